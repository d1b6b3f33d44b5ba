"""A node of an ONNX file as a module, and what its row in the table may ask of it.

Sizes are worked out beside the tensors: what follows from shapes and constants alone is a NumPy array (of type
``object`` where a size is free while the model is traced), so that chains of Shape, Gather and Concat leave no
operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.errors import InputError
from rarefy.graph.nodes import Value

T = TypeVar("T")
LARGEST = 2**31  # elements of one value: more is a damaged or a hostile file


@dataclass(frozen=True)
class Row:
    """How a node is computed.

    run: takes the step and its inputs (None where one is left out), returns its output or a tuple of them.
    settings: places of inputs that are numbers for the operator and no tensors: axes, sizes, bounds.
    either: places of inputs that ``run`` takes as an array where they are constant, as a tensor elsewhere.
    broadcast: the operands are of one element each or broadcast, and a constant of one element is a number.
    stored: names of the inputs that are a layer's weights ("" for others), in order.
    store: changes a weight to the form, or to the tensors by their names, that PyTorch's operator reads.
    """

    run: Callable[..., Value]
    settings: tuple[int, ...] = ()
    either: tuple[int, ...] = ()
    broadcast: bool = False
    stored: tuple[str, ...] = ()
    store: Callable[[Step, str, np.ndarray], np.ndarray | dict[str, np.ndarray]] | None = None

    def reads_array(self, place: int, value: np.ndarray) -> bool:
        """Is a constant there left as it is, and not stored as a tensor of the model?"""
        return place in self.settings or place in self.either or (self.broadcast and value.size == 1)


class Step(nn.Module):
    """One node.

    kind: its operator. label: how messages call it. attributes: plain values. opset: the file's. reads: for each input
    its name, a constant, or None. writes: names of its outputs, "" where nothing reads one.
    done: names that nothing reads after it. free: for a node whose sizes the file fixes for its own batch, what makes
    its inputs fit any (``rarefy.models.onnx.batch``). stored_turned: is its weight stored as (out, in), unlike the
    file? path: its name in the tree of modules, as wished; place: as it is.
    """

    def __init__(self, kind: str, label: str, attributes: Mapping[str, Value], opset: int, row: Row):
        super().__init__()
        self.kind, self.label, self.attributes, self.opset, self.row = kind, label, dict(attributes), opset, row
        self.reads: list[Value] = []
        self.writes: list[str] = []
        self.done: list[str] = []
        self.free: Callable[..., Value] | None = None
        self.stored_turned = False
        self.path = self.place = ""

    def get(self, name: str, default: T) -> T:
        """An attribute, or what stands for it where the file does not say."""
        value: T = self.attributes.get(name, default)
        return value

    def refuse(self, what: str, way_out: str = "") -> InputError:
        """The error for a form of the operator that there is no row for."""
        way_out = way_out or "cut the file before that node (onnx.utils.extract_model), or start from the PyTorch model"
        return InputError(f"{self.label}: {what}; {way_out}")

    def only(self, name: str, *allowed: Value) -> None:
        """Raises InputError where an attribute is another than these, of which the first is the default."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise self.refuse(f"{self.kind} with {name}={value}")

    def axis(self, rank: int, default: int = 0) -> int:
        """The attribute ``axis``, counted from the front."""
        return self.wrapped(int(self.get("axis", default)), rank)

    def wrapped(self, axis: int, rank: int) -> int:
        if not -rank <= axis < max(rank, 1):
            raise self.refuse(f"axis {axis} of a tensor of {rank} axes", "the file is damaged; export it again")
        return axis % rank if rank else 0

    def forward(self, *inputs: Value) -> Value:
        if self.free is not None:
            inputs = self.free(*inputs)
        rank = max((value.dim() for value in inputs if isinstance(value, Tensor)), default=0)
        return self.row.run(self, *(self._operand(*one, rank) for one in enumerate(inputs)))

    def _operand(self, place: int, value: Value, rank: int) -> Value:
        if isinstance(value, Tensor) and place in self.row.settings:
            raise self.refuse(f"input {place} of {self.kind} is computed from values, not from sizes")
        if not isinstance(value, np.ndarray) or place in self.row.settings or place in self.row.either:
            return value
        if self.row.broadcast and value.size == 1 and value.ndim <= rank:
            return value.item()
        return as_tensor(value)


def as_tensor(value: np.ndarray) -> Tensor:
    """Numbers as a tensor, also where some are sizes that are free while the model is traced."""
    if value.dtype != object:
        return torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)
    parts = [torch.scalar_tensor(one, dtype=torch.int64) for one in value.reshape(-1)]
    return torch.stack(parts).reshape(value.shape) if parts else torch.empty(value.shape, dtype=torch.int64)


def numbers(value: np.ndarray | Sequence[int] | None) -> list[Value]:
    """A list of plain numbers, or of sizes that are free."""
    if value is None:
        return []
    return [one.item() if isinstance(one, np.generic) else one for one in np.asarray(value).reshape(-1)]


def number(value: Value) -> Value:
    return numbers(value)[0]


def as_sizes(values: Sequence[Value]) -> np.ndarray:
    """Sizes as an array that stays exact where some are free."""
    plain = all(isinstance(one, int) for one in values)
    found = np.empty(len(values), dtype=np.int64 if plain else object)
    found[:] = values
    return found


def checked(step: Step, sizes: Sequence[Value]) -> list[Value]:
    """Sizes of a value about to be made. Raises InputError where they can't be meant."""
    plain = [int(one) for one in sizes if isinstance(one, int)]
    if any(one < 0 for one in plain) or math.prod(plain) > LARGEST:
        raise step.refuse(f"makes a tensor of {'x'.join(map(str, sizes))}", "the file is damaged; export it again")
    return list(sizes)
