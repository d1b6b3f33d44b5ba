"""Which sizes of its inputs a graph leaves free beside the batch: height and width, the length of a sequence.

The trace writes whatever ``forward`` reads of a size into the graph as a number, and the graph would answer another
size wrongly. So the model says which sizes are free: where it answers another size (odd, then a multiple of 32), and
the graph gives the same numbers, they are; where the model takes that size and the graph differs, they stay as they
are, and that is told once. Where code outside of torch reads sizes, a branch of it may hang on how large they are, and
a second, larger size is tried.

Given up: sizes as symbols of the trace, with which a network that reads them would be free, too. On window attention
torch's own reasoning about them takes minutes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from rarefy.graph import signature
from rarefy.graph.capture.examples import Call
from rarefy.graph.nodes import Value

STEP = 32  # pixels, or tokens: networks halve their planes five times
CLOSE = 1e-3  # of the largest number that is answered, for sums in another order
_TORCH = str(Path(torch.__file__).parent)
Sizes = list[list[int | None]]  # of each input, of each axis behind the batch: what it is a multiple of; None: fixed


def free_sizes(model: nn.Module, graph: fx.GraphModule, call: Call) -> Sizes:
    """The sizes that ``graph``, captured from ``model`` with ``call``, leaves free."""
    fixed: Sizes = [[None] * (tensor.dim() - 1) for tensor in call.tensors]
    for axes in _open_axes(call.tensors):
        for multiple, change in ((1, _odd), (STEP, _stepped)):
            same = _tried(model, graph, call, axes, change)
            if same and _reads_sizes(model, call):
                same = _tried(model, graph, call, axes, _larger) is not False
            if same:
                return [
                    [multiple if axis in open_axes else None for axis in range(1, tensor.dim())]
                    for tensor, open_axes in zip(call.tensors, axes, strict=True)
                ]
            if same is not None:
                _tell(model, call)
                return fixed
    return fixed


def _tell(model: nn.Module, call: Call) -> None:
    """Why the graph takes the example's sizes alone."""
    inputs = zip(call.names, call.tensors, strict=True)
    taken = ", ".join(f"{name} (N, {', '.join(map(str, tensor.shape[1:]))})" for name, tensor in inputs)
    one, other = (call.mapped(torch.clone).run(model) for _ in range(2))
    why = "reads sizes of its input"
    if not _same(one, other):
        why = "answers otherwise each time, also in eval() (noise, dropout that is always on, a state that it keeps)"
    logging.getLogger("rarefy").warning(
        "%s %s, so the graph takes the size of the example alone: %s", type(model).__name__, why, taken
    )


def _open_axes(tensors: Sequence[Tensor]) -> list[list[list[int]]]:
    """Axes of each input that may be free, the likeliest first: of a plane or volume, of a sequence, not channels."""
    first = [list(range(2, tensor.dim())) if tensor.dim() > 3 else _of_sequence(tensor) for tensor in tensors]
    last = [list(range(1, tensor.dim() - 1)) if tensor.dim() > 3 else axes for tensor, axes in zip(tensors, first)]
    turned = [[2] if tensor.dim() == 3 else axes for tensor, axes in zip(tensors, first)]
    found = [first]
    found += [axes for axes in (last, turned) if axes not in found]
    return [axes for axes in found if any(axes)]


def _of_sequence(tensor: Tensor) -> list[int]:
    return [1] if tensor.dim() == 3 or (tensor.dim() == 2 and not tensor.is_floating_point()) else []


def _odd(size: int, axis: int) -> int:
    return size + 1 + size % 2 if axis % 2 else max(1, size - 1 - size % 2)


def _stepped(size: int, axis: int) -> int:
    return size + STEP * (1 + axis % 2)


def _larger(size: int, axis: int) -> int:
    return size + min(size, 5 * STEP) + 3 + 2 * (axis % 2)


def _tried(
    model: nn.Module,
    graph: fx.GraphModule,
    call: Call,
    axes: Sequence[Sequence[int]],
    change: Callable[[int, int], int],
) -> bool | None:
    """Does the graph answer such sizes as the model does? None: the model takes none such."""
    changed = {  # inputs of one size stay so: tokens and their mask
        (tensor.shape[axis], axis): change(tensor.shape[axis], axis)
        for tensor, open_axes in zip(call.tensors, axes, strict=True)
        for axis in open_axes
    }
    made = iter([_resized(tensor, open_axes, changed) for tensor, open_axes in zip(call.tensors, axes, strict=True)])
    other = call.mapped(lambda _: next(made))
    try:
        wanted = other.mapped(torch.clone).run(model)  # a model may write to its input
    except Exception:  # whatever a model's own code raises for a size that it does not take
        return None
    try:
        with torch.no_grad():
            found = graph(*other.tensors)
    except Exception:
        return False
    return _same(wanted, found)


def _resized(tensor: Tensor, axes: Sequence[int], changed: Mapping[tuple[int, int], int]) -> Tensor:
    """One or two samples of these sizes, of the example's numbers over and over."""
    for axis in axes:
        size = changed[tensor.shape[axis], axis]
        index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
        tensor = tensor.index_select(axis, index)
    return tensor[:2]


def _same(wanted: Value, found: Value) -> bool:
    ours, theirs = (
        [value for value in pytree.tree_leaves(signature.plain(one)) if isinstance(value, Tensor)]
        for one in (found, wanted)
    )
    if [value.shape for value in ours] != [value.shape for value in theirs]:
        return False
    return all(map(_close, ours, theirs))


def _close(one: Tensor, other: Tensor) -> bool:
    allowed = CLOSE if one.dtype.itemsize >= 4 else 30 * CLOSE
    if not one.is_floating_point():
        return torch.equal(one, other)
    one, other = one.double(), other.double()
    finite = other.isfinite()
    if not torch.equal(finite, one.isfinite()):
        return False
    if not bool(finite.any()):
        return True
    difference, largest = float((one - other)[finite].abs().max()), float(other[finite].abs().max())
    return difference <= allowed * largest


class _Reads(TorchFunctionMode):
    """While a model runs: does code outside of torch ask a tensor for a size?"""

    found = False

    def __torch_function__(
        self, func: Callable[..., Value], types: object, args: tuple[Value, ...] = (), kwargs: Value = None
    ) -> Value:
        if func in (torch.Tensor.size, torch.Tensor.shape.__get__):  # type: ignore[attr-defined]
            frame = sys._getframe(1)
            self.found = self.found or not frame.f_code.co_filename.startswith(_TORCH)
        return func(*args, **(kwargs or {}))


def _reads_sizes(model: nn.Module, call: Call) -> bool:
    reads = _Reads()
    with reads:
        call.run(model)
    return bool(reads.found)
