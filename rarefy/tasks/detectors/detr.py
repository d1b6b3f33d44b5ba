"""DETR and its kin (2005.12872), as transformers has them: Deformable and Conditional DETR, RT-DETR, D-FINE, YOLOS: a
set of boxes, one for each query.

Outputs ``logits`` (N, queries, columns) and ``pred_boxes`` (N, queries, 4), middle and sides relative to the input. In
DETR and YOLOS a softmax has "no object" for its last column; the others have a sigmoid a class. Nothing is suppressed.

loss, as the authors': with queries and targets matched one to one (``_sets.py``), cross-entropy of the classes ("no
object" at a tenth), or the focal loss, + 5 · L1 + 2 · (1 - GIoU). Of the last layer's answers alone: those of the
layers before it, from which transformers' own training learns too, are no output of a core.

The core takes whole pictures, stretched to its size, so there is no mask of padding.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.errors import InputError
from rarefy.tasks.detector import Feed
from rarefy.tasks.detectors import _grid, _losses, _nms, _sets
from rarefy.tasks.metric import Outputs

_NAMES = ("logits", "pred_boxes")
_SOFTMAX = ("detr", "yolos", "table-transformer")
_PLAIN = ("rt_detr", "rt_detr_v2", "d_fine")  # fed with values of 0 to 1
_NO_OBJECT = 0.1


@dataclass(frozen=True)
class Detr:
    """DETR and its kin of transformers: one box a query.

    size: (H, W) of the input. softmax: over classes and "no object"; else a sigmoid a class. normal: are pictures
    normalised with ImageNet's means? most: boxes a picture.
    """

    classes: int = 91
    size: tuple[int, ...] = (800, 1088)
    softmax: bool = True
    normal: bool = True
    most: int = 300

    overlap, least = 1.0, 0.001

    def __post_init__(self) -> None:
        _grid.check_numbers(self)
        _grid.check_options(self.classes, self.size, (64,))

    @property
    def feed(self) -> Feed:
        height, width = self.size
        if not self.normal:
            return Feed((height, width))
        return Feed((height, width), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        kind = type(model)
        if not kind.__module__.startswith("transformers.models.") or not kind.__name__.endswith("ForObjectDetection"):
            return None
        config: Any = model.config
        name = str(config.model_type)
        size = (640, 640) if name in _PLAIN else (800, 1088)
        for option in ("image_size", "eval_size", "anchor_image_size"):
            said = getattr(config, option, None)
            if isinstance(said, (list, tuple)) and len(said) == 2:
                size = (int(said[0]), int(said[1]))
        return cls(int(config.num_labels), size, name in _SOFTMAX, name not in _PLAIN)

    def core(self, model: nn.Module) -> nn.Module:
        return _Core(model)

    def around(self, model: nn.Module, core: nn.Module) -> nn.Module:
        return _Called(model, core)

    def scored(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        logits, boxes = self._read(outputs)
        height, width = size
        corners = _sets.corners(boxes) * torch.tensor([width, height] * 2, device=boxes.device, dtype=boxes.dtype)
        if not self.softmax:
            return corners, logits.sigmoid()
        scores = logits.softmax(-1)[..., :-1]
        return corners, scores * F.one_hot(scores.argmax(-1), self.classes)

    def boxes(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        return _nms.kept(*self.scored(outputs, size), self)

    def logits(self, outputs: Outputs) -> Tensor:
        """Of no object and the classes; or of no and yes, for each class."""
        logits, _ = self._read(outputs)
        return logits.roll(1, -1).flatten(0, 1) if self.softmax else _losses.pairs_of(logits)

    def partners(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
        return _sets.partners(ours, theirs)

    def loss(self, outputs: Outputs, targets: Tensor, size: tuple[int, int]) -> Tensor:
        logits, boxes = self._read(outputs)
        if self.softmax:
            matching = _sets.match(boxes, -logits.softmax(-1)[..., :-1], targets, size, 1.0)
            kinds = torch.where(matching.positive, matching.kind, self.classes)
            weight = logits.new_ones(self.classes + 1)
            weight[-1] = _NO_OBJECT
            kind = F.cross_entropy(logits.transpose(1, 2), kinds, weight)
            number = matching.positive.sum().clamp_min(1)
            return kind + _sets.box_loss(boxes, matching, number)
        matching = _sets.match(boxes, _price(logits), targets, size, 2.0)
        hot = F.one_hot(matching.kind, self.classes) * matching.positive[..., None]
        number = matching.positive.sum().clamp_min(1)
        return 2 * _losses.focal(logits, hot.to(logits.dtype)).sum() / number + _sets.box_loss(boxes, matching, number)

    def _read(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        named = isinstance(outputs, dict) and set(_NAMES) <= outputs.keys()
        logits, boxes = _grid.tensors([outputs[name] for name in _NAMES] if named else outputs, "detr", 2)
        _grid.check(boxes, (boxes.shape[1], 4), "detr")
        _grid.check(logits, (boxes.shape[1], self.classes + int(self.softmax)), "detr")
        return logits, boxes


def _price(logits: Tensor) -> Tensor:
    """What a class costs where it is learned by the focal loss."""
    one = torch.ones_like(logits)
    return _losses.focal(logits, one) - _losses.focal(logits, 1 - one)


class _Core(nn.Module):
    """Pictures (N, 3, H, W) to the two outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = self.model(pixel_values=x)
        return {name: getattr(outputs, name) for name in _NAMES}


class _Called(nn.Module):
    """A core that is called as the user's model is, and answers in its class; the loss is the original's own.

    Pictures of another size than the core's are refused by the core, and so is a mask that masks anything.
    """

    def __init__(self, model: Any, core: nn.Module):
        super().__init__()
        self.core, self.config = core, copy.deepcopy(model.config)
        module = sys.modules[type(model).__module__]
        names = [name for name in vars(module) if name.endswith("ObjectDetectionOutput")]
        self.answer, self.criterion = getattr(module, names[0]), model.loss_function

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: Any = None, **_: Any) -> Any:
        if pixel_mask is not None and not bool(pixel_mask.all()):
            raise InputError(
                "pixel_mask: the compressed core takes whole pictures; make the image processor stretch them "
                "to its size (do_pad=False, size={'height': ..., 'width': ...})"
            )
        outputs = self.core(pixel_values)
        logits, boxes = (outputs[name] for name in _NAMES)
        if labels is None:
            return self.answer(logits=logits, pred_boxes=boxes)
        loss, parts, _ = self.criterion(logits, labels, logits.device, boxes, self.config, None, None)
        return self.answer(loss=loss, loss_dict=parts, logits=logits, pred_boxes=boxes)
