from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from rarefy.errors import InputError

aten = torch.ops.aten
WEIGHTED = {aten.conv2d.default, aten.conv2d.padding, aten.conv1d.default, aten.linear.default}


def weighted(node: fx.Node) -> bool:
    """A convolution or linear layer whose weight (and bias, if any) is a stored tensor."""
    if node.op != "call_function" or node.target not in WEIGHTED:
        return False
    sources = node.args[1:3]
    return all(source is None or (isinstance(source, fx.Node) and source.op == "get_attr") for source in sources)


def layer_name(node: fx.Node) -> str:
    """``layer1.0.conv1`` for the node that reads ``layer1.0.conv1.weight``."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    return str(source.target).rpartition(".")[0] or str(source.target)


def names(node: fx.Node) -> list[str]:
    """What a user may call a node by: its layer, itself, its module."""
    return [
        name for name in (layer_name(node) if weighted(node) else "", node.name, node.meta.get("stack", "")) if name
    ]


def padding_of(node: fx.Node) -> float | None:
    """What aten.pad(x, sizes, mode="constant", value=None) puts around, if that has a code: 0, or -inf where only max pooling reads it; else None."""
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    if mode != "constant":
        return None
    if value in (None, 0):
        return 0.0
    return (
        float(value)
        if value == -math.inf and all(user.target is aten.max_pool2d.default for user in node.users)
        else None
    )


def check_globs(graph: fx.GraphModule, **given: Iterable[str]) -> None:
    """Raises InputError for a glob of layer names that nothing in the graph goes by; the keyword says which option it stands in."""
    known = {name for node in graph.graph.nodes for name in names(node)}
    for option, globs in given.items():
        for glob in globs:
            if not fnmatch.filter(known, glob):
                example = next((layer_name(node) for node in graph.graph.nodes if weighted(node)), "nothing")
                raise InputError(
                    f"{option}: {glob!r} matches no layer; names look like {example}, and 'NAME.*' is all that lies in NAME"
                )
