"""From scored boxes to what was found: the best of a picture, without those that overlap a better one of their class."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.data.boxes.boxes import FOUND_COLUMNS, padded
from rarefy.system.dependencies import needs

MOST = 300  # boxes of a picture
LEAST = 0.001  # score of one
CANDIDATES = 3000  # of a picture, before suppression


def kept(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None = None,
    *,
    overlap: float | None,
    least: float = LEAST,
    most: int = MOST,
    candidates: int = CANDIDATES,
) -> Tensor:
    """What was found, (N, M, 6), the best first.

    boxes: (N, places, 4), or (N, places, classes, 4) where each class has its own. scores: (N, places, classes), each a
    box of its own; with ``classes`` (N, places) it is (N, places). overlap: IoU with a better box of the same class
    from which on one is left out; None: none is. NaN and infinity are no box.
    """
    number = 1 if classes is not None else scores.shape[-1]
    flat = scores.reshape(len(scores), -1)
    count = min(candidates, flat.shape[1])
    ones = boxes.dim() == 4 and boxes.shape[2] == number
    own = boxes.flatten(1, 2) if ones else boxes
    usable = own.isfinite().all(-1) if ones else own.isfinite().all(-1).repeat_interleave(number, 1)
    flat = torch.where(usable & flat.isfinite(), flat, 0.0)
    best, order = flat.topk(count, 1)
    place = order if ones else order // number
    found = torch.stack([*own.gather(1, place[..., None].expand(-1, -1, 4)).unbind(-1)], -1)
    kind = order % number if classes is None else classes.gather(1, order)
    pictures = []
    for box, one, score in zip(found, kind, best, strict=True):
        sure = score > least
        box, one, score = box[sure], one[sure], score[sure]
        if overlap is not None and len(box):
            stays = needs("torchvision.ops", "vision").batched_nms(box, score, one, overlap)
        else:
            stays = torch.arange(len(box), device=box.device)
        stays = stays[:most]
        pictures.append(torch.cat([box[stays], one[stays, None].to(box.dtype), score[stays, None]], 1))
    return padded([picture.float().cpu() for picture in pictures], FOUND_COLUMNS).to(boxes.device)
