"""YOLO with anchors, as v5 and v7 end (YOLOR and v3 in the same code, too): a module called ``Detect`` (``IDetect``,
``IAuxDetect``) with ``anchors``, ``na`` and ``stride``, on three or four maps.

The core's outputs are maps (N, anchors · (5 + classes), rows, columns), one a stride: of each anchor two values of the
middle, two of the sides, objectness and the classes, all to go through a sigmoid. With (x, y) the column and row of a
place and (w, h) an anchor in pixels,

    middle = (2 σ(0, 1) - 0.5 + (x, y)) · stride,   sides = (2 σ(2, 3))² · (w, h),   score = σ(objectness) · σ(class)

Of an exported file, whose decoding is part of the graph, the output is (N, places, 5 + classes): middles and sides in
pixels, and probabilities; places by map, anchor, row and column.

A place learns a box whose middle lies in it or in the half of a place next to it, by an anchor whose sides are at most
4 times the box's and at least a quarter; of several boxes the one that it overlaps most. (Where the anchors are not
known, of an exported file, SimOTA says which; ``_assign.py``.)

    loss = 1 - GIoU + 10 · classes/80 · cross-entropy of the classes, means over these places,
           + 20 · (H · W / 640²) · cross-entropy of the objectness against the IoU, a mean of each map,
             the finest of which weighs most

Pictures: RGB, 0 to 1, letterboxed in the middle on grey 114. In the copy that is called as the original the head stays,
with convolutions that hand on what the core said. What v7's auxiliary heads say is for training alone, and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.tasks.detector import Feed
from rarefy.tasks.detectors import _assign, _ends, _grid, _losses, _nms, _numbered
from rarefy.tasks.metric import Outputs

_STRIDES = (8, 16, 32, 64)
_WEIGHTS = {3: (4.0, 1.0, 0.4), 4: (4.0, 1.0, 0.25, 0.06)}  # of the maps' objectness


@dataclass(frozen=True)
class Yolov5:
    """YOLO v5, v7 and the like: objectness and classes for each anchor of a few maps.

    size: (H, W) of the input. anchors: width and height of each in pixels, by map. outputs: "maps": one of each stride;
    "decoded": boxes and probabilities. overlap: IoU from which on the worse of two boxes of a class is left out.
    """

    classes: int = 80
    size: tuple[int, ...] = (640, 640)
    strides: tuple[int, ...] = (8, 16, 32)
    anchors: tuple[tuple[float, ...], ...] = (
        (10.0, 13.0, 16.0, 30.0, 33.0, 23.0),
        (30.0, 61.0, 62.0, 45.0, 59.0, 119.0),
        (116.0, 90.0, 156.0, 198.0, 373.0, 326.0),
    )
    outputs: Literal["maps", "decoded"] = "maps"
    overlap: float = 0.6

    least, most = 0.001, 300

    def __post_init__(self) -> None:
        _grid.check_numbers(self)
        _grid.check_options(self.classes, self.size, self.strides)
        _grid.check_grids(_grid.grids((self.size[0], self.size[1]), self.strides), self._counts)
        good = all(len(one) == len(self.anchors[0]) > 0 and len(one) % 2 == 0 for one in self.anchors)
        if not good or not all(0 < side <= _grid.MOST_PIXELS for one in self.anchors for side in one):
            raise ValueError(f"anchors={self.anchors} are not as many widths and heights in pixels for each map")

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
            if not strides:
                return None
            pixels = torch.as_tensor(head.anchors).double().cpu() * torch.tensor(strides).view(-1, 1, 1)
            anchors = tuple(tuple(round(value, 3) for value in one.flatten().tolist()) for one in pixels)
            return cls(int(head.nc), (side, side), strides, anchors)
        ends = _ends.ends(model)
        if len(ends) != 1 or ends[0].operators[-1] != "sigmoid":
            return None
        ((shape, parts),) = _ends.sizes(model, ends)  # type: ignore[arg-type]
        size = _ends.input_size(model)  # type: ignore[arg-type]
        levels = [len(parts) // 3] if len(parts) % 3 == 0 else []
        strides = next((_STRIDES[:count] for count in levels if 1 < count <= 4), ())
        kinds = [operator for operator, _ in parts]
        repeated = kinds == kinds[:3] * len(strides) and "convolution" not in kinds and kinds[:2].count("sigmoid") == 0
        if len(shape) != 2 or shape[1] < 6 or not strides or not repeated:
            return None
        count, rest = divmod(shape[0], _grid.count(size, strides))
        if rest or not 1 <= count <= 16:
            return None
        known = cls.anchors if (count, len(strides)) == (3, 3) else ((16.0,) * 2 * count,) * len(strides)
        return cls(shape[1] - 5, size, strides, known, "decoded")

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
        head = _numbered.head_of(owner, _is_head)
        last = _numbered.without(head, _CONVOLUTIONS)
        for name in _CONVOLUTIONS:
            if isinstance(getattr(head, name, None), nn.Module):
                setattr(last, name, nn.ModuleList(nn.Identity() for _ in getattr(head, name)))
        return _numbered.with_core(model, owner, core, last, copies=2 if hasattr(head, "m2") else 1)

    def scored(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        said = self._said(outputs, size)
        boxes = self._boxes(said, size)
        probability = said.values if self.outputs == "decoded" else said.values.sigmoid()
        return boxes, probability[..., :1] * probability[..., 1:]

    def boxes(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        return _nms.kept(*self.scored(outputs, size), self)

    def logits(self, outputs: Outputs) -> Tensor:
        """Of no and yes, for each class."""
        if self.outputs == "decoded":
            (values,) = _grid.tensors(outputs, "yolov5", 1)
            return _losses.pairs(values[..., 4:5] * values[..., 5:])
        values = torch.cat(self._flat(outputs), 1).sigmoid()
        return _losses.pairs(values[..., 4:5] * values[..., 5:])

    def loss(self, outputs: Outputs, targets: Tensor, size: tuple[int, int]) -> Tensor:
        said = self._said(outputs, size)
        boxes = self._boxes(said, size)
        centre = said.corner + said.stride / 2
        if self.outputs == "decoded":
            sure = (said.values[..., :1] * said.values[..., 1:]).clamp_min(0).sqrt()
            assigned = _assign.simota(boxes.detach(), sure.detach(), centre, said.stride, targets)
        else:
            assigned = _assign.anchored(boxes.detach(), centre, said.stride, said.anchor, targets)
        iou, generalised = _losses.paired_iou(boxes, assigned.box)
        positive = assigned.positive.float()
        box = ((1 - generalised) * positive).sum() / assigned.number
        kind = self._entropy(said.values[..., 1:], assigned.one_hot(self.classes)).sum(-1)
        kind = (kind * positive).sum() / (80 * assigned.number)  # a mean over classes, times classes/80
        found = self._entropy(said.values[..., 0], iou.detach().clamp_min(0) * positive) * ~assigned.ignored
        weights = _WEIGHTS.get(len(self.strides), (1.0,) * len(self.strides))
        parts = [one.mean() * weight for one, weight in zip(found.split(self._places(size), 1), weights, strict=True)]
        return box + 10 * kind + 20 * (size[0] * size[1] / 640**2) * torch.stack(parts).sum()

    @property
    def _counts(self) -> list[int]:
        """Anchors of a place, by map."""
        return [len(one) // 2 for one in self.anchors]

    def _places(self, size: tuple[int, int]) -> list[int]:
        grids = _grid.grids(size, self.strides)
        return [rows * columns * count for (rows, columns), count in zip(grids, self._counts, strict=True)]

    def _entropy(self, values: Tensor, wanted: Tensor) -> Tensor:
        if self.outputs == "decoded":
            return _losses.cross_entropy(values, wanted)
        return F.binary_cross_entropy_with_logits(values, wanted, reduction="none")

    def _flat(self, outputs: Outputs) -> list[Tensor]:
        """(N, anchors · rows · columns, 5 + classes) of each map."""
        maps, each = _grid.tensors(outputs, "yolov5", len(self.strides)), 5 + self.classes
        for one, count in zip(maps, self._counts, strict=True):
            if one.dim() != 4 or one.shape[1] != count * each:
                _grid.check(one, (count * each, *one.shape[2:]), "yolov5")
        split: list[Tensor] = [
            one.unflatten(1, (count, each))
            for one, count in zip(maps, self._counts, strict=True)  # type: ignore[no-untyped-call]
        ]
        return [one.permute(0, 1, 3, 4, 2).flatten(1, 3) for one in split]

    def _said(self, outputs: Outputs, size: tuple[int, int]) -> _Said:
        if self.outputs == "decoded":
            (values,) = _grid.tensors(outputs, "yolov5", 1)
        else:
            values = torch.cat(self._flat(outputs), 1)
        _grid.check(values, (sum(self._places(size)), 5 + self.classes), "yolov5")
        corner, stride = _grid.places(size, self.strides, values)
        lengths = [rows * columns for rows, columns in _grid.grids(size, self.strides)]
        both = zip(corner.split(lengths), stride.split(lengths), self._counts, strict=True)
        repeated = [(one.repeat(count, 1), other.repeat(count, 1)) for one, other, count in both]
        anchors = [
            torch.tensor(one, device=values.device).view(-1, 1, 2).expand(-1, length, 2).reshape(-1, 2)
            for one, length in zip(self.anchors, lengths, strict=True)
        ]
        corners, strides = (torch.cat(part) for part in zip(*repeated, strict=True))
        return _Said(values[..., :4], values[..., 4:], corners, strides, torch.cat(anchors))

    def _boxes(self, said: _Said, size: tuple[int, int]) -> Tensor:
        if self.outputs == "decoded":
            return _grid.corners(said.box[..., :2], said.box[..., 2:])
        share = said.box.sigmoid()
        centre = (2 * share[..., :2] - 0.5) * said.stride + said.corner
        return _grid.corners(centre, (2 * share[..., 2:]).square() * said.anchor)


class _Said(NamedTuple):
    """box: (N, P, 4). values: (N, P, 1 + classes), objectness first. corner: (P, 2). stride: (P, 1). anchor: (P, 2)."""

    box: Tensor
    values: Tensor
    corner: Tensor
    stride: Tensor
    anchor: Tensor


_CONVOLUTIONS = (
    "m",
    "m2",
    "ia",
    "im",
)  # of a head: those of the maps, auxiliary ones, and what is added and multiplied


def _is_head(module: nn.Module) -> bool:
    names = ("nc", "na", "nl", "anchors", "stride", "m", "f", "i")
    return type(module).__name__.endswith("Detect") and all(hasattr(module, name) for name in names)


class _Raw(nn.Module):
    """The head's convolutions, without what it does behind them; and its place among the model's layers."""

    def __init__(self, head: _numbered.Head):
        super().__init__()
        count = int(head.nl)
        plain = [nn.Identity() for _ in range(count)]
        before, behind = (list(getattr(head, name, plain)) for name in ("ia", "im"))
        self.m = nn.ModuleList(
            nn.Sequential(*parts) for parts in zip(before[:count], list(head.m)[:count], behind[:count], strict=True)
        )
        _numbered.placed(self, head)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return [convolution(one) for one, convolution in zip(x, self.m)]
