"""Rules: which labels an operator ties, one row an operator (``RULES`` at the end of the file).

* An operator that only moves values (view, permute, cat, chunk, slice, ...) runs *as it is* on each layer of labels.
* One that computes ties what must leave together: the inputs of a convolution with axis 1 of its weight, two summands
  with each other. Products are einsums (``contraction.py``).
* One that takes a statistic (layer norm, a mean over channels) takes it over what is kept; it is noted in
  ``statistics``, because for it masking is not removal (``reductions.py``).

A rule takes the labels so far, the node and its arguments by name, and returns the ``Value`` (or list of them) the node
yields, or ``Unknown``. Given up: a convolution loses the same channels in every group, never whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from rarefy.graph.nodes import argument, attribute, operator_name
from rarefy.pruning.groups.contraction import attention, einsum, linear, matmul
from rarefy.pruning.groups.labels import (
    Arguments,
    Carried,
    Trace,
    Unknown,
    Value,
    along,
    blank,
    compact,
    replaced,
    values_in,
)
from rarefy.pruning.groups.recurrent import recurrent, recurrent_cell
from rarefy.pruning.groups.reductions import (
    cosine,
    extreme,
    gathered,
    mixed,
    place_of,
    reduced,
    results,
    unpooled,
    windowed,
)

aten = torch.ops.aten

Rule = Callable[[Trace, fx.Node, Arguments], Carried]


def pointwise(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    shape = trace.shape(node)
    operands = [value for value in a.values() if isinstance(value, Value)]
    if len(operands) == 1 and operands[0].shape == shape:
        return Value(shape, list(operands[0].layers))
    return Value(shape, trace.meet(operands, len(shape)))


def _extreme_or_pointwise(trace: Trace, node: fx.Node, a: Arguments) -> Carried:
    """max and min are of an axis, or of two tensors."""
    return pointwise(trace, node, a) if "other" in a else extreme(trace, node, a)


def _first(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """Elementwise in the first argument; the others are no part of the result."""
    value = next(iter(a.values()))
    return Value(trace.shape(node), list(value.layers))


def _moves(trace: Trace, node: fx.Node, a: Arguments) -> Carried:
    """The operator itself, on each layer as if it were the tensor."""
    source = a["self"] if "self" in a else a.get("input")
    if not isinstance(source, Value):
        return Unknown
    rest = {name: value for name, value in a.items() if value is not source}
    operator: Carried = aten.reshape.default if operator_name(node) in ("view", "_unsafe_view") else node.target
    if operator is aten.reshape.default:
        rest = {"shape": rest.get("size", rest.get("shape"))}
    whole = blank(trace.shapes[node])
    sliced = a["dim"] % source.rank if operator_name(node) in ("slice", "narrow") else None
    for layer in source.layers:
        # Also where nothing is left: an empty part keeps its other axes.
        if sliced is not None and layer.shape[sliced] == 1:
            whole.layers.append(layer)
            continue
        moved = operator(layer.expand(source.shape), **rest)
        for value, part in zip(values_in(whole), moved if isinstance(whole, list) else [moved], strict=True):
            value.layers.append(compact(part))
    return whole


def _moves_as(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """view_as, reshape_as: moved into the shape of another, whose size the result follows."""
    source, other = a["self"], a["other"]
    moved = [compact(layer.expand(source.shape).reshape(other.shape)) for layer in source.layers]
    return Value(other.shape, trace.meet([Value(other.shape, trace.disjoint(moved)), other], other.rank))


def _expand(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """Axes that come to be by repetition are as free as those of a created tensor."""
    source, shape = a["self"], trace.shape(node)
    lead = len(shape) - source.rank
    asked = argument(node, "size")
    made = [
        axis
        for axis, size in enumerate(shape)
        if size > 1 and isinstance(asked[axis], int) and (axis < lead or source.shape[axis - lead] == 1)
    ]
    layers = [layer.reshape((1,) * lead + tuple(layer.shape)) for layer in source.layers]
    return Value(shape, layers + trace.created(shape, made).layers)


def _creates(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    shape = trace.shape(node)
    asked = argument(node, "size")
    return trace.created(shape, [axis for axis, size in enumerate(asked) if isinstance(size, int)])


def _constant(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """Its values say where they stand (arange, eye), so none may leave."""
    return Value(trace.shape(node))


def _cat(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    shape = trace.shape(node)
    axis = a["dim"] % len(shape)
    parts: list[Value] = [_unsqueezed(part, axis) if operator_name(node) == "stack" else part for part in a["tensors"]]
    return Value(shape, _joined(trace, [part for part in parts if part.rank == len(shape)], axis))


def _joined(trace: Trace, parts: list[Value], axis: int) -> list[Tensor]:
    """Layers along ``axis`` are joined, all others are met."""
    rank = parts[0].rank
    across = [
        Value(replaced(part.shape, axis, 1), [layer for layer in part.layers if layer.shape[axis] == 1])
        for part in parts
    ]
    layers = trace.meet(across, rank)
    labels = [trace.channel(part, axis)[0] for part in parts]
    if any(piece is not None for piece in labels):
        fixed = [torch.zeros(part.shape[axis], dtype=torch.int64) for part in parts]
        pieces = [zeros if piece is None else piece for piece, zeros in zip(labels, fixed, strict=True)]
        layers.append(along(torch.cat(pieces), axis, rank))
    return layers


def _scatter(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """slice_scatter, select_scatter: ``src`` replaces a part of ``self`` along ``dim``, and leaves as that would."""
    base, part = a["self"], a["src"]
    axis = a["dim"] % base.rank
    if operator_name(node) == "select_scatter":
        part = _unsqueezed(part, axis)
        places = range(a["index"] % base.shape[axis], a["index"] % base.shape[axis] + 1)
    else:
        places = range(*slice(a["start"], a["end"], a["step"]).indices(base.shape[axis]))
    labels, rest = trace.channel(base, axis)
    source, source_rest = trace.channel(part, axis)
    layers = trace.meet(
        [Value(replaced(base.shape, axis, 1), rest), Value(replaced(part.shape, axis, 1), source_rest)], base.rank
    )
    if places.step != 1 or labels is None:
        for own in (labels, source):
            if own is not None:
                trace.freeze(own, "written into at places that cannot move")
        return Value(base.shape, layers)
    trace.tie_or_freeze(labels[places.start : places.stop], source, "is replaced by a part whose size is fixed")
    return Value(base.shape, [*layers, along(labels, axis, base.rank)])


def _pad(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """Created elements get fresh labels; where none vary along a padded axis, the padding follows its neighbour."""
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
            created = [replaced(layer.shape, axis, max(size, 0)) for size in (before, after)]
            pieces = [trace.fresh(math.prod(shape)).reshape(shape) for shape in created]
            layer = torch.cat((pieces[0], layer, pieces[1]), axis)
        layers.append(layer)
    return Value(trace.shape(node), layers)


def _roll(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    source = a["self"]
    moved = {axis % source.rank for axis in a["dims"]} or set(range(source.rank))
    return Value(source.shape, trace.keep(source.layers, set(range(source.rank)) - moved, "rolled along that axis"))


def _index(trace: Trace, node: fx.Node, a: Arguments) -> Value | type[Unknown]:
    """``x[:, index]``: labels are looked up as the values are, if the index is a constant."""
    source = a["self"]
    single = operator_name(node) == "index_select"
    asked = argument(node, "index" if single else "indices")
    indices: list[Carried] = [None] * (a["dim"] % source.rank) + [asked] if single else list(asked)
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if any(trace.shapes[indices[axis]].dtype == torch.bool for axis in axes):
        return Unknown
    constant = all(indices[axis].op == "get_attr" for axis in axes)
    places: list[Tensor | slice] = [slice(None)] * len(indices)
    for axis in axes:
        shape = tuple(trace.shapes[indices[axis]].shape)
        places[axis] = (
            attribute(trace.graph, indices[axis]).cpu() if constant else torch.zeros(shape, dtype=torch.int64)
        )
    moved = []
    for layer in source.layers:
        if any(layer.shape[axis] > 1 for axis in axes) and (len(axes) > 1 or not constant):
            trace.freeze(layer, "looked up by an index that is not one constant")
        else:
            moved.append(compact(layer.expand(source.shape)[tuple(places)]))
    return Value(trace.shape(node), moved)


def _embedding(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    weight, shape = a["weight"], trace.shape(node)
    for layer in weight.layers:
        if layer.shape[0] > 1:
            trace.freeze(layer, "rows of a table looked up by the input")
    trace.note_layer(argument(node, "weight"), 1)
    own = [along(layer.reshape(-1), len(shape) - 1, len(shape)) for layer in weight.layers if layer.shape[0] == 1]
    return Value(shape, [*(layer.unsqueeze(-1) for layer in a["indices"].layers), *own])


def _convolution(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """weight (out, in / groups, ...): the same positions in each group.

    Depthwise: output o follows input o // multiplier.
    """
    source, weight, groups = a["input"], a["weight"], a["groups"]
    axis = source.rank - weight.rank + 1
    labels, rest = trace.channel(source, axis)
    rest = trace.keep(rest, [*range(axis), *_pointwise_axes(a, weight, axis)], "a spatial axis of a convolution")
    out, _ = trace.channel(weight, 0)
    inner, kernel = trace.channel(weight, 1)
    _freeze_kernel(trace, kernel)
    trace.note_layer(argument(node, "weight"), 0)
    outputs, inputs = weight.shape[0], source.shape[axis]
    if groups > 1 and inputs == groups:
        followed = labels.repeat_interleave(outputs // groups) if labels is not None else None
        trace.tie_or_freeze(out, followed, "follows an input that is fixed")
    elif groups > 1:
        blocks = labels.reshape(groups, -1) if labels is not None else None
        trace.tie_or_freeze(inner[None] if inner is not None else None, blocks, "follows an input that is fixed")
        if out is not None and outputs > groups:
            out_blocks = out.reshape(groups, -1)
            trace.tie(out_blocks, out_blocks[:1])
        elif out is not None:
            trace.freeze(out, "one output a group")
    else:
        trace.tie_or_freeze(inner, labels, "follows an input that is fixed")
    return _convolved(trace, node, a, out, rest)


def _pointwise_axes(a: Arguments, weight: Value, axis: int) -> list[int]:
    """Spatial axes along which a convolution takes each place by itself: a kernel of 1, steps of 1, no padding."""
    steps, padding = a["stride"], a["padding"]
    found = []
    for index, size in enumerate(weight.shape[2:]):
        step, pad = (
            values[index % len(values)] if isinstance(values, (list, tuple)) else values for values in (steps, padding)
        )
        if size == 1 and step == 1 and (pad == 0 or isinstance(pad, str)):
            found.append(axis + 1 + index)
    return found


def _transposed_convolution(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """weight (in, out / groups, ...)."""
    source, weight, groups = a["input"], a["weight"], a["groups"]
    axis = source.rank - weight.rank + 1
    labels, rest = trace.channel(source, axis)
    rest = trace.keep(rest, range(axis), "a spatial axis of a convolution")
    inner, _ = trace.channel(weight, 0)
    out, kernel = trace.channel(weight, 1)
    _freeze_kernel(trace, kernel)
    trace.note_layer(argument(node, "weight"), 0 if groups == source.shape[axis] and groups > 1 else 1)
    trace.tie_or_freeze(inner, labels, "follows an input that is fixed")
    if groups > 1 and inner is not None:
        if groups == source.shape[axis]:  # depthwise: an input leaves with all that is made of it
            if out is not None:
                trace.freeze(out, "the outputs of one input")
            out = inner.repeat_interleave(weight.shape[1])
        else:
            blocks = inner.reshape(groups, -1)
            trace.tie(blocks, blocks[:1])
            out = None if out is None else out.repeat(groups)
    return _convolved(trace, node, a, out, rest)


def _freeze_kernel(trace: Trace, layers: list[Tensor]) -> None:
    for layer in layers:
        if layer.shape[0] == 1:
            trace.freeze(layer, "the kernel of a convolution")


def _convolved(trace: Trace, node: fx.Node, a: Arguments, out: Tensor | None, rest: list[Tensor]) -> Value:
    """What a convolution yields. out: (channels,) labels, None if they are fixed.  rest: layers along other axes."""
    shape = trace.shape(node)
    _affine(trace, out, a["bias"])
    channels = [] if out is None else [along(out, a["input"].rank - a["weight"].rank + 1, len(shape))]
    return Value(shape, [*rest, *channels])


def _affine(trace: Trace, labels: Tensor | None, *vectors: Carried) -> None:
    """Vectors of one number a channel leave with it."""
    for vector in vectors:
        if not isinstance(vector, Value):
            continue
        if labels is None:
            trace.keep(vector.layers, (), "one number a channel, and the channels are fixed")
        else:
            trace.tie_or_freeze(trace.channel(vector, 0)[0], labels, "one number a channel")


def _batch_norm(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """Batch and instance norm: statistics of each channel alone."""
    source = a["input"]
    labels, _ = trace.channel(source, 1)
    _affine(trace, labels, *(value for name, value in a.items() if name != "input"))
    if operator_name(node) == "instance_norm":
        return Value(source.shape, trace.keep(source.layers, (0, 1), "an axis that instance norm averages over"))
    # Weight standardisation: its own statistics.
    if a["training"] is True and any(layer.shape[1] == 1 for layer in source.layers):
        trace.statistics.add(node)
    return Value(source.shape, list(source.layers))


def _layer_norm(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    source = a["input"]
    axes = range(source.rank - len(a["normalized_shape"]), source.rank)
    layers = [
        trace.only(layer, axes) if any(layer.shape[axis] > 1 for axis in axes) else layer for layer in source.layers
    ]
    vectors = [a[name] for name in ("weight", "bias") if isinstance(a.get(name), Value)]
    trace.statistics.add(node)
    return Value(source.shape, trace.meet([Value(source.shape, layers), *vectors], source.rank))


def _group_norm(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    source, groups = a["input"], a["num_groups"]
    labels, rest = trace.channel(source, 1)
    rest = trace.keep(rest, (0,), "an axis that group norm averages over")
    _affine(trace, labels, a["weight"], a["bias"])
    if labels is None:
        return Value(source.shape, rest)
    if 1 < groups < source.shape[1]:
        blocks = labels.reshape(groups, -1)
        trace.tie(blocks, blocks[:1])
    if groups < source.shape[1]:
        trace.statistics.add(node)
    return Value(source.shape, [*rest, along(labels, 1, source.rank)])


def _prelu(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    source, weight = a["self"], a["weight"]
    slope = Value(
        (weight.shape[0],) + (1,) * (source.rank - 2),
        [layer.reshape(-1, *[1] * (source.rank - 2)) for layer in weight.layers],
    )
    return Value(source.shape, trace.meet([source, slope], source.rank))


def _glu(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """glu(x) = first half times sigmoid of the second."""
    source = a["self"]
    axis, shape = a["dim"] % source.rank, trace.shape(node)
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


def _unfold(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """im2col: (n, c, h, w) -> (n, c * kh * kw, places)."""
    source, kernel = a["self"], a["kernel_size"]
    labels, rest = trace.channel(source, source.rank - 3)
    trace.keep(rest, (), "a spatial axis of a convolution")
    shape = trace.shape(node)
    size = kernel[0] * kernel[-1]
    return Value(
        shape, [along(labels.repeat_interleave(size), len(shape) - 2, len(shape))] if labels is not None else []
    )


def _fold(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """col2im: (n, c * kh * kw, places) -> (n, c, h, w); a channel leaves with all of its places in the kernel."""
    source, kernel = a["self"], a["kernel_size"]
    labels, rest = trace.channel(source, source.rank - 2)
    trace.keep(rest, (), "places that are summed into an image")
    shape = trace.shape(node)
    if labels is None:
        return Value(shape)
    blocks = labels.reshape(-1, kernel[0] * kernel[-1])
    trace.tie(blocks, blocks[:, :1])
    return Value(shape, [along(blocks[:, 0], len(shape) - 3, len(shape))])


def _spatial(trace: Trace, node: fx.Node, a: Arguments) -> Value | list[Value]:
    """Pooling and resizing mix the last axes; the batch and the channels stay apart."""
    source = next(iter(a.values()))
    lead = 1 if source.rank == 2 else source.rank - _spatial_rank(node)
    layers = trace.keep(source.layers, range(lead), "an axis that pooling or resizing mixes")
    return results(trace, node, layers)


def _sample(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """grid_sampler: (n, c, ...) looked up at places (n, ..., 2 or 3); all but the channels hangs on places.

    Where heads lie in the batch, each has places of its own, so that all of them stay, and lose the same channels.
    """
    trace.keep(a["grid"].layers, (), "places at which an image is looked up")
    return Value(trace.shape(node), trace.keep(a["input"].layers, (1,), "an axis that is looked up by place"))


def _spatial_rank(node: fx.Node) -> int:
    name = operator_name(node)
    return next((int(name[index - 1]) for index in range(len(name), 0, -1) if name[index - 1] in "123"), 2)


def _unsqueezed(part: Value, axis: int) -> Value:
    shape = (*part.shape[:axis], 1, *part.shape[axis:])
    return Value(shape, [layer.unsqueeze(axis) for layer in part.layers])


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "view _unsafe_view reshape permute transpose t swapaxes swapdims movedim moveaxis numpy_T mT adjoint "
            "chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split slice select narrow "
            "flatten unflatten squeeze unsqueeze unbind "
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
    **dict.fromkeys(
        "masked_fill expand_as floor_divide where clamp __and__ __or__ __xor__ __iand__ __ior__ __ixor__".split(),
        pointwise,
    ),
    **dict.fromkeys(("view_as", "reshape_as"), _moves_as),
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    **dict.fromkeys("new_zeros new_ones new_full new_empty zeros ones full empty".split(), _creates),
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
            "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
            "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
            "upsample_nearest1d upsample_nearest2d upsample_bilinear2d "
            "upsample_linear1d upsample_bicubic2d upsample_trilinear3d upsample_nearest3d "
            "reflection_pad2d replication_pad2d "
            "_upsample_bicubic2d_aa _upsample_bilinear2d_aa "
            "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d"
        ).split(),
        _spatial,
    ),
    **dict.fromkeys(
        (
            "mean sum nansum nanmean prod amax amin aminmax var std var_mean std_mean linalg_vector_norm norm "
            "logsumexp any all count_nonzero quantile nanquantile"
        ).split(),
        reduced,
    ),
    **dict.fromkeys("max min median nanmedian mode".split(), _extreme_or_pointwise),
    **dict.fromkeys(("argmax", "argmin"), place_of),
    "cosine_similarity": cosine,
    **dict.fromkeys(
        (
            "softmax _softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp "
            "sort argsort topk kthvalue msort diff"
        ).split(),
        mixed,
    ),
    "unfold": windowed,
    **dict.fromkeys(("gather", "take_along_dim"), gathered),
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), unpooled),
    **dict.fromkeys(("gru", "lstm", "rnn_tanh", "rnn_relu"), recurrent),
    **dict.fromkeys(("gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell"), recurrent_cell),
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "addmm", "baddbmm"), matmul),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
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
    return rule in _MOVING or (
        rule is _pad and (operator_name(node) == "constant_pad_nd" or argument(node, "mode") == "constant")
    )
