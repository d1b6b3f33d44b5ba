"""Rows of the operators on one element, or on two at one place: arithmetic, activations, comparisons, types."""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from rarefy.deployment.onnx.writer import CONTRIB, Arguments, Row, Untranslated, Writer
from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import Value, is_tensor


def _unary(kind: str, **attributes: float) -> Row:
    return lambda w, node, g: w.op(kind, [w.value(next(iter(g.values())), w.dtype(node))], **attributes)


def _sides(w: Writer, g: Arguments, dtype: torch.dtype) -> list[str]:
    return [w.value(g[side], dtype) for side in ("self", "other")]


def _binary(w: Writer, node: fx.Node, g: Arguments, kind: str) -> str:
    if not is_tensor(w.known[node]):  # sizes
        return w.op(kind, [w.vector([size]) for size in g.values()])
    one, two = _sides(w, g, w.dtype(node))
    return w.op(kind, [one, w.scaled(two, g.get("alpha", 1), w.dtype(node))])


def _reverse_subtract(w: Writer, node: fx.Node, g: Arguments) -> str:
    one, two = _sides(w, g, w.dtype(node))
    return w.op("Sub", [two, w.scaled(one, g["alpha"], w.dtype(node))])


def _divide(w: Writer, node: fx.Node, g: Arguments) -> str:
    dtype = w.dtype(node)
    name = w.op("Div", _sides(w, g, dtype))
    mode = g.get("rounding_mode")
    if mode is None:
        return name
    if not dtype.is_floating_point:
        raise Untranslated(f"{node.name}: a division of integers, rounded")
    return w.op("Floor", [name]) if mode == "floor" else w.cast(w.cast(name, torch.int64), dtype)


def _compare(w: Writer, node: fx.Node, g: Arguments, kind: str, negate: bool = False) -> str:
    sides = [w.known[value] if isinstance(value, fx.Node) else value for value in (g["self"], g["other"])]
    dtype = torch.result_type(
        *(torch.empty(side.shape, dtype=side.dtype) if is_tensor(side) else side for side in sides)
    )
    name = w.op(kind, _sides(w, g, dtype))
    return w.op("Not", [name]) if negate else name


def _logical(w: Writer, node: fx.Node, g: Arguments, kind: str) -> str:
    if w.dtype(node) != torch.bool:
        raise Untranslated(f"{node.name}: {node.target} on integers")
    return w.op(kind, [w.value(value, torch.bool) for value in g.values()])


def _clip(w: Writer, node: fx.Node, g: Arguments) -> str:
    low, high = (g.get(short, g.get(long)) for short, long in (("min", "min_val"), ("max", "max_val")))
    dtype = w.dtype(node)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        name = w.value(g["self"], dtype)
        name = name if low is None else w.op("Max", [name, w.value(low, dtype)])
        return name if high is None else w.op("Min", [name, w.value(high, dtype)])
    bounds = ["" if value is None else w.constant(value, dtype) for value in (low, high)]
    return w.op("Clip", [w.value(g["self"], dtype), *bounds])


def _silu(w: Writer, node: fx.Node, g: Arguments) -> str:
    x = w.value(g["self"])
    return _quick_silu(w, x) if _is_quick(w, g["self"]) else w.op("Mul", [x, w.op("Sigmoid", [x])])


def _multiply(w: Writer, node: fx.Node, g: Arguments) -> str:
    one, two = g.values()
    for x, gate in ((one, two), (two, one)):
        is_gate = isinstance(gate, fx.Node) and gate.target is torch.ops.aten.sigmoid.default and gate.args[0] is x
        if is_gate and _is_quick(w, x):
            return _quick_silu(w, w.value(x))
    return _binary(w, node, g, "Mul")


def _is_quick(w: Writer, x: Value) -> bool:
    """Is it a decoded value? ONNX Runtime decodes it once for each reader, and then sees no SiLU in x sigmoid(x)."""
    return w.contrib and isinstance(x, fx.Node) and is_decoded(x)


def _quick_silu(w: Writer, x: str) -> str:
    """In one pass: decoding, sigmoid and product take 1.4 times as long apart."""
    return w.op("QuickGelu", [x], domain=CONTRIB, alpha=1.0)


def _softplus(w: Writer, node: fx.Node, g: Arguments) -> str:
    x = w.value(g["self"])
    if g["beta"] == 1:
        return w.op("Softplus", [x])
    beta = w.constant(g["beta"], w.dtype(node))
    return w.op("Div", [w.op("Softplus", [w.op("Mul", [x, beta])]), beta])


def _power(w: Writer, node: fx.Node, g: Arguments) -> str:
    dtype = w.dtype(node)
    base = w.value(g["self"], dtype)
    if g["exponent"] == 2:
        return w.op("Mul", [base, base])
    if g["exponent"] == 0.5:
        return w.op("Sqrt", [base])
    return w.op("Pow", [base, w.value(g["exponent"], dtype)])


def _prelu(w: Writer, node: fx.Node, g: Arguments) -> str:
    slope = w.value(g["weight"])
    if w.rank(g["weight"]) == 1 and w.rank(node) > 2:
        slope = w.reshaped(slope, [w.fixed(g["weight"], 0), *[1] * (w.rank(node) - 2)])
    return w.op("PRelu", [w.value(g["self"]), slope])


def _glu(w: Writer, node: fx.Node, g: Arguments) -> str:
    one, two = w.ops("Split", [w.value(g["self"])], 2, axis=g["dim"], num_outputs=2)
    return w.op("Mul", [one, w.op("Sigmoid", [two])])


def _addcmul(w: Writer, node: fx.Node, g: Arguments) -> str:
    product = w.scaled(w.op("Mul", w.values(g["tensor1"], g["tensor2"])), g["value"], w.dtype(node))
    return w.op("Add", [w.value(g["self"]), product])


def _lerp(w: Writer, node: fx.Node, g: Arguments) -> str:
    start = w.value(g["self"])
    way = w.op("Sub", [w.value(g["end"]), start])
    return w.op("Add", [start, w.op("Mul", [way, w.value(g["weight"], w.dtype(node))])])


def _where(w: Writer, node: fx.Node, g: Arguments) -> str:
    return w.op("Where", [w.value(g["condition"], torch.bool), *_sides(w, g, w.dtype(node))])


def _masked_fill(w: Writer, node: fx.Node, g: Arguments) -> str:
    return w.op("Where", [w.value(g["mask"], torch.bool), w.value(g["value"], w.dtype(node)), w.value(g["self"])])


_KINDS = {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "abs": "Abs",
    "neg": "Neg", "floor": "Floor", "ceil": "Ceil", "round": "Round", "erf": "Erf", "sin": "Sin", "cos": "Cos",
    "reciprocal": "Reciprocal", "sign": "Sign", "hardswish": "HardSwish", "mish": "Mish",
}  # fmt: skip
ROWS: dict[str, Row] = {
    **{name: _unary(kind) for name, kind in _KINDS.items()},
    "hardsigmoid": _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    "leaky_relu": lambda w, node, g: w.op("LeakyRelu", [w.value(g["self"])], alpha=g["negative_slope"]),
    "elu": lambda w, node, g: w.op("Elu", [w.value(g["self"])], alpha=g["alpha"]),
    "silu": _silu,
    "gelu": lambda w, node, g: w.op("Gelu", [w.value(g["self"])], approximate=g["approximate"]),
    "softplus": _softplus,
    "rsqrt": lambda w, node, g: w.op("Reciprocal", [w.op("Sqrt", [w.value(g["self"], w.dtype(node))])]),
    "square": lambda w, node, g: w.op("Mul", [w.value(g["self"])] * 2),
    "prelu": _prelu,
    "glu": _glu,
    "relu6": lambda w, node, g: _clip(w, node, {"self": g["self"], "min": 0.0, "max": 6.0}),
    "hardtanh clamp clamp.Tensor clamp_min clamp_max clip": _clip,
    "pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar": _power,
    "add.Tensor add.Scalar operator.add": partial(_binary, kind="Add"),
    "sub.Tensor sub.Scalar operator.sub": partial(_binary, kind="Sub"),
    "mul.Tensor mul.Scalar operator.mul": _multiply,
    "maximum max.other": partial(_binary, kind="Max"),
    "minimum min.other": partial(_binary, kind="Min"),
    "rsub.Scalar rsub.Tensor": _reverse_subtract,
    "operator.floordiv": partial(_binary, kind="Div"),
    "div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode": _divide,
    "eq.Scalar eq.Tensor": partial(_compare, kind="Equal"),
    "ne.Scalar ne.Tensor": partial(_compare, kind="Equal", negate=True),
    "lt.Scalar lt.Tensor": partial(_compare, kind="Less"),
    "gt.Scalar gt.Tensor": partial(_compare, kind="Greater"),
    "le.Scalar le.Tensor": partial(_compare, kind="LessOrEqual"),
    "ge.Scalar ge.Tensor": partial(_compare, kind="GreaterOrEqual"),
    "logical_not bitwise_not": partial(_logical, kind="Not"),
    "logical_and bitwise_and.Tensor __and__.Tensor": partial(_logical, kind="And"),
    "logical_or bitwise_or.Tensor __or__.Tensor": partial(_logical, kind="Or"),
    "addcmul": _addcmul,
    "lerp.Scalar lerp.Tensor": _lerp,
    "where.self where.ScalarOther where.ScalarSelf where.Scalar": _where,
    "masked_fill.Scalar masked_fill.Tensor": _masked_fill,
    "to.dtype to.dtype_layout to.device to.other type_as _to_copy": lambda w, node, g: w.value(
        g["self"], w.dtype(node)
    ),
    "contiguous clone dropout feature_dropout alpha_dropout feature_alpha_dropout detach alias": lambda w, node, g: (
        w.value(next(iter(g.values())))
    ),
}
