"""Rows of the operators that compute number by number."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import fx

from rarefy.deployment.tflite.writer import Arguments, Ref, Row, Untranslated, Writer
from rarefy.graph.nodes import Value

_TABLES = {"ADD": "AddOptions", "SUB": "SubOptions", "MUL": "MulOptions", "DIV": "DivOptions",
           "MAXIMUM": "MaximumMinimumOptions", "MINIMUM": "MaximumMinimumOptions", "POW": "PowOptions"}  # fmt: skip


def together(w: Writer, *values: Ref) -> list[Ref]:
    """In one order of axes: channels last where one of them is, those of fewer axes widened for it."""
    if not any(ref.last for ref in values):
        return list(values)
    found = []
    for ref in values:
        if len(ref.shape) not in (0, 4):
            ref = w.reshaped(ref, (*[1] * (4 - len(ref.shape)), *ref.shape))
        found.append(w.channels_last(ref) if len(ref.shape) == 4 else ref)
    return found


def stored_shape(w: Writer, node: fx.Node, last: bool) -> tuple[int, ...]:
    """Of what a node yields, in the order that it is kept in."""
    shape = w.shape(node)
    return (shape[0], *shape[2:], shape[1]) if last else shape


def _binary(w: Writer, node: fx.Node, g: Arguments, kind: str) -> Ref:
    one, two = list(g.values())[:2]
    if g.get("alpha", 1) != 1:
        raise Untranslated(f"{w.name}: a sum with alpha")
    if w.known[node].dtype not in (torch.float32,):
        raise Untranslated(f"{w.name}: arithmetic of whole numbers")
    a, b = together(w, w.value(one), w.value(two))
    last = a.last or b.last
    return w.compute(kind, [a, b], stored_shape(w, node, last), last, table=_TABLES[kind])


def _unary(kind: str, table: str = "", **options: object) -> Row:
    def row(w: Writer, node: fx.Node, g: Arguments) -> Ref:
        x = w.value(next(iter(g.values())))
        return w.compute(kind, [x], x.shape, x.last, **({"table": table} if table else {}), **options)

    return row


def _clip(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    name = str(node.target)
    low, high = (g.get(one, g.get(other)) for one, other in (("min", "min_val"), ("max", "max_val")))
    if "relu" in name:
        low, high = 0, 6 if "relu6" in name else None
    return clipped(w, w.value(next(iter(g.values()))), low, high)


def clipped(w: Writer, x: Ref, low: Value, high: Value) -> Ref:
    """Numbers within bounds."""
    if (low, high) in ((0, 6), (0, None)):
        return w.compute("RELU6" if high else "RELU", [x], x.shape, x.last)
    for kind, bound in (("MAXIMUM", low), ("MINIMUM", high)):
        if bound is not None:
            x = w.compute(kind, [x, w.value(float(bound))], x.shape, x.last, table=_TABLES[kind])
    return x


def _gate(w: Writer, node: fx.Node, g: Arguments, times: bool) -> Ref:
    x = w.value(g["self"])
    moved = w.compute("ADD", [x, w.value(3.0)], x.shape, x.last, table="AddOptions")
    gate = w.compute("MUL", [clipped(w, moved, 0, 6), w.value(1 / 6)], x.shape, x.last, table="MulOptions")
    return w.compute("MUL", [x, gate], x.shape, x.last, table="MulOptions") if times else gate


def _silu(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x = w.value(g["self"])
    gate = w.compute("LOGISTIC", [x], x.shape, x.last)
    return w.compute("MUL", [x, gate], x.shape, x.last, table="MulOptions")


def _gelu(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x = w.value(g["self"])
    approximate = g["approximate"] == "tanh"
    return w.compute("GELU", [x], x.shape, x.last, table="GeluOptions", approximate=approximate)


def _leaky(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x = w.value(g["self"])
    slope = float(g["negative_slope"])
    return w.compute("LEAKY_RELU", [x], x.shape, x.last, table="LeakyReluOptions", alpha=slope)


def _same(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    if w.known[node].dtype != w.known[next(iter(g.values()))].dtype:
        raise Untranslated(f"{w.name}: a change of type")
    return w.value(next(iter(g.values())))


def _power(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x, exponent = w.value(g["self"]), g["exponent"]
    if isinstance(exponent, fx.Node):
        raise Untranslated(f"{w.name}: a power of tensors")
    if exponent == 2:
        return w.compute("MUL", [x, x], x.shape, x.last, table="MulOptions")
    number = w.constant(np.asarray(exponent, np.float32))
    return w.compute("POW", [x, number], x.shape, x.last, table="PowOptions")


ROWS: dict[str, Row] = {
    "add.Tensor": partial(_binary, kind="ADD"),
    "sub.Tensor": partial(_binary, kind="SUB"),
    "mul.Tensor": partial(_binary, kind="MUL"),
    "div.Tensor": partial(_binary, kind="DIV"),
    "maximum": partial(_binary, kind="MAXIMUM"),
    "minimum": partial(_binary, kind="MINIMUM"),
    "relu relu6 hardtanh clamp clamp_min clamp_max": _clip,
    "sigmoid": _unary("LOGISTIC"),
    "tanh": _unary("TANH"),
    "exp": _unary("EXP", "ExpOptions"),
    "log": _unary("LOG"),
    "sqrt": _unary("SQRT"),
    "rsqrt": _unary("RSQRT"),
    "abs": _unary("ABS", "AbsOptions"),
    "neg": _unary("NEG", "NegOptions"),
    "elu": _unary("ELU"),
    "hardsigmoid": partial(_gate, times=False),
    "hardswish": partial(_gate, times=True),
    "silu": _silu,
    "gelu": _gelu,
    "leaky_relu": _leaky,
    "pow.Tensor_Scalar": _power,
    "contiguous clone dropout detach alias to.dtype _to_copy": _same,
}
