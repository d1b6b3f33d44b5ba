"""FastestDet: one grid of stride 16, an objectness, a box and a softmax over the classes at each place.

Output (N, 5 + classes, rows, columns): objectness (sigmoid), 4 box values v, classes (softmax). With (x, y) the column
and row of a place and (W, H) the number of columns and rows, relative to the picture,

    centre = (tanh v0 + x) / W, (tanh v1 + y) / H,  sides = sigmoid v2, sigmoid v3,  score = objectness^0.6 · class^0.4

loss = 8 · (1 - IoU) + cross-entropy of the classes over the places that learn a box (SimOTA) + 16 · smooth distance of
the objectness to the IoU over all places, a quarter of it where there is no box. Pictures: BGR, 0 to 1, stretched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.tasks.detector import Feed
from rarefy.tasks.detectors import _assign, _ends, _grid, _losses, _nms
from rarefy.tasks.metric import Outputs

_OBJECTNESS, _CLASS = 0.6, 0.4  # powers


@dataclass(frozen=True)
class Fastestdet:
    """FastestDet: one grid, softmax over the classes.

    size: (H, W) of the input. overlap: IoU from which on the worse of two boxes of a class is left out.
    """

    classes: int = 80
    size: tuple[int, ...] = (352, 352)
    stride: int = 16
    overlap: float = 0.45

    least, most = 0.001, 300

    def __post_init__(self) -> None:
        _grid.check_numbers(self)
        _grid.check_options(self.classes, self.size, (self.stride,))

    @property
    def feed(self) -> Feed:
        height, width = self.size
        return Feed((height, width), channels="bgr", antialias=False)

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        ends = _ends.ends(model)
        if len(ends) != 1 or ends[0].operators != ["sigmoid", "convolution", "softmax"]:
            return None
        ((shape, parts),) = _ends.sizes(model, ends)  # type: ignore[arg-type]
        height, width = _ends.input_size(model)  # type: ignore[arg-type]
        if len(shape) != 3 or [channels for _, channels in parts[:2]] != [1, 4]:
            return None
        stride = round(height / shape[1])
        fits = _grid.grids((height, width), [stride]) == [shape[1:]]
        return cls(parts[2][1], (height, width), stride) if fits else None

    def core(self, model: nn.Module) -> nn.Module:
        return model

    def around(self, model: nn.Module, core: nn.Module) -> nn.Module:
        return core

    def scored(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of each place only the likeliest class counts."""
        sure, boxes, classes = self.read(outputs, size)
        best, kind = classes.max(-1)
        scores = sure.clamp_min(0).pow(_OBJECTNESS) * best.clamp_min(0).pow(_CLASS)
        return boxes, F.one_hot(kind, self.classes) * scores[..., None]

    def boxes(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        return _nms.kept(*self.scored(outputs, size), self)

    def logits(self, outputs: Outputs) -> Tensor:
        """Of "no box" and of each class: (N x places, 1 + classes)."""
        (values,) = _grid.tensors(outputs, "fastestdet", 1)
        values = values.flatten(2).transpose(1, 2).flatten(0, 1)
        sure = values[:, :1]
        return torch.cat([1 - sure, sure * values[:, 5:]], 1).clamp_min(1e-6).log()

    def loss(self, outputs: Outputs, targets: Tensor, size: tuple[int, int]) -> Tensor:
        sure, boxes, classes = self.read(outputs, size)
        corner, stride = _grid.places(size, (self.stride,), boxes)
        scores = (sure[..., None] * classes).clamp_min(0).sqrt()
        assigned = _assign.simota(boxes.detach(), scores.detach(), corner + stride / 2, stride, targets)
        iou, _ = _losses.paired_iou(boxes, assigned.box)
        positive = assigned.positive.float()
        right = classes.gather(-1, assigned.kind.clamp_max(self.classes - 1)[..., None])[..., 0]
        kind = -(right.clamp_min(1e-7).log() * positive).sum() / assigned.number
        box = ((1 - iou) * positive).sum() / assigned.number
        weight = torch.where(assigned.positive, 0.75, 0.25) * ~assigned.ignored
        found = (F.smooth_l1_loss(sure, iou.detach() * positive, reduction="none") * weight).mean()
        return 8 * box + kind + 16 * found

    def read(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Objectness (N, P), boxes (N, P, 4) in pixels, and classes (N, P, classes)."""
        (values,) = _grid.tensors(outputs, "fastestdet", 1)
        ((rows, columns),) = _grid.grids(size, [self.stride])
        _grid.check(values, (5 + self.classes, rows, columns), "fastestdet")
        height, width = size
        values = values.flatten(2).transpose(1, 2)
        corner, stride = _grid.places(size, (self.stride,), values)
        scale = values.new_tensor([width / columns, height / rows])
        centre = (values[..., 1:3].tanh() + corner / stride) * scale
        sides = values[..., 3:5].sigmoid() * values.new_tensor([width, height])
        return values[..., 0], _grid.corners(centre, sides), values[..., 5:]
