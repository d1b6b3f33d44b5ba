"""FCOS (1904.01355), as torchvision has it: a box, classes and a centredness at each place of a pyramid.

Outputs ``cls_logits`` (N, P, columns), ``bbox_regression`` (N, P, 4), how far left, top, right and bottom are from the
place in anchors' sides, and ``bbox_ctrness`` (N, P, 1). Score: root of class · centredness. A place learns the smallest
box that it lies in near to its centre, if that is of the size that its map is for. Loss: as torchvision's: focal loss
of the classes + (1 - GIoU) + cross-entropy of the centredness, by the number of places that learn a box.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.data.boxes.boxes import CLASS, IGNORED, area, present
from rarefy.tasks.detector import Feed
from rarefy.tasks.detectors import _anchors, _grid, _losses, _nms, _torchvision
from rarefy.tasks.metric import Outputs

_NAMES = ("cls_logits", "bbox_regression", "bbox_ctrness")


@dataclass(frozen=True)
class Fcos:
    """FCOS of torchvision.

    background: is column 0 a background's, as torchvision's documentation says, so that labels begin at 1? size: (H, W)
    of the input. sizes: side of the anchor on each map. radius: of the centre of a box, in anchors' sides. overlap: IoU
    from which on the worse of two boxes of a class is left out. least: score of a box. most: boxes a picture.
    candidates: of a map before suppression.
    """

    classes: int = 90
    background: bool = True
    size: tuple[int, ...] = (1088, 1088)
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    sizes: tuple[float, ...] = (8, 16, 32, 64, 128)
    radius: float = 1.5
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    overlap: float = 0.6
    least: float = 0.2
    most: int = 100
    candidates: int = 1000

    def __post_init__(self) -> None:
        _grid.check_numbers(self)
        _grid.check_options(self.classes, self.size, self.strides)
        _grid.check_grids(self._grids((self.size[0], self.size[1])), [1] * len(self.sizes))

    @property
    def feed(self) -> Feed:
        return _torchvision.feed(self.size, False, self.mean, self.std)

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        if not _torchvision.is_a(model, "FCOS"):
            return None
        size = _torchvision.input_size(model.transform)
        strides = _torchvision.strides(_torchvision.grids(model.get_submodule("backbone"), size), size)
        sizes, ratios = _torchvision.anchors(model.anchor_generator)
        if strides is None or any(len(one) != 1 for one in sizes) or any(one != (1.0,) for one in ratios):
            return None
        head = model.get_submodule("head")
        columns = int(head.classification_head.num_classes)  # type: ignore[union-attr, arg-type]
        return cls(
            max(columns - 1, 1), columns > 1, size, strides, tuple(one[0] for one in sizes),
            float(model.center_sampling_radius),  # type: ignore[arg-type]
            **_torchvision.normal(model),
            **_torchvision.suppression(model),
        )  # fmt: skip

    def core(self, model: nn.Module) -> nn.Module:
        return _torchvision.Core(model.get_submodule("backbone"), model.get_submodule("head"))

    def around(self, model: nn.Module, core: nn.Module) -> nn.Module:
        return _torchvision.around(model, core, self._grids)

    def scored(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        logits, values, centred, anchors = self._read(outputs, size)
        scores = (logits.sigmoid() * centred.sigmoid()).sqrt()[..., int(self.background) :]
        return _grid.clipped(_boxes(values, anchors), size), scores

    def boxes(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        boxes, scores = self.scored(outputs, size)
        parts = [rows * columns for rows, columns in self._grids(size)]
        return _nms.kept(boxes, _nms.most_of_each(scores, self.candidates, parts), self)

    def logits(self, outputs: Outputs) -> Tensor:
        """Of no and yes, for each class."""
        values = _torchvision.tensors(outputs, _NAMES, "fcos")[0][..., int(self.background) :]
        return _losses.pairs_of(values)

    def loss(self, outputs: Outputs, targets: Tensor, size: tuple[int, int]) -> Tensor:
        logits, values, centred, anchors = self._read(outputs, size)
        positive, own, ignored = self._assigned(targets, anchors, size)
        kinds = (own[..., CLASS].clamp_min(0).long() + int(self.background)).clamp_max(logits.shape[-1] - 1)
        hot = F.one_hot(kinds, logits.shape[-1]) * positive[..., None]
        kind = _losses.focal(logits, hot.to(logits.dtype)).sum(-1) * ~ignored
        box = (1 - _losses.paired_iou(_boxes(values, anchors), own[..., :4])[1]) * positive
        middle = (anchors[:, :2] + anchors[:, 2:]) / 2
        far = torch.cat([middle - own[..., :2], own[..., 2:4] - middle], -1).clamp_min(1e-6)
        pairs = torch.stack([far[..., 0::2], far[..., 1::2]], -2)
        wanted = (pairs.amin(-1) / pairs.amax(-1)).prod(-1).sqrt()
        centre = F.binary_cross_entropy_with_logits(centred[..., 0], wanted, reduction="none") * positive
        return (kind.sum() + box.sum() + centre.sum()) / positive.sum().clamp_min(1)

    @torch.no_grad()
    def _assigned(self, targets: Tensor, anchors: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of places (N, P): does it learn a box, which (N, P, 8), and is it in one that is to be ignored?"""
        middle, side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2] - anchors[:, 0]
        centre = (targets[..., None, :2] + targets[..., None, 2:4]) / 2
        far = torch.cat([middle - targets[..., None, :2], targets[..., None, 2:4] - middle], -1)  # (N, M, P, 4)
        counts = [rows * columns for rows, columns in self._grids(size)]
        first, last = torch.arange(len(side), device=side.device) < counts[0], len(side) - counts[-1]
        lower = torch.where(first, 0.0, side * 4)
        upper = torch.where(torch.arange(len(side), device=side.device) >= last, torch.inf, side * 8)
        inside = far.amin(-1) > 0
        fits = inside & (far.amax(-1) > lower) & (far.amax(-1) < upper)
        fits &= (middle - centre).abs().amax(-1) < self.radius * side
        real = present(targets) & (targets[..., IGNORED] < 0.5)
        sizes = torch.where(fits & real[..., None], area(targets)[..., None], torch.inf)
        least, owner = sizes.min(1)
        own = targets.gather(1, owner[..., None].expand(-1, -1, targets.shape[-1]))
        crowd = (inside & (present(targets) & ~real)[..., None]).any(1)
        return least < torch.inf, own, crowd & (least == torch.inf)

    def _grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        return _grid.grids(size, self.strides)

    def _read(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, values, centred = _torchvision.tensors(outputs, _NAMES, "fcos")
        ones = ((1.0,),) * len(self.sizes)
        anchors = _anchors.grid_anchors(size, self._grids(size), tuple((one,) for one in self.sizes), ones, values)
        for value, last in ((values, 4), (logits, self.classes + int(self.background)), (centred, 1)):
            _grid.check(value, (len(anchors), last), "fcos")
        return logits, values, centred, anchors


def _boxes(values: Tensor, anchors: Tensor) -> Tensor:
    """(N, P, 4) of distances in anchors' sides."""
    sides = (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
    return _grid.from_distances((anchors[:, :2] + anchors[:, 2:]) / 2, values * sides)
