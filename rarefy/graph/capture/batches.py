"""Batches in the forms that users have, as the inputs of a graph: what a data loader yields, or a plain tensor.

A batch is a tensor, an array, a dictionary by the graph's names, or a tuple: of the inputs, behind which labels may
stand, which are left out, and that is told once. Numbers are cast where nothing is lost: floats to the graph's type,
whole numbers to wider ones. Bytes for a graph that reads floats are refused: nobody says here how they are scaled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from rarefy.errors import InputError, first_line
from rarefy.graph.nodes import Value, device_of, dtype_name
from rarefy.graph.signature import input_names


def each(batches: object, where: str) -> Iterator[Value]:
    """The batches one after the other: of a list, a loader, a data set without an iterator; a tensor is one batch.

    where: whose batches they are, for messages. Raises InputError for what holds none.
    """
    if isinstance(batches, (Tensor, np.ndarray, Mapping)):
        return iter([batches])
    text = isinstance(batches, (str, bytes))
    if isinstance(batches, Iterable) and not text:
        return iter(batches)
    if not text and callable(getattr(batches, "__getitem__", None)) and callable(getattr(batches, "__len__", None)):
        return (batches[index] for index in range(len(batches)))  # type: ignore[index,arg-type]
    raise InputError(
        f"{where}: a {type(batches).__name__} holds no batches; pass a list of tensors (N, ...), a data loader, "
        "or a tensor"
    )


class Arranger:
    """Batches as the inputs of one graph. where: whose batches they are, for messages."""

    def __init__(self, graph: fx.GraphModule, where: str):
        self.names, self.specs, self.device = input_names(graph), graph.meta["inputs"], device_of(graph)
        self.where, self._told = where, False

    def __call__(self, batch: Value) -> tuple[Tensor, ...]:
        """(N, ...) of each input, on the graph's device. Raises InputError for what is none such."""
        values = self._picked(batch)
        return tuple(map(self._one, values, self.specs, self.names))

    def _picked(self, batch: Value) -> Value:
        """What of a batch the inputs are."""
        count = len(self.specs)
        if isinstance(batch, Mapping):
            return self._by_name(batch)
        if isinstance(batch, (Tensor, np.ndarray)) or not isinstance(batch, (tuple, list)):
            batch = (batch,)
        if count == 1 and len(batch) == 1 and isinstance(batch[0], Mapping):  # (dictionary,)
            return self._by_name(batch[0])
        if len(batch) == count + 1 and all(map(self._fits, batch, self.specs)):
            if not self._told:
                logging.getLogger("rarefy").warning(
                    "%s: batches hold more than the model's input; the last of each, its labels, is left out",
                    self.where,
                )
            self._told = True
            return batch[:count]
        if len(batch) != count:
            names = ", ".join(self.names)
            wanted = names if count == 1 else f"({names})"
            rest = "".join(f", _{index}" for index in range(len(batch) - count))
            raise InputError(
                f"{self.where}: a batch of {len(batch)} parts for {count} input{'s' if count > 1 else ''} ({names}); "
                f"pass the inputs alone, as in [{wanted} for {names}{rest} in loader]"
            )
        return batch

    def _by_name(self, batch: Mapping[str, Value]) -> Sequence[Value]:
        if set(self.names) <= set(batch):
            return [batch[name] for name in self.names]
        fitting = [key for key, value in batch.items() if self._fits(value, self.specs[0])]
        if len(self.specs) == 1 and len(fitting) == 1:
            return [batch[fitting[0]]]
        keys = ", ".join(map(str, batch))
        raise InputError(
            f"{self.where}: a batch with the keys {keys} for the inputs {', '.join(self.names)}; pass them by these "
            f"names, as in [{{{self.names[0]!r}: batch[{next(iter(map(str, batch)), 'KEY')!r}]}} for batch in loader]"
        )

    def _fits(self, value: Value, spec: Mapping[str, Value]) -> bool:
        """Has it the axes of that input, a batch or one sample?"""
        rank = len(spec["shape"])
        return isinstance(value, (Tensor, np.ndarray)) and value.ndim in (rank, rank + 1)

    def _one(self, value: Value, spec: Mapping[str, Value], name: str) -> Tensor:
        """One input of a batch, in the graph's type."""
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.where}: a {type(value).__name__} is no input ({first_line(error, 100)}); pass tensors, as in "
                f"[transform(image) for image in images]"
            ) from error
        wanted: list[int] = spec["shape"]
        if list(tensor.shape) == wanted:
            tensor = tensor.unsqueeze(0)
        if list(tensor.shape[1:]) != wanted:  # of all batches one size, whose sums are taken together
            sizes = ", ".join(map(str, wanted))
            raise InputError(f"{self.where} of shape {list(tensor.shape)} for {name}: the model takes (N, {sizes})")
        return self._cast(tensor, getattr(torch, spec["dtype"]), name).to(self.device)

    def _cast(self, tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        if tensor.dtype == dtype or (tensor.is_floating_point() and dtype.is_floating_point):
            return tensor.to(dtype)
        given = f"{self.where}: {name} holds {dtype_name(tensor.dtype)}, the model reads {dtype_name(dtype)}"
        if dtype.is_floating_point:
            raise InputError(
                f"{given}, and nothing says how whole numbers are scaled; prepare them as in training, "
                "such as [x.float() / 255 for x in batches], or pass a task"
            )
        whole = tensor.to(dtype)
        if not torch.equal(whole.to(tensor.dtype), tensor):
            raise InputError(f"{given}, which can't hold them; pass whole numbers, as in [x.long() for x in batches]")
        return whole
