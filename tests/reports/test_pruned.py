"""What a pruning says of itself: before and after, what could not leave and why; a warning where little left."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.pruning.cost import costs_of, stays
from rarefy.pruning.groups.groups import couple
from rarefy.reports import facts as facts_module
from rarefy.reports import pruned, report

IMAGE = torch.randn(2, 3, 8, 8)


class Sorting(nn.Module):
    """Sorted channels hold both layers of a stream; a small layer beside it is free."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.narrow, self.wide = nn.Conv2d(32, 4, 1), nn.Conv2d(4, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = x + self.two(x) + self.wide(torch.relu(self.narrow(x)))
        return self.head(x.sort(1)[0].mean((2, 3)))


def facts(model: nn.Module, **asked: Any) -> dict[str, Any]:
    return rarefy.prune(model.eval(), inputs=IMAGE, **asked).meta["history"][-1]["facts"]


def test_what_stays_is_counted_by_hand() -> None:
    found = stays(couple(rarefy.capture(Sorting().eval(), IMAGE)))
    held = {"one": 32 * 27 + 32, "two": 32 * 288 + 32, "wide": 32, "head": 32 * 5 + 5}
    macs = {"one": 32 * 27 * 64, "two": 32 * 288 * 64, "wide": 0, "head": 160}
    assert found["params"] == sum(held.values()) and found["macs"] == sum(macs.values())
    first, second = found["reasons"]
    assert first["why"] == "sort runs over it (sort)" and first["layers"] == ["two", "one", "wide"]
    assert first["params"] == held["two"] + held["one"] + held["wide"] and first["count"] == 3
    assert first["macs"] == macs["two"] + macs["one"]
    assert second == {"why": "output of the network", "params": 165, "macs": 160, "layers": ["head"], "count": 1}


def test_what_stays_is_what_the_costs_are_without_any_class() -> None:
    coupling = couple(rarefy.capture(Sorting().eval(), IMAGE), ignore=["narrow"])
    alive = torch.zeros(coupling.count, dtype=torch.bool).numpy()
    alive[0] = True
    left = costs_of(coupling)(alive)
    found = stays(coupling)
    assert (found["params"], found["macs"]) == (left["params"], left["macs"])
    assert [one["why"] for one in found["reasons"]] == [
        "sort runs over it (sort)",
        "output of the network",
        "ignore='narrow' (the request)",
    ]


@pytest.mark.parametrize("asked", [{"keep": 0.5}, {"keep": 0.3}])
def test_little_for_a_request_of_half_warns(caplog: pytest.LogCaptureFixture, asked: dict[str, float]) -> None:
    with caplog.at_level(logging.WARNING, "rarefy"):
        found = facts(Sorting(), **asked)
    (text,) = (record.getMessage() for record in caplog.records)
    assert pruned.warning(found) in text
    assert "of the MACs are left" in text and "sort runs over it (sort): two, one, wide" in text and "--explain" in text


def test_parameters_that_leave_while_macs_stay_warn_too() -> None:
    """A target of parameters is met by a wide layer of few MACs."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.hidden, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 1000), nn.Linear(1000, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.hidden(self.one(x).sort(1)[0].mean((2, 3)))))

    found = facts(Late(), params=0.5)
    assert found["params"][1] <= 0.5 * found["params"][0] and found["macs"][1] > 0.7 * found["macs"][0]
    many = {**found, "macs": [100, 95]}
    assert "params=0.5 took little" in pruned.warning(many) and "95.0 % of the MACs" in pruned.warning(many)


def test_what_was_asked_decides(caplog: pytest.LogCaptureFixture) -> None:
    """A fifth of what should leave is the bound, whatever the target counts in."""
    free = {"asked": {"keep": 0.5}, "macs": [1000, 899], "params": [1000, 899]}
    assert pruned.warning(free) == ""
    assert pruned.warning({**free, "macs": [1000, 901]})
    assert pruned.warning({**free, "asked": {"keep": 0.95}, "macs": [1000, 985]}) == ""
    assert pruned.warning({**free, "asked": {"speedup": 2.0}, "params": [1000, 905]})
    assert pruned.warning({**free, "asked": {"macs": 500}, "macs": [1000, 500], "params": [1000, 920]})
    assert pruned.warning({**free, "asked": {"keep": 1.0}, "macs": [1000, 1000]}) == ""
    assert pruned.warning({"asked": {"keep": 0.5}}) == ""  # a record of before this was kept
    with caplog.at_level(logging.WARNING, "rarefy"):
        facts(
            nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 5)),
            keep=0.5,
        )
    assert not caplog.records


def test_narrow_layers_are_named() -> None:
    found = {"asked": {"keep": 0.5}, "macs": [100, 99], "params": [100, 99], "kept_whole": ["one.weight", "two.weight"]}
    assert "2 layers are narrower than round_to, such as one.weight" in pruned.warning(found)


def test_rows_for_people() -> None:
    shown = dict(pruned.rows(facts(Sorting(), keep=0.5)))
    assert shown["parameters before, after"].startswith("10,")
    assert "97.5 % of the parameters" in shown["could not leave"] and "of the MACs" in shown["could not leave"]
    assert pruned.rows({"asked": {"keep": 0.5}}) == []


@pytest.mark.parametrize(
    "found",
    [
        {"macs": "many", "params": [1, "x"]},
        {"macs": [0, 0], "params": [True, 1]},
        {"macs": [9, 9], "could_not_leave": [1]},
        {"macs": [9, 9], "could_not_leave": {"params": 1, "macs": 1, "reasons": "none"}},
        {"macs": [9, 9], "could_not_leave": {"params": 1, "macs": 1, "reasons": [{"why": 3}]}},
        {"macs": [9, 9], "asked": "half", "kept_whole": 3},
        {"macs": [9, 9], "asked": {"keep": "half"}},
    ],
)
def test_a_record_of_another_form_is_not_believed(found: dict[str, Any]) -> None:
    assert all(name.endswith("before, after") for name, _ in pruned.rows(found))
    assert pruned.warning(found) == ""


def test_the_page_tells_what_could_not_leave() -> None:
    small = rarefy.prune(Sorting().eval(), inputs=IMAGE, keep=0.5)
    page = report.html(facts_module.told_by(small.meta["history"]))
    for said in ("could not leave", "sort runs over it (sort): two, one, wide", "MACs before, after"):
        assert said in page
