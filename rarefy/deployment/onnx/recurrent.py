"""Rows of the recurrent layers: each layer is one LSTM, GRU or RNN of ONNX, with its gates in ONNX's order.

torch    lstm i f g o      gru r z n
ONNX     lstm i o f g      gru z r h, with the reset gate behind the product (linear_before_reset)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from rarefy.deployment.onnx.writer import Arguments, Row, Untranslated, Writer
from rarefy.errors import InputError
from rarefy.graph.nodes import Value, attribute, operator_name


@dataclass(frozen=True)
class Kind:
    """name: of ONNX's operator. order: place among torch's gates of each of ONNX's. activation: of a plain RNN."""

    name: str
    order: tuple[int, ...]
    activation: str = ""

    def options(self, directions: int) -> dict[str, object]:
        if self.activation:
            return {"activations": [self.activation] * directions}
        return {"linear_before_reset": 1} if self.name == "GRU" else {}


def _layer(
    w: Writer, kind: Kind, x: str, parts: Sequence[Sequence[Tensor]], states: Sequence[str], key: str
) -> list[str]:
    """One layer of one or two directions. x: (time, batch, inputs). parts: of each direction, its weights and biases.

    states: what it begins with, (directions, batch, hidden) each.
    """
    hidden = parts[0][1].shape[1]

    def ordered(part: Tensor) -> Tensor:
        gates = part.split(hidden)
        return torch.cat([gates[place] for place in kind.order])

    names = []
    for index, letter in enumerate("WR"):
        weights = torch.stack([ordered(part[index]) for part in parts])
        names.append(w.stored_anew(f"{letter}{key}", weights))
    bias = ""
    if len(parts[0]) == 4:
        biases = torch.stack([torch.cat([ordered(part[2]), ordered(part[3])]) for part in parts])
        bias = w.stored_anew(f"B{key}", biases)
    direction = "bidirectional" if len(parts) == 2 else "forward"
    inputs = [x, *names, bias, "", *states]
    options = kind.options(len(parts))
    return w.ops(kind.name, inputs, 1 + len(states), hidden_size=hidden, direction=direction, **options)


def _projected(
    w: Writer, kind: Kind, x: str, parts: Sequence[Sequence[Tensor]], states: Sequence[str], key: str
) -> list[str]:
    """The same with a projection, (projected, hidden), at the end of each of ``parts``.

    states: none, for zeros, and the cells.
    """
    without = [[part[0], part[1] @ part[-1], *part[2:-1]] for part in parts]
    answers, last, cells = _layer(w, kind, x, without, states, key)
    projection = w.stored_anew(f"P{key}", torch.stack([part[-1].t() for part in parts]))
    return [w.op("MatMul", [answers, projection]), w.op("MatMul", [last, projection]), cells]


def _zeros(node: fx.Node, state: fx.Node) -> str:
    """No state, which is one of zeros, of the shape before the projection."""
    if operator_name(state) not in ("zeros", "new_zeros", "zeros_like"):
        raise InputError(
            f"{node.name}: ONNX has no recurrent layer with a projection that begins with a state of its own"
        )
    return ""


def _tensors(w: Writer, node: fx.Node, parameters: Sequence[Value]) -> list[Tensor]:
    if any(not isinstance(one, fx.Node) or one.op != "get_attr" for one in parameters):
        raise Untranslated(f"{node.name}: a recurrent layer with computed weights")
    return [attribute(w.graph, one).detach() for one in parameters]


def _sequence(w: Writer, node: fx.Node, g: Arguments, kind: Kind) -> list[str]:
    directions, layers = 2 if g["bidirectional"] else 1, g["num_layers"]
    stored = _tensors(w, node, g["params"])
    each = len(stored) // (layers * directions)
    x = w.value(g["input"])
    if g["batch_first"]:
        x = w.transposed(x, [1, 0, 2])
    states = g["hx"] if isinstance(g["hx"], (list, tuple)) else [g["hx"]]
    starts = w.values(*states)
    if each in (3, 5):
        starts[0] = _zeros(node, states[0])
    lasts: list[list[str]] = [[] for _ in starts]
    for layer in range(layers):
        parts = [stored[(layer * directions + way) * each :][:each] for way in range(directions)]
        begin, end = layer * directions, (layer + 1) * directions
        own = starts if layers == 1 else [name and w.sliced(name, 0, begin, end) for name in starts]
        if each in (3, 5):
            outputs = _projected(w, kind, x, parts, own, str(layer))
        else:
            outputs = _layer(w, kind, x, parts, own, str(layer))
        # (time, directions, batch, hidden) -> (time, batch, directions x hidden)
        transposed = w.transposed(outputs[0], [0, 2, 1, 3])
        x = w.op("Reshape", [transposed, w.constant([0, 0, -1])], allowzero=0)
        for last, name in zip(lasts, outputs[1:], strict=True):
            last.append(name)
    answer = w.transposed(x, [1, 0, 2]) if g["batch_first"] else x
    return [answer, *(last[0] if layers == 1 else w.op("Concat", last, axis=0) for last in lasts)]


def _cell(w: Writer, node: fx.Node, g: Arguments, kind: Kind) -> str | list[str]:
    """One step is a sequence of one."""
    parts = [_tensors(w, node, [g[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if g[name] is not None])]
    states = g["hx"] if isinstance(g["hx"], (list, tuple)) else [g["hx"]]
    first = w.constant([0])
    x, *starts = (w.op("Unsqueeze", [name, first]) for name in w.values(g["input"], *states))
    _, *lasts = _layer(w, kind, x, parts, starts, "")
    results = [w.op("Squeeze", [name, first]) for name in lasts]
    return results if kind.name == "LSTM" else results[0]


LSTM, GRU = Kind("LSTM", (0, 3, 1, 2)), Kind("GRU", (1, 0, 2))
TANH, RELU = Kind("RNN", (0,), "Tanh"), Kind("RNN", (0,), "Relu")
ROWS: dict[str, Row] = {
    "lstm.input": partial(_sequence, kind=LSTM),
    "gru.input": partial(_sequence, kind=GRU),
    "rnn_tanh.input": partial(_sequence, kind=TANH),
    "rnn_relu.input": partial(_sequence, kind=RELU),
    "lstm_cell": partial(_cell, kind=LSTM),
    "gru_cell": partial(_cell, kind=GRU),
    "rnn_tanh_cell": partial(_cell, kind=TANH),
    "rnn_relu_cell": partial(_cell, kind=RELU),
}
