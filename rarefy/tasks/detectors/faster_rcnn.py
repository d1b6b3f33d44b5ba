"""Faster R-CNN (1506.01497), as torchvision has it: proposals of a pyramid, and a second look at each.

The core is backbone, pyramid and the head that proposes; outputs ``features`` (the maps that the second look reads),
``objectness`` (N, anchors, rows, columns) and ``deltas`` (N, 4 · anchors, rows, columns) of each map. The second look
(crops of the maps, and its box head) is no function of tensors of set sizes: it stays as it is, and so do the channels
of the maps that it reads.

So what a core alone says are **proposals, of one class**: that is what ``boxes`` returns and ``loss`` teaches
(objectness over anchors that overlap a box by 0.7 or none by 0.3, both halves weighing alike, where torchvision draws
256 of them; smooth L1 of the boxes). The whole detector is judged and trained as it is called:
``rarefy.as_original(core, model)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.tasks.detector import Feed
from rarefy.tasks.detectors import _anchors, _grid, _losses, _nms, _torchvision
from rarefy.tasks.metric import Outputs


class _Core(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.backbone(x)
        features = {"0": features} if isinstance(features, Tensor) else dict(features)
        objectness, deltas = self.head(list(features.values()))
        return {"features": features, "objectness": list(objectness), "deltas": list(deltas)}


@dataclass(frozen=True)
class FasterRcnn:
    """Faster R-CNN of torchvision: its core proposes, the second look stays.

    size: (H, W) of the input. sizes, ratios: of the anchors on each map. overlap, most: of proposals.
    """

    size: tuple[int, ...] = (1088, 1088)
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    sizes: tuple[tuple[float, ...], ...] = ((32,), (64,), (128,), (256,), (512,))
    ratios: tuple[tuple[float, ...], ...] = ((0.5, 1.0, 2.0),) * 5
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    overlap: float = 0.7
    most: int = 1000

    classes, least = 1, 0.0
    proposes = True  # what it finds is for a second look

    def __post_init__(self) -> None:
        _grid.check_numbers(self)
        _grid.check_options(1, self.size, self.strides)
        counts = [len(one) * len(other) for one, other in zip(self.sizes, self.ratios)]
        _grid.check_grids(self._grids((self.size[0], self.size[1])), counts)

    @property
    def feed(self) -> Feed:
        return _torchvision.feed(self.size, False, self.mean, self.std)

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        if not _torchvision.is_a(model, "FasterRCNN"):
            return None
        size = _torchvision.input_size(model.transform)
        strides = _torchvision.strides(_torchvision.grids(model.get_submodule("backbone"), size), size)
        if strides is None:
            return None
        rpn = model.get_submodule("rpn")
        return cls(
            size, strides, *_torchvision.anchors(rpn.anchor_generator),
            **_torchvision.normal(model),
            overlap=float(rpn.nms_thresh),  # type: ignore[arg-type]
        )  # fmt: skip

    def core(self, model: nn.Module) -> nn.Module:
        return _Core(model.get_submodule("backbone"), model.get_submodule("rpn.head"))

    def around(self, model: nn.Module, core: nn.Module) -> nn.Module:
        return _torchvision.around(model, core, None, "rpn.head", _said)

    def scored(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        objectness, deltas, anchors = self._read(outputs, size)
        return _grid.clipped(_anchors.decode(deltas, anchors), size), objectness[..., None].sigmoid()

    def boxes(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        return _nms.kept(*self.scored(outputs, size), self)

    def logits(self, outputs: Outputs) -> Tensor:
        """Of no and yes, for each anchor."""
        return _losses.pairs_of(torch.cat([one.permute(0, 2, 3, 1).flatten(1) for one in self._parts(outputs)[0]], 1))

    def loss(self, outputs: Outputs, targets: Tensor, size: tuple[int, int]) -> Tensor:
        objectness, deltas, anchors = self._read(outputs, size)
        matched = _anchors.match(targets, anchors, 0.7, 0.3, "ties")
        positive = matched.positive.float()
        negative = (~matched.positive & ~matched.neither).float()
        found = F.binary_cross_entropy_with_logits(objectness, positive, reduction="none")
        halves = [(found * part).sum() / part.sum().clamp_min(1) for part in (positive, negative)]
        box = F.smooth_l1_loss(deltas, _anchors.encode(matched.box, anchors), beta=1 / 9, reduction="none").sum(-1)
        return (halves[0] + halves[1] + (box * positive).sum() / positive.sum().clamp_min(1)) / 2

    def _grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        return _grid.grids(size, self.strides)

    def _parts(self, outputs: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        number = len(self.strides)
        values = _grid.tensors(outputs, "faster_rcnn", 3 * number)
        return values[number : 2 * number], values[2 * number :]

    def _read(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Objectness (N, P), deltas (N, P, 4) and anchors (P, 4)."""
        found, changes = self._parts(outputs)
        counts = [len(one) * len(other) for one, other in zip(self.sizes, self.ratios, strict=True)]
        for one, delta, grid, count in zip(found, changes, self._grids(size), counts, strict=True):
            _grid.check(one, (count, *grid), "faster_rcnn")
            _grid.check(delta, (4 * count, *grid), "faster_rcnn")
        objectness = torch.cat([one.permute(0, 2, 3, 1).flatten(1) for one in found], 1)
        flat = [one.permute(0, 2, 3, 1).reshape(len(one), -1, 4) for one in changes]
        return (
            objectness,
            torch.cat(flat, 1),
            _anchors.grid_anchors(size, self._grids(size), self.sizes, self.ratios, objectness),
        )


def _said(outputs: Any) -> tuple[Any, Any]:
    return outputs["objectness"], outputs["deltas"]
