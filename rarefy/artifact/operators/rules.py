"""Rules of aten.txt that need shapes or types: (values by name, arguments by name, the argument) -> what is wrong with
it, or the bytes that the operator takes inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rarefy.artifact.allowlist import MOST_NUMBERS
from rarefy.graph.nodes import Value

Values = Mapping[str, Value]


def _divisor(values: Values, given: Values, name: str) -> str | int:
    """The least 32-bit and 64-bit number divided by -1 is a signal on x86, so that no computed number divides them."""
    if values.get("rounding_mode") == "floor" or type(given[name]) is float:
        return 0
    kinds = [one.dtype for one in (values["self"], values[name]) if isinstance(one, Tensor)]
    if any(kind.is_floating_point or kind.is_complex for kind in kinds):
        return 0
    good = type(given[name]) is int and given[name] not in (0, -1)
    return 0 if good else "must be a number other than 0 and -1, where whole numbers are divided"


def _product(values: Values, given: Values, name: str) -> str | int:
    """Factors are copied for each of the batches that they are broadcast to."""
    one, other = values["self"], values["other"]
    if one.dim() < 3 and other.dim() < 3:
        return 0
    batches = math.prod(torch.broadcast_shapes(one.shape[:-2], other.shape[:-2]))
    return _size_of(batches * (math.prod(one.shape[-2:]) + math.prod(other.shape[-2:])), one)


def _attention(values: Values, given: Values, name: str) -> str | int:
    query, key = values["query"], values["key"]
    if query.dim() < 2 or key.dim() < 2:
        return 0
    return _size_of(math.prod(query.shape[:-1]) * key.shape[-2], query)


def _windows(values: Values, given: Values, name: str) -> str | int:
    """A convolution may write all its windows out: for each place of the output, the numbers of a kernel."""
    x, weight = values["input"], values[name]
    if values.get("transposed"):
        return _transposed(values, given, name)
    rank = weight.dim() - 2
    if x.dim() not in (rank + 1, rank + 2) or (not x.is_floating_point() and not x.is_complex()):
        return "can't be slid over " + (f"{x.dim()} axes" if x.is_floating_point() else str(x.dtype))
    stride, padding = (_each(values[key], rank) for key in ("stride", "padding"))
    if min(stride, default=1) < 1:
        return f"can't be moved by {min(stride)}"
    harm = _harm(x, weight, values, rank)
    if harm:
        return harm
    wide = [(size + 2 * around) // step + 1 for size, around, step in zip(x.shape[-rank:], padding, stride)]
    samples = x.shape[0] if x.dim() == rank + 2 else 1
    return _size_of(samples * math.prod(wide) * math.prod(weight.shape[1:]) * values["groups"], x)


_FLOAT32 = "save the model in float32"
_MISSED = 128  # taps of a kernel that may meet nothing before one does


def _harm(x: Tensor, weight: Tensor, values: Values, rank: int) -> str:
    """What is wrong with a convolution of 16-bit numbers that some CPUs do not compute; mostly nothing.

    Found of oneDNN's kernels for AMX (torch 2.14), by drawn arguments. The process dies where all that the kernel meets
    along an axis is padding: x (1, 3, 1, 8), w (8, 3, 2, 2), padding (2, 2), dilation (3, 3). bfloat16 answers with
    memory that was never written where one column is left of a stride, y (2, 4, 6, 1) from x (2, 4, 8, 4), w (4, 4, 3,
    4), stride (1, 3), and where several planes of a kernel meet one: x (1, 3, 1, 8, 8), w (16, 3, 2, 2, 2), padding 1.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        return ""
    spread = values.get("transposed", "output_padding" in values)
    stride, dilation = (_each(values[key], rank) for key in ("stride", "dilation"))
    sizes, kernel = x.shape[-rank:], weight.shape[-rank:]
    wide = [apart * (taps - 1) for apart, taps in zip(dilation, kernel)]
    if isinstance(values["padding"], str):
        padding = [width // 2 * (values["padding"] == "same") for width in wide]
    else:
        padding = list(_each(values["padding"], rank))
    for size, taps, step, around, apart, width in zip(sizes, kernel, stride, padding, dilation, wide):
        if spread:
            size, places = (size - 1) * step - 2 * around + width + 1, size
        else:
            places = (size + 2 * around - width - 1) // step + 1
        if min(size, places) > 0 and not _meets(size, taps, step, around, apart, places):
            return f"in {_short(x)} meets nothing but padding along an axis, which ends the process; {_FLOAT32}"
    if x.dtype != torch.bfloat16 or rank < 2 or spread:
        return ""
    left = sizes[-1] + 2 * padding[-1] - wide[-1] - 1
    if (stride[-1] > 1 and 0 <= left < stride[-1]) or (rank == 3 and sizes[0] == 1 and kernel[0] > 1):
        return f"in bfloat16 answers with memory that was never written on some CPUs; {_FLOAT32}"
    return ""


def _meets(size: int, taps: int, step: int, around: int, apart: int, places: int) -> bool:
    """Does any of the kernel's taps, at any of its places, fall on one of so many numbers?"""
    for tap in range(min(taps, _MISSED)):
        first = around - tap * apart  # of place * step
        place = max(0, -(-first // step))
        if place < places and place * step < first + size:
            return True
    return False


def _transposed(values: Values, given: Values, name: str) -> str | int:
    x, weight = values["input"], values[name]
    if not x.is_floating_point() and not x.is_complex():
        return f"can't be spread over {x.dtype}"
    rank = max(1, weight.dim() - 2)
    harm = _harm(x, weight, values, rank)
    return harm or _size_of(math.prod(x.shape[-rank:]) * x.shape[0] * math.prod(weight.shape[1:]), x)


def _short(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _size_of(numbers: int, like: Tensor) -> int:
    return numbers * like.element_size()


def _each(value: Value, rank: int) -> Sequence[int]:
    if isinstance(value, str):  # "same" puts no more around than the image is wide
        return [0] * rank
    return list(value) * (rank // len(value) or 1) if isinstance(value, (list, tuple)) else [value] * rank


def _scaled(values: Values, given: Values, name: str) -> str | int:
    """A picture on another grid is read at places times scale, which must lie in it."""
    x = next(value for value in values.values() if isinstance(value, Tensor))
    scales = [value for key, value in values.items() if key.startswith("scales")]
    for size, wished, scale in zip(x.shape[2:], _each(values[name], x.dim() - 2), scales):
        if scale is not None and not (0 < scale < math.inf and math.floor(size * scale) == wished):
            return f"is {wished} where a scale of {scale} makes another number of {size}"
    return 0


def _count(values: Values, given: Values, name: str) -> str | int:
    return 0 if values[name] <= MOST_NUMBERS else f"is above {MOST_NUMBERS}"


def _pieces(values: Values, given: Values, name: str) -> str | int:
    axis = values["self"].shape[values["dim"]]
    step = values[name]
    return 0 if step < 1 or axis / step <= MOST_NUMBERS else f"makes more than {MOST_NUMBERS} tensors"


def _each_one(values: Values, given: Values, name: str) -> str | int:
    return 0 if values["self"].shape[values["dim"]] <= MOST_NUMBERS else f"makes more than {MOST_NUMBERS} tensors"


RULES: Mapping[str, Callable[[Values, Values, str], str | int]] = {
    "divisor": _divisor,
    "product": _product,
    "attention": _attention,
    "windows": _windows,
    "transposed": _transposed,
    "count": _count,
    "pieces": _pieces,
    "each": _each_one,
    "scaled": _scaled,
}
