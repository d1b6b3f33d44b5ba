"""torchvision's detectors: what their core is, and how another one is put into a copy of them.

They take a list of pictures of any size and return a list of dictionaries, or losses in training. Inside, pictures are
resized and padded to a batch; **the core** is what is then made of tensors alone: backbone, neck and head. Anchors,
decoding and suppression stay. In the copy the backbone runs the core and hands on empty maps of the right sizes, which
is all that the anchors ask of them, and the head returns what the core said.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.tasks.detector import Feed
from rarefy.tasks.detectors import _grid

Size = tuple[int, int]
GridsOf = Callable[[Size], Sequence[tuple[int, ...]]]


def is_a(model: nn.Module, name: str) -> bool:
    """Is this torchvision's detector of that name, or derived from it?"""
    return any(
        one.__name__ == name and one.__module__.startswith("torchvision.models.detection.")
        for one in type(model).__mro__
    )


def input_size(transform: Any) -> Size:
    """(H, W) that pictures are fed in: fixed, or a square in which a picture of 4 to 3 has the size that it is resized
    to."""
    if transform.fixed_size is not None:
        width, height = transform.fixed_size
        return int(height), int(width)
    least, step = max(transform.min_size), transform.size_divisible
    side = min(round(least * 4 / 3), int(transform.max_size))
    side = -(-side // step) * step
    return side, side


def feed(size: Sequence[int], fixed: bool, mean: Sequence[float], std: Sequence[float]) -> Feed:
    """As the model's transform feeds pictures; padding has the mean colour."""
    height, width = size
    red, green, blue = mean
    of_red, of_green, of_blue = std
    fill = 0.0 if fixed else (255 * red, 255 * green, 255 * blue)
    return Feed(
        (height, width), "stretch" if fixed else "letterbox", fill, mean=(red, green, blue),
        std=(of_red, of_green, of_blue), antialias=False,
    )  # fmt: skip


def grids(backbone: nn.Module, size: Size) -> list[Size]:
    """Rows and columns of each map that the backbone makes; computed without numbers."""
    tensors = {name: value.to("meta") for name, value in [*backbone.named_parameters(), *backbone.named_buffers()]}
    was_training = [(module, module.training) for module in backbone.modules()]
    try:
        backbone.eval()
        maps = torch.func.functional_call(backbone, tensors, (torch.empty((1, 3, *size), device="meta"),))
    finally:
        for module, training in was_training:
            module.training = training
    values = [maps] if isinstance(maps, Tensor) else list(maps.values())
    return [(int(one.shape[-2]), int(one.shape[-1])) for one in values]


def strides(found: Sequence[Size], size: Size) -> tuple[int, ...] | None:
    """Of grids whose sides are the input's over a stride, rounded up; None of others."""
    guess = tuple(round(size[0] / rows) for rows, _ in found)
    for powers in (guess, tuple(2 ** round(torch.tensor(float(one)).log2().item()) for one in guess)):
        if [(-(-size[0] // one), -(-size[1] // one)) for one in powers] == list(found):
            return powers
    return None


class Core(nn.Module):
    """Pictures (N, 3, H, W) to what the head says of them."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Any:
        features = self.backbone(x)
        return self.head([features] if isinstance(features, Tensor) else list(features.values()))


@dataclass
class _Answer:
    """What the core said of the batch at hand."""

    outputs: Any = None


class _Backbone(nn.Module):
    """Runs the core; returns its maps, where it has any, or empty ones."""

    def __init__(self, core: nn.Module, answer: _Answer, grids_of: GridsOf | None):
        super().__init__()
        self.core, self.answer, self.grids_of = core, answer, grids_of

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        outputs = self.answer.outputs = self.core(x)
        if self.grids_of is None:
            return OrderedDict(outputs["features"])
        sides = self.grids_of((x.shape[-2], x.shape[-1]))
        return OrderedDict((str(place), x.new_empty((len(x), 0, *side))) for place, side in enumerate(sides))


class _Head(nn.Module):
    """Returns what the core said; the loss is the original head's."""

    def __init__(self, original: nn.Module, answer: _Answer, read: Callable[[Any], Any]):
        super().__init__()
        self.original, self.answer, self.read = original, answer, read

    def forward(self, features: Sequence[Tensor]) -> Any:
        return self.read(self.answer.outputs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.compute_loss(*args, **kwargs)  # type: ignore[operator]


def around(
    model: nn.Module, core: nn.Module, grids_of: GridsOf | None, head: str = "head", read: Callable[[Any], Any] = dict
) -> nn.Module:
    """A copy of the model without the weights of its backbone and head, which the core has."""
    inner = [model.get_submodule("backbone"), model.get_submodule(head)]
    weights = [one for module in inner for one in [*module.parameters(), *module.buffers()]]
    whole = copy.deepcopy(model, {id(one): None for one in weights})
    answer = _Answer()
    owner, _, name = head.rpartition(".")
    place = whole.get_submodule(owner)
    setattr(place, name, _Head(getattr(place, name), answer, read))
    whole.backbone = _Backbone(core, answer, grids_of)
    return whole


def anchors(generator: Any) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]:
    """Sizes and aspect ratios of each map's."""
    sizes, ratios = (
        tuple(tuple(float(one) for one in part) for part in parts)
        for parts in (generator.sizes, generator.aspect_ratios)
    )
    return sizes, ratios


def normal(model: Any) -> dict[str, Any]:
    """Options ``mean`` and ``std``."""
    pairs = {"mean": model.transform.image_mean, "std": model.transform.image_std}
    return {name: tuple(float(one) for one in values) for name, values in pairs.items()}


def suppression(model: Any) -> dict[str, Any]:
    """Options ``overlap``, ``least``, ``most`` and ``candidates``."""
    return {
        "overlap": float(model.nms_thresh), "least": float(model.score_thresh),
        "most": int(model.detections_per_img), "candidates": int(model.topk_candidates),
    }  # fmt: skip


def tensors(outputs: Any, names: Sequence[str], family: str) -> list[Tensor]:
    """The outputs of these names, float32; of a runtime, which has no names, in that order."""
    found = [outputs[name] for name in names] if isinstance(outputs, dict) and set(names) <= outputs.keys() else outputs
    return _grid.tensors(found, family, len(names))
