"""NanoDet and other heads of the generalised focal loss (2006.04388): classes, and each side's distance by bins.

For strides 8, 16, 32, ...: classes (N, places, classes) after a sigmoid, and logits (N, places, 4 · bins) of how far
left, top, right and bottom are from the place's centre, (column + offset) · stride: the mean of softmax over
0, 1, ..., bins - 1, times the stride. NanoDet-Plus has both in one output, and offset 0.

loss = quality focal of the classes (against the IoU) over all places + 2 · (1 - GIoU) + 0.25 · distribution focal, both
by how sure the place is, over the places that learn a box (SimOTA). Pictures: BGR, stretched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from rarefy.tasks.detector import Feed
from rarefy.tasks.detectors import _assign, _ends, _grid, _losses, _nms
from rarefy.tasks.metric import Outputs

_STRIDES = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Nanodet:
    """NanoDet: classes and distances by bins.

    size: (H, W) of the input. outputs: "apart": the classes of all strides, then the distances of all; "joined": one
    output of both. offset: of a centre, in strides. overlap: IoU from which on the worse of two boxes is left out.
    """

    classes: int = 80
    size: tuple[int, ...] = (320, 320)
    strides: tuple[int, ...] = (8, 16, 32)
    bins: int = 8
    outputs: Literal["apart", "joined"] = "apart"
    offset: float = 0.5
    overlap: float = 0.6

    least, most, spreads = 0.001, 300, True

    def __post_init__(self) -> None:
        _grid.check_numbers(self)
        _grid.check_options(self.classes, self.size, self.strides)
        if not 2 <= self.bins <= 1024:
            raise ValueError(f"bins={self.bins} is not 2 to 1024")

    @property
    def feed(self) -> Feed:
        height, width = self.size
        blue, green, red = (value / 255 for value in (103.53, 116.28, 123.675))
        of_blue, of_green, of_red = (value / 255 for value in (57.375, 57.12, 58.395))
        means, stds = (blue, green, red), (of_blue, of_green, of_red)
        return Feed((height, width), channels="bgr", mean=means, std=stds, antialias=False)

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        ends = _ends.ends(model)
        flat = [operator for end in ends for operator in end.operators]
        if not 2 <= len(flat) <= 2 * len(_STRIDES) or sorted(set(flat)) != ["convolution", "sigmoid"]:
            return None
        found = _ends.sizes(model, ends)  # type: ignore[arg-type]
        size, number = _ends.input_size(model), len(flat) // 2  # type: ignore[arg-type]
        strides = _STRIDES[:number]
        parts = [part for _, of_output in found for part in of_output]
        joined = len(ends) == 1
        classes, sides = (parts[0], parts[1]) if joined else (parts[0], parts[-1])
        wanted = [classes, sides] * number if joined else [classes] * number + [sides] * number
        places = [rows * columns for rows, columns in _grid.grids(size, strides)]
        shapes = (
            [(sum(places), classes[1] + sides[1])]
            if joined
            else [(count, one) for one in (classes[1], sides[1]) for count in places]
        )
        fits = classes[0] == "sigmoid" and sides[0] == "convolution" and sides[1] % 4 == 0 and sides[1] >= 8
        if not fits or parts != wanted or [shape for shape, _ in found] != shapes:
            return None
        form: Literal["apart", "joined"] = "joined" if joined else "apart"
        return cls(classes[1], size, strides, sides[1] // 4, form, 0.0 if joined else 0.5)

    def core(self, model: nn.Module) -> nn.Module:
        return model

    def around(self, model: nn.Module, core: nn.Module) -> nn.Module:
        return core

    def scored(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        scores, sides = self.read(outputs, size)
        return _grid.clipped(self._boxes(sides, size), size), scores

    def boxes(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        return _nms.kept(*self.scored(outputs, size), self)

    def logits(self, outputs: Outputs) -> Tensor:
        return _losses.pairs(self._values(outputs)[0])

    def loss(self, outputs: Outputs, targets: Tensor, size: tuple[int, int]) -> Tensor:
        scores, sides = self.read(outputs, size)
        boxes = self._boxes(sides, size)
        centre, stride = self._centres(size, sides)
        assigned = _assign.simota(boxes.detach(), scores.detach(), centre, stride, targets)
        quality = assigned.one_hot(self.classes) * assigned.iou[..., None]
        kind = _losses.quality_focal(scores, quality) * ~assigned.ignored[..., None]
        sure = scores.detach().amax(-1) * assigned.positive
        _, overlap = _losses.paired_iou(boxes, assigned.box)
        far = torch.cat([centre - assigned.box[..., :2], assigned.box[..., 2:] - centre], -1) / stride
        spread = _losses.distribution_focal(sides.unflatten(-1, (4, self.bins)), far).mean(-1)
        by_box = ((2 * (1 - overlap) + 0.25 * spread) * sure).sum() / sure.sum().clamp_min(1e-6)
        return kind.sum() / assigned.number + by_box

    def distances(self, outputs: Outputs) -> Tensor:
        """Logits (N, places, 4, bins) of each side's distance."""
        sides: Tensor = self._values(outputs)[1].unflatten(-1, (4, self.bins))  # type: ignore[no-untyped-call]
        return sides

    def read(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Classes (N, P, classes) and logits of the sides (N, P, 4 * bins)."""
        scores, sides = self._values(outputs)
        _grid.check(scores, (_grid.count(size, self.strides), self.classes), "nanodet")
        return scores, sides

    def _values(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        number = len(self.strides)
        if self.outputs == "joined":
            (values,) = _grid.tensors(outputs, "nanodet", 1)
            _grid.check(values, (values.shape[1], self.classes + 4 * self.bins), "nanodet")
            return values[..., : self.classes], values[..., self.classes :]
        parts = _grid.tensors(outputs, "nanodet", 2 * number)
        for value, last in zip(parts, [self.classes] * number + [4 * self.bins] * number, strict=True):
            _grid.check(value, (value.shape[1], last), "nanodet")
        return torch.cat(parts[:number], 1), torch.cat(parts[number:], 1)

    def _centres(self, size: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        place, stride = _grid.places(size, self.strides, like)
        return place + self.offset * stride, stride

    def _boxes(self, sides: Tensor, size: tuple[int, int]) -> Tensor:
        centre, stride = self._centres(size, sides)
        return _grid.from_distances(centre, _grid.expectation(sides) * stride)
