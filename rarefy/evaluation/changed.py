"""Changed: the judged pictures of which a compressed model says something else than the original, drawn side by side.

How far two lists of answers are apart: each answer is laid beside the surest one left of the other list that is of the
same class and, of boxes, overlaps it by half or more; of such a pair the difference of the scores counts, of an answer
without a partner its score.
"""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from rarefy.data.boxes.boxes import iou
from rarefy.deployment.runtime import Session
from rarefy.reports.drawing import Mark, Pictured, drawn, side_by_side
from rarefy.tasks.answers import Answer, Answering
from rarefy.tasks.metric import OutputError
from rarefy.tasks.task import Task

MOST = 8
LOOKED_AT = 256  # of more judged pictures the first
LEAST = 0.3  # score of the boxes that are drawn, as ``predict`` has it
_BATCH = 16
_SIDE, _SMALLEST = 320, 128  # of a drawn picture, in pixels
_DRAWN = 50  # answers of a picture


def changed(models: Mapping[str, Session], task: Task) -> list[Pictured]:
    """Of two models, the original first, the pictures that changed most, those first; none where all say the same.

    models: by the names that stand above the pictures. task: fitted to them; a task whose answers or pictures can't be
    shown gives none.
    """
    if not isinstance(task, Answering) or not hasattr(task.data, "images"):
        return []
    found: list[tuple[float, int, list[list[Answer]], torch.Tensor]] = []
    place = 0
    for pictures, _ in task.data.images("val", _BATCH, limit=LOOKED_AT):
        inputs = task.data.normalize(pictures)
        sizes = [(pictures.shape[2], pictures.shape[3])] * len(pictures)
        try:
            said = [task.answers(one.outputs(inputs), sizes, _names(task), LEAST) for one in models.values()]
        except OutputError:
            return []
        for picture, ours, theirs in zip(pictures, *said, strict=True):
            found.append((apart(ours, theirs), -place, [ours, theirs], picture))
            place += 1
        found = heapq.nlargest(MOST, found, key=lambda one: one[:2])
    return [
        Pictured(number=-place, change=change, jpeg=_jpeg(picture, said, list(models)))
        for change, place, said, picture in found
        if change > 0
    ]


def apart(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """0 where both say the same."""
    left, total = list(theirs), 0.0
    for one in ours:
        partner = next((other for other in left if _alike(one, other)), None)
        if partner is not None:
            left.remove(partner)
        total += abs(one.score - (partner.score if partner is not None else 0.0))
    return total + sum(other.score for other in left)


def _alike(one: Answer, other: Answer) -> bool:
    if one.kind != other.kind or (one.corners is None) != (other.corners is None):
        return False
    if one.corners is None or other.corners is None:
        return True
    return bool(iou(torch.tensor([one.corners]), torch.tensor([other.corners])) >= 0.5)


def _names(task: Task) -> Sequence[str] | None:
    names: Sequence[str] | None = getattr(task, "class_names", None)
    return names


def _jpeg(picture: torch.Tensor, said: Sequence[Sequence[Answer]], titles: Sequence[str]) -> str:
    """Base64 of the picture (C, H, W) from 0 to 1, drawn for each model."""
    pixels = (picture * 255).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    longest = max(image.size)
    scale = _SIDE / longest if longest > _SIDE else max(1, _SMALLEST // longest)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, Image.Resampling.BILINEAR if scale < 1 else Image.Resampling.NEAREST)
    rows = [drawn(image, [_mark(one, scale) for one in answers[:_DRAWN]]) for answers in said]
    file = io.BytesIO()
    side_by_side(rows, titles).save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _mark(answer: Answer, scale: float) -> Mark:
    if answer.corners is None:
        return Mark(answer.text, answer.kind)
    left, top, right, bottom = (value * scale for value in answer.corners)
    return Mark(answer.text, answer.kind, (left, top, right, bottom))
