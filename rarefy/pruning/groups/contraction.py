"""Contractions: products of activations and weights as the einsums they are, and what their labels tie.

The letters of the result are met, operand with operand; those of summed letters leave the sum together, and the result
does not see them. A linear layer, a matrix product and attention (two products with a softmax between them) are the
same rule with other letters.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from rarefy.graph.macs import einsum_letters
from rarefy.graph.nodes import argument
from rarefy.pruning.groups.labels import Arguments, Trace, Unknown, Value, axes_of, replaced


def contract(trace: Trace, operands: Sequence[Value], letters: list[list[str]], out: list[str]) -> list[Tensor]:
    """Layers of an einsum.

    Labels of a letter are met; those of summed letters leave the sum together and the result does not see them.

    A layer along a summed and another letter (dims of heads) is tied across the other: the same dims leave each head.
    With ``whole_heads`` it is tied across the summed one, if all operands have the other: whole heads leave, and the
    result sees them. Likewise where each factor keeps an axis of its own beside the heads (k' v of linear attention).
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
    """Layers of several factors along a common axis, each along one of its own too, leave one of both.

    Met, they would tie everything.
    """

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


def linear(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    source, weight, bias = a["input"], a["weight"], a["bias"]
    shape = trace.shape(node)
    lead = [f"lead{axis}" for axis in range(source.rank - 1)]
    trace.note_layer(argument(node, "weight"), 0)
    layers = contract(
        trace, [source, weight], [[*lead, "in"], ["out", "in"][2 - weight.rank :]], [*lead, "out"][: len(shape)]
    )
    if bias is not None:
        layers = trace.meet([Value(shape, layers), bias], len(shape))
    return Value(shape, layers)


def matmul(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """matmul, mm, bmm, mv; addmm and baddbmm add ``self``."""
    shape = trace.shape(node)
    factors = [a[name] for name in ("mat1", "batch1", "self", "other", "mat2", "batch2", "vec") if name in a]
    added = [a["self"]] if "mat1" in a or "batch1" in a else []
    left, right = [factor for factor in factors if not any(factor is value for value in added)]
    lead = max(left.rank, right.rank, 2) - 2
    names = [f"batch{index}" for index in range(lead)]
    one = [*names[lead - max(left.rank - 2, 0) :], "rows", "inner"] if left.rank > 1 else ["inner"]
    two = [*names[lead - max(right.rank - 2, 0) :], "inner", "columns"] if right.rank > 1 else ["inner"]
    out = [*names, *(["rows"] if left.rank > 1 else []), *(["columns"] if right.rank > 1 else [])]
    layers = contract(trace, [left, right], [one, two], out)
    if added:
        layers = trace.meet([Value(shape, layers), *added], len(shape))
    return Value(shape, layers)


def einsum(trace: Trace, node: fx.Node, a: Arguments) -> Value | type[Unknown]:
    operands: list[Value] = a["tensors"]
    letters, out = einsum_letters(a["equation"], [value.rank for value in operands])
    if any(len(set(names)) < len(names) for names in letters):
        return Unknown
    return Value(trace.shape(node), contract(trace, operands, letters, out))


def attention(trace: Trace, node: fx.Node, a: Arguments) -> Value:
    """softmax(q k' / sqrt(d)) v, as the two products it is."""
    query, key, value = a["query"], a["key"], a["value"]
    if a.get("enable_gqa") and query.rank > 3 and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (
            Value(
                replaced(part.shape, part.rank - 3, query.shape[-3]),
                [layer.repeat_interleave(repeats, -3) if layer.shape[-3] > 1 else layer for layer in part.layers],
            )
            for part in (key, value)
        )
    lead = [f"batch{index}" for index in range(query.rank - 2)]
    scores_shape = (*query.shape[:-1], key.shape[-2])
    products = contract(
        trace, [query, key], [[*lead, "rows", "inner"], [*lead, "keys", "inner"]], [*lead, "rows", "keys"]
    )
    scores = Value(scores_shape, products)
    if isinstance(a["attn_mask"], Value):
        scores = Value(scores_shape, trace.meet([scores, a["attn_mask"]], len(scores_shape)))
    for layer in scores.layers:
        if layer.shape[-1] > 1:
            trace.freeze(layer, "softmax runs over it")
    scores.layers = [layer for layer in scores.layers if layer.shape[-1] == 1]
    layers = contract(
        trace, [scores, value], [[*lead, "rows", "keys"], [*lead, "keys", "columns"]], [*lead, "rows", "columns"]
    )
    return Value(trace.shape(node), layers)
