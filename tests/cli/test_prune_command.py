"""What ``rarefy prune`` prints: before and after, what could not leave and why, and a warning where little left."""

from __future__ import annotations

from typing import Any

import pytest

from rarefy.cli import outputs

HELD = {"why": "sort runs over it (sort)", "params": 850, "macs": 9000, "layers": ["two", "one"], "count": 4}
FACTS: dict[str, Any] = {
    "asked": {"keep": 0.5},
    "params": [1000, 960],
    "macs": [10_000, 9_900],
    "could_not_leave": {"params": 900, "macs": 9500, "reasons": [HELD]},
}


def printed(capsys: pytest.CaptureFixture[str], step: str, facts: dict[str, Any]) -> str:
    numbers = {"parameters": 960, "macs": 9900, "weight_bytes": 3840}
    outputs._show_result({"step": step, "facts": facts, "folder": "small", **numbers}, "net", None)
    return " ".join(capsys.readouterr().out.split())


def test_a_pruning_says_what_could_not_leave_and_warns(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "prune", FACTS)
    for part in (
        "1,000 -> 960 (4.0 % less)",
        "10,000 -> 9,900 (1.0 % less)",
        "could not leave 90.0 % of the parameters and 95.0 % of the MACs",
        "sort runs over it (sort): two, one and 2 more (85.0 % of the parameters and 90.0 % of the MACs)",
        "warning: keep=0.5 took little: 96.0 % of the parameters and 99.0 % of the MACs are left",
        "--explain",
    ):
        assert part in said


def test_a_pruning_that_took_what_was_asked_and_other_steps_do_not_warn(capsys: pytest.CaptureFixture[str]) -> None:
    assert "warning" not in printed(capsys, "prune", {**FACTS, "params": [1000, 500], "macs": [10_000, 5_000]})
    said = printed(capsys, "quantize", FACTS)
    assert "warning" not in said and "could not leave" not in said
