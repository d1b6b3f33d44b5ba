"""YOLOX (2107.08430): one box, an objectness and the classes at each place of three grids, without anchors.

Output (N, places, 5 + classes), for strides 8, 16, 32 in turn: 4 box values, objectness and classes, both after a
sigmoid. With (x, y) the column and row of a place,

    centre = (values 0, 1 + (x, y)) · stride,   sides = exp(values 2, 3) · stride,   score = objectness · class

loss = 5 · (1 - IoU²) + cross-entropy of classes (against the IoU) over the places that learn a box, which SimOTA finds,
+ cross-entropy of the objectness over all, each by the number of the former. Pictures: BGR, 0 to 255, letterboxed at
the top left on grey 114.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from rarefy.tasks.detector import Feed
from rarefy.tasks.detectors import _assign, _ends, _grid, _losses, _nms
from rarefy.tasks.metric import Outputs


@dataclass(frozen=True)
class Yolox:
    """YOLOX: one box a place, with objectness.

    size: (H, W) of the input. overlap: IoU from which on the worse of two boxes of a class is left out.
    """

    classes: int = 80
    size: tuple[int, ...] = (640, 640)
    strides: tuple[int, ...] = (8, 16, 32)
    overlap: float = 0.65

    least, most = 0.001, 300

    def __post_init__(self) -> None:
        _grid.check_numbers(self)
        _grid.check_options(self.classes, self.size, self.strides)

    @property
    def feed(self) -> Feed:
        height, width = self.size
        return Feed((height, width), "letterbox", 114.0, channels="bgr", std=(1 / 255,) * 3, antialias=False)

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        head = getattr(model, "head", None)
        if type(model).__name__ == "YOLOX" and hasattr(head, "decode_in_inference"):
            strides = tuple(int(stride) for stride in head.strides)  # type: ignore[union-attr]
            return cls(int(head.num_classes), strides=strides)  # type: ignore[union-attr, arg-type]
        ends = _ends.ends(model)
        if len(ends) != 1 or sorted(set(ends[0].operators)) != ["convolution", "sigmoid"]:
            return None
        ((shape, parts),) = _ends.sizes(model, ends)  # type: ignore[arg-type]
        if len(shape) != 2:
            return None
        size, classes = _ends.input_size(model), shape[1] - 5  # type: ignore[arg-type]
        levels = [("convolution", 4), ("sigmoid", 1), ("sigmoid", classes)]
        strides = cls.strides[: len(parts) // 3] if len(parts) <= 9 else (8, 16, 32, 64)
        fits = parts == levels * len(strides) and shape[0] == _grid.count(size, strides)
        return cls(classes, size, strides) if fits else None

    def core(self, model: nn.Module) -> nn.Module:
        if not hasattr(model, "head"):
            return model
        plain = copy.copy(model)
        plain._modules = {**model._modules, "head": copy.copy(model.get_submodule("head"))}
        plain.head.decode_in_inference = False  # type: ignore[assignment, union-attr]
        return plain

    def around(self, model: nn.Module, core: nn.Module) -> nn.Module:
        decodes = bool(getattr(getattr(model, "head", None), "decode_in_inference", False))
        return Decoded(core, self) if decodes else core

    def scored(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        boxes, sure, classes = self.read(outputs, size)
        return boxes, sure * classes

    def boxes(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        return _nms.kept(*self.scored(outputs, size), self)

    def logits(self, outputs: Outputs) -> Tensor:
        (values,) = _grid.tensors(outputs, "yolox", 1)
        return _losses.pairs(values[..., 4:5] * values[..., 5:])

    def loss(self, outputs: Outputs, targets: Tensor, size: tuple[int, int]) -> Tensor:
        boxes, sure, classes = self.read(outputs, size)
        place, stride = _grid.places(size, self.strides, boxes)
        scores = (sure * classes).clamp_min(0).sqrt()
        assigned = _assign.simota(boxes.detach(), scores.detach(), place + stride / 2, stride, targets)
        iou, _ = _losses.paired_iou(boxes, assigned.box)
        positive = assigned.positive.float()
        box = ((1 - iou.square()) * positive).sum()
        kind = _losses.cross_entropy(classes, assigned.one_hot(self.classes) * assigned.iou[..., None])
        found = _losses.cross_entropy(sure[..., 0], positive) * ~assigned.ignored
        return (5 * box + (kind * positive[..., None]).sum() + found.sum()) / assigned.number

    def read(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, P, 4) in pixels, objectness (N, P, 1) and classes (N, P, classes)."""
        (values,) = _grid.tensors(outputs, "yolox", 1)
        _grid.check(values, (_grid.count(size, self.strides), 5 + self.classes), "yolox")
        return self.decoded(values, size), values[..., 4:5], values[..., 5:]

    def decoded(self, values: Tensor, size: tuple[int, int], middles: bool = False) -> Tensor:
        """(N, P, 4): corners of the boxes; or their middles and sides, as the network itself puts them."""
        place, stride = _grid.places(size, self.strides, values)
        centre = values[..., :2] * stride + place
        sides = values[..., 2:4].clamp_max(_grid.LARGEST).exp() * stride
        return torch.cat([centre, sides], -1) if middles else _grid.corners(centre, sides)


class Decoded(nn.Module):
    """A core that answers as the user's module does: boxes in pixels, middles and sides."""

    def __init__(self, core: nn.Module, family: Yolox):
        super().__init__()
        self.core, self.family = core, family

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.core(x)
        height, width = x.shape[-2:]
        return torch.cat([self.family.decoded(values, (height, width), True), values[..., 4:]], -1)
