"""From scored boxes to what was found: the best, without those that overlap a better one of their class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rarefy.data.boxes.boxes import FOUND_COLUMNS, padded
from rarefy.system.dependencies import needs

CANDIDATES = 3000  # of a picture, before suppression


class Rules(Protocol):
    """What a family says of its suppression."""

    @property
    def overlap(self) -> float: ...

    @property
    def least(self) -> float: ...

    @property
    def most(self) -> int: ...


def kept(boxes: Tensor, scores: Tensor, rules: Rules) -> Tensor:
    """What was found, (N, M, 6), the best first.

    boxes: (N, places, 4). scores: (N, places, classes), each a box of its own. rules: the family. NaN and infinity are
    no box.
    """
    number = scores.shape[-1]
    usable = boxes.isfinite().all(-1, keepdim=True) & scores.isfinite()
    flat = torch.where(usable, scores, 0.0).flatten(1)
    best, order = flat.topk(min(CANDIDATES, flat.shape[1]), 1)
    place, kinds = order // number, order % number
    corners = boxes.gather(1, place[..., None].expand(-1, -1, 4))
    pictures = []
    for box, kind, score in zip(corners, kinds, best, strict=True):
        sure = score > rules.least
        box, kind, score = box[sure], kind[sure], score[sure]
        if rules.overlap < 1 and len(box):
            stays = needs("torchvision.ops", "vision").batched_nms(box.float(), score.float(), kind, rules.overlap)
            box, kind, score = box[stays], kind[stays], score[stays]
        pictures.append(torch.cat([box, kind[:, None].to(box.dtype), score[:, None]], 1)[: rules.most].float().cpu())
    return padded(pictures, FOUND_COLUMNS).to(boxes.device)


def most_of_each(scores: Tensor, most: int, parts: Sequence[int]) -> Tensor:
    """The scores (N, places, classes) with 0 for all but the ``most`` best of each part of the places."""
    found = []
    for part in scores.split(list(parts), 1):
        flat = part.flatten(1)
        if most < flat.shape[1]:
            best, places = flat.topk(most, 1)
            flat = torch.zeros_like(flat).scatter(1, places, best)
        found.append(flat.view_as(part))
    return torch.cat(found, 1)
