"""What may be worked out of a file's constants: memory is asked for before it is taken.

An operator on constants can make a terabyte of two numbers (Expand, Tile, Range, a sum over two axes), and a chain of
them anything at all. Each output's size is known before it is made: NumPy's from the shapes, and PyTorch's by running
the operator on the meta device first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy.graph.nodes import Value, takes
from rarefy.models.onnx.step import Step

LEAST, MULTIPLE = 2**28, 8  # bytes that any file may make, and so many for each byte of its weights

# of which NumPy copies operands until their shapes agree
_BROADCAST = frozenset(
    "Add Sub Mul Div Mod Min Max Equal Greater Less GreaterOrEqual LessOrEqual And Or Where Expand".split()
)


class Budget(TorchDispatchMode):
    """Bytes that are left to one file. Raises InputError, by ``step``, before more are taken."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = LEAST
        self.step: Step | None = None

    def grant(self, weight: np.ndarray) -> None:
        """Of what the file holds, more may be made."""
        self.left += MULTIPLE * weight.nbytes

    def ask(self, step: Step, inputs: Sequence[Value]) -> None:
        """Before the step runs, for what NumPy makes in it."""
        self.step = step
        arrays = [one for one in inputs if isinstance(one, np.ndarray)]
        sizes = [one.size for one in arrays]
        count = sum(sizes)
        try:
            if step.kind in _BROADCAST and len(arrays) > 1:
                shapes = [one.shape for one in arrays]
                count = math.prod(np.broadcast_shapes(*shapes))
            elif step.kind == "Gather" and len(arrays) == 2:
                count = sizes[1] * sizes[0] // max(1, arrays[0].shape[step.axis(arrays[0].ndim)])
            elif step.kind == "Range" and sizes == [1, 1, 1]:
                start, end, jump = (float(one.item()) for one in arrays)
                count = max(0, math.ceil((end - start) / jump))
        except (ValueError, IndexError, ArithmeticError):
            return  # shapes that do not fit: the step says so
        self._check(count * max((one.itemsize for one in arrays), default=0))

    def took(self, made: Mapping[str, np.ndarray]) -> None:
        """After it: what stays."""
        self.left -= sum(one.nbytes for one in made.values())
        self._check(0)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Value] = (), kwargs: Mapping[str, Value] | None = None
    ) -> Value:
        given = dict(kwargs or {})
        self._check(_made(func, args, given))
        return func(*args, **given)

    def _check(self, count: int) -> None:
        if count > self.left and self.step is not None:
            raise self.step.refuse(
                f"makes {count / 1e9:.1f} GB of the file's constants, {max(0, self.left) / 1e9:.1f} GB are left",
                "no model needs as much: export it again",
            )


def _made(func: Any, args: Sequence[Value], kwargs: Mapping[str, Value]) -> int:
    """Bytes that the operator makes, asked on the meta device; 0 where that can't say, for what reads numbers."""

    def nowhere(value: Value) -> Value:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return torch.device("meta") if isinstance(value, torch.device) else value

    away, named = pytree.tree_map(nowhere, (tuple(args), dict(kwargs)))
    if not any(isinstance(one, Tensor) for one in pytree.tree_leaves((away, named))):
        if not takes(func, "device"):
            return 0
        named["device"] = torch.device("meta")
    try:
        found = func(*away, **named)
    except Exception:  # whatever the operator says of numbers that are not there, or of shapes: it will say so again
        return 0
    return sum(one.numel() * one.element_size() for one in pytree.tree_leaves(found) if isinstance(one, Tensor))
