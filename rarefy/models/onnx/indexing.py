"""Rows of the operators that read or write places by number."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.graph.nodes import Value
from rarefy.models.onnx.step import Row, Step, as_tensor, number, numbers


def _gather(step: Step, x: Tensor, places: Value) -> Tensor:
    axis = step.axis(x.dim())
    if isinstance(places, Tensor):
        if axis == 0 and x.dim() == 2 and isinstance(x, torch.nn.Parameter):
            return F.embedding(places, x)
        size = x.shape[axis]
        flat = x.index_select(axis, torch.where(places < 0, places + size, places).reshape(-1))
        return flat.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])
    if places.ndim == 0:
        return x.select(axis, number(places))
    index = _run(numbers(places))
    if places.ndim == 1 and index is not None:
        return x[(slice(None),) * axis + (index,)]
    return x.index_select(axis, as_tensor(places % x.shape[axis]).reshape(-1)).reshape(
        *x.shape[:axis], *places.shape, *x.shape[axis + 1 :]
    )


def _run(places: list[Value]) -> slice | None:
    """The slice that reads these places, if one does."""
    jump = places[1] - places[0] if len(places) > 1 else 1
    if not places or jump < 1 or places[0] < 0 or places != list(range(places[0], places[-1] + 1, jump)):
        return None
    return slice(places[0], places[-1] + 1, jump)


def _from_front(places: Tensor, size: Value) -> Tensor:
    return torch.where(places < 0, places + size, places).to(torch.int64)


def _gather_elements(step: Step, x: Tensor, places: Tensor) -> Tensor:
    axis = step.axis(x.dim())
    return x.gather(axis, _from_front(places, x.shape[axis]))


def _gather_nd(step: Step, x: Tensor, places: Tensor) -> Tensor:
    if step.get("batch_dims", 0):
        raise step.refuse("GatherND with batch_dims")
    return x[tuple(_from_front(one, size) for one, size in zip(places.unbind(-1), x.shape))]


def _scatter_nd(step: Step, x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    kind = step.get("reduction", "none")
    if kind not in ("none", "add"):
        raise step.refuse(f"ScatterND with reduction={kind}")
    where = tuple(_from_front(one, size) for one, size in zip(places.unbind(-1), x.shape))
    return x.index_put(where, values, accumulate=kind == "add")


def _scatter_elements(step: Step, x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    axis = step.axis(x.dim())
    places = _from_front(places, x.shape[axis])
    kind = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}.get(step.get("reduction", "none"))
    if kind is None:
        step.only("reduction", "none")
        return x.scatter(axis, places, values)
    return x.scatter_reduce(axis, places, values, kind)


def _one_hot(step: Step, places: Tensor, depth: np.ndarray, values: np.ndarray) -> Tensor:
    count, (off, on) = int(number(depth)), numbers(values)
    axis = int(step.get("axis", -1))
    axis = axis + places.dim() + 1 if axis < 0 else axis
    shape = [1] * (places.dim() + 1)
    shape[axis] = count
    chosen = _from_front(places, count).unsqueeze(axis) == torch.arange(count).reshape(shape)
    return torch.where(chosen, as_tensor(values[1]), as_tensor(values[0])) if on != off else chosen * 0 + off


def _range(step: Step, start: np.ndarray, end: np.ndarray, jump: np.ndarray) -> Tensor:
    return torch.arange(number(start), number(end), number(jump), dtype=as_tensor(np.asarray(start)).dtype)


ROWS = {
    "Gather": Row(_gather, either=(1,), stored=("weight",)),
    "GatherElements": Row(_gather_elements),
    "GatherND": Row(_gather_nd),
    "ScatterND": Row(_scatter_nd),
    "ScatterElements": Row(_scatter_elements),
    "Scatter": Row(_scatter_elements),
    "OneHot": Row(_one_hot, settings=(1, 2)),
    "Range": Row(_range, settings=(0, 1, 2)),
}
