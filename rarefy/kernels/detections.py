"""From boxes and scores at every place to what was found: the best, without those that overlap a better one.

Of each picture the ``candidates`` best pairs of place and class with a score above ``least`` are looked at, best first.
One is left out if a better one of its class that stays overlaps it by more than ``overlap`` (greedy non-maximum
suppression), and of the rest the first ``most`` are what was found. NaN and infinity are no box.

Whether one stays hangs on better ones alone: stays(i) = not any(stays(j) and covers(j, i) for j < i). From "all stay",
this rule applied to all at once is right for the first, then for the second, ..., and is final when nothing changes,
which takes as many rounds as the longest chain of boxes that cover each other, mostly under 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.kernels.library import operator

NONE = -1.0  # class of a row that is no box
COLUMNS = 6  # left, top, right, bottom, class, score


@torch.no_grad()
def detections(boxes: Tensor, scores: Tensor, overlap: float, least: float, most: int, candidates: int) -> Tensor:
    """boxes: (N, P, 4) left, top, right, bottom. scores: (N, P, classes). Returns (N, most, 6) float32, best first.

    overlap: of two boxes, their common area by that of both together; 1: none is left out.
    """
    classes = scores.shape[-1]
    usable = (boxes.isfinite().all(-1, keepdim=True) & scores.isfinite()).flatten(1)
    flat = torch.where(usable, scores.flatten(1), 0.0).float()
    best, order = flat.topk(min(candidates, flat.shape[1]), 1)
    kind = order % classes
    found = boxes.float().gather(1, (order // classes)[..., None].expand(-1, -1, 4))
    rows = torch.cat([found, kind[..., None].float(), best[..., None]], -1)
    result = rows.new_zeros(len(rows), most, COLUMNS)
    result[..., 4] = NONE
    for place, picture in enumerate(rows):
        sure = picture[picture[:, 5] > least]
        chosen = sure[_stays(sure, overlap)][:most] if overlap < 1 else sure[:most]
        result[place, : len(chosen)] = chosen
    return result


def _stays(rows: Tensor, overlap: float) -> Tensor:
    """(n,) bool of boxes (n, 6), best first."""
    low, high = torch.maximum(rows[:, None, :2], rows[:, :2]), torch.minimum(rows[:, None, 2:4], rows[:, 2:4])
    shared = (high - low).clamp_min(0).prod(-1)
    sides = (rows[:, 2:4] - rows[:, :2]).clamp_min(0).prod(-1)
    covers = shared > overlap * (sides[:, None] + sides - shared)
    covers = (covers & (rows[:, None, 4] == rows[:, 4])).triu(1).float()  # a better one: a worse one
    stays = torch.ones_like(rows[:, 0])
    while True:
        again = (stays @ covers == 0).float()
        if bool((again == stays).all()):
            return stays.bool()
        stays = again


def _shape(boxes: Tensor, scores: Tensor, overlap: float, least: float, most: int, candidates: int) -> Tensor:
    return boxes.new_empty((boxes.shape[0], most, COLUMNS), dtype=torch.float32)


OPERATOR = operator(
    "Tensor boxes, Tensor scores, float overlap, float least, int most, int candidates", detections, _shape
)
