"""Rows of layers with weights, of products, norms and softmax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from rarefy.deployment.tflite.writer import Arguments, Array, Ref, Row, Untranslated, Writer, pair
from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import argument, attribute


def padded(w: Writer, x: Ref, before: list[int], after: list[int], value: float | None = None) -> Ref:
    """A plane (N, H, W, C) with so many rows and columns around it. value: None is zero, on whatever grid."""
    around = np.array([[0, 0], [before[0], after[0]], [before[1], after[1]], [0, 0]], np.int32)
    shape = [size + int(one.sum()) for size, one in zip(x.shape, around, strict=True)]
    sizes = w.constant(around)
    if value is None:
        return w.move("PAD", x, [sizes], shape, True, table="PadOptions")
    filling = np.array([-128 if x.grid else value], np.int8 if x.grid else np.float32)
    return w.move("PADV2", x, [sizes, w.constant(filling, "", x.grid)], shape, True, table="PadV2Options")


def fits_same(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> bool:
    """Does TensorFlow's padding SAME put as much before and after?"""
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return (before, after) == (total // 2, total - total // 2)


def _weight(w: Writer, node: fx.Node, order: tuple[int, ...], axis: int) -> Ref:
    """The weight with its axes in that order; its output channels then stand at ``axis``."""
    if node.op == "get_attr":
        return w.constant(attribute(w.graph, node).permute(order), str(node.target))
    codes, scale, zero, along = (argument(node, name) for name in ("q", "scale", "zero_point", "axis"))
    stored = codes.op == "get_attr" and attribute(w.graph, codes).dtype == torch.int8
    if not stored or along not in (0, None) or attribute(w.graph, scale).dim() > 1 or attribute(w.graph, zero).any():
        if w.wanted is None:
            ref = w.value(node)
            return (
                w.constant(w.data[ref.place].transpose(order))
                if ref.place in w.data
                else w.transposed(ref, order, False)
            )
        raise Untranslated(f"{w.name}: weights with groups or zero points in integers")
    array: Array = attribute(w.graph, codes).permute(order).contiguous().numpy()
    ref = w.by_channel(array, attribute(w.graph, scale).numpy(), axis, str(codes.target))
    if w.wanted is not None:
        return ref
    numbers = w.tensor(array.shape, "float32")
    w.operator("DEQUANTIZE", [ref], numbers, table="DequantizeOptions")  # once, when the file is opened
    return numbers


def _bias(w: Writer, node: fx.Node | None, outs: int) -> Ref | None:
    if node is None:
        return None if w.wanted is None else w.constant(np.zeros(outs, np.int32))
    if not is_decoded(node):
        return w.value(node)
    codes, scale = argument(node, "q"), argument(node, "scale")
    if w.wanted is None:
        return w.constant(attribute(w.graph, codes).double() * attribute(w.graph, scale).double())
    return w.by_channel(attribute(w.graph, codes).numpy(), attribute(w.graph, scale).numpy(), 0, str(codes.target))


def _convolution(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x, weight, groups = w.channels_last(w.value(g["input"])), g["weight"], g["groups"]
    outs, ins, *kernel = w.shape(weight)
    stride, dilation = pair(g["stride"]), pair(g["dilation"])
    before, after = _padding(g["padding"], kernel, dilation)
    sides = range(2)
    same = all(fits_same(x.shape[1 + i], kernel[i], stride[i], dilation[i], before[i], after[i]) for i in sides)
    if not same and any(before + after):
        x = padded(w, x, before, after)
    shape = [x.shape[0], *w.shape(node)[2:], outs]
    options: dict[str, Any] = {
        "padding": w.schema.Padding.SAME if same else w.schema.Padding.VALID,
        "strideH": stride[0], "strideW": stride[1], "dilationHFactor": dilation[0], "dilationWFactor": dilation[1],
    }  # fmt: skip
    bias = _bias(w, g["bias"], outs)
    if bias is None:
        bias = w.constant(np.zeros(outs, np.float32))
    if groups == x.shape[3] and ins == 1 and groups > 1:
        inputs = [x, _weight(w, weight, (1, 2, 3, 0), 3), bias]
        more: dict[str, Any] = {"table": "DepthwiseConv2DOptions", "depthMultiplier": outs // groups}
        return w.compute("DEPTHWISE_CONV_2D", inputs, shape, True, **options, **more)
    inputs = [x, _weight(w, weight, (0, 2, 3, 1), 0), bias]
    return w.compute("CONV_2D", inputs, shape, True, **options, table="Conv2DOptions")


def _padding(padding: object, kernel: list[int], dilation: list[int]) -> tuple[list[int], list[int]]:
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [one // 2 for one in total], [one - one // 2 for one in total]
    around = [0, 0] if padding == "valid" else pair(padding)
    return around, list(around)


def _linear(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x = w.plain(w.value(g["input"]))
    weight = _weight(w, g["weight"], (0, 1), 0)
    bias = _bias(w, g["bias"], weight.shape[0])
    shape = (*x.shape[:-1], weight.shape[0])
    options: dict[str, Any] = {"table": "FullyConnectedOptions", "keepNumDims": len(shape) != 2}
    return w.compute("FULLY_CONNECTED", [x, weight, bias], shape, **options)


def _product(w: Writer, a: Ref, b: Ref, shape: tuple[int, ...], turn: bool = False) -> Ref:
    a, b = w.plain(a), w.plain(b)
    return w.compute("BATCH_MATMUL", [a, b], shape, table="BatchMatMulOptions", adjX=False, adjY=turn)


def _matmul(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    a, b = (w.value(value) for value in g.values() if isinstance(value, fx.Node))
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise Untranslated(f"{w.name}: a product with a vector")
    return _product(w, a, b, w.shape(node))


def _attention(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    query, key, value = (w.plain(w.value(g[part])) for part in ("query", "key", "value"))
    if g["enable_gqa"]:
        raise Untranslated(f"{w.name}: attention with grouped queries")
    scale = g["scale"] if g["scale"] is not None else 1 / math.sqrt(query.shape[-1])
    scaled = w.compute("MUL", [query, w.value(float(scale))], query.shape, table="MulOptions")
    scores = _product(w, scaled, key, (*query.shape[:-1], key.shape[-2]), turn=True)
    mask = None
    if g["is_causal"]:
        mask = w.constant(np.triu(np.full(scores.shape[-2:], -1e9, np.float32), 1))
    elif g["attn_mask"] is not None:
        if w.known[g["attn_mask"]].dtype == torch.bool:
            raise Untranslated(f"{w.name}: attention with a mask of flags")
        mask = w.plain(w.value(g["attn_mask"]))
    if mask is not None:
        scores = w.compute("ADD", [scores, mask], scores.shape, table="AddOptions")
    weights = w.compute("SOFTMAX", [scores], scores.shape, table="SoftmaxOptions", beta=1.0)
    return _product(w, weights, value, w.shape(node))


def _softmax(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x = w.plain(w.value(g["self"]))
    axis, rank = g["dim"] % len(x.shape), len(x.shape)
    order = [*(one for one in range(rank) if one != axis), axis]
    x = w.transposed(x, order, False) if axis != rank - 1 else x
    kind = "LOG_SOFTMAX" if "log" in str(node.target) else "SOFTMAX"
    options: dict[str, Any] = (
        {"table": "LogSoftmaxOptions"} if kind == "LOG_SOFTMAX" else {"table": "SoftmaxOptions", "beta": 1.0}
    )
    y = w.compute(kind, [x], x.shape, **options)
    return w.transposed(y, [order.index(one) for one in range(rank)], False) if axis != rank - 1 else y


def _layer_norm(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x = w.plain(w.value(g["input"]))
    count = len(g["normalized_shape"])
    axes = w.constant(np.arange(len(x.shape) - count, len(x.shape), dtype=np.int32))
    small = (*x.shape[:-count], *[1] * count)
    reducing: dict[str, Any] = {"table": "ReducerOptions", "keepDims": True}
    mean = w.compute("MEAN", [x, axes], small, **reducing)
    squares = w.compute("SQUARED_DIFFERENCE", [x, mean], x.shape, table="SquaredDifferenceOptions")
    variance = w.compute("MEAN", [squares, axes], small, **reducing)
    moved = w.compute("ADD", [variance, w.value(float(g["eps"]))], small, table="AddOptions")
    factor = w.compute("RSQRT", [moved], small)
    centred = w.compute("SUB", [x, mean], x.shape, table="SubOptions")
    y = w.compute("MUL", [centred, factor], x.shape, table="MulOptions")
    for kind, table, name in (("MUL", "MulOptions", "weight"), ("ADD", "AddOptions", "bias")):
        if g[name] is not None:
            y = w.compute(kind, [y, w.value(g[name])], x.shape, table=table)
    return y


def _batch_norm(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    if g["running_mean"] is None:
        raise Untranslated(f"{w.name}: batch norm with the statistics of the batch")
    mean, variance = (attribute(w.graph, g[name]).double() for name in ("running_mean", "running_var"))
    factor = torch.rsqrt(variance + g["eps"])
    if g["weight"] is not None:
        factor = factor * attribute(w.graph, g["weight"]).double()
    shift = -mean * factor + (attribute(w.graph, g["bias"]).double() if g["bias"] is not None else 0)
    x = w.value(g["input"])
    x = w.channels_last(x) if len(x.shape) == 4 else x
    shape = [-1] if x.last or len(x.shape) == 2 else [-1, *[1] * (len(x.shape) - 2)]
    for kind, table, number in (("MUL", "MulOptions", factor), ("ADD", "AddOptions", shift)):
        x = w.compute(kind, [x, w.constant(number.float().reshape(shape))], x.shape, x.last, table=table)
    return x


ROWS: dict[str, Row] = {
    "conv2d conv2d.padding": _convolution,
    "linear": _linear,
    "matmul bmm mm": _matmul,
    "scaled_dot_product_attention": _attention,
    "softmax.int log_softmax.int": _softmax,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
}
