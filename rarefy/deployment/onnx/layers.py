"""Rows of the operators with weights, of products, norms and softmax."""

from __future__ import annotations

import math

import torch
from torch import fx

from rarefy.deployment.onnx.quantized import transposed_weight, weight_in_4_bits
from rarefy.deployment.onnx.writer import Arguments, Row, Untranslated, Writer, listed
from rarefy.graph.lowering import is_decoded


def _convolution(w: Writer, node: fx.Node, g: Arguments) -> str:
    kernel = w.plane(g["weight"])
    stride, dilation = (listed(g[key], len(kernel)) for key in ("stride", "dilation"))
    if g["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [one // 2 for one in total] + [one - one // 2 for one in total]
    else:
        pads = listed(0 if g["padding"] == "valid" else g["padding"], len(kernel)) * 2
    inputs = w.values(g["input"], g["weight"], g["bias"])
    return w.op("Conv", inputs, kernel_shape=kernel, strides=stride, dilations=dilation, pads=pads, group=g["groups"])


def _transposed_convolution(w: Writer, node: fx.Node, g: Arguments) -> str:
    kernel = w.plane(g["weight"])
    stride, dilation, padding, more = (
        listed(g[key], len(kernel)) for key in ("stride", "dilation", "padding", "output_padding")
    )
    inputs = w.values(g["input"], g["weight"], g["bias"])
    sizes = {"kernel_shape": kernel, "strides": stride, "dilations": dilation, "pads": padding * 2}
    return w.op("ConvTranspose", inputs, **sizes, output_padding=more, group=g["groups"])


def _linear(w: Writer, node: fx.Node, g: Arguments) -> str:
    x, weight, bias = w.value(g["input"]), g["weight"], g["bias"]
    matrix = None
    if w.four_bits and is_decoded(weight) and not is_decoded(g["input"]) and not is_decoded(bias):
        matrix = weight_in_4_bits(w, weight)
    if matrix is None and w.rank(g["input"]) == 2:
        return w.op("Gemm", [x, *w.values(weight, bias)], transB=1)
    product = w.op("MatMul", [x, transposed_weight(w, weight) if matrix is None else matrix])
    return product if bias is None else w.op("Add", [product, w.value(bias)])


def _addmm(w: Writer, node: fx.Node, g: Arguments) -> str:
    one, two = (g.get(key, g.get(other)) for key, other in (("mat1", "batch1"), ("mat2", "batch2")))
    product = w.scaled(w.op("MatMul", w.values(one, two)), g["alpha"], w.dtype(node))
    return w.op("Add", [product, w.scaled(w.value(g["self"]), g["beta"], w.dtype(node))])


def _attention(w: Writer, node: fx.Node, g: Arguments) -> str:
    query, key, value, mask = (g[part] for part in ("query", "key", "value", "attn_mask"))
    rank, dtype = w.rank(query), w.dtype(query)
    scale = g["scale"] if g["scale"] is not None else 1 / math.sqrt(w.fixed(query, -1))
    keys, values = w.value(key), w.value(value)
    if g["enable_gqa"] and w.fixed(query, 1) != w.fixed(key, 1):
        times = w.fixed(query, 1) // w.fixed(key, 1)
        keys, values = w.interleaved(keys, w.shape(key), 1, times), w.interleaved(values, w.shape(value), 1, times)
    transposed = w.transposed(keys, [*range(rank - 2), rank - 1, rank - 2])
    scores = w.op("MatMul", [w.op("Mul", [w.value(query), w.constant(float(scale), dtype)]), transposed])
    if g["is_causal"]:
        allowed = torch.ones(w.fixed(query, -2), w.fixed(key, -2)).tril() > 0
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -math.inf)
        scores = w.op("Add", [scores, w.stored_anew("causal", bias)])
    elif mask is not None:
        added = w.value(mask)
        if w.dtype(mask) == torch.bool:
            added = w.op("Where", [added, w.constant(0.0, dtype), w.constant(-math.inf, dtype)])
        scores = w.op("Add", [scores, added])
    return w.op("MatMul", [w.op("Softmax", [scores], axis=-1), values])


def _batch_norm(w: Writer, node: fx.Node, g: Arguments) -> str:
    if g["running_mean"] is None:
        raise Untranslated(f"{node.name}: batch norm with the statistics of the batch")
    mean = w.known[g["running_mean"]]
    factors = [
        w.value(g[key]) if g[key] is not None else w.stored_anew(key, torch.full(mean.shape, neutral, dtype=mean.dtype))
        for key, neutral in (("weight", 1), ("bias", 0))
    ]
    inputs = [w.value(g["input"]), *factors, *w.values(g["running_mean"], g["running_var"])]
    return w.op("BatchNormalization", inputs, epsilon=g["eps"])


def _layer_norm(w: Writer, node: fx.Node, g: Arguments) -> str:
    size, weight = list(g["normalized_shape"]), g["weight"]
    ones = torch.ones(size, dtype=w.dtype(node))
    factor = w.stored_anew("weight", ones) if weight is None else w.value(weight)
    inputs = [w.value(g["input"]), factor, *w.values(g["bias"])]
    return w.op("LayerNormalization", inputs, axis=-len(size), epsilon=g["eps"])


def _rms_norm(w: Writer, node: fx.Node, g: Arguments) -> str:
    x, dtype = w.value(g["input"]), w.dtype(node)
    axes = w.constant(list(range(-len(g["normalized_shape"]), 0)))
    eps = g["eps"] if g["eps"] is not None else torch.finfo(dtype).eps
    mean = w.op("ReduceMean", [w.op("Mul", [x, x]), axes], keepdims=1)
    name = w.op("Div", [x, w.op("Sqrt", [w.op("Add", [mean, w.constant(eps, dtype)])])])
    return name if g["weight"] is None else w.op("Mul", [name, w.value(g["weight"])])


def _group_norm(w: Writer, node: fx.Node, g: Arguments) -> str:
    groups, dtype, shape = g["num_groups"], w.dtype(node), w.shape(node)
    ones = w.stored_anew("1", torch.ones(groups, dtype=dtype))
    zeros = w.stored_anew("0", torch.zeros(groups, dtype=dtype))
    apart = w.op("Reshape", [w.value(g["input"]), w.constant([0, groups, -1])], allowzero=0)
    name = w.reshaped(w.op("InstanceNormalization", [apart, ones, zeros], epsilon=g["eps"]), shape)
    for kind, factor in (("Mul", g["weight"]), ("Add", g["bias"])):
        if factor is not None:
            name = w.op(kind, [name, w.reshaped(w.value(factor), [w.fixed(factor, 0), *[1] * (len(shape) - 2)])])
    return name


ROWS: dict[str, Row] = {
    "conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding": _convolution,
    "conv_transpose1d conv_transpose2d.input conv_transpose3d.input": _transposed_convolution,
    "linear": _linear,
    "matmul bmm mm": lambda w, node, g: w.op(
        "MatMul", [w.value(value) for value in g.values() if isinstance(value, fx.Node)]
    ),
    "addmm baddbmm": _addmm,
    "einsum": lambda w, node, g: w.op("Einsum", w.values(*g["tensors"]), equation=g["equation"]),
    "scaled_dot_product_attention": _attention,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "softmax.int": lambda w, node, g: w.op("Softmax", [w.value(g["self"], w.dtype(node))], axis=g["dim"]),
    "log_softmax.int": lambda w, node, g: w.op("LogSoftmax", [w.value(g["self"], w.dtype(node))], axis=g["dim"]),
}
