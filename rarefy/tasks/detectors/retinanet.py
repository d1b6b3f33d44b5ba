"""RetinaNet (1708.02002), as torchvision has it: anchors on a pyramid, a sigmoid a class, focal loss.

Outputs ``cls_logits`` (N, P, columns) and ``bbox_regression`` (N, P, 4). Loss: as torchvision's: focal loss (alpha
0.25, gamma 2) of all anchors but those between IoU 0.4 and 0.5, and L1 (v2: generalised IoU) of the matched ones, by
the number of the matched, mean over the pictures. By torchvision's convention column 0 is the background's, and never
learns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.tasks.detector import Feed
from rarefy.tasks.detectors import _anchors, _grid, _losses, _nms, _torchvision
from rarefy.tasks.metric import Outputs

_NAMES = ("cls_logits", "bbox_regression")


@dataclass(frozen=True)
class Retinanet:
    """RetinaNet of torchvision.

    background: is column 0 a background's, as torchvision's documentation says, so that labels begin at 1? size: (H, W)
    of the input. sizes, ratios: of the anchors on each map. box: what a box learns by. overlap: IoU from which on the
    worse of two boxes of a class is left out. least: score of a box. most: boxes a picture. candidates: of a map before
    suppression.
    """

    classes: int = 90
    background: bool = True
    size: tuple[int, ...] = (1088, 1088)
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    sizes: tuple[tuple[float, ...], ...] = (
        (32, 40, 50),
        (64, 80, 101),
        (128, 161, 203),
        (256, 322, 406),
        (512, 645, 812),
    )
    ratios: tuple[tuple[float, ...], ...] = ((0.5, 1.0, 2.0),) * 5
    box: Literal["l1", "giou"] = "l1"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    overlap: float = 0.5
    least: float = 0.05
    most: int = 300
    candidates: int = 1000

    def __post_init__(self) -> None:
        _grid.check_numbers(self)
        _grid.check_options(self.classes, self.size, self.strides)
        counts = [len(one) * len(other) for one, other in zip(self.sizes, self.ratios)]
        _grid.check_grids(self._grids(self._size), counts)

    @property
    def _size(self) -> tuple[int, int]:
        return self.size[0], self.size[1]

    @property
    def feed(self) -> Feed:
        return _torchvision.feed(self.size, False, self.mean, self.std)

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        if not _torchvision.is_a(model, "RetinaNet"):
            return None
        size = _torchvision.input_size(model.transform)
        strides = _torchvision.strides(_torchvision.grids(model.get_submodule("backbone"), size), size)
        if strides is None:
            return None
        head = model.get_submodule("head")
        columns = int(head.classification_head.num_classes)  # type: ignore[union-attr, arg-type]
        loss = str(head.regression_head._loss_type)  # type: ignore[union-attr]
        sizes, ratios = _torchvision.anchors(model.anchor_generator)
        return cls(
            max(columns - 1, 1), columns > 1, size, strides, sizes, ratios, "l1" if "l1" in loss else "giou",
            **_torchvision.normal(model), **_torchvision.suppression(model),
        )  # fmt: skip

    def core(self, model: nn.Module) -> nn.Module:
        return _torchvision.Core(model.get_submodule("backbone"), model.get_submodule("head"))

    def around(self, model: nn.Module, core: nn.Module) -> nn.Module:
        return _torchvision.around(model, core, self._grids)

    def scored(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        logits, values, anchors = self._read(outputs, size)
        return _grid.clipped(_anchors.decode(values, anchors), size), logits.sigmoid()[..., int(self.background) :]

    def boxes(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        boxes, scores = self.scored(outputs, size)
        return _nms.kept(boxes, _nms.most_of_each(scores, self.candidates, self._parts(size)), self)

    def logits(self, outputs: Outputs) -> Tensor:
        """Of no and yes, for each class."""
        values = _torchvision.tensors(outputs, _NAMES, "retinanet")[0][..., int(self.background) :]
        return _losses.pairs_of(values)

    def loss(self, outputs: Outputs, targets: Tensor, size: tuple[int, int]) -> Tensor:
        logits, values, anchors = self._read(outputs, size)
        matched = _anchors.match(targets, anchors, 0.5, 0.4, "ties")
        kinds = (matched.kind + int(self.background)).clamp_max(logits.shape[-1] - 1)
        hot = F.one_hot(kinds, logits.shape[-1]) * matched.positive[..., None]
        kind = _losses.focal(logits, hot.to(logits.dtype)).sum(-1) * ~matched.neither
        if self.box == "l1":
            box = (values - _anchors.encode(matched.box, anchors)).abs().sum(-1)
        else:
            box = 1 - _losses.paired_iou(_anchors.decode(values, anchors), matched.box)[1]
        number = matched.positive.sum(1).clamp_min(1)
        return ((kind.sum(1) + (box * matched.positive).sum(1)) / number).mean()

    def _grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        return _grid.grids(size, self.strides)

    def _parts(self, size: tuple[int, int]) -> list[int]:
        """Anchors of each map."""
        counts = [len(one) * len(other) for one, other in zip(self.sizes, self.ratios, strict=True)]
        return [rows * columns * count for (rows, columns), count in zip(self._grids(size), counts, strict=True)]

    def _read(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        logits, values = _torchvision.tensors(outputs, _NAMES, "retinanet")
        anchors = _anchors.grid_anchors(size, self._grids(size), self.sizes, self.ratios, values)
        _grid.check(values, (len(anchors), 4), "retinanet")
        _grid.check(logits, (len(anchors), self.classes + int(self.background)), "retinanet")
        return logits, values, anchors
