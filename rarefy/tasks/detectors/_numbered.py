"""Models whose layers go by number, as they come from a yaml file: ``model.model`` is a Sequential, each layer says
where its inputs come from (``f``, ``i``), and the last is the head.

Such a model is called with another core in it by two layers alone: the core, and the user's head, whose convolutions
hand on what the core said. Nothing of the libraries is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Head = Any  # a user's module, whose attributes are known by their names
IsHead = Callable[[nn.Module], bool]


def owner_of(model: nn.Module, is_head: IsHead) -> nn.Module | None:
    """The module whose ``model`` are layers by number, the last of them the head: the user's, or one inside."""
    for module in model.modules():
        layers = getattr(module, "model", None)
        if isinstance(layers, nn.Sequential) and len(layers) and is_head(layers[-1]):
            return module
    return None


def head_of(model: nn.Module, is_head: IsHead) -> Head:
    owner = owner_of(model, is_head)
    return None if owner is None else owner.model[-1]  # type: ignore[index, operator]


def strides_of(head: Head) -> tuple[int, ...]:
    """Of its maps; none where the model was never run, which is when they are measured."""
    strides = tuple(int(stride) for stride in torch.as_tensor(head.stride).flatten().tolist())
    return strides if strides and min(strides) > 0 else ()


def side(model: nn.Module) -> int:
    """What it was trained at, where it says so."""
    said = getattr(model, "args", None)
    one = said.get("imgsz") if isinstance(said, Mapping) else getattr(said, "imgsz", None)
    return one if isinstance(one, int) and 32 <= one <= 4096 else 640


def placed(layer: nn.Module, other: nn.Module) -> None:
    """What a model that goes through its layers by number asks of each."""
    for name in ("f", "i", "type", "np"):
        if hasattr(other, name):
            setattr(layer, name, getattr(other, name))


def replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The model with another module in place of one; all others are shared."""
    if model is old:
        return new
    if not any(module is old for module in model.modules()):
        return model
    other = copy.copy(model)
    other._modules = {
        name: None if module is None else replaced(module, old, new) for name, module in model._modules.items()
    }
    return other


def without(head: nn.Module, names: tuple[str, ...]) -> Head:
    """A copy of the head in which nothing of these parts is copied."""
    weights = [
        value
        for name in names
        if isinstance(getattr(head, name, None), nn.Module)
        for value in [*getattr(head, name).parameters(), *getattr(head, name).buffers()]
    ]
    return copy.deepcopy(head, {id(value): None for value in weights})


def with_core(model: nn.Module, owner: nn.Module, core: nn.Module, last: Head, copies: int = 1) -> nn.Module:
    """The user's model, whose layers are the core and ``last``. copies: how often this gets what the core says."""
    last.f, last.i = -1, 1
    layers = copy.copy(owner)
    layers._modules = {**owner._modules, "model": nn.Sequential(_Layer(core, copies), last)}
    if hasattr(layers, "save"):
        layers.save = []  # type: ignore[assignment]
    whole = replaced(model, owner, layers)
    if getattr(whole, "predictor", None) is not None:
        whole.predictor = None  # type: ignore[assignment]
    return whole


class _Layer(nn.Module):
    """The core, as the first of a model's layers."""

    def __init__(self, core: nn.Module, copies: int):
        super().__init__()
        self.core, self.copies = core, copies
        for name, value in (("f", -1), ("i", 0), ("type", "Core"), ("np", 0)):
            setattr(self, name, value)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.core(x)) * self.copies
