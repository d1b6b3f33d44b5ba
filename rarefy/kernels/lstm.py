"""Sizes of an LSTM's arguments, compared before it runs; the operator is torch's.

torch runs an LSTM of floats on a CPU through oneDNN, which takes each weight by its address and the sizes that the
input and the states have: a weight shorter than that is read past its end (seen in torch 2.14; GRU and the plain
recurrent layers go through ``linear``, which compares). In a graph of a stranger these sizes may follow from the batch,
so that no single look at the file finds them: they are compared whenever an LSTM is about to run on inputs of another
shape, by the interpreter for each node, and by the module's own hook (``graph.signature``) once for each shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

LSTM = torch.ops.aten.lstm.input


def mismatch(values: Mapping[str, Any]) -> str:
    """What is of the wrong size, or "". values: arguments by name."""
    x, states, weights = values["input"], list(values["hx"]), list(values["params"])
    ways, biases, layers = 2 if values["bidirectional"] else 1, values["has_biases"], values["num_layers"]
    if len(states) != 2 or x.dim() != 3 or any(state.dim() != 3 for state in states):
        return f"an LSTM takes an input and two states of 3 axes, not {[_size(one) for one in (x, *states)]}"
    if states[0].shape[2] != states[1].shape[2]:
        return ""  # with a projection: that is torch's own code, which compares
    hidden, batch = states[0].shape[2], x.shape[0 if values["batch_first"] else 1]
    wanted: list[tuple[int, ...]] = [(layers * ways, batch, hidden)] * 2
    for layer in range(layers):
        given = x.shape[2] if layer == 0 else hidden * ways
        sizes: list[tuple[int, ...]] = [(4 * hidden, given), (4 * hidden, hidden)]
        wanted += (sizes + [(4 * hidden,)] * (2 if biases else 0)) * ways
    found = [*states, *weights]
    if len(found) != len(wanted):
        return f"an LSTM of {layers} layers takes {len(wanted) - 2} weights, not {len(weights)}"
    for one, size in zip(found, wanted, strict=True):
        if tuple(one.shape) != size or one.dtype != x.dtype:
            return f"an LSTM takes {x.dtype} of {size} where it has {one.dtype} of {tuple(one.shape)}"
    return ""


def _size(value: Any) -> str:
    return str(tuple(value.shape))
