"""Rewrites that leave a network's answers as they are and make it ready for few bits.

* ``fold_constants``: what follows from parameters alone (a weight that is standardised, a table of relative positions, embeddings that are
  resized) is computed and stored, so that a layer with a computed weight is a layer like any other.
* ``fold``: batch norm goes into the convolution or linear layer before it, w <- w g / sqrt(v + e), b <- (b - m) g / sqrt(v + e) + beta;
  one that stands alone (after a concatenation, say) becomes a depthwise 1x1 convolution of the same factors, which every runtime has in
  integers. Dropout goes. The result is for inference only.
* ``simplify``: one form for what can be written in several (mean over the plane is average pooling; hardswish is x hardsigmoid(x), silu
  is x sigmoid(x); attention is its two products and a softmax; as many zeros on either side are the padding of the convolution that reads them), so
  that the tables of operators stay short.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy.graph.layers import weighted
from rarefy.graph.nodes import attribute, finish, set_attribute, share_copy
from rarefy.graph.shapes import shapes
from rarefy.kernels import OPERATORS

aten = torch.ops.aten
_TRAINING_ONLY = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.detach.default,
}


def fold(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy without batch norm, dropout and detach, constants computed, that answers as ``graph`` does in eval mode."""
    graph = fold_constants(copy.deepcopy(graph))
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _TRAINING_ONLY:
            node.replace_all_uses_with(node.args[0])
        elif node.op == "call_function" and node.target is aten.batch_norm.default and node.args[3] is not None:
            _fold_batch_norm(graph, node)
    return finish(graph)


def fold_constants(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy, in eval mode, that stores what no input has a part in, and shares what it had. What comes of codes stays computed, and so does what is drawn at random."""
    graph = share_copy(graph).eval()
    constant: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and constant.issuperset(node.all_input_nodes) and _repeatable(node.target)
        ):
            constant.add(node)
    values: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node not in constant or node.op == "get_attr" or constant.issuperset(node.users):
            continue
        with torch.no_grad():
            value = _computed(graph, node, values)
        if isinstance(value, Tensor):
            owner = str(node.meta.get("stack") or "")
            with graph.graph.inserting_before(node):
                set_attribute(
                    graph,
                    name := f"{owner}.{node.name}_value".lstrip("."),
                    nn.Parameter(value.clone().contiguous(), requires_grad=False),
                )
                stored = graph.graph.get_attr(name)
            stored.meta = dict(node.meta)
            node.replace_all_uses_with(stored)
        elif isinstance(value, (int, float, bool)):
            numbers = {node: value}
            for user in list(node.users):
                user.args, user.kwargs = fx.map_arg(
                    (user.args, user.kwargs), lambda source, numbers=numbers: numbers.get(source, source)
                )  # type: ignore[misc]
    return finish(graph)


def _repeatable(target: Any) -> bool:
    return target not in OPERATORS and torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ())


def _computed(graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node that depends on stored tensors only."""
    waiting = [node]
    while waiting:
        one = waiting[-1]
        missing = [source for source in one.all_input_nodes if source not in values]
        waiting += missing
        if missing:
            continue
        waiting.pop()
        if one.op == "get_attr":
            values[one] = attribute(graph, one)
        elif one not in values:
            args, kwargs = fx.map_arg((one.args, one.kwargs), values.__getitem__)
            values[one] = one.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


def _fold_batch_norm(graph: fx.GraphModule, node: fx.Node) -> None:
    source, *parameters = node.args[:5]
    tensors: list[Any] = [None if value is None else attribute(graph, value).detach() for value in parameters]
    gamma, beta, mean, variance = tensors
    factor = torch.rsqrt(variance.double() + float(node.args[7]))  # type: ignore[arg-type]
    factor = factor if gamma is None else factor * gamma.double()
    shift = -mean.double() * factor if beta is None else beta.double() - mean.double() * factor
    assert isinstance(source, fx.Node)
    name = str(parameters[2].target).rpartition(".")[0]
    if weighted(source) and len(source.users) == 1:
        weight = attribute(graph, source.args[1])
        bias = attribute(graph, source.args[2]) if len(source.args) > 2 and source.args[2] is not None else None
        wide = weight.detach().double() * factor.view(-1, *[1] * (weight.dim() - 1))
        moved = shift if bias is None else shift + bias.detach().double() * factor
        put(graph, source, wide.to(weight.dtype), moved.to(weight.dtype))
        node.replace_all_uses_with(source)
    elif _rank(graph, node) == 4:
        channels = len(mean)
        with graph.graph.inserting_before(node):
            weight = _stored(graph, f"{name}.scale.weight", factor.to(mean.dtype).view(-1, 1, 1, 1))
            bias = _stored(graph, f"{name}.scale.bias", shift.to(mean.dtype))
            alone = graph.graph.call_function(
                aten.conv2d.default, (source, weight, bias, [1, 1], [0, 0], [1, 1], channels)
            )
        alone.meta["stack"] = name
        node.replace_all_uses_with(alone)


def _rank(graph: fx.GraphModule, node: fx.Node) -> int:
    return len(shapes(graph)[node].shape)


def put(graph: fx.GraphModule, node: fx.Node, weight: Tensor, bias: Tensor) -> None:
    """Give a weighted node these tensors as parameters of its own (a weight that other nodes read as well stays as it is for them)."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    base = str(source.target)
    readers = [
        user for other in graph.graph.nodes if other.op == "get_attr" and other.target == base for user in other.users
    ]
    name = base if len(readers) == 1 else f"{base.rpartition('.')[0]}.{node.name}.weight".lstrip(".")
    owner = name.rpartition(".")[0]
    with graph.graph.inserting_before(node):
        new_weight = _stored(graph, name, weight)
        new_bias = _stored(graph, f"{owner}.bias" if owner else f"{name}_bias", bias)
    node.args = (node.args[0], new_weight, new_bias, *node.args[3:])


def _stored(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    set_attribute(graph, name, nn.Parameter(value))
    return graph.graph.get_attr(name)


NORM = "batch_norm"
EPS, MOMENTUM = 1e-5, 0.1


def normed(graph: fx.GraphModule) -> list[str]:
    """Names of the weights of layers that batch norm alone reads."""
    return [
        str(node.args[1].target)  # type: ignore[union-attr]
        for node in graph.graph.nodes
        if weighted(node) and len(node.users) == 1 and next(iter(node.users)).target is aten.batch_norm.default
    ]
