"""The verdict: met, missed, not shown by so many images; no loss is green; robustness that falls is said."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rarefy.cli import outputs
from rarefy.compression.budget import Budget, goals
from rarefy.errors import GoalMissed
from rarefy.reports import report
from rarefy.reports.view import view


def facts(drop: float, interval: tuple[float, float] | None, **more: Any) -> dict[str, Any]:
    """Of a run that was asked for half a point and twice the speed, on 650 images."""
    evaluation = {"metric": "top1", "label": "top-1", "unit": "%", "better": "higher", "samples": 650}
    after = {**evaluation, "value": 0.9 - drop, "drop": {"value": drop, "interval": interval}}
    asked = goals(
        Budget(max_drop=0.005, speedup=2.0), drop=drop, speedup=2.5, size=1, macs=0.5, parameters=0.5,
        interval=interval, samples=650,
    )  # fmt: skip
    sides = {"before": {"evaluation": {**evaluation, "value": 0.9}}, "after": {"evaluation": after}}
    return {"title": "net", "goals": asked, **sides, **more}


MET, CROSSED, MISSED = (0.001, (-0.001, 0.004)), (0.001, (-0.009, 0.011)), (0.02, (0.01, 0.03))


def test_a_goal_that_the_interval_crosses_is_not_shown() -> None:
    told = view(facts(*CROSSED))
    verdict = told["verdict"]
    assert verdict is not None
    assert (verdict["status"], verdict["word"], verdict["light"]) == ("not shown", "Goal not shown", "neutral")
    assert "at most 0.5 points is not shown by 650 images: 0.1 points (-0.9 to 1.1)" in verdict["sentence"]
    assert "met" not in verdict["sentence"] and "missed" not in verdict["sentence"]
    assert [goal["verdict"] for goal in told["goals"]] == ["not shown by 650 images", "met"]
    assert [goal["light"] for goal in told["goals"]] == ["warn", "good"]
    page = report.html(facts(*CROSSED))
    assert '<span class="chip warn">? not shown by 650 images</span>' in page and "more validation images" in page
    assert "not shown by 650 images" in report.summary(facts(*CROSSED))


def test_the_same_drop_within_the_interval_is_met_and_one_beyond_is_missed() -> None:
    for told, status, light in ((MET, "met", "good"), (MISSED, "missed", "bad")):
        verdict = view(facts(*told))["verdict"]
        assert verdict is not None and (verdict["status"], verdict["light"]) == (status, light)


def test_missed_and_not_shown_are_both_told() -> None:
    told = facts(*CROSSED)
    told["goals"][1] = {**told["goals"][1], "met": False, "status": "missed", "reached": 1.5}
    verdict = view(told)["verdict"]
    assert verdict is not None and verdict["status"] == "missed"
    assert "1 of 2 goals missed: speed 1.5× instead of at least 2×." in verdict["sentence"]
    assert "not shown by 650 images" in verdict["sentence"]


def test_reports_of_before_had_no_status() -> None:
    told = facts(*MET)
    told["goals"] = [{"name": "speedup", "asked": 2, "reached": 1, "met": False}, {"name": "size", "met": True}]
    assert [goal["status"] for goal in view(told)["goals"]] == ["missed", "met"]


@pytest.mark.parametrize(
    ("drop", "interval", "good"),
    [
        (-0.001, (-0.01, 0.008), True),
        (0.0, (-0.01, 0.01), None),
        (0.0001, (-0.01, 0.01), None),
        (0.004, (0.001, 0.007), False),  # small, and no chance
        (0.006, (-0.01, 0.02), False),
        (0.004, None, None),
    ],
)
def test_a_loss_is_never_green(drop: float, interval: tuple[float, float] | None, good: bool | None) -> None:
    (row,) = view(facts(drop, interval))["comparison"]
    assert row["good"] is good
    page = report.html(facts(drop, interval))
    assert ('class="value good"' in page) == (good is True) and ('class="value bad"' in page) == (good is False)


def worsened(**after: float) -> dict[str, Any]:
    before = {"fog": {"1": 0.8, "3": 0.6}, "noise": {"1": 0.7, "3": 0.7}}
    return {
        "before": before,
        "after": {name: {one: v - after[name] for one, v in row.items()} for name, row in before.items()},
    }


def test_robustness_that_falls_stands_in_the_verdict() -> None:
    """The interval is +-0.25 points, so half a point is what may fall without a word."""
    for falls in ({"fog": 0.0049, "noise": 0.0049}, {"fog": -0.2, "noise": -0.1}):
        verdict = view(facts(*MET, robustness=worsened(**falls)))["verdict"]
        assert verdict is not None and "Robustness" not in verdict["sentence"] and verdict["light"] == "good"
    both = view(facts(*MET, robustness=worsened(fog=0.05, noise=0.03)))["verdict"]
    assert both is not None and both["status"] == "met" and both["light"] == "neutral"
    assert "Robustness falls: the top-1 accuracy on images made worse on purpose" in both["sentence"]
    assert "by −4.00 points in the mean, under fog by −5.00 points" in both["sentence"]
    one = view(facts(*MET, robustness=worsened(fog=0.0, noise=0.006)))["verdict"]  # in the mean 0.3 points
    assert one is not None and "under noise by −0.60 points" in one["sentence"]
    exact = facts(0.0, (-0.25, 0.25), robustness={"before": {"fog": {"1": 1.0}}, "after": {"fog": {"1": 0.5}}})
    for less, falls in ((0.0, False), (1 / 64, True)):  # twice the half, to the bit, is no fall
        exact["robustness"]["after"] = {"fog": {"1": 0.5 - less}}
        verdict = view(exact)["verdict"]
        assert verdict is not None and ("Robustness falls" in verdict["sentence"]) == falls


def test_what_falls_of_a_loss_is_what_rises() -> None:
    told = facts(*MET, robustness=worsened(fog=-0.05, noise=-0.05))
    for side in ("before", "after"):
        told[side]["evaluation"] |= {"metric": "mae", "label": "error", "unit": "years", "better": "lower"}
    verdict = view(told)["verdict"]
    assert verdict is not None and "+0.05 years in the mean" in verdict["sentence"]


def judged(**after: Any) -> list[str]:
    """The risks of a run whose result was judged so; the original's worst class was right on half of its images."""
    told = facts(*MET, robustness=worsened(fog=0.0, noise=0.0))
    told["before"]["evaluation"]["worst_class"] = {"value": 0.5, "index": 1, "name": "cat", "samples": 500}
    told["after"]["evaluation"] |= {"samples": 5000, "interval": (0.88, 0.92), **after}
    return view(told)["risks"]


def worst(value: float, samples: int) -> dict[str, Any]:
    return {"worst_class": {"value": value, "index": 2, "name": None, "samples": samples}}


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({}, []),
        ({"samples": 1000}, []),
        ({"samples": 999}, ["judged on 999 images only: the true top-1 accuracy may lie 2.00 points higher or lower"]),
        ({"samples": 101}, ["judged on 101 images only"]),
        ({"samples": 99, "interval": None}, []),
        (worst(0.453125, 500), []),
        (
            worst(0.4375, 500),
            ["The worst class, 2, is right on 44 % of its images; the original's worst was right on 50"],
        ),
        (worst(0.75, 30), []),
        (worst(0.75, 29), ["Class 2 has 29 images only"]),
        (worst(0.25, 11), ["The worst class, 2", "Class 2 has 11 images only"]),
    ],
)
def test_risks_begin_at_their_bounds(after: dict[str, Any], words: list[str]) -> None:
    told = judged(**after)
    assert len(told) == len(words) and all(word in text for word, text in zip(words, told, strict=True))


def test_other_risks() -> None:
    def of(*disturbed: str, **more: Any) -> list[str]:
        told = facts(*MET, robustness=worsened(fog=0.0, noise=0.0), **more)
        told["after"]["evaluation"]["samples"] = 5000
        for side in disturbed:
            told[side]["latency_ms"] = {"disturbed": True}
        return view(told)["risks"]

    assert of() == of(parity={"passed": True}) == []
    assert "does not answer as the model does" in of(parity={"passed": False})[0]
    for side in ("before", "after"):
        assert "Other programs ran while times were measured" in of(side)[0]
    crossed = view(facts(*CROSSED))["risks"]
    assert any("accuracy drop was not shown to hold" in text for text in crossed)
    assert any("bad pictures (noise, blur, fog) was not measured" in text for text in crossed)


def test_goals_in_their_units() -> None:
    told = facts(*MET)
    told["goals"] = [
        {"name": "speedup", "asked": 2, "reached": 2.5, "met": True, "interval": (2.25, 2.75)},
        {"name": "size", "asked": 2_000_000, "reached": 3_000_000, "met": False, "advice": "prune"},
        {"name": "max_drop", "asked": 0.005, "reached": 0.001, "met": True, "interval": (0.0, 0.004)},
        {"name": "energy", "unit": "J", "asked": 2, "reached": None, "met": False},
    ]
    goals_ = [
        (goal["label"], goal["asked"], goal["reached"], goal["light"], goal["advice"]) for goal in view(told)["goals"]
    ]
    assert goals_ == [
        ("speed", "at least 2×", "2.5× (2.25 to 2.75)", "good", ""),
        ("size", "at most 2 MB", "3 MB", "bad", "prune"),
        ("accuracy drop", "at most 0.5 points", "0.1 points (0 to 0.4)", "good", ""),
        ("energy", "2 J", "not measured", "bad", ""),
    ]
    for side in ("before", "after"):
        told[side]["evaluation"] |= {"metric": "mae", "label": "error", "unit": "years", "better": "lower"}
    assert view(told)["goals"][2]["label"].startswith("drop of the ")


def test_exit_and_words_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Only what is missed is an error; what is not shown is said, with what would show it."""
    outputs.show_report(facts(*CROSSED), "small", False)
    said = capsys.readouterr().out
    assert "not shown by 650 images" in said and "try: judge on more validation images (about 4,100 would" in said
    outputs.show_report(facts(*MET), "small", False)
    assert "Both goals were met" in capsys.readouterr().out
    with pytest.raises(GoalMissed, match="accuracy drop 2 points"):
        outputs.show_report(facts(*MISSED), "small", False)
    capsys.readouterr()
    outputs.show_report(facts(*CROSSED), "small", True)
    goal, _ = json.loads(capsys.readouterr().out)["goals"]
    assert (goal["status"], goal["met"], goal["samples"]) == ("not shown", False, 650)
