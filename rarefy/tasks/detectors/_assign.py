"""Which place learns which box, from what the network says now (SimOTA, 2107.08430; one pass of all pictures).

A place may learn a box that it lies in, or to whose centre it is near. Of these a box takes the k of least cost, where
k is how many such boxes' worth of overlap the best of them have, and a place that two boxes take learns the cheaper.

    cost = cross-entropy of the class + 3 · (-log IoU),  and much more where the place is not in box and centre at once
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rarefy.data.boxes.boxes import BOTTOM, CLASS, IGNORED, LEFT, RIGHT, TOP, iou, present

NEAR = 2.5  # strides from a centre
MOST = 10  # places that a box takes
_FAR, _NEVER = 1e5, 1e9
_MOST_RATIO = 4.0  # of an anchor's side and a box's


class Assigned(NamedTuple):
    """Of places (N, P). positive: bool. box: (N, P, 4) pixels. kind: int64, class. iou: of the found and that box.

    ignored: bool, not positive and inside of a box that is neither right nor wrong to find.
    """

    positive: Tensor
    box: Tensor
    kind: Tensor
    iou: Tensor
    ignored: Tensor

    @property
    def number(self) -> Tensor:
        """Of positive places in the batch, at least 1."""
        return self.positive.sum().clamp_min(1).float()

    def one_hot(self, classes: int) -> Tensor:
        """(N, P, classes): 1 at the class of a positive place."""
        hot = torch.nn.functional.one_hot(self.kind, classes)
        return hot.to(self.iou.dtype) * self.positive[..., None]


@torch.no_grad()
def simota(boxes: Tensor, scores: Tensor, centres: Tensor, strides: Tensor, targets: Tensor) -> Assigned:
    """boxes: (N, P, 4). scores: (N, P, classes). centres: (P, 2). strides: (P, 1). targets: (N, M, 8)."""
    real = present(targets) & (targets[..., IGNORED] < 0.5)
    kind = targets[..., CLASS].clamp(0, scores.shape[-1] - 1).long()
    inside, near = _inside(centres, targets), _near(centres, strides, targets)
    overlaps = iou(targets[..., :4], boxes)  # (N, M, P)
    sure = scores.clamp(1e-7, 1 - 1e-7)
    yes = sure.transpose(1, 2).gather(1, kind[..., None].expand(-1, -1, sure.shape[1]))
    others = -(1 - sure).log().sum(-1)[:, None] + (1 - yes).log()
    cost = others - yes.log() - 3 * (overlaps + 1e-8).log() + _FAR * ~(inside & near)
    allowed = (inside | near) & real[..., None]
    cost = torch.where(allowed, cost, _NEVER)
    most = min(MOST, boxes.shape[1])
    wanted = (overlaps * allowed).topk(most, -1).values.sum(-1).int().clamp_min(1)
    least, places = cost.topk(most, -1, largest=False)
    taken = (torch.arange(most, device=cost.device) < wanted[..., None]) & (least < _NEVER)
    chosen = torch.zeros_like(allowed).scatter(-1, places, taken)
    return _assigned(torch.where(chosen, cost, 2 * _NEVER), chosen, overlaps, targets, inside)


@torch.no_grad()
def aligned(boxes: Tensor, scores: Tensor, centres: Tensor, targets: Tensor) -> tuple[Assigned, Tensor]:
    """By how well score and overlap go together (task alignment, 2108.07755): the places in a box of largest
    score^0.5 · IoU^6. Also how sure each should be, (N, P): that, scaled to the best IoU of its box.
    """
    real = present(targets) & (targets[..., IGNORED] < 0.5)
    kind = targets[..., CLASS].clamp(0, scores.shape[-1] - 1).long()
    inside = _inside(centres, targets)
    allowed = inside & real[..., None]
    overlaps = iou(targets[..., :4], boxes) * allowed
    sure = scores.transpose(1, 2).gather(1, kind[..., None].expand(-1, -1, scores.shape[1])).clamp_min(0)
    # to many places the first outputs give no overlap at all: the score decides among these
    worth = (sure.sqrt() * overlaps.pow(6) + 1e-9 * (1 + sure)) * allowed
    best, places = worth.topk(min(MOST, boxes.shape[1]), -1)
    chosen = torch.zeros_like(allowed).scatter(-1, places, best > 0)
    assigned = _assigned(torch.where(chosen, -overlaps, _NEVER), chosen, overlaps, targets, inside)
    own = torch.where(chosen & (-overlaps == torch.where(chosen, -overlaps, _NEVER).amin(1, True)), worth, 0.0)
    scale = (overlaps * (own > 0)).amax(-1, keepdim=True) / own.amax(-1, keepdim=True).clamp_min(1e-12)
    return assigned, (own * scale).amax(1) * assigned.positive


@torch.no_grad()
def anchored(boxes: Tensor, centres: Tensor, strides: Tensor, anchors: Tensor, targets: Tensor) -> Assigned:
    """Places in which a box's middle lies, and those next to it within half a stride, whose anchor's sides are at most
    4 times the box's and at least a quarter. anchors: (P, 2), width and height.
    """
    real = present(targets) & (targets[..., IGNORED] < 0.5)
    middle = (targets[..., None, LEFT : TOP + 1] + targets[..., None, RIGHT : BOTTOM + 1]) / 2
    away = (middle - centres).abs() / strides
    x, y = away.unbind(-1)  # (N, M, P)
    near = ((x < 1) & (y <= 0.5)) | ((x <= 0.5) & (y < 1))
    sides = (targets[..., None, RIGHT : BOTTOM + 1] - targets[..., None, LEFT : TOP + 1]).clamp_min(1e-3)
    ratio = torch.maximum(sides / anchors, anchors / sides).amax(-1)
    chosen = near & (ratio < _MOST_RATIO) & real[..., None]
    overlaps = iou(targets[..., :4], boxes)
    cost = torch.where(chosen, -overlaps, _NEVER)
    return _assigned(cost, chosen, overlaps, targets, _inside(centres, targets))


def _assigned(cost: Tensor, chosen: Tensor, overlaps: Tensor, targets: Tensor, inside: Tensor) -> Assigned:
    owner = cost.argmin(1)  # (N, P)
    positive = chosen.any(1)
    own = targets.gather(1, owner[..., None].expand(-1, -1, targets.shape[-1]))
    overlap = overlaps.gather(1, owner[:, None])[:, 0]
    neither = present(targets) & (targets[..., IGNORED] > 0.5)
    ignored = (inside & neither[..., None]).any(1) & ~positive
    return Assigned(positive, own[..., :4], own[..., CLASS].clamp_min(0).long(), overlap * positive, ignored)


def _inside(centres: Tensor, targets: Tensor) -> Tensor:
    """(N, M, P): is the place in the box?"""
    x, y = centres[:, 0], centres[:, 1]
    left, top, right, bottom = (targets[..., side, None] for side in (LEFT, TOP, RIGHT, BOTTOM))
    return (x > left) & (y > top) & (x < right) & (y < bottom)


def _near(centres: Tensor, strides: Tensor, targets: Tensor) -> Tensor:
    """(N, M, P): is it near the centre of the box?"""
    middle = (targets[..., None, LEFT : TOP + 1] + targets[..., None, RIGHT : BOTTOM + 1]) / 2
    return ((centres - middle).abs() < NEAR * strides).all(-1)
