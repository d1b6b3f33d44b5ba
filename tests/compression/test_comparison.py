"""The last measurement beside what the gate has seen: once more where they contradict each other, and told then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rarefy.compression import comparison, facts
from rarefy.compression.gates import ORIGINAL
from rarefy.deployment import latency


def ratio(median: float, half: float = 0.05) -> latency.Quartiles:
    return {"low": median - half, "median": median, "high": median + half}


def timed(*medians: float, disturbed: bool = False) -> Any:
    """Stands for ``latency.timed``: one speed-up after the other."""
    left = list(medians)

    def measure(files: Any, example: Any, runtime: Any) -> Any:
        told = {"repeats": 9, "rounds": 60, "disturbed": disturbed}
        return {"result": {"latency_ms": told, "speedup": {ORIGINAL: ratio(left.pop(0))}}}

    measure.left = left  # type: ignore[attr-defined]
    return measure


@pytest.mark.parametrize(
    ("gate", "medians", "disturbed", "words", "unused"),
    [
        (1.5, (1.48, 9.0), False, [], 1),
        (1.5, (1.1, 1.49), False, [], 0),
        (1.5, (1.1, 1.12), False, ["1.50x (1.45 to 1.55) when the step was judged, and 1.12x (1.07 to 1.17)"], 0),
        (1.5, (1.5,), True, ["only 9 of 60 rounds could be trusted"], 0),
        (None, (3.0,), False, [], 0),
    ],
    ids=["agree", "agree the second time", "apart", "disturbed", "the original"],
)
def test_the_last_measurement_is_held_against_the_gates(
    gate: float | None, medians: tuple[float, ...], disturbed: bool, words: list[str], unused: int, monkeypatch: Any
) -> None:
    measure = timed(*medians, disturbed=disturbed)
    monkeypatch.setattr(latency, "timed", measure)
    result: Any = SimpleNamespace(index=0 if gate is None else 2, record={"speedup": {ORIGINAL: ratio(gate or 1.0)}})
    run: Any = SimpleNamespace(runtime=None)
    times, doubts = comparison._timed(run, {"result": Path("x")}, torch.zeros(1), result)
    assert len(measure.left) == unused
    assert len(doubts) == len(words) and all(word in told for word, told in zip(words, doubts, strict=True))
    assert times["result"]["speedup"][ORIGINAL]["median"] == medians[len(medians) - unused - 1]


def test_a_candidates_disturbed_measurement_is_told() -> None:
    told: Any = {"repeats": 9, "rounds": 60, "disturbed": True}
    assert "9 of 60" in facts._doubt(SimpleNamespace(record={"latency_ms": told}))  # type: ignore[arg-type]
    assert facts._doubt(SimpleNamespace(record={"latency_ms": {"repeats": 9}})) == ""  # type: ignore[arg-type]
