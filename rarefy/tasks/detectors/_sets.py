"""Detectors that answer with a set of boxes: each target is matched with one of them (DETR, 2005.12872).

    cost = class · kind + 5 · |boxes| + 2 · (1 - generalised IoU),  the matching is the cheapest one to one

Boxes here are relative to the input: middle and sides, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rarefy.data.boxes.boxes import CLASS, IGNORED, present
from rarefy.system.dependencies import needs
from rarefy.tasks.detectors import _grid, _losses

L1, OVERLAP = 5.0, 2.0
_NEVER = 1e6


class Matching(NamedTuple):
    """Of queries (N, Q). positive: bool. box: (N, Q, 4), relative middle and sides. kind: int64, class."""

    positive: Tensor
    box: Tensor
    kind: Tensor


def relative(targets: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, M, 4): middle and sides, of the input's, of corners in pixels."""
    height, width = size
    scale = targets.new_tensor([width, height])
    low, high = targets[..., :2] / scale, targets[..., 2:4] / scale
    return torch.cat([(low + high) / 2, high - low], -1)


def corners(boxes: Tensor) -> Tensor:
    return _grid.corners(boxes[..., :2], boxes[..., 2:])


@torch.no_grad()
def match(boxes: Tensor, kinds: Tensor, targets: Tensor, size: tuple[int, int], weight: float) -> Matching:
    """boxes: (N, Q, 4). kinds: (N, Q, classes), what a class costs: less is likelier. targets: (N, M, 8).
    weight: of the class.
    """
    real = present(targets) & (targets[..., IGNORED] < 0.5)
    own, kind = relative(targets, size), targets[..., CLASS].clamp(0, kinds.shape[-1] - 1).long()
    price = kinds.transpose(1, 2).gather(1, kind[..., None].expand(-1, -1, boxes.shape[1]))  # (N, M, Q)
    far = torch.cdist(own, boxes, p=1)
    near = _losses.paired_iou(corners(boxes)[:, None], corners(own)[:, :, None])[1]
    cost = (weight * price + L1 * far - OVERLAP * near).nan_to_num(_NEVER, _NEVER, -_NEVER)
    solve = needs("scipy.optimize", "vision").linear_sum_assignment
    positive = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    owner = torch.zeros(boxes.shape[:2], dtype=torch.long)
    for place, (one, rows) in enumerate(zip(cost.cpu(), real.cpu(), strict=True)):
        chosen = rows.nonzero()[:, 0]
        row, query = (torch.as_tensor(index) for index in solve(one[chosen].numpy()))
        positive[place, query], owner[place, query] = True, chosen[row]
    positive, owner = positive.to(boxes.device), owner.to(boxes.device)
    return Matching(positive, own.gather(1, owner[..., None].expand(-1, -1, 4)), kind.gather(1, owner))


@torch.no_grad()
def partners(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
    """Of each query of theirs the one of ours, (N, Q), the cheapest one to one; what they are sure of weighs most.

    Of both ``scores`` (N, Q, classes) and ``boxes`` (N, Q, 4), relative corners; of ours at least as many.
    """
    kind = torch.cdist(theirs["scores"], ours["scores"], p=1)
    far = torch.cdist(theirs["boxes"], ours["boxes"], p=1)
    near = _losses.paired_iou(theirs["boxes"][:, :, None], ours["boxes"][:, None])[1]
    sure = theirs["scores"].amax(-1, keepdim=True)
    cost = (sure * (kind + L1 * far - OVERLAP * near)).nan_to_num(_NEVER, _NEVER, -_NEVER)
    solve = needs("scipy.optimize", "vision").linear_sum_assignment
    found = [torch.as_tensor(solve(one.numpy())[1]) for one in cost.float().cpu()]
    return torch.stack(found).long().to(cost.device)


def box_loss(boxes: Tensor, matching: Matching, number: Tensor) -> Tensor:
    """L1 and generalised IoU of the matched, by their number."""
    far = (boxes - matching.box).abs().sum(-1)
    near = _losses.paired_iou(corners(boxes), corners(matching.box))[1]
    return ((L1 * far + OVERLAP * (1 - near)) * matching.positive).sum() / number
