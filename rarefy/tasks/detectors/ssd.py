"""SSD and SSDlite (1512.02325, 1801.04381), as torchvision has them: default boxes on several maps, softmax with a
background.

Outputs ``bbox_regression`` (N, P, 4) and ``cls_logits`` (N, P, 1 + classes), the background first. Loss: as
torchvision's: smooth L1 of the boxes and cross-entropy of the classes over the matched (IoU 0.5, or the best of a box)
and three times as many of the hardest others, by the number of the matched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.tasks.detector import Feed
from rarefy.tasks.detectors import _anchors, _grid, _nms, _torchvision
from rarefy.tasks.metric import Outputs

_NAMES = ("bbox_regression", "cls_logits")
_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@dataclass(frozen=True)
class Ssd:
    """SSD and SSDlite of torchvision.

    size: (H, W) of the input. grids: rows and columns of each map. ratios: of default boxes on each map, beside 1.
    scales: their sides, shares of the input. steps: strides, where they are not the input over the map. overlap: IoU
    from which on the worse of two boxes of a class is left out. least: score of a box. most: boxes a picture.
    candidates: of a class before suppression.
    """

    classes: int = 90
    size: tuple[int, ...] = (320, 320)
    grids: tuple[tuple[int, ...], ...] = ((20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1))
    ratios: tuple[tuple[float, ...], ...] = ((2, 3),) * 6
    scales: tuple[float, ...] = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
    steps: tuple[int, ...] = ()
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    overlap: float = 0.55
    least: float = 0.001
    most: int = 300
    candidates: int = 300

    def __post_init__(self) -> None:
        _grid.check_numbers(self)
        _grid.check_options(self.classes, self.size, (1024,))
        _grid.check_grids(self.grids, [2 + 2 * len(one) for one in self.ratios])
        if len(self.scales) != len(self.ratios) + 1 or len(self.steps) not in (0, len(self.ratios)):
            raise ValueError("scales and steps do not fit the number of grids")
        numbers = [*self.scales, *self.steps, *(one for part in self.ratios for one in part)]
        if not all(0 < one <= 1024 for one in numbers):
            raise ValueError("scales, ratios and steps are numbers of 0 to 1024")

    @property
    def feed(self) -> Feed:
        return _torchvision.feed(self.size, True, self.mean, self.std)

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        if not _torchvision.is_a(model, "SSD"):
            return None
        boxes, transform = model.anchor_generator, model.transform
        size = _torchvision.input_size(transform)
        head = model.get_submodule("head")
        return cls(
            head.classification_head.num_columns - 1,  # type: ignore[union-attr, operator, arg-type]
            size,
            tuple(_torchvision.grids(model.get_submodule("backbone"), size)),
            tuple(tuple(float(one) for one in part) for part in boxes.aspect_ratios),  # type: ignore[union-attr]
            tuple(float(one) for one in boxes.scales),  # type: ignore[union-attr]
            tuple(int(one) for one in boxes.steps or ()),  # type: ignore[union-attr]
            **_torchvision.normal(model),
            **_torchvision.suppression(model),
        )  # fmt: skip

    def core(self, model: nn.Module) -> nn.Module:
        return _torchvision.Core(model.get_submodule("backbone"), model.get_submodule("head"))

    def around(self, model: nn.Module, core: nn.Module) -> nn.Module:
        return _torchvision.around(model, core, self._grids)

    def scored(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        values, logits, anchors = self._read(outputs, size)
        return _grid.clipped(_anchors.decode(values, anchors, _WEIGHTS), size), logits.softmax(-1)[..., 1:]

    def boxes(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        boxes, scores = self.scored(outputs, size)
        least = scores.topk(min(self.candidates, scores.shape[1]), 1).values[:, -1:]
        return _nms.kept(boxes, torch.where(scores >= least, scores, 0.0), self)

    def logits(self, outputs: Outputs) -> Tensor:
        """Of the background and of each class."""
        return _torchvision.tensors(outputs, _NAMES, "ssd")[1].flatten(0, 1)

    def loss(self, outputs: Outputs, targets: Tensor, size: tuple[int, int]) -> Tensor:
        values, logits, anchors = self._read(outputs, size)
        matched = _anchors.match(targets, anchors, 0.5, 0.5, "each")
        wanted = _anchors.encode(matched.box, anchors, _WEIGHTS)
        box = F.smooth_l1_loss(values, wanted, reduction="none").sum(-1) * matched.positive
        kinds = (matched.kind + 1).clamp_max(self.classes) * matched.positive
        kind = F.cross_entropy(logits.transpose(1, 2), kinds, reduction="none")
        hard = torch.where(matched.positive | matched.neither, -torch.inf, kind.detach())
        rank = hard.argsort(dim=1, descending=True, stable=True).argsort(1)
        taken = matched.positive | ((rank < 3 * matched.positive.sum(1, keepdim=True)) & ~matched.neither)
        return (box.sum() + torch.where(taken, kind, 0.0).sum()) / matched.positive.sum().clamp_min(1)

    def _grids(self, size: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
        return self.grids

    def _read(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        values, logits = _torchvision.tensors(outputs, _NAMES, "ssd")
        anchors = _anchors.default_boxes(size, self.grids, self.ratios, self.scales, self.steps, values)
        _grid.check(values, (len(anchors), 4), "ssd")
        _grid.check(logits, (len(anchors), 1 + self.classes), "ssd")
        return values, logits, anchors
