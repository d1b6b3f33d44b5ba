"""Rows of the operators that move numbers about: shapes, orders, parts, borders."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.graph.nodes import Value
from rarefy.models.onnx.step import Row, Step, as_sizes, as_tensor, checked, number, numbers


def _reshape(step: Step, x: Tensor, shape: Value) -> Tensor:
    sizes = numbers(step.get("shape", None) if shape is None else shape)
    if not step.get("allowzero", 0):
        sizes = [x.shape[axis] if _is(size, 0) and axis < x.dim() else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _is(size: Value, what: int) -> bool:
    """A free size is never 0 or -1."""
    return isinstance(size, int) and size == what


def _flatten(step: Step, x: Tensor) -> Tensor:
    axis = int(step.get("axis", 1))
    axis = axis if axis == x.dim() else step.wrapped(axis, x.dim())
    if axis in (0, x.dim()):
        return x.flatten().unsqueeze(1 if axis else 0)
    return (x.flatten(0, axis - 1) if axis > 1 else x).flatten(1)


def axes_of(step: Step, axes: Value, rank: int) -> list[int]:
    """Axes of an input, or of the attribute that older files have."""
    return [step.wrapped(int(axis), rank) for axis in numbers(step.get("axes", None) if axes is None else axes)]


def _squeeze(step: Step, x: Tensor, axes: Value = None) -> Tensor:
    chosen = axes_of(step, axes, x.dim())
    if any(x.shape[axis] != 1 for axis in chosen):
        raise step.refuse("drops an axis of more than one place (the batch?)", "export it with a free batch axis")
    return x.squeeze(chosen or [axis for axis, size in enumerate(x.shape) if _is(size, 1)])


def _unsqueeze(step: Step, x: Tensor, axes: Value = None) -> Tensor:
    given = numbers(step.get("axes", None) if axes is None else axes)
    for axis in sorted(step.wrapped(int(axis), x.dim() + len(given)) for axis in given):
        x = x.unsqueeze(axis)
    return x


def _transpose(step: Step, x: Tensor) -> Tensor:
    return x.permute(step.get("perm", list(range(x.dim()))[::-1]))


def _split(step: Step, x: Tensor, sizes: Value = None) -> tuple[Tensor, ...]:
    axis = step.axis(x.dim())
    parts = numbers(step.get("split", None) if sizes is None else sizes)
    if not parts:
        count = len(step.writes)
        whole = -(-x.shape[axis] // count)
        parts = [whole] * (count - 1) + [x.shape[axis] - whole * (count - 1)]
    found: tuple[Tensor, ...] = x.split(parts, axis)
    return found


def _slice(step: Step, x: Tensor, *given: Value) -> Tensor:
    names = ("starts", "ends", "axes", "steps")
    parts = [numbers(step.get(name, None)) for name in names] if not given else [numbers(one) for one in given]
    parts += [[]] * (4 - len(parts))
    starts, ends, axes, steps = parts
    axes, steps = axes or list(range(len(starts))), steps or [1] * len(starts)
    for start, end, axis, jump in zip(starts, ends, axes, steps):
        axis = step.wrapped(int(axis), x.dim())
        if jump < 0:  # the same places from the other end
            start, end = (-1 - place if place < 0 else x.shape[axis] - 1 - place for place in (start, end))
            x, jump = x.flip(axis), -jump
            start = max(start, 0) if isinstance(start, int) else start
            if isinstance(end, int) and end < 0:
                end = 0
        x = x[
            (slice(None),) * axis + (slice(start, end if not isinstance(end, int) or end < 2**31 - 1 else None, jump),)
        ]
    return x


def _expand(step: Step, x: Tensor, shape: Value) -> Tensor:
    sizes = checked(step, numbers(shape))
    have = list(x.shape)
    sizes = [1] * (len(have) - len(sizes)) + sizes
    have = [1] * (len(sizes) - len(have)) + have
    return x.expand([old if _is(new, 1) else new for old, new in zip(have, sizes)])


def _tile(step: Step, x: Tensor, repeats: Value) -> Tensor:
    times = numbers(repeats)
    checked(step, [size * more for size, more in zip(x.shape, times)])
    return x.repeat(times) if any(not _is(one, 1) for one in times) else x


def _pad(step: Step, x: Tensor, around: Value = None, value: Value = None, axes: Value = None) -> Tensor:
    given = numbers(step.get("pads", None) if around is None else around)
    chosen = [step.wrapped(int(axis), x.dim()) for axis in numbers(axes)] or list(range(x.dim()))
    count = len(chosen)
    if len(given) != 2 * count:
        raise step.refuse(f"{len(given)} pads for {count} axes", "the file is damaged; export it again")
    sides = {axis: (given[index], given[count + index]) for index, axis in enumerate(chosen)}
    every = [sides.get(axis, (0, 0)) for axis in range(x.dim())]
    checked(step, [size + low + high for size, (low, high) in zip(x.shape, every)])
    while every and _is(every[0][0], 0) and _is(every[0][1], 0):
        every = every[1:]
    if not every:
        return x
    flat = [side for pair in reversed(every) for side in pair]
    mode = step.get("mode", "constant")
    fill = step.get("value", 0.0) if value is None else number(value)
    if mode == "constant":
        return F.pad(x, flat, value=float(fill)) if x.dtype.is_floating_point else F.pad(x, flat, value=int(fill))
    kind = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}.get(mode)
    if kind is None or len(every) >= x.dim() or (x.dim() > 3 and len(every) > x.dim() - 2):
        raise step.refuse(f"Pad with mode={mode} over batch or channels")
    flat += [0, 0] * (x.dim() - 2 - len(every))
    return F.pad(x, flat, mode=kind)


def _concat(step: Step, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, step.axis(inputs[0].dim())) if len(inputs) > 1 else inputs[0]


def _shape(step: Step, x: Tensor) -> np.ndarray:
    return as_sizes(list(x.shape)[step.get("start", 0) : step.get("end", None)])


def _size(step: Step, x: Tensor) -> np.ndarray:
    return as_sizes([x.numel()]).reshape(())


def _trilu(step: Step, x: Tensor, diagonal: Value = None) -> Tensor:
    k = 0 if diagonal is None else int(number(diagonal))
    return torch.triu(x, k) if step.get("upper", 1) else torch.tril(x, k)


def _filled(step: Step, shape: Value) -> Tensor:
    fill = step.get("value", np.zeros(1, np.float32))
    return as_tensor(np.asarray(fill)).reshape(()).expand(checked(step, numbers(shape))).clone()


ROWS = {
    "Reshape": Row(_reshape, settings=(1,)),
    "Flatten": Row(_flatten),
    "Squeeze": Row(_squeeze, settings=(1,)),
    "Unsqueeze": Row(_unsqueeze, settings=(1,)),
    "Transpose": Row(_transpose),
    "Split": Row(_split, settings=(1,)),
    "Slice": Row(_slice, settings=(1, 2, 3, 4)),
    "Expand": Row(_expand, settings=(1,)),
    "Tile": Row(_tile, settings=(1,)),
    "Pad": Row(_pad, settings=(1, 2, 3)),
    "Concat": Row(_concat),
    "Shape": Row(_shape),
    "Size": Row(_size),
    "Trilu": Row(_trilu, settings=(1,)),
    "ConstantOfShape": Row(_filled, settings=(0,)),
}
