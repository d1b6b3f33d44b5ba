"""Layers: which nodes are convolutions or linear layers with stored weights, and what a user may call them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable

import torch
from torch import fx

from rarefy.errors import InputError
from rarefy.graph.nodes import argument

aten = torch.ops.aten
# Operators with a flag that says whether the module is training, and the name of that argument.
TRAINING_FLAG = {
    aten.batch_norm.default: "training",
    aten.dropout.default: "train",
    aten.feature_dropout.default: "train",
    aten.alpha_dropout.default: "train",
    aten.feature_alpha_dropout.default: "train",
    aten.lstm.input: "train",
    aten.gru.input: "train",
    aten.rnn_tanh.input: "train",
    aten.rnn_relu.input: "train",
}

CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
WEIGHTED = CONVOLUTIONS | {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, aten.linear.default}


def weighted(node: fx.Node) -> bool:
    """A convolution or linear layer whose weight (and bias, if any) is a stored tensor."""
    if node.op != "call_function" or node.target not in WEIGHTED:
        return False
    sources = (argument(node, "weight"), argument(node, "bias"))
    return all(source is None or (isinstance(source, fx.Node) and source.op == "get_attr") for source in sources)


def layer_name(node: fx.Node) -> str:
    """``layer1.0.conv1`` for the node that reads ``layer1.0.conv1.weight``."""
    name = str(argument(node, "weight").target)
    return name.rpartition(".")[0] or name


def names(node: fx.Node) -> list[str]:
    """What a user may call a node by: its layer, itself, its module."""
    return [
        name for name in (layer_name(node) if weighted(node) else "", node.name, node.meta.get("stack", "")) if name
    ]


def padding_of(node: fx.Node) -> float | None:
    """What ``aten.pad`` puts around, if that has a code (0, or -inf where only max pooling reads it), else None."""
    value = argument(node, "value")
    if argument(node, "mode") != "constant":
        return None
    if value in (None, 0):
        return 0.0
    pooled = all(user.target is aten.max_pool2d.default for user in node.users)
    return float(value) if value == -math.inf and pooled else None


def check_globs(graph: fx.GraphModule, **given: Iterable[str]) -> None:
    """Raises InputError for a glob that no layer of the graph goes by; the keyword is the option it stands in."""
    known = {name for node in graph.graph.nodes for name in names(node)}
    for option, globs in given.items():
        for glob in globs:
            if not fnmatch.filter(known, glob):
                example = next((layer_name(node) for node in graph.graph.nodes if weighted(node)), "nothing")
                raise InputError(
                    f"{option}: {glob!r} matches no layer; "
                    f"names look like {example}, and 'NAME.*' is all that lies in NAME"
                )
