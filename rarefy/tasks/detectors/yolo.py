"""YOLO with distances by bins, as v8, v9, v11, v12 and v5u end: a module called ``Detect`` with ``nc``, ``reg_max`` and
``stride``, on three maps.

The core's outputs are maps (N, 4 · bins + classes, rows, columns), one a stride: logits of how far left, top, right and
bottom are from the middle of the place (``nanodet.py``; with one bin the distance itself), and logits of the classes.
Of an exported file, whose decoding is part of the graph, the output is (N, 4 + classes, places): middles and sides in
pixels, and probabilities.

loss = 7.5 · (1 - GIoU) + 1.5 · distribution focal + 0.5 · cross-entropy of the classes, the former two by how sure a
place should be, which task alignment (2108.07755) says, all by the sum of that. Pictures: RGB, 0 to 1, letterboxed in
the middle on grey 114.

A user's model is known by what it has; nothing of its library is imported. In the copy that is called as the original
the module ``Detect`` stays, with branches that hand on what the core said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.tasks.detector import Feed
from rarefy.tasks.detectors import _assign, _ends, _grid, _losses, _nms, _numbered
from rarefy.tasks.metric import Outputs

_STRIDES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Yolo:
    """YOLO v5u, v8, v9, v11 and the like: classes and distances by bins on three maps.

    size: (H, W) of the input. outputs: "maps": one of each stride; "decoded": boxes and probabilities. overlap: IoU
    from which on the worse of two boxes of a class is left out; 1: none is (v10, 26).
    """

    classes: int = 80
    size: tuple[int, ...] = (640, 640)
    strides: tuple[int, ...] = (8, 16, 32)
    bins: int = 16
    outputs: Literal["maps", "decoded"] = "maps"
    overlap: float = 0.7

    least, most = 0.001, 300

    def __post_init__(self) -> None:
        _grid.check_numbers(self)
        _grid.check_options(self.classes, self.size, self.strides)
        if not 1 <= self.bins <= 1024:
            raise ValueError(f"bins={self.bins} is not 1 to 1024")

    @property
    def spreads(self) -> bool:
        return self.outputs == "maps" and self.bins > 1

    @property
    def feed(self) -> Feed:
        height, width = self.size
        return Feed((height, width), "letterbox", 114.0, centred=True, antialias=False)

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        owner = _numbered.owner_of(model, _is_head)
        if owner is not None:
            head, side = _numbered.head_of(model, _is_head), _numbered.side(owner)
            strides = _numbered.strides_of(head)
            overlap = 1.0 if getattr(head, "end2end", False) else 0.7
            return cls(int(head.nc), (side, side), strides, int(head.reg_max), "maps", overlap) if strides else None
        ends = _ends.ends(model)
        if len(ends) != 1 or len(ends[0].parts) < 2 or ends[0].operators[-1] != "sigmoid":
            return None
        ((shape, parts),) = _ends.sizes(model, ends)  # type: ignore[arg-type]
        size, classes = _ends.input_size(model), parts[-1][1]  # type: ignore[arg-type]
        if (
            len(shape) != 2
            or shape[0] != 4 + classes
            or any(one in ("convolution", "sigmoid") for one, _ in parts[:-1])
        ):
            return None
        strides = next((_STRIDES[:count] for count in (3, 4) if _grid.count(size, _STRIDES[:count]) == shape[1]), ())
        return cls(classes, size, strides, outputs="decoded") if strides else None

    def core(self, model: nn.Module) -> nn.Module:
        owner = _numbered.owner_of(model, _is_head)
        if owner is None:
            return model
        head = _numbered.head_of(owner, _is_head)
        return _numbered.replaced(owner, head, _Raw(head))

    def around(self, model: nn.Module, core: nn.Module) -> nn.Module:
        owner = _numbered.owner_of(model, _is_head)
        if owner is None:
            return core
        last = _without_branches(_numbered.head_of(owner, _is_head), 4 * self.bins)
        return _numbered.with_core(model, owner, core, last)

    def scored(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if self.outputs == "decoded":
            values = self._decoded(outputs, size)
            return _grid.corners(values[..., :2], values[..., 2:4]), values[..., 4:]
        sides, logits = self._maps(outputs, size)
        return self._boxes(sides, size), logits.sigmoid()

    def boxes(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        return _nms.kept(*self.scored(outputs, size), self)

    def logits(self, outputs: Outputs) -> Tensor:
        """Of no and yes, for each class."""
        if self.outputs == "decoded":
            (values,) = _grid.tensors(outputs, "yolo", 1)
            return _losses.pairs(values[:, 4:].transpose(1, 2))
        return _losses.pairs_of(self._flat(outputs)[1])

    def distances(self, outputs: Outputs) -> Tensor:
        """Logits (N, places, 4, bins) of each side's distance."""
        sides: Tensor = self._flat(outputs)[0].unflatten(-1, (4, self.bins))  # type: ignore[no-untyped-call]
        return sides

    def loss(self, outputs: Outputs, targets: Tensor, size: tuple[int, int]) -> Tensor:
        boxes, scores = self.scored(outputs, size)
        corner, stride = _grid.places(size, self.strides, boxes)
        centre = corner + stride / 2
        assigned, sure = _assign.aligned(boxes.detach(), scores.detach(), centre, targets)
        wanted = assigned.one_hot(self.classes) * sure[..., None]
        if self.outputs == "decoded":
            kind = _losses.cross_entropy(scores, wanted)
        else:
            kind = F.binary_cross_entropy_with_logits(self._maps(outputs, size)[1], wanted, reduction="none")
        number = sure.sum().clamp_min(1)
        box = ((1 - _losses.paired_iou(boxes, assigned.box)[1]) * sure).sum()
        loss = 7.5 * box + 0.5 * (kind * ~assigned.ignored[..., None]).sum()
        if self.outputs == "maps" and self.bins > 1:
            far = torch.cat([centre - assigned.box[..., :2], assigned.box[..., 2:] - centre], -1) / stride
            spread = _losses.distribution_focal(self.distances(outputs), far).mean(-1)
            loss = loss + 1.5 * (spread * sure).sum()
        return loss / number

    def _decoded(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        (values,) = _grid.tensors(outputs, "yolo", 1)
        _grid.check(values, (4 + self.classes, _grid.count(size, self.strides)), "yolo")
        return values.transpose(1, 2)

    def _flat(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        maps = _grid.tensors(outputs, "yolo", len(self.strides))
        for one in maps:
            if one.dim() != 4 or one.shape[1] != 4 * self.bins + self.classes:
                _grid.check(one, (4 * self.bins + self.classes, *one.shape[2:]), "yolo")
        values = torch.cat([one.flatten(2) for one in maps], 2).transpose(1, 2)
        return values[..., : 4 * self.bins], values[..., 4 * self.bins :]

    def _maps(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Logits of the sides (N, P, 4 * bins) and of the classes (N, P, classes)."""
        sides, logits = self._flat(outputs)
        _grid.check(logits, (_grid.count(size, self.strides), self.classes), "yolo")
        return sides, logits

    def _boxes(self, sides: Tensor, size: tuple[int, int]) -> Tensor:
        corner, stride = _grid.places(size, self.strides, sides)
        distances = sides if self.bins == 1 else _grid.expectation(sides)
        return _grid.from_distances(corner + stride / 2, distances * stride)


def _is_head(module: nn.Module) -> bool:
    names = ("nc", "reg_max", "stride", "cv2", "cv3", "f", "i")
    return type(module).__name__.endswith("Detect") and all(hasattr(module, name) for name in names)


class _Raw(nn.Module):
    """The head's branches, without what it does behind them; and its place among the model's layers."""

    def __init__(self, head: _numbered.Head):
        super().__init__()
        single = bool(getattr(head, "end2end", False)) and getattr(head, "one2one_cv2", None) is not None
        self.cv2, self.cv3 = (head.one2one_cv2, head.one2one_cv3) if single else (head.cv2, head.cv3)
        _numbered.placed(self, head)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return [torch.cat([box(one), kind(one)], 1) for one, box, kind in zip(x, self.cv2, self.cv3)]


class _Part(nn.Module):
    """Some channels of a map."""

    def __init__(self, first: int, last: int | None):
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.first : self.last]


def _without_branches(head: _numbered.Head, sides: int) -> _numbered.Head:
    """A copy of the head, to whose branches the core's maps are given."""
    names = ("cv2", "cv3", "one2one_cv2", "one2one_cv3")
    last = _numbered.without(head, names)
    for name in names:
        if isinstance(getattr(head, name, None), nn.Module):
            part = (0, sides) if name.endswith("cv2") else (sides, None)
            setattr(last, name, nn.ModuleList(_Part(*part) for _ in range(len(getattr(head, name)))))
    return last
