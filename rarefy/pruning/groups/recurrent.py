"""Recurrent layers: hidden units leave with their gates, and inputs with what makes them.

    weight_ih (gates * hidden, inputs)      weight_hh (gates * hidden, hidden)      biases (gates * hidden,)

A unit leaves with its row in every gate, with its column of ``weight_hh``, and with its column of the next layer's
``weight_ih``. The state (layers * directions, batch, hidden) is one tensor, so all layers and directions of one
operator lose the same units. Given up: the hidden units of an LSTM with a projection, because torch tells one by sizes
that differ, which pruning could make equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rarefy.graph.nodes import argument
from rarefy.pruning.groups.labels import Arguments, Carried, Trace, Unknown, Value, along

CELL = ("w_ih", "w_hh", "b_ih", "b_hh")


def recurrent(trace: Trace, node: fx.Node, a: Arguments) -> Carried:
    """gru, lstm, rnn_tanh, rnn_relu on a sequence: the answers of all steps, and the last state (or two)."""
    if "input" not in a:
        return Unknown  # packed sequences
    source, params = a["input"], a["params"]
    directions = 2 if a["bidirectional"] else 1
    each = len(params) // (a["num_layers"] * directions)
    cells = [params[start : start + each] for start in range(0, len(params), each)]
    for weight in argument(node, "params")[::each]:
        trace.note_layer(weight, 0)
    units = [_units(trace, cell) for cell in cells]
    for other in units[1:]:
        trace.tie_or_freeze(other, units[0], "follows a layer whose units are fixed")
    read, rest = trace.channel(source, 2)
    trace.keep(rest, (), "steps of a recurrent layer, or its batch")
    last = len(cells) - directions
    for index, cell in enumerate(cells):
        columns, _ = trace.channel(cell[0], 1)
        before = index // directions * directions - directions
        made = read if before < 0 else _joined(units[before : before + directions])
        trace.tie_or_freeze(columns, made, "follows an input that is fixed")
    states = _states(trace, a["hx"], units[0])
    shapes = [tuple(result.shape) for result in trace.shapes[node]]
    answers = Value(shapes[0], _along(_joined(units[last:]), 3))
    return [answers, *(Value(shape, _along(units[0], 3)) for shape, _ in zip(shapes[1:], states, strict=True))]


def recurrent_cell(trace: Trace, node: fx.Node, a: Arguments) -> Carried:
    """gru_cell, lstm_cell, rnn_tanh_cell, rnn_relu_cell: one step."""
    trace.note_layer(argument(node, "w_ih"), 0)
    cell = [a[name] for name in CELL if isinstance(a.get(name), Value)]
    units = _units(trace, cell)
    read, rest = trace.channel(a["input"], 1)
    trace.keep(rest, (), "the batch of a recurrent layer")
    trace.tie_or_freeze(trace.channel(cell[0], 1)[0], read, "follows an input that is fixed")
    _states(trace, a["hx"], units)
    made = trace.shapes[node]
    results = [
        Value(tuple(one.shape), _along(units, 2)) for one in (made if isinstance(made, (list, tuple)) else [made])
    ]
    return results if isinstance(made, (list, tuple)) else results[0]


def _units(trace: Trace, cell: list[Value]) -> Tensor | None:
    """(hidden,) labels of one layer and direction; None where they are fixed.

    cell: weight_ih, weight_hh, the biases if there are any, and the projection if there is one.
    """
    projected = len(cell) in (3, 5)
    hidden = cell[-1].shape[1] if projected else cell[1].shape[1]
    found: Tensor | None = None
    for part in cell[:-1] if projected else cell:
        rows, _ = trace.channel(part, 0)
        if rows is None:
            continue
        gates = rows.reshape(-1, hidden)
        trace.tie(gates, gates[:1])
        found = gates[0] if found is None else found
        trace.tie(gates[0], found)
    columns, _ = trace.channel(cell[1], 1)
    if not projected:
        trace.tie_or_freeze(found, columns, "units of one that are fixed")
        return found if columns is not None else None
    for labels in (found, columns, *(trace.channel(cell[-1], axis)[0] for axis in (0, 1))):
        if labels is not None:
            trace.freeze(labels, "a recurrent layer with a projection (proj_size)")
    return None


def _states(trace: Trace, hx: Carried, units: Tensor | None) -> list[Value]:
    """The states that it begins with: their units are those of the layer."""
    states = hx if isinstance(hx, list) else [hx]
    for state in states:
        own, rest = trace.channel(state, state.rank - 1)
        trace.keep(rest, (), "layers of a recurrent layer, or its batch")
        trace.tie_or_freeze(own, units, "the state that a recurrent layer begins with is fixed")
    return states


def _joined(units: list[Tensor | None]) -> Tensor | None:
    """Of all directions, side by side."""
    known = [one for one in units if one is not None]
    return torch.cat(known) if known and len(known) == len(units) else None


def _along(units: Tensor | None, rank: int) -> list[Tensor]:
    return [] if units is None else [along(units, rank - 1, rank)]
