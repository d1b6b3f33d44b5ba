"""Detectors with anchors: boxes of set sizes at every place of a few grids, of which the network says what to change.

With an anchor of centre c, sides s and the network's values v, each over its weight: centre = c + s · v(0, 1), sides =
s · exp v(2, 3) (Faster R-CNN, 1506.01497). An anchor learns the box that it overlaps most, where that is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rarefy.data.boxes.boxes import CLASS, IGNORED, iou, present

LARGEST = math.log(1000 / 16)  # exponent of a side
Nested = tuple[tuple[float, ...], ...]
Grids = Sequence[tuple[int, ...]]


def grid_anchors(size: tuple[int, int], grids: Grids, sizes: Nested, ratios: Nested, like: Tensor) -> Tensor:
    """(P, 4) pixels. sizes, ratios: of each grid, root of the area and height over width."""
    parts = []
    for (rows, columns), lengths, shapes in zip(grids, sizes, ratios, strict=True):
        high = torch.tensor(shapes, device=like.device, dtype=torch.float32).sqrt()[:, None]
        length = torch.tensor(lengths, device=like.device, dtype=torch.float32)
        width, height = (length / high).flatten(), (length * high).flatten()
        own = (torch.stack([-width, -height, width, height], 1) / 2).round()
        y, x = _steps(rows, size[0] // rows, like), _steps(columns, size[1] // columns, like)
        y, x = torch.meshgrid(y, x, indexing="ij")
        corner = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
        parts.append((corner + own).reshape(-1, 4))
    return torch.cat(parts)


def _steps(count: int, stride: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device) * float(stride)


def default_boxes(
    size: tuple[int, int], grids: Grids, ratios: Nested, scales: Sequence[float], steps: Sequence[int], like: Tensor
) -> Tensor:
    """SSD's (1512.02325), (P, 4) pixels. scales: of each grid, a share of the input, and one more. steps: strides."""
    height, width = size
    parts = []
    for number, ((rows, columns), shapes) in enumerate(zip(grids, ratios, strict=True)):
        scale, between = scales[number], math.sqrt(scales[number] * scales[number + 1])
        roots = [math.sqrt(one) for one in shapes]
        sides = [(scale, scale), (between, between)]
        sides += [pair for one in roots for pair in ((scale * one, scale / one), (scale / one, scale * one))]
        own = torch.tensor(sides, device=like.device, dtype=torch.float32).clamp(0, 1)
        down = height / steps[number] if steps else rows
        across = width / steps[number] if steps else columns
        y = (torch.arange(rows, device=like.device) + 0.5) / down
        x = (torch.arange(columns, device=like.device) + 0.5) / across
        y, x = torch.meshgrid(y, x, indexing="ij")
        centre = torch.stack([x, y], -1).reshape(-1, 1, 2)
        parts.append(torch.cat([centre - own / 2, centre + own / 2], -1).reshape(-1, 4))
    return torch.cat(parts) * torch.tensor([width, height, width, height], device=like.device, dtype=torch.float32)


def decode(values: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes (N, P, 4) of values (N, P, 4)."""
    values = values / torch.tensor(weights, device=values.device, dtype=values.dtype)
    sides = anchors[:, 2:] - anchors[:, :2]
    centre = anchors[:, :2] + sides / 2 + values[..., :2] * sides
    half = values[..., 2:].clamp_max(LARGEST).exp() * sides / 2
    return torch.cat([centre - half, centre + half], -1)


def encode(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """What the network should say, (N, P, 4), of boxes (N, P, 4)."""
    sides, own = (boxes[..., 2:] - boxes[..., :2]).clamp_min(1e-3), anchors[:, 2:] - anchors[:, :2]
    centre, middle = boxes[..., :2] + sides / 2, anchors[:, :2] + own / 2
    values = torch.cat([(centre - middle) / own, (sides / own).log()], -1)
    return values * torch.tensor(weights, device=values.device, dtype=values.dtype)


class Matched(NamedTuple):
    """Of anchors (N, P). positive: bool; box: (N, P, 4), the one it learns; kind: int64, its class; neither: bool,
    overlaps one too much for the background and too little for a box, or lies in what is to be ignored."""

    positive: Tensor
    box: Tensor
    kind: Tensor
    neither: Tensor


@torch.no_grad()
def match(targets: Tensor, anchors: Tensor, high: float, low: float, best: str) -> Matched:
    """targets: (N, M, 8). high, low: IoU from which on an anchor learns a box, and below which it learns that there is
    none. best: "each": a box's best anchor learns it; "ties": so does every anchor of that IoU, what it overlaps most;
    "": neither.
    """
    real = present(targets) & (targets[..., IGNORED] < 0.5)
    overlaps = torch.where(real[..., None], iou(targets[..., :4], anchors[None]), -1.0)  # (N, M, P)
    most, owner = overlaps.max(1)
    positive = most >= high
    neither = (most >= low) & (most < high)
    if best == "each":
        place = overlaps.argmax(-1)  # (N, M)
        rows = torch.arange(targets.shape[1], device=targets.device).expand_as(place)
        place = torch.where(real, place, len(anchors))
        wide = torch.cat([owner, owner.new_zeros(len(owner), 1)], 1)
        owner = wide.scatter(1, place, rows)[:, :-1]
        positive = torch.nn.functional.pad(positive, (0, 1)).scatter(1, place, True)[:, :-1]
    elif best == "ties":
        top = overlaps.amax(-1, keepdim=True)
        positive = positive | ((overlaps == top) & (top > 0)).any(1)
    ignored = present(targets) & ~real
    crowd = (iou(targets[..., :4], anchors[None]) >= low) & ignored[..., None]
    own = targets.gather(1, owner[..., None].expand(-1, -1, targets.shape[-1]))
    return Matched(positive, own[..., :4], own[..., CLASS].clamp_min(0).long(), (neither | crowd.any(1)) & ~positive)
