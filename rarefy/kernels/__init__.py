"""Operators of our own, one a file: formula, reference in torch, and a Triton kernel where PyTorch has none.

Each file registers its operators under ``torch.ops.rarefy`` and lists them in its ``OPERATORS``; importing this package
registers them all, and ``OPERATORS`` here is what a loaded file may call.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import NamedTuple

import torch
from torch import fx, nn

OPERATORS: set[torch._ops.OpOverload] = set()
for _module in pkgutil.iter_modules(__path__):
    OPERATORS |= set(getattr(importlib.import_module(f"{__name__}.{_module.name}"), "OPERATORS", ()))


def is_quantised(model: nn.Module) -> bool:
    """Is it a graph that computes with codes?"""
    return isinstance(model, fx.GraphModule) and any(node.target in OPERATORS for node in model.graph.nodes)


GRID = ("scale", "zero_point", "qmin", "qmax", "dtype")  # arguments that say which codes an operator makes


class QParams(NamedTuple):
    """The grid that codes are made on. scale, zero_point: nodes that read them. value: name of the rounded value."""

    scale: fx.Node
    zero_point: fx.Node
    qmin: int
    qmax: int
    value: str


def makes_codes(node: fx.Node) -> bool:
    """Does the node round what it computes to codes (``quantize``, and every operator that yields codes)?"""
    return node.target in _GRIDS


def qparams(node: fx.Node) -> QParams:
    """The grid of the codes that a node makes. Raises ValueError for a node that makes none."""
    if not makes_codes(node):
        raise ValueError(f"{node.name}: {node.target} makes no codes")
    scale, zero_point, qmin, qmax = (
        node.args[place] if place < len(node.args) else node.kwargs[name] for name, place in _GRIDS[node.target].items()
    )
    return QParams(scale, zero_point, qmin, qmax, value_of(scale))  # type: ignore[arg-type]


def value_of(scale: fx.Node | str) -> str:
    """The value that a scale rounds: ``conv2d_3`` for ``quantization.conv2d_3.scale``, or the node that reads it."""
    name = str(scale.target if isinstance(scale, fx.Node) else scale)
    return name.removeprefix("quantization.").partition(".")[0]


def _grid_of(operator: torch._ops.OpOverload) -> dict[str, int]:
    """Name -> place of the arguments that say on which grid codes are made; empty for operators that make none."""
    schema = operator._schema
    names = [argument.name for argument in schema.arguments]
    return {name: names.index(name) for name in GRID[:4]} if set(GRID) <= set(names) else {}


_GRIDS: dict[object, dict[str, int]] = {operator: places for operator in OPERATORS if (places := _grid_of(operator))}
