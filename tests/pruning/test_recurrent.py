"""Recurrent layers: hidden units leave with their gates, in all layers and directions alike; inputs with their
maker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coupled import classes, coupled, cut_half
from networks import Reader, Stepped
from torch import Tensor, nn

import rarefy
from rarefy.graph.capture import capture
from rarefy.graph.macs import count_macs
from rarefy.pruning.groups.groups import couple

LINES = torch.randn(2, 1, 4, 6)
FORMS: dict[str, dict[str, Any]] = {
    "one": {},
    "two layers": {"num_layers": 2},
    "both ways": {"bidirectional": True},
    "two layers both ways": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
    "steps first": {"batch_first": False},
}
CASES = [(nn.LSTM, form) for form in FORMS] + [(nn.GRU, form) for form in ("one", "two layers both ways", "no bias")]
GATES = {nn.GRU: 3, nn.LSTM: 4, nn.RNN: 1}


@pytest.mark.parametrize(
    ("kind", "form"), [*CASES, (nn.RNN, "two layers")], ids=lambda one: getattr(one, "__name__", one)
)
def test_units_and_inputs_leave(kind: type[nn.RNNBase], form: str) -> None:
    """Each unit with its row in every gate, its column of the products with the state, and of what reads it."""
    options = FORMS[form]
    ways = 2 if options.get("bidirectional") else 1
    found = coupled(Reader(kind, **options), LINES)
    gates = GATES[kind]
    inputs, units = classes(found, "one.weight", 0), classes(found, "many.weight_hh_l0", 1)
    assert len(set(inputs)) == 6 and len(set(units)) == 10 and 0 not in inputs + units
    assert classes(found, "many.weight_ih_l0", 1) == [one for one in inputs for _ in range(4)]
    assert classes(found, "head.weight", 1) == units * ways
    for layer in range(options.get("num_layers", 1)):
        for way in ("", "_reverse")[:ways]:
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if options.get("bias", True) else 2]:
                assert classes(found, f"many.{name}_l{layer}{way}", 0) == units * gates
            if layer:
                assert classes(found, f"many.weight_ih_l{layer}{way}", 1) == units * ways
    assert not found.unknown
    small, alive = cut_half(found)
    kept = int(alive[units].sum())
    assert small.many.weight_hh_l0.shape == (gates * kept, kept) and kept < 10


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_units_of_a_cell_leave(kind: type[nn.RNNCellBase]) -> None:
    found = coupled(Stepped(kind), torch.randn(2, 3, 5))
    units = classes(found, "cell.weight_hh", 1)
    assert len(set(units)) == 9 and classes(found, "head.weight", 1) == units
    assert classes(found, "cell.weight_ih", 1) == classes(found, "first.weight", 0)
    cut_half(found)


def test_the_state_may_be_read_or_given() -> None:
    class Chained(nn.Module):
        """The last state of an encoder begins a decoder; the first one begins with a learned state."""

        def __init__(self) -> None:
            super().__init__()
            self.begin = nn.Parameter(torch.randn(2, 1, 8))
            self.one, self.two = nn.GRU(5, 8, 2, batch_first=True), nn.GRU(5, 8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            _, state = self.one(x, self.begin.expand(-1, x.shape[0], -1).contiguous())
            return self.head(self.two(x, state)[1][-1])  # type: ignore[no-any-return]

    found = coupled(Chained(), torch.randn(2, 4, 5))
    units = classes(found, "one.weight_hh_l0", 1)
    assert len(set(units)) == 8
    assert classes(found, "begin", 2) == classes(found, "two.weight_hh_l1", 1) == units
    cut_half(found)


def test_a_state_from_outside_fixes_the_units() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.many, self.head = nn.Linear(5, 6), nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            return self.head(self.many(self.first(x), state.transpose(0, 1).contiguous())[0])  # type: ignore

    found = coupled(Given(), torch.randn(2, 4, 5), torch.randn(2, 1, 8))
    assert set(classes(found, "many.weight_hh_l0", 1)) == {0}
    assert "the state that a recurrent layer begins with is fixed" in found.frozen["many.weight_ih_l0"]
    assert len(set(classes(found, "first.weight", 0))) == 6


def test_a_projection_holds_the_units_and_says_so() -> None:
    found = coupled(Reader(nn.LSTM, proj_size=4), LINES)
    assert "proj_size" in found.frozen["many.weight_ih_l0"]
    assert set(classes(found, "many.weight_hr_l0", 0)) == {0}
    assert len(set(classes(found, "one.weight", 0))) == 6
    cut_half(found)


def test_macs_by_hand() -> None:
    graph = capture(Reader(nn.LSTM, num_layers=2, bidirectional=True).eval(), LINES)
    steps, gates = 6, 4
    first, second = 2 * gates * 10 * (24 + 10), 2 * gates * 10 * (20 + 10)
    assert count_macs(graph) == 6 * 9 * 4 * 6 + steps * (first + second) + 20 * 4
    stepped = capture(Stepped(nn.GRUCell).eval(), torch.randn(2, 3, 5))
    assert count_macs(stepped) == 3 * (5 * 7 + 3 * 9 * (7 + 9)) + 9 * 4


def test_costs_of_what_is_cut_are_those_of_the_result() -> None:
    graph = capture(Reader(nn.GRU, num_layers=2).eval(), LINES)
    small = rarefy.prune(graph, macs=0.4)
    facts = small.meta["history"][-1]["facts"]
    assert facts["macs"] == [count_macs(graph), count_macs(small)]
    assert facts["params"][1] == sum(parameter.numel() for parameter in small.parameters())
    assert facts["macs"][1] <= 0.4 * facts["macs"][0]


@pytest.mark.parametrize("criterion", ["magnitude", "fpgm", "random"])
def test_criteria_without_data_rank_units(criterion: str) -> None:
    small = rarefy.prune(Reader(nn.LSTM).eval(), inputs=LINES, keep=0.5, criterion=criterion)
    before, after = small.meta["history"][-1]["facts"]["channels"]["many.weight_ih_l0"]
    assert before == 40 and after < 40 and after % 4 == 0


def test_what_is_left_trains_is_saved_and_comes_back(tmp_path: Path) -> None:
    small = rarefy.prune(Reader(nn.GRU, num_layers=2).eval(), inputs=LINES, keep=0.5)
    before = {name: parameter.clone() for name, parameter in small.named_parameters()}
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    small(torch.randn(8, 1, 4, 6)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in small.named_parameters())
    rarefy.save(small.eval(), tmp_path / "small")
    back = rarefy.load(tmp_path / "small")
    x = torch.randn(5, 1, 4, 6)
    assert torch.equal(back(x), small(x))
    assert couple(back).count == couple(small).count


def test_dropout_between_layers_follows_the_mode() -> None:
    graph = capture(Reader(nn.LSTM, num_layers=2, dropout=0.5), LINES)
    x = torch.randn(5, 1, 4, 6)
    assert torch.equal(graph.eval()(x), graph(x))
    assert not torch.equal(graph.train()(x), graph(x))
