"""``len(x)`` of a tensor in the trace: its first size, which stays free, as in ``x.shape[0]``.

Python's own ``len`` gives numbers alone, and would write the batch of the example into the graph. So files in which the
model's classes stand are given a ``len`` of theirs while the trace runs, as ``torch.fx``'s tracer does it.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterator

from torch import Tensor, nn

from rarefy.graph.nodes import Value

_NAME = "len"


@contextlib.contextmanager
def free_lengths(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's own files read the length of a tensor as a size."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    names = {kind.__module__ for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "builtins")}
    files = [vars(sys.modules[name]) for name in names if name in sys.modules]
    given = [file for file in files if _NAME not in file]
    for file in given:
        file[_NAME] = _length
    try:
        yield
    finally:
        for file in given:
            del file[_NAME]


def _length(value: Value) -> Value:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else builtins.len(value)
