"""Ties: which labels an operator ties, one row an operator (``RULES`` at the end of the file).

* An operator that only moves values (view, permute, cat, chunk, slice, ...) runs *as it is* on each layer of labels.
* One that computes ties what must leave together: the inputs of a convolution with axis 1 of its weight, two summands with each other.
* One that takes a statistic (layer norm, a mean over channels) takes it over what is kept; it is noted in ``statistics``, because for it
  masking is not removal.

A rule takes the labels so far, the node and its arguments by name, and returns the ``Value`` (or list of them) the node yields, or
``Unknown``.
Given up: a convolution loses the same channels in every group, never whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.graph.macs import einsum_letters
from rarefy.graph.nodes import attribute, is_tensor, operator_name
from rarefy.pruning.groups.labels import Trace, Value, along, axes_of, compact

aten = torch.ops.aten

Rule = Callable[[Trace, fx.Node, dict[str, Any]], Any]


class Unknown:
    """What a rule returns when it cannot describe this use of its operator."""


def blank(result: Any) -> Any:
    if is_tensor(result):
        return Value(tuple(result.shape))
    if isinstance(result, (list, tuple)):
        return [blank(item) for item in result]
    return result


def pointwise(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    shape = tuple(trace.found[node].shape)
    operands = [value for value in a.values() if isinstance(value, Value)]
    if len(operands) == 1 and operands[0].shape == shape:
        return Value(shape, list(operands[0].layers))
    return Value(shape, trace.meet(operands, len(shape)))


def _first(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """Elementwise in the first argument; the others are no part of the result."""
    value = next(iter(a.values()))
    return Value(tuple(trace.found[node].shape), list(value.layers))


def _moves(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Any:
    """The operator itself, on each layer as if it were the tensor."""
    source = a["self"] if "self" in a else a.get("input")
    if not isinstance(source, Value):
        return Unknown
    rest = {name: value for name, value in a.items() if value is not source}
    target = aten.reshape.default if operator_name(node) in ("view", "_unsafe_view") else node.target
    if target is aten.reshape.default:
        rest = {"shape": rest.get("size", rest.get("shape"))}
    result = trace.found[node]
    whole = blank(result)
    sliced = a["dim"] % source.rank if operator_name(node) in ("slice", "narrow") else None
    for layer in source.layers:
        if (
            sliced is not None and layer.shape[sliced] == 1
        ):  # also where nothing is left: an empty part keeps its other axes
            whole.layers.append(layer)
            continue
        full = layer.expand(source.shape)
        moved = target(full, **rest)  # type: ignore[operator]
        if isinstance(whole, list):
            for value, part in zip(whole, moved, strict=True):
                value.layers.append(compact(part))
        else:
            whole.layers.append(compact(moved))
    return whole


def _moves_as(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """view_as, reshape_as: moved into the shape of another, whose size the result follows."""
    source, other = a["self"], a["other"]
    moved = [compact(layer.expand(source.shape).reshape(other.shape)) for layer in source.layers]
    return Value(other.shape, trace.meet([Value(other.shape, trace.disjoint(moved)), other], other.rank))


def _expand(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """Axes that come to be by repetition are as free as those of a created tensor."""
    source, shape = a["self"], tuple(trace.found[node].shape)
    lead = len(shape) - source.rank
    asked: Any = node.args[1]
    made = [
        axis
        for axis, size in enumerate(shape)
        if size > 1 and isinstance(asked[axis], int) and (axis < lead or source.shape[axis - lead] == 1)
    ]
    layers = [layer.reshape((1,) * lead + tuple(layer.shape)) for layer in source.layers]
    return Value(shape, layers + trace.created(shape, made).layers)


def _creates(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    shape = tuple(trace.found[node].shape)
    asked: Any = node.args[_SIZE_ARGUMENT[operator_name(node)]]
    return trace.created(shape, [axis for axis, size in enumerate(asked) if isinstance(size, int)])


def _constant(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """Its values say where they stand (arange, eye), so none may leave."""
    return Value(tuple(trace.found[node].shape))


def _cat(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    shape = tuple(trace.found[node].shape)
    parts: list[Value] = a["tensors"]
    if operator_name(node) == "stack":
        axis = a["dim"] % len(shape)
        parts = [Value(_inserted(part.shape, axis), [layer.unsqueeze(axis) for layer in part.layers]) for part in parts]
    parts = [part for part in parts if part.rank == len(shape)]
    axis = a["dim"] % len(shape)
    return Value(shape, _joined(trace, parts, axis))


def _joined(trace: Trace, parts: list[Value], axis: int) -> list[Tensor]:
    """Layers along ``axis`` are joined, all others are met."""
    rank = parts[0].rank
    across = [
        Value(_replaced(part.shape, axis, 1), [layer for layer in part.layers if layer.shape[axis] == 1])
        for part in parts
    ]
    layers = trace.meet(across, rank)
    found = [trace.channel(part, axis)[0] for part in parts]
    if any(own is not None for own in found):
        pieces = [
            torch.zeros(part.shape[axis], dtype=torch.int64) if own is None else own
            for part, own in zip(parts, found, strict=True)
        ]
        layers.append(along(torch.cat(pieces), axis, rank))
    return layers


def _scatter(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """slice_scatter, select_scatter: ``src`` takes the place of a part of ``self`` along ``dim``, and leaves as that part would."""
    base, part = a["self"], a["src"]
    axis = a["dim"] % base.rank
    if operator_name(node) == "select_scatter":
        part = Value(_inserted(part.shape, axis), [layer.unsqueeze(axis) for layer in part.layers])
        places = range(a["index"] % base.shape[axis], a["index"] % base.shape[axis] + 1)
    else:
        places = range(*slice(a["start"], a["end"], a["step"]).indices(base.shape[axis]))
    labels, rest = trace.channel(base, axis)
    source, source_rest = trace.channel(part, axis)
    layers = trace.meet(
        [Value(_replaced(base.shape, axis, 1), rest), Value(_replaced(part.shape, axis, 1), source_rest)], base.rank
    )
    if places.step != 1 or labels is None:
        for own in (labels, source):
            if own is not None:
                trace.freeze(own, "written into at places that cannot move")
        return Value(base.shape, layers)
    _tie_or_freeze(trace, labels[places.start : places.stop], source, "is replaced by a part whose size is fixed")
    return Value(base.shape, [*layers, along(labels, axis, base.rank)])


def _pad(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """Created elements get fresh labels; where the labels do not vary along a padded axis, the padding follows its neighbour."""
    source, pad = a["self"], a["pad"]
    constant = operator_name(node) == "constant_pad_nd" or a.get("mode", "") == "constant"
    amounts = {source.rank - 1 - index: (pad[2 * index], pad[2 * index + 1]) for index in range(len(pad) // 2)}
    layers = []
    for layer in source.layers:
        for axis, (before, after) in amounts.items():
            if layer.shape[axis] == 1 or (before, after) == (0, 0):
                continue
            if not constant:
                trace.freeze(layer, "padded with its own values")
            layer = layer.narrow(axis, max(-before, 0), layer.shape[axis] + min(before, 0) + min(after, 0))
            created = [_replaced(layer.shape, axis, max(size, 0)) for size in (before, after)]
            pieces = [trace.fresh(math.prod(shape)).reshape(shape) for shape in created]
            layer = torch.cat((pieces[0], layer, pieces[1]), axis)
        layers.append(layer)
    return Value(tuple(trace.found[node].shape), layers)


def _roll(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    source = a["self"]
    moved = {axis % source.rank for axis in a["dims"]} or set(range(source.rank))
    return Value(source.shape, trace.keep(source.layers, set(range(source.rank)) - moved, "rolled along that axis"))


def _index(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value | type[Unknown]:
    """``x[:, index]``: labels are looked up as the values are, if the index is a constant."""
    source = a["self"]
    single = operator_name(node) == "index_select"
    raw: Any = node.args[2] if single else node.args[1]
    indices: list[Any] = [None] * (a["dim"] % source.rank) + [raw] if single else list(raw)
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    constants = {axis: _constant_index(trace, indices[axis]) for axis in axes}
    if any(trace.found[indices[axis]].dtype == torch.bool for axis in axes):
        return Unknown
    looked_up = {
        axis: constants[axis]
        if constants[axis] is not None
        else torch.zeros(tuple(trace.found[indices[axis]].shape), dtype=torch.int64)
        for axis in axes
    }
    moved = []
    for layer in source.layers:
        if any(layer.shape[axis] > 1 for axis in axes) and (len(axes) > 1 or constants[axes[0]] is None):
            trace.freeze(layer, "looked up by an index that is not one constant")
            continue
        full = layer.expand(source.shape)
        moved.append(
            compact(full[tuple(looked_up[axis] if axis in looked_up else slice(None) for axis in range(len(indices)))])
        )
    return Value(tuple(trace.found[node].shape), moved)


def _constant_index(trace: Trace, node: fx.Node) -> Tensor | None:
    return attribute(trace.graph, str(node.target)).cpu() if node.op == "get_attr" else None


def _embedding(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    weight, shape = a["weight"], tuple(trace.found[node].shape)
    for layer in weight.layers:
        if layer.shape[0] > 1:
            trace.freeze(layer, "rows of a table looked up by the input")
    _made_by(trace, node.args[0], 1)
    return Value(
        shape, [along(layer.reshape(-1), len(shape) - 1, len(shape)) for layer in weight.layers if layer.shape[0] == 1]
    )


def _made_by(trace: Trace, weight: Any, axis: int) -> None:
    """Note the parameter a layer's weight comes from, directly or through a standardisation that keeps its shape."""
    source = weight
    while isinstance(source, fx.Node) and source.op == "call_function" and source.args:
        source = source.args[0]
    if (
        isinstance(source, fx.Node)
        and source.op == "get_attr"
        and trace.found[source].shape == trace.found[weight].shape
    ):
        trace.outputs[id(attribute(trace.graph, str(source.target)))] = axis


def _convolution(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """weight (out, in / groups, ...): the same positions in each group; depthwise: output o follows input o // multiplier."""
    source, weight, groups = a["input"], a["weight"], a["groups"]
    shape = tuple(trace.found[node].shape)
    axis = source.rank - weight.rank + 1
    labels, rest = trace.channel(source, axis)
    rest = trace.keep(rest, [*range(axis), *_pointwise_axes(a, weight, axis)], "a spatial axis of a convolution")
    out, _ = trace.channel(weight, 0)
    inner, kernel = trace.channel(weight, 1)
    for layer in kernel:
        if layer.shape[0] == 1:
            trace.freeze(layer, "the kernel of a convolution")
    _made_by(trace, node.args[1], 0)
    outputs, inputs = weight.shape[0], source.shape[axis]
    if groups > 1 and inputs == groups:
        followed = labels.repeat_interleave(outputs // groups) if labels is not None else None
        _tie_or_freeze(trace, out, followed, "follows an input that is fixed")
    elif groups > 1:
        blocks = labels.reshape(groups, -1) if labels is not None else None
        _tie_or_freeze(trace, inner[None] if inner is not None else None, blocks, "follows an input that is fixed")
        if out is not None and outputs > groups:
            out_blocks = out.reshape(groups, -1)
            trace.tie(out_blocks, out_blocks[:1])
        elif out is not None:
            trace.freeze(out, "one output a group")
    else:
        _tie_or_freeze(trace, inner, labels, "follows an input that is fixed")
    layers = list(rest)
    if out is not None:
        _affine(trace, out, a["bias"])
        layers.append(along(out, axis, len(shape)))
    elif isinstance(a["bias"], Value):
        trace.keep(a["bias"].layers, (), "one number a channel, and the channels are fixed")
    return Value(shape, layers)


def _pointwise_axes(a: dict[str, Any], weight: Value, axis: int) -> list[int]:
    """Spatial axes along which a convolution takes each place by itself: a kernel of 1, in steps of 1, with no padding."""
    steps, padding = a["stride"], a["padding"]
    found = []
    for index, size in enumerate(weight.shape[2:]):
        step, pad = (
            values[index % len(values)] if isinstance(values, (list, tuple)) else values for values in (steps, padding)
        )
        if size == 1 and step == 1 and (pad == 0 or isinstance(pad, str)):
            found.append(axis + 1 + index)
    return found


def _transposed_convolution(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """weight (in, out / groups, ...)."""
    source, weight, groups = a["input"], a["weight"], a["groups"]
    shape = tuple(trace.found[node].shape)
    axis = source.rank - weight.rank + 1
    labels, rest = trace.channel(source, axis)
    rest = trace.keep(rest, range(axis), "a spatial axis of a convolution")
    inner, _ = trace.channel(weight, 0)
    out, kernel = trace.channel(weight, 1)
    for layer in kernel:
        if layer.shape[0] == 1:
            trace.freeze(layer, "the kernel of a convolution")
    _made_by(trace, node.args[1], 1)
    _tie_or_freeze(trace, inner, labels, "follows an input that is fixed")
    if groups > 1 and inner is not None:
        blocks = inner.reshape(groups, -1)
        if groups == source.shape[axis] and weight.shape[1] == 1:
            out = inner
        elif groups == source.shape[axis]:
            trace.freeze(inner, "the groups of a transposed convolution")
            out = None if out is None else out.repeat(groups)
        else:
            trace.tie(blocks, blocks[:1])
            out = None if out is None else out.repeat(groups)
    layers = list(rest)
    if out is not None:
        _affine(trace, out, a["bias"])
        layers.append(along(out, axis, len(shape)))
    elif isinstance(a["bias"], Value):
        trace.keep(a["bias"].layers, (), "one number a channel, and the channels are fixed")
    return Value(shape, layers)


def _tie_or_freeze(trace: Trace, one: Tensor | None, other: Tensor | None, why: str) -> None:
    if one is not None and other is not None:
        trace.tie(one, other)
    elif one is not None or other is not None:
        trace.freeze(one if one is not None else other, why)  # type: ignore[arg-type]


def _affine(trace: Trace, labels: Tensor, *vectors: Any) -> None:
    """Vectors of one number a channel leave with it."""
    for vector in vectors:
        if isinstance(vector, Value):
            _tie_or_freeze(trace, trace.channel(vector, 0)[0], labels, "one number a channel")


def _batch_norm(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """Batch and instance norm: statistics of each channel alone."""
    source = a["input"]
    labels, _ = trace.channel(source, 1)
    vectors = [value for name, value in a.items() if name != "input" and isinstance(value, Value)]
    if labels is not None:
        _affine(trace, labels, *vectors)
    else:
        for vector in vectors:
            trace.keep(vector.layers, (), "one number a channel, and the channels are fixed")
    if operator_name(node) == "instance_norm":
        return Value(source.shape, trace.keep(source.layers, (0, 1), "an axis that instance norm averages over"))
    if a["training"] is True and any(
        layer.shape[1] == 1 for layer in source.layers
    ):  # weight standardisation: its own statistics
        trace.statistics.add(node)
    return Value(source.shape, list(source.layers))


def _layer_norm(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    source = a["input"]
    axes = range(source.rank - len(a["normalized_shape"]), source.rank)
    layers = [
        trace.only(layer, axes) if any(layer.shape[axis] > 1 for axis in axes) else layer for layer in source.layers
    ]
    vectors = [a[name] for name in ("weight", "bias") if isinstance(a.get(name), Value)]
    trace.statistics.add(node)
    return Value(source.shape, trace.meet([Value(source.shape, layers), *vectors], source.rank))


def _group_norm(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    source, groups = a["input"], a["num_groups"]
    labels, rest = trace.channel(source, 1)
    rest = trace.keep(rest, (0,), "an axis that group norm averages over")
    vectors = [a[name] for name in ("weight", "bias") if isinstance(a[name], Value)]
    if labels is None:
        for vector in vectors:
            trace.keep(vector.layers, (), "one number a channel, and the channels are fixed")
        return Value(source.shape, rest)
    _affine(trace, labels, *vectors)
    if 1 < groups < source.shape[1]:
        blocks = labels.reshape(groups, -1)
        trace.tie(blocks, blocks[:1])
    if groups < source.shape[1]:
        trace.statistics.add(node)
    return Value(source.shape, [*rest, along(labels, 1, source.rank)])


def _prelu(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    source, weight = a["self"], a["weight"]
    slope = Value(
        (weight.shape[0],) + (1,) * (source.rank - 2),
        [layer.reshape(-1, *[1] * (source.rank - 2)) for layer in weight.layers],
    )
    return Value(source.shape, trace.meet([source, slope], source.rank))


def _glu(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """glu(x) = first half times sigmoid of the second."""
    source = a["self"]
    axis, shape = a["dim"] % source.rank, tuple(trace.found[node].shape)
    halves = [
        Value(
            shape,
            [
                compact(layer.narrow(axis, start, shape[axis]) if layer.shape[axis] > 1 else layer)
                for layer in source.layers
            ],
        )
        for start in (0, shape[axis])
    ]
    return Value(shape, trace.meet(halves, source.rank))


def _unfold(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """im2col: (n, c, h, w) -> (n, c * kh * kw, places)."""
    source, kernel = a["self"], a["kernel_size"]
    labels, rest = trace.channel(source, source.rank - 3)
    trace.keep(rest, (), "a spatial axis of a convolution")
    shape = tuple(trace.found[node].shape)
    size = kernel[0] * kernel[-1]
    return Value(
        shape, [along(labels.repeat_interleave(size), len(shape) - 2, len(shape))] if labels is not None else []
    )


def _fold(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """col2im: (n, c * kh * kw, places) -> (n, c, h, w); a channel leaves with all of its places in the kernel."""
    source, kernel = a["self"], a["kernel_size"]
    labels, rest = trace.channel(source, source.rank - 2)
    trace.keep(rest, (), "places that are summed into an image")
    shape = tuple(trace.found[node].shape)
    if labels is None:
        return Value(shape)
    blocks = labels.reshape(-1, kernel[0] * kernel[-1])
    trace.tie(blocks, blocks[:, :1])
    return Value(shape, [along(blocks[:, 0], len(shape) - 3, len(shape))])


def _spatial(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value | list[Value]:
    """Pooling and resizing mix the last axes; the batch and the channels stay apart."""
    source = next(iter(a.values()))
    lead = 1 if source.rank == 2 else source.rank - _spatial_rank(node)
    layers = trace.keep(source.layers, range(lead), "an axis that pooling or resizing mixes")
    result = trace.found[node]
    if isinstance(result, (list, tuple)):
        return [Value(tuple(item.shape), list(layers)) for item in result]
    return Value(tuple(result.shape), layers)


def _sample(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """grid_sampler: (n, c, ...) looked up at places (n, ..., 2 or 3); all but the channels hangs on places."""
    trace.keep(a["grid"].layers, (0,), "places at which an image is looked up")
    return Value(
        tuple(trace.found[node].shape), trace.keep(a["input"].layers, (0, 1), "an axis that is looked up by place")
    )


def _spatial_rank(node: fx.Node) -> int:
    name = operator_name(node)
    return next((int(name[index - 1]) for index in range(len(name), 0, -1) if name[index - 1] in "123"), 2)


def _reduces(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value | list[Value]:
    """Sums, means, norms, maxima: over a pruned axis they run over what is kept.

    Of blocks, summed as they stand (branches), the same is kept in each, and so in the sum; of dims of heads the same dims, or whole heads.
    """
    source = a["self"]
    dim = a.get("dim")
    axes = [axis % max(source.rank, 1) for axis in ([dim] if isinstance(dim, int) else dim or range(source.rank))]
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
    result = trace.found[node]
    if isinstance(result, (list, tuple)):
        return [Value(tuple(item.shape), list(layers)) for item in result]
    return Value(tuple(result.shape), layers)


def _size(layer: Tensor, axes: Sequence[int]) -> int:
    return math.prod(layer.shape[axis] for axis in axes)


def _mixes(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """softmax, cumsum: each result depends on the whole of one axis, which therefore stays."""
    source = a["self"]
    others = set(range(source.rank)) - {a["dim"] % source.rank}
    return Value(source.shape, trace.keep(source.layers, others, f"{operator_name(node)} runs over it"))


def _linear(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    source, weight, bias = a["input"], a["weight"], a["bias"]
    shape = tuple(trace.found[node].shape)
    lead = [f"lead{axis}" for axis in range(source.rank - 1)]
    _made_by(trace, node.args[1], 0)
    layers = _contract(
        trace, [source, weight], [[*lead, "in"], ["out", "in"][2 - weight.rank :]], [*lead, "out"][: len(shape)]
    )
    if bias is not None:
        layers = trace.meet([Value(shape, layers), bias], len(shape))
    return Value(shape, layers)


def _matmul(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """matmul, mm, bmm, mv; addmm and baddbmm add ``self``."""
    shape = tuple(trace.found[node].shape)
    factors = [a[name] for name in ("mat1", "batch1", "self", "other", "mat2", "batch2", "vec") if name in a]
    added = [a["self"]] if "mat1" in a or "batch1" in a else []
    left, right = [factor for factor in factors if not any(factor is value for value in added)]
    lead = max(left.rank, right.rank, 2) - 2
    names = [f"batch{index}" for index in range(lead)]
    one = [*names[lead - max(left.rank - 2, 0) :], "rows", "inner"] if left.rank > 1 else ["inner"]
    two = [*names[lead - max(right.rank - 2, 0) :], "inner", "columns"] if right.rank > 1 else ["inner"]
    out = [*names, *(["rows"] if left.rank > 1 else []), *(["columns"] if right.rank > 1 else [])]
    layers = _contract(trace, [left, right], [one, two], out)
    if added:
        layers = trace.meet([Value(shape, layers), *added], len(shape))
    return Value(shape, layers)


def _einsum(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value | type[Unknown]:
    operands: list[Value] = a["tensors"]
    letters, out = einsum_letters(a["equation"], [value.rank for value in operands])
    if any(len(set(names)) < len(names) for names in letters):
        return Unknown
    return Value(tuple(trace.found[node].shape), _contract(trace, operands, letters, out))


def _attention(trace: Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """softmax(q k' / sqrt(d)) v, as the two products it is."""
    query, key, value = a["query"], a["key"], a["value"]
    if a.get("enable_gqa") and query.rank > 3 and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (
            Value(
                _replaced(part.shape, part.rank - 3, query.shape[-3]),
                [layer.repeat_interleave(repeats, -3) if layer.shape[-3] > 1 else layer for layer in part.layers],
            )
            for part in (key, value)
        )
    lead = [f"batch{index}" for index in range(query.rank - 2)]
    scores_shape = (*query.shape[:-1], key.shape[-2])
    products = _contract(
        trace, [query, key], [[*lead, "rows", "inner"], [*lead, "keys", "inner"]], [*lead, "rows", "keys"]
    )
    scores = Value(scores_shape, products)
    if isinstance(a["attn_mask"], Value):
        scores = Value(scores_shape, trace.meet([scores, a["attn_mask"]], len(scores_shape)))
    for layer in scores.layers:
        if layer.shape[-1] > 1:
            trace.freeze(layer, "softmax runs over it")
    scores.layers = [layer for layer in scores.layers if layer.shape[-1] == 1]
    layers = _contract(
        trace, [scores, value], [[*lead, "rows", "keys"], [*lead, "keys", "columns"]], [*lead, "rows", "columns"]
    )
    return Value(tuple(trace.found[node].shape), layers)


def _contract(trace: Trace, operands: list[Value], letters: list[list[str]], out: list[str]) -> list[Tensor]:
    """Layers of an einsum. Labels of a letter are met; those of summed letters leave the sum together and the result does not see them.

    A layer along a summed and another letter (dims of heads) is tied across the other: the same dims leave each head. With ``whole_heads`` it is
    tied across the summed one, if all operands have the other: whole heads leave, and the result sees them. Likewise where each factor keeps an axis of
    its own beside the heads (k' v of linear attention).
    """
    names = [*out, *sorted({letter for own in letters for letter in own} - set(out))]
    summed = [index for index, letter in enumerate(names) if letter not in out]
    shared = [
        index
        for index, letter in enumerate(names)
        if index not in summed
        and all(
            letter in own and value.shape[own.index(letter)] > 1 for value, own in zip(operands, letters, strict=True)
        )
    ]
    spread = []
    for value, own in zip(operands, letters, strict=True):
        order = sorted(range(len(own)), key=lambda axis: names.index(own[axis]))
        place = [names.index(own[axis]) for axis in order]

        def placed(sizes: Sequence[int], order: list[int] = order, place: list[int] = place) -> list[int]:
            full = [1] * len(names)
            for axis, index in zip(order, place, strict=True):
                full[index] = sizes[axis]
            return full

        layers = []
        for layer in value.layers:
            layer = layer.permute(order).reshape(placed(layer.shape))
            inner = [axis for axis in axes_of(layer) if axis in summed]
            outer = [axis for axis in axes_of(layer) if axis in shared] if trace.whole_heads and inner else []
            layers.append(trace.only(layer, outer or inner) if inner else layer)
        spread.append(Value(tuple(placed(value.shape)), layers))
    met = trace.meet(_apart(trace, spread), len(names))
    return [layer.squeeze(tuple(summed)) for layer in met if not any(layer.shape[axis] > 1 for axis in summed)]


def _apart(trace: Trace, factors: list[Value]) -> list[Value]:
    """Layers of several factors along a common axis, each along one of its own too, leave one of both: met, they would tie everything."""

    def own(value: Value, layer: Tensor) -> list[int]:
        return [axis for axis in axes_of(layer) if all(other is value or other.shape[axis] == 1 for other in factors)]

    result = []
    for value in factors:
        layers = []
        for layer in value.layers:
            mine = own(value, layer)
            common = [axis for axis in axes_of(layer) if axis not in mine]
            crossed = any(
                own(other, one) and set(axes_of(one)) & set(common)
                for other in factors
                if other is not value
                for one in other.layers
            )
            layers.append(trace.only(layer, common if trace.whole_heads else mine) if mine and crossed else layer)
        result.append(Value(value.shape, layers))
    return result


def _inserted(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis:])


def _replaced(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


# The place of the sizes among the arguments of operators that create a tensor.
_SIZE_ARGUMENT = {
    "new_zeros": 1,
    "new_ones": 1,
    "new_full": 1,
    "new_empty": 1,
    "zeros": 0,
    "ones": 0,
    "full": 0,
    "empty": 0,
}

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "view _unsafe_view reshape permute transpose t swapaxes swapdims movedim moveaxis numpy_T mT adjoint chunk split "
            "split_with_sizes tensor_split unsafe_chunk unsafe_split slice select narrow flatten unflatten squeeze unsqueeze unbind "
            "flip repeat tile repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle"
        ).split(),
        _moves,
    ),
    **dict.fromkeys(
        "to _to_copy type_as contiguous alias detach zeros_like ones_like full_like empty_like zero fill".split(),
        _first,
    ),
    **dict.fromkeys(
        "hardswish log_sigmoid dropout feature_dropout alpha_dropout feature_alpha_dropout rrelu hardshrink".split(),
        _first,
    ),
    **dict.fromkeys("masked_fill expand_as floor_divide where clamp".split(), pointwise),
    **dict.fromkeys(("view_as", "reshape_as"), _moves_as),
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    **dict.fromkeys(_SIZE_ARGUMENT, _creates),
    **dict.fromkeys("arange eye linspace scalar_tensor tril_indices triu_indices".split(), _constant),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _cat),
    **dict.fromkeys(("slice_scatter", "select_scatter"), _scatter),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "roll": _roll,
    **dict.fromkeys(("index", "index_select"), _index),
    "embedding": _embedding,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    **dict.fromkeys(("batch_norm", "instance_norm"), _batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "group_norm": _group_norm,
    "prelu": _prelu,
    "glu": _glu,
    "im2col": _unfold,
    "col2im": _fold,
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), _sample),
    **dict.fromkeys(
        (
            "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d "
            "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
            "upsample_nearest1d upsample_nearest2d upsample_bilinear2d "
            "upsample_linear1d upsample_bicubic2d upsample_trilinear3d upsample_nearest3d reflection_pad2d replication_pad2d "
            "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d"
        ).split(),
        _spatial,
    ),
    **dict.fromkeys(
        "mean sum prod amax amin var std linalg_vector_norm norm logsumexp var_mean std_mean any all".split(), _reduces
    ),
    **dict.fromkeys("softmax _softmax log_softmax cumsum cumprod softmin".split(), _mixes),
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "addmm", "baddbmm"), _matmul),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}

_MOVING = {_moves, _moves_as, _expand, _cat, _scatter, _roll, _index}


def rule_of(node: fx.Node) -> Rule | None:
    """The row of the node's operator; elementwise operators need none."""
    rule = RULES.get(operator_name(node))
    if rule is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        rule = pointwise
    return rule


def is_elementwise(node: fx.Node) -> bool:
    """Does each number of the result hang on those at its own place alone?"""
    return rule_of(node) in (pointwise, _first)


def only_moves(node: fx.Node) -> bool:
    """Are the numbers it yields those it reads, at other places (or the zeros of a padding)?"""
    rule = rule_of(node)
    constant = operator_name(node) == "constant_pad_nd" or len(node.args) < 3 or str(node.args[2]) == "constant"
    return rule in _MOVING or (rule is _pad and constant)
