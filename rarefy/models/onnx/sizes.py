"""Operators on sizes and constants, worked out while the model is built or traced: they leave nothing in the graph.

Arrays are NumPy's, of type ``object`` where a size is free.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable

import numpy as np

from rarefy.graph.nodes import Value
from rarefy.models.onnx.step import Step, checked, numbers

Host = Callable[..., Value]


def _axes(step: Step, axes: np.ndarray | None) -> list[int]:
    return [int(axis) for axis in numbers(step.get("axes", None) if axes is None else axes)]


def _gather(step: Step, x: np.ndarray, places: np.ndarray) -> np.ndarray:
    return np.asarray(np.take(x, places, step.axis(x.ndim)))


def _squeeze(step: Step, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return x.squeeze(tuple(_axes(step, axes)) or None)


def _unsqueeze(step: Step, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.expand_dims(x, tuple(_axes(step, axes)))


def _slice(step: Step, x: np.ndarray, *given: np.ndarray) -> np.ndarray:
    names = ("starts", "ends", "axes", "steps")
    parts = [numbers(one) for one in given] if given else [numbers(step.get(name, None)) for name in names]
    parts += [[]] * (4 - len(parts))
    starts, ends, axes, steps = parts
    cut = [slice(None)] * x.ndim
    for start, end, axis, jump in zip(starts, ends, axes or range(len(starts)), steps or [1] * len(starts)):
        low = end is not None and jump < 0 and end < -x.shape[axis]
        cut[axis] = slice(start, None if low else end, jump)
    return x[tuple(cut)]


def _divide(step: Step, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    if _is_float(one) or _is_float(two):
        return np.asarray(one / two)
    if object in (one.dtype, two.dtype):
        return np.asarray(one // two, dtype=object)  # sizes: none is negative
    return np.asarray(np.sign(one) * np.sign(two) * (np.abs(one) // np.abs(two))).astype(one.dtype)


def _is_float(value: np.ndarray) -> bool:
    return value.dtype.kind == "f" or (value.dtype == object and not all(_is_whole(one) for one in value.reshape(-1)))


def _is_whole(value: Value) -> bool:
    return isinstance(value, (int, np.integer)) or type(value).__name__ == "SymInt"


_KINDS = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float32, 11: np.float64}


def _cast(step: Step, x: np.ndarray) -> np.ndarray:
    kind = _KINDS.get(step.get("to", 0))
    if kind is None:
        raise step.refuse(f"a cast of sizes to ONNX's type {step.get('to', 0)}")
    if x.dtype != object:
        return x.astype(kind)
    return _each(float if kind in (np.float32, np.float64) else int, x)


def _each(run: Callable[[Value], Value], x: np.ndarray) -> np.ndarray:
    """Element by element; a size that is free stays one."""
    found = np.empty(x.shape, dtype=object)
    for place, value in np.ndenumerate(x):
        symbolic = run in (int, float) and type(value).__module__ == "torch"
        found[place] = (math.trunc(value) if run is int else value * 1.0) if symbolic else run(value)
    return found


def _rounded(exact: Callable[[np.ndarray], np.ndarray], one: Callable[[Value], Value]) -> Host:
    return lambda step, x: _each(one, x) if x.dtype == object else np.asarray(exact(x))


def _reduce(run: Callable[..., np.ndarray]) -> Host:
    def called(step: Step, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
        return np.asarray(run(x, axis=tuple(_axes(step, axes)) or None, keepdims=bool(step.get("keepdims", 1))))

    return called


def _filled(step: Step, shape: np.ndarray) -> np.ndarray | None:
    if shape.dtype == object or np.prod(shape.astype(np.float64)) > 4096:
        return None  # a tensor then
    fill = np.asarray(step.get("value", np.zeros(1, np.float32))).reshape(())
    return np.full(checked(step, numbers(shape)), fill)


def _range(step: Step, start: np.ndarray, end: np.ndarray, jump: np.ndarray) -> np.ndarray | None:
    if object in (start.dtype, end.dtype, jump.dtype):
        return None
    checked(step, [max(0, math.ceil((end.item() - start.item()) / jump.item()))])
    return np.arange(start.item(), end.item(), jump.item(), dtype=start.dtype)


def _expand(step: Step, x: np.ndarray, shape: np.ndarray) -> np.ndarray | None:
    if object in (x.dtype, shape.dtype) and shape.dtype == object:
        return None
    checked(step, numbers(shape))
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(numbers(shape))))


def _split(step: Step, x: np.ndarray, sizes: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    axis, count = step.axis(x.ndim), len(step.writes)
    parts = numbers(step.get("split", None) if sizes is None else sizes)
    whole = -(-x.shape[axis] // count)
    edges = np.cumsum(parts)[:-1] if parts else [whole * index for index in range(1, count)]
    return tuple(np.split(x, edges, axis))


def _two(run: Callable[[Value, Value], Value]) -> Host:
    return lambda step, one, two: np.asarray(run(one, two))


def _many(run: Callable[..., np.ndarray]) -> Host:
    return lambda step, *inputs: np.asarray(functools.reduce(run, inputs))


HOST: dict[str, Host] = {
    "Gather": _gather,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Concat": lambda step, *inputs: np.concatenate(inputs, step.axis(inputs[0].ndim)),
    "Split": _split,
    "Reshape": lambda step, x, shape: x.reshape(numbers(shape)),
    "Transpose": lambda step, x: x.transpose(step.get("perm", None)),
    "Identity": lambda step, x: x,
    "Shape": lambda step, x: np.array(x.shape, np.int64)[step.get("start", 0) : step.get("end", None)],
    "Size": lambda step, x: np.array(x.size, np.int64),
    "Cast": _cast,
    "Add": _two(operator.add),
    "Sub": _two(operator.sub),
    "Mul": _two(operator.mul),
    "Div": _divide,
    "Mod": lambda step, one, two: np.fmod(one, two) if step.get("fmod", 0) else np.asarray(one % two),
    "Neg": lambda step, x: np.asarray(-x),
    "Min": _many(np.minimum),
    "Max": _many(np.maximum),
    "Equal": _two(np.equal),
    "Greater": _two(np.greater),
    "Less": _two(np.less),
    "GreaterOrEqual": _two(operator.ge),
    "LessOrEqual": _two(operator.le),
    "And": _two(np.logical_and),
    "Or": _two(np.logical_or),
    "Abs": lambda step, x: np.abs(x),
    "Not": lambda step, x: np.logical_not(x),
    "Where": lambda step, condition, one, two: np.where(condition.astype(bool), one, two),
    "Sqrt": _rounded(np.sqrt, math.sqrt),
    "Floor": _rounded(np.floor, math.floor),
    "Ceil": _rounded(np.ceil, math.ceil),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ConstantOfShape": _filled,
    "Range": _range,
    "Expand": _expand,
}
