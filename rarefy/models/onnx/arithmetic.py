"""Rows of the operators on one element, or on several at one place: arithmetic, activations, comparisons, types."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.graph.nodes import Value
from rarefy.models.onnx.step import Row, Step, number

# ONNX's types by their numbers; half precision is computed in single.
TYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float32, 11: torch.float64, 16: torch.float32,
}  # fmt: skip


def _one(run: Callable[..., Value]) -> Row:
    return Row(lambda s, x: run(x))


def _like(value: Value, other: Value) -> Tensor:
    """An operand as a tensor, where the operator takes no number."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=other.dtype)


def _two(run: Callable[..., Tensor]) -> Row:
    def called(step: Step, one: Value, two: Value) -> Tensor:
        return run(one if isinstance(one, Tensor) or isinstance(two, Tensor) else torch.tensor(one), two)

    return Row(called, broadcast=True)


def _tensors(run: Callable[..., Tensor]) -> Row:
    """Any number of operands, joined two by two, all of them tensors."""

    def called(step: Step, *inputs: Value) -> Tensor:
        first = next(value for value in inputs if isinstance(value, Tensor))
        return functools.reduce(run, [_like(value, first) for value in inputs])

    return Row(called, broadcast=True)


def _divide(step: Step, one: Value, two: Value) -> Tensor:
    tensor = one if isinstance(one, Tensor) else two
    if tensor.dtype.is_floating_point:
        quotient: Tensor = one / two
        return quotient
    return torch.div(_like(one, tensor), two, rounding_mode="trunc")


def _power(step: Step, one: Value, two: Value) -> Tensor:
    if not isinstance(one, Tensor):
        return torch.pow(_like(one, two), two)
    if two == 2.0 if not isinstance(two, Tensor) else False:
        return one.square() if one.dtype.is_floating_point else one * one
    return torch.pow(one, two).to(one.dtype)


def _mod(step: Step, one: Value, two: Value) -> Tensor:
    first = one if isinstance(one, Tensor) else _like(one, two)
    return torch.fmod(first, two) if step.get("fmod", 0) else torch.remainder(first, two)


def _mean(step: Step, *inputs: Value) -> Tensor:
    total: Tensor = functools.reduce(lambda one, two: one + two, inputs)
    return total / len(inputs)


def _clip(step: Step, x: Tensor, low: np.ndarray | None = None, high: np.ndarray | None = None) -> Tensor:
    bounds = [
        number(given) if given is not None else step.get(name, None) for name, given in (("min", low), ("max", high))
    ]
    bounds = [None if value is None or abs(value) > 3.4e38 else value for value in bounds]
    if bounds == [None, None]:
        return x
    if bounds == [0, None] and x.dtype.is_floating_point:
        return F.relu(x)
    return F.relu6(x) if bounds == [0, 6] and x.dtype.is_floating_point else torch.clamp(x, *bounds)


def _hard_sigmoid(step: Step, x: Tensor) -> Tensor:
    slope, shift = step.get("alpha", 0.2), step.get("beta", 0.5)
    if math.isclose(slope, 1 / 6, rel_tol=1e-5) and shift == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * slope + shift, 0, 1)


def _selu(step: Step, x: Tensor) -> Tensor:
    alpha, gamma = step.get("alpha", 1.6732632), step.get("gamma", 1.050701)
    if math.isclose(alpha, 1.6732632, rel_tol=1e-4) and math.isclose(gamma, 1.050701, rel_tol=1e-4):
        return F.selu(x)
    return gamma * F.elu(x, alpha)


def _prelu(step: Step, x: Tensor, slope: Value) -> Tensor:
    if isinstance(slope, Tensor) and slope.dim() == 1 and x.dim() > 1 and len(slope) in (1, x.shape[1]):
        return F.prelu(x, slope)
    return torch.where(x < 0, x * slope, x)


def _slope(step: Step, name: str, value: np.ndarray) -> np.ndarray:
    """(channels, 1, 1) -> (channels), where it is one number a channel."""
    return value.reshape(-1) if value.ndim > 1 and value.size == value.shape[0] else value


def _softmax(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def called(step: Step, x: Tensor) -> Tensor:
        axis = step.axis(x.dim(), 1 if step.opset < 13 else -1)
        if step.opset >= 13 or axis == x.dim() - 1:
            return run(x, axis)
        return run(x.flatten(axis), axis).reshape(x.shape)  # once, over all that is left from that axis on

    return called


def _cast(step: Step, x: Tensor, like: Tensor | None = None) -> Tensor:
    if like is not None:
        return x.to(like.dtype)
    kind = step.get("to", 0)
    if kind not in TYPES:
        raise step.refuse(f"a cast to ONNX's type {kind}")
    return x if x.dtype == TYPES[kind] else x.to(TYPES[kind])


def _shrink(step: Step, x: Tensor) -> Tensor:
    bias, edge = step.get("bias", 0.0), step.get("lambd", 0.5)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, torch.zeros_like(x)))


def _where(step: Step, condition: Tensor, one: Value, two: Value) -> Tensor:
    if not isinstance(one, Tensor) and not isinstance(two, Tensor):
        return torch.where(condition, torch.tensor(one, dtype=step_dtype(one)), torch.tensor(two))
    return torch.where(condition, one, two)


def step_dtype(value: float) -> torch.dtype:
    """The type of a plain number as ONNX files have it."""
    return torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float32


def _dropout(step: Step, x: Tensor, ratio: np.ndarray | None = None, training: np.ndarray | None = None) -> Tensor:
    if training is not None and number(training):
        raise step.refuse("dropout in training mode", "export the model in eval mode")
    share = step.get("ratio", 0.5) if ratio is None else float(number(ratio))
    return F.dropout(x, share, step.training)


def _gelu(step: Step, x: Tensor) -> Tensor:
    step.only("approximate", "none", "tanh")
    return F.gelu(x, approximate=step.get("approximate", "none"))


def _is_infinite(step: Step, x: Tensor) -> Tensor:
    both = step.get("detect_positive", 1), step.get("detect_negative", 1)
    return torch.isinf(x) & {(1, 1): torch.tensor(True), (1, 0): x > 0, (0, 1): x < 0}.get(both, torch.tensor(False))


_PLAIN: dict[str, Callable[..., Value]] = {
    "Relu": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Erf": torch.erf, "Softplus": F.softplus,
    "Softsign": F.softsign, "Mish": F.mish, "Sqrt": torch.sqrt, "Exp": torch.exp, "Log": torch.log,
    "Abs": torch.abs, "Neg": torch.neg, "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round,
    "Sign": torch.sign, "Reciprocal": torch.reciprocal, "Not": torch.logical_not, "Sin": torch.sin,
    "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos, "Atan": torch.atan,
    "Sinh": torch.sinh, "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
    "IsNaN": torch.isnan, "BitwiseNot": torch.bitwise_not,
}  # fmt: skip
ROWS = {
    "Add": _two(lambda one, two: one + two),
    "Sub": _two(lambda one, two: one - two),
    "Mul": _two(lambda one, two: one * two),
    "Div": Row(_divide, broadcast=True),
    "Pow": Row(_power, broadcast=True),
    "Mod": Row(_mod, broadcast=True),
    "Sum": Row(lambda s, *x: functools.reduce(lambda one, two: one + two, x), broadcast=True),
    "Mean": Row(_mean, broadcast=True),
    "Min": _tensors(torch.minimum),
    "Max": _tensors(torch.maximum),
    "And": _tensors(torch.logical_and),
    "Or": _tensors(torch.logical_or),
    "Xor": _tensors(torch.logical_xor),
    "BitwiseAnd": _tensors(torch.bitwise_and),
    "BitwiseOr": _tensors(torch.bitwise_or),
    "BitwiseXor": _tensors(torch.bitwise_xor),
    "Equal": _two(lambda one, two: one == two),
    "Greater": _two(lambda one, two: one > two),
    "GreaterOrEqual": _two(lambda one, two: one >= two),
    "Less": _two(lambda one, two: one < two),
    "LessOrEqual": _two(lambda one, two: one <= two),
    "Where": Row(_where, broadcast=True),
    "Clip": Row(_clip, settings=(1, 2)),
    "HardSigmoid": Row(_hard_sigmoid),
    "HardSwish": _one(F.hardswish),
    "Elu": Row(lambda s, x: F.elu(x, s.get("alpha", 1.0))),
    "Celu": Row(lambda s, x: F.celu(x, s.get("alpha", 1.0))),
    "LeakyRelu": Row(lambda s, x: F.leaky_relu(x, s.get("alpha", 0.01))),
    "ThresholdedRelu": Row(lambda s, x: F.threshold(x, s.get("alpha", 1.0), 0.0)),
    "PRelu": Row(_prelu, stored=("", "weight"), store=_slope),
    "Selu": Row(_selu),
    "Gelu": Row(_gelu),
    "Swish": Row(lambda s, x: x * torch.sigmoid(x * s.get("alpha", 1.0))),
    "Softmax": Row(_softmax(F.softmax)),
    "LogSoftmax": Row(_softmax(F.log_softmax)),
    "Shrink": Row(_shrink),
    "Cast": Row(_cast),
    "CastLike": Row(_cast),
    "IsInf": Row(_is_infinite),
    "Dropout": Row(_dropout, settings=(1, 2)),
    "Identity": _one(lambda x: x),
    **{name: _one(run) for name, run in _PLAIN.items()},
}
