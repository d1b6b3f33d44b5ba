"""Rows of the operators that take one number out of several along axes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rarefy.models.onnx.step import Row, Step, number, numbers


def _reduce(run: Callable[[Tensor, list[int], bool], Tensor]) -> Row:
    def called(step: Step, x: Tensor, axes: np.ndarray | None = None) -> Tensor:
        chosen = numbers(step.get("axes", None) if axes is None else axes)
        if not chosen and step.get("noop_with_empty_axes", 0):
            return run(x, [], True) if run in _PER_ELEMENT else x
        chosen = [step.wrapped(axis, x.dim()) for axis in chosen] or list(range(x.dim()))
        return run(x, chosen, bool(step.get("keepdims", 1)))

    return Row(called, settings=(1,))


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype) if axes else x


def _sum_square(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep)


def _l1(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep).sqrt()


def _log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(x, axes, keep).log()


_PER_ELEMENT = {_sum_square, _l1, _l2, _log_sum}  # they change a number also where nothing is joined


def _place(run: Callable[..., Tensor]) -> Row:
    def called(step: Step, x: Tensor) -> Tensor:
        axis, keep = step.axis(x.dim()), bool(step.get("keepdims", 1))
        if not step.get("select_last_index", 0):
            return run(x, axis, keepdim=keep)
        return x.shape[axis] - 1 - run(x.flip(axis), axis, keepdim=keep)

    return Row(called)


def _top(step: Step, x: Tensor, count: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    k = step.get("k", 0) if count is None else number(count)
    values, places = torch.topk(
        x, k, step.axis(x.dim(), -1), largest=bool(step.get("largest", 1)), sorted=bool(step.get("sorted", 1))
    )
    return values, places


def _running_sum(step: Step, x: Tensor, axis: np.ndarray) -> Tensor:
    along = step.wrapped(int(number(axis)), x.dim())
    if step.get("reverse", 0):
        x = x.flip(along)
    total = x.cumsum(along, dtype=x.dtype)
    if step.get("exclusive", 0):
        total = total - x
    return total.flip(along) if step.get("reverse", 0) else total


ROWS = {
    "ReduceSum": _reduce(_sum),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceProd": _reduce(_product),
    "ReduceL1": _reduce(_l1),
    "ReduceL2": _reduce(_l2),
    "ReduceSumSquare": _reduce(_sum_square),
    "ReduceLogSum": _reduce(_log_sum),
    "ReduceLogSumExp": _reduce(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "ArgMax": _place(torch.argmax),
    "ArgMin": _place(torch.argmin),
    "TopK": Row(_top, settings=(1,)),
    "CumSum": Row(_running_sum, settings=(1,)),
}
