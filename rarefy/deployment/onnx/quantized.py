"""Rows of the operators that make codes and decode them, and how the weights of linear layers are stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from rarefy.deployment.onnx.writer import Arguments, Row, Writer
from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import argument, attribute

BLOCKS = (16, 32, 64, 128, 256)  # that runtimes have a product with codes of 4 bits for


def _quantize(w: Writer, node: fx.Node, g: Arguments) -> str:
    axis = {} if g["axis"] is None else {"axis": g["axis"]}
    name = w.op("QuantizeLinear", w.values(g["x"], g["scale"], g["zero_point"]), **axis)
    limits = torch.iinfo(g["dtype"])
    if (g["qmin"], g["qmax"]) == (limits.min, limits.max):
        return name
    return w.op("Clip", [name, w.constant(g["qmin"], g["dtype"]), w.constant(g["qmax"], g["dtype"])])


def _dequantize(w: Writer, node: fx.Node, g: Arguments) -> str:
    if w.rank(g["scale"]) > 1:
        return _dequantize_groups(w, g)
    axis = {} if g["axis"] is None or not w.rank(g["scale"]) else {"axis": g["axis"]}
    return w.op("DequantizeLinear", w.values(g["q"], g["scale"], g["zero_point"]), **axis)


def _dequantize_groups(w: Writer, g: Arguments) -> str:
    """Codes cut into groups, times their scales, put together: constants, computed when the file is opened."""
    codes, scale, zero = (attribute(w.graph, g[name]) for name in ("q", "scale", "zero_point"))
    out, groups = scale.shape[:2]
    # of the last group, which may be shorter
    missing = groups * max(g["group"], 1) - codes.shape[1] if groups > 1 else 0
    cut = F.pad(codes, (*[0, 0] * (codes.dim() - 2), 0, missing)).reshape(out, groups, -1)
    number = w.op("Cast", [w.stored(str(g["q"].target), cut, "grouped")], to=1)
    if zero.any():
        zeros = zero.float().reshape(*zero.shape[:2], 1)
        number = w.op("Sub", [number, w.stored(str(g["zero_point"].target), zeros, "grouped")])
    number = w.op("Mul", [number, w.stored(str(g["scale"].target), scale.reshape(out, groups, 1), "grouped")])
    whole = w.op("Reshape", [number, w.constant([out, codes.shape[1] + missing, *codes.shape[2:]])])
    return w.sliced(whole, 1, 0, codes.shape[1]) if missing else whole


def weight_in_4_bits(w: Writer, weight: fx.Node) -> str | None:
    """A linear layer's weight as (in, out), decoded from codes of 4 bits and a scale for each block of inputs.

    None where it has other codes, or blocks that a runtime has no product for.
    One scale an output is written as one for each of its blocks.
    """
    codes, scale, zero, axis, group = (argument(weight, key) for key in ("q", "scale", "zero_point", "axis", "group"))
    bits = w.graph.meta.get("bits", {}).get(str(codes.target), 8)
    if codes.op != "get_attr" or bits > 4 or (not group and axis not in (0, None)):
        return None
    stored, scales, zeros = (attribute(w.graph, source) for source in (codes, scale, zero))
    outs, ins = stored.shape
    block = group or next((size for size in BLOCKS if size >= ins), BLOCKS[-1])
    if block not in BLOCKS:
        return None
    sizes = (outs, -(-ins // block))
    name = str(codes.target)
    inputs = [
        w.stored_in_4_bits(name, stored.t(), "in_4_bits"),
        w.stored(name, (scales if group else scales.reshape(-1, 1)).expand(sizes).t(), "blocks"),
    ]
    if zeros.any():
        zeros = zeros if group or not zeros.dim() else zeros.reshape(-1, 1)
        inputs.append(w.stored_in_4_bits(name, zeros.expand(sizes).t(), "zeros_in_4_bits"))
    return w.op("DequantizeLinear", inputs, axis=0, block_size=block)


def transposed_weight(w: Writer, weight: fx.Node) -> str:
    """A matrix transposed: where it is stored, in the store."""
    if weight.op == "get_attr":
        return w.stored(str(weight.target), attribute(w.graph, weight).t(), "transposed")
    if is_decoded(weight) and argument(weight, "q").op == "get_attr" and argument(weight, "axis") in (0, None):
        codes, scale = argument(weight, "q"), argument(weight, "scale")
        if w.rank(scale) <= 1:
            name = w.stored(str(codes.target), attribute(w.graph, codes).t(), "transposed")
            axis = {"axis": 1} if w.rank(scale) else {}
            return w.op("DequantizeLinear", [name, *w.values(scale, argument(weight, "zero_point"))], **axis)
    return w.op("Transpose", [w.value(weight)], perm=[1, 0])


ROWS: dict[str, Row] = {"rarefy.quantize": _quantize, "rarefy.dequantize": _dequantize}
