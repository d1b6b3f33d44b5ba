"""Boxes: what a detector is taught and what it finds, as one tensor, whatever file they came from.

A batch's boxes are a tensor (N, M, columns) float32, padded to the picture that has the most; a row of no box has the
class ``NONE``. Coordinates are pixels of the model's input, xyxy: left, top, right, bottom.

===========  =========================================================================================================
targets      (N, M, 8): left, top, right, bottom, class, ignored (1: a crowd or too difficult, neither right nor wrong
             to find), area in the picture's own pixels, and how many of these a pixel of the input stands for
found        (N, M, 6): left, top, right, bottom, class, score, the best first
===========  =========================================================================================================

Intersection over union does not change when a picture is shifted and either side is scaled, so boxes are compared where
the model sees them; what goes by size (small, medium, large) goes by the picture's own pixels, hence the last two
columns. M is at least 1, so that the last column is there of every picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEFT, TOP, RIGHT, BOTTOM, CLASS = range(5)
IGNORED, AREA, FACTOR = 5, 6, 7  # of targets
SCORE = 5  # of what was found
TARGET_COLUMNS, FOUND_COLUMNS = 8, 6
NONE = -1.0


def padded(pictures: Sequence[Tensor], columns: int, rows: int = 1) -> Tensor:
    """(N, M, columns) of boxes (m, columns) for each picture. rows: M, if no picture has more."""
    most = max(rows, *(len(boxes) for boxes in pictures)) if pictures else rows
    batch = torch.zeros(len(pictures), most, columns)
    batch[..., CLASS] = NONE
    for place, boxes in enumerate(pictures):
        batch[place, : len(boxes)] = boxes
    return batch


def present(boxes: Tensor) -> Tensor:
    """(N, M) bool: which rows are boxes."""
    return boxes[..., CLASS] >= 0


def area(boxes: Tensor) -> Tensor:
    """(...,) of boxes (..., 4 or more); 0 where a side is turned round."""
    return (boxes[..., RIGHT] - boxes[..., LEFT]).clamp_min(0) * (boxes[..., BOTTOM] - boxes[..., TOP]).clamp_min(0)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Area that boxes (..., m, 4+) and (..., n, 4+) share, (..., m, n)."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:4], b[..., None, :, 2:4])
    return (high - low).clamp_min(0).prod(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., m, 4+) and (..., n, 4+), (..., m, n); 0 where both are of no area."""
    shared = overlap(a, b)
    union = area(a)[..., :, None] + area(b)[..., None, :] - shared
    return torch.where(union > 0, shared / union.clamp_min(torch.finfo(union.dtype).tiny), 0)
