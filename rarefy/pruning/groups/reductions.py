"""Operators that take an axis together: sums, means and extremes of it, its order, and places looked up along it.

A sum, a mean or a maximum over a pruned axis runs over what is kept; it is noted in ``statistics``, because for it
masking is not removal. Where the answer is a place along the axis (argmax), or hangs on how many there are (softmax,
cumsum, sort, the k-th value), the axis stays.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from torch import Tensor, fx

from rarefy.graph.nodes import operator_name
from rarefy.pruning.groups.labels import Arguments, Carried, Trace, Unknown, Value, axes_of, replaced


def results(trace: Trace, node: fx.Node, layers: list[Tensor]) -> Value | list[Value]:
    """The same layers for each tensor that the node yields."""
    result = trace.shapes[node]
    if isinstance(result, (list, tuple)):
        return [Value(tuple(item.shape), list(layers)) for item in result]
    return Value(tuple(result.shape), layers)


def reduced(trace: Trace, node: fx.Node, a: Arguments) -> Value | list[Value]:
    """Sums, means, norms, extremes: over a pruned axis they run over what is kept.

    Of blocks, summed as they stand (branches), the same is kept in each, and so in the sum; of dims of heads the same
    dims, or whole heads.
    """
    source = a["self"]
    axes = _axes(a, source.rank)
    layers = []
    for layer in source.layers:
        varying = axes_of(layer)
        outer = [axis for axis in varying if axis not in axes]
        if len(outer) == len(varying):
            layers.append(layer)
        elif outer and (
            trace.whole_heads or (operator_name(node) == "sum" and _size(layer, outer) > _size(layer, axes))
        ):
            layers.append(trace.only(layer, outer))
        else:
            trace.statistics.add(node)
            trace.only(layer, axes)
    if not a.get("keepdim", False):
        layers = [layer.squeeze(tuple(axes)) for layer in layers]
    return results(trace, node, layers)


def extreme(trace: Trace, node: fx.Node, a: Arguments) -> Carried:
    """max, min, median, mode along an axis, and where that stands: if somebody reads the place, the axis stays."""
    source = a["self"]
    if any(user.target is operator.getitem and user.args[1] == 1 for user in node.users):
        axes = _axes(a, source.rank)
        source = Value(source.shape, [_placed(trace, node, layer, axes) for layer in source.layers])
        source.layers = [layer for layer in source.layers if layer.numel() > 1]
    return reduced(trace, node, {**a, "self": source})


def place_of(trace: Trace, node: fx.Node, a: Arguments) -> Carried:
    """argmax, argmin: a place along an axis, which therefore stays."""
    source = a["self"]
    axes = _axes(a, source.rank)
    layers = [_placed(trace, node, layer, axes) for layer in source.layers]
    layers = [layer for layer in layers if layer.numel() > 1]
    return reduced(trace, node, {**a, "self": Value(source.shape, layers)})


def _placed(trace: Trace, node: fx.Node, layer: Tensor, axes: Sequence[int]) -> Tensor:
    """The layer along the other axes; frozen, and of one position, if it varies along ``axes`` alone."""
    outer = [axis for axis in axes_of(layer) if axis not in axes]
    if not outer:
        trace.freeze(layer, "a place along it is looked up")
    return trace.only(layer, outer)


def cosine(trace: Trace, node: fx.Node, a: Arguments) -> Carried:
    """cosine_similarity: three sums of products of two tensors."""
    one, other = a["x1"], a["x2"]
    rank = max(one.rank, other.rank)
    shape = tuple(
        max(sizes) for sizes in zip(*((1,) * (rank - each.rank) + each.shape for each in (one, other)), strict=True)
    )
    return reduced(trace, node, {"self": Value(shape, trace.meet([one, other], rank)), "dim": a["dim"]})


def mixed(trace: Trace, node: fx.Node, a: Arguments) -> Value | list[Value]:
    """softmax, cumsum, sort, topk, kthvalue: each result depends on the whole of one axis, which therefore stays."""
    source = a["self"]
    dim = a.get("dim", 0)
    if dim is None:
        return results(trace, node, trace.keep(source.layers, (), f"{operator_name(node)} runs over it"))
    axis = dim % max(source.rank, 1)
    others = set(range(source.rank)) - {axis}
    layers = trace.keep(source.layers, others, f"{operator_name(node)} runs over it")
    if operator_name(node) == "kthvalue" and not a["keepdim"]:
        layers = [layer.squeeze(axis) for layer in layers]
    return results(trace, node, layers)


def windowed(trace: Trace, node: fx.Node, a: Arguments) -> Value | list[Value]:
    """x.unfold(axis, size, step): windows of an axis, their places in a new last one."""
    source = a["self"]
    others = set(range(source.rank)) - {a["dimension"] % source.rank}
    layers = trace.keep(source.layers, others, "cut into windows along that axis")
    return results(trace, node, [layer.unsqueeze(-1) for layer in layers])


def gathered(trace: Trace, node: fx.Node, a: Arguments) -> Value | type[Unknown]:
    """gather, take_along_dim: numbers looked up along one axis, place by place of the others.

    Along these the index leaves as what is looked up does; along the axis it stands for the result.
    """
    source, index = a["self"], a["index"] if "index" in a else a["indices"]
    if a["dim"] is None or index.rank != source.rank:
        return Unknown
    axis = a["dim"] % source.rank
    shape = trace.shape(node)
    others = set(range(source.rank)) - {axis}
    layers = []
    for layer in trace.keep(source.layers, others, "places along it are looked up"):
        if all(shape[own] == source.shape[own] for own in axes_of(layer)):
            layers.append(layer)
        else:
            trace.freeze(layer, "only the first of it are looked up")
    places, rest = trace.channel(index, axis)
    met = trace.meet(
        [Value(replaced(shape, axis, 1), layers), Value(replaced(index.shape, axis, 1), rest)], source.rank
    )
    if places is not None:
        met.append(places.reshape([-1 if own == axis else 1 for own in range(source.rank)]))
    return Value(shape, met)


def unpooled(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """max_unpool: each number goes to its place in the plane; batch and channels are those of the places."""
    source, places = a["self"], a["indices"]
    lead = source.rank - len(a["output_size"])
    parts = [
        Value(part.shape, trace.keep(part.layers, range(lead), "an axis that pooling mixes"))
        for part in (source, places)
    ]
    return Value(trace.shape(node), trace.meet(parts, source.rank))


def _axes(a: Arguments, rank: int) -> list[int]:
    dim = a.get("dim")
    if isinstance(dim, int):
        return [dim % max(rank, 1)]
    return [axis % max(rank, 1) for axis in (dim or range(rank))]


def _size(layer: Tensor, axes: Sequence[int]) -> int:
    return math.prod(layer.shape[axis] for axis in axes)
