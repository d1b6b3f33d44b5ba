"""Budget: what contradicts itself, the usual recipe, the goals that were reached and what to try for the others."""

from __future__ import annotations

from typing import Any

import pytest

from rarefy.compression.budget import Budget, goals, usual_steps
from rarefy.errors import InputError
from rarefy.tasks.classification import Classification


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_drop": -0.1},
        {"max_drop": 1.0},
        {"speedup": 0.5},
        {"speedup": float("nan")},
        {"size": 0},
        {"max_drop": float("nan")},
    ],
)
def test_a_budget_that_contradicts_itself(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Budget(**wrong)


def test_a_budgets_bounds() -> None:
    assert Budget(max_drop=0.0, speedup=1.0, size=1) == Budget(0.0, 1.0, 1)
    assert Budget(max_drop=0.999, speedup=999.0) == Budget(0.999, 999.0)
    for wrong in ({"max_drop": 1.0}, {"speedup": 1000.0}, {"speedup": 0.999}, {"size": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Budget(**wrong)  # type: ignore[arg-type]


def test_what_the_usual_recipe_asks_of_pruning() -> None:
    """int8 gives 1.5, and time falls by 1 / 1.2 of what MACs do: 1.5 / (1.2 ratio) may stay, at least a tenth."""
    labels = Classification(train="sklearn:digits", val="sklearn:digits", augment="none")
    images = labels.data.images("train", 8, limit=8)
    bare = Classification(train=(next(iter(images))[0], None), val="sklearn:digits", mean=0, std=1)
    (pruned, taught, _) = usual_steps(Budget(speedup=2.0), 10**6, labels)
    assert pruned == {"do": "prune", "macs": 0.625, "round_to": 8}
    assert taught == {"do": "distill", "epochs": 10, "batch_size": 128}
    assert usual_steps(Budget(speedup=100.0), 10**6, labels)[0]["macs"] == 0.1
    assert [step["do"] for step in usual_steps(Budget(speedup=1.4), 10**6, labels)] == ["prune", "distill", "quantize"]
    assert [step["do"] for step in usual_steps(Budget(speedup=1.38), 10**6, labels)] == ["quantize"]
    assert "macs" in usual_steps(Budget(size=140_000), 10**6, labels)[0]  # 0.504 of the weights may stay, 0.5 of MACs
    assert usual_steps(Budget(size=138_000), 10**6, labels)[0]["params"] == 0.497
    assert usual_steps(Budget(speedup=2.0), 10**6, bare)[1] == {
        "do": "distill", "epochs": 10, "batch_size": 8, "hard_weight": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("drop", "high", "said"),
    [
        (0.0, 0.157, "about 990,000 would"),
        (0.0, 0.16, "judge on more validation images, or allow a larger drop"),  # over a million: nobody has them
        (0.004, 0.0051, "about 1,200 would"),
    ],
)
def test_how_many_images_would_show_a_drop(drop: float, high: float, said: str) -> None:
    (goal,) = goals(Budget(max_drop=0.005), drop=drop, interval=(-high, high), samples=1000, **SPEED)
    assert goal["status"] == "not shown" and said in goal["advice"]


@pytest.mark.parametrize(
    ("left", "advice"), [(0.1, "macs=0.02"), (0.07, "ask for less, or start from a faster architecture")]
)
def test_pruning_is_no_advice_below_a_fiftieth(left: float, advice: str) -> None:
    found = goals(Budget(speedup=4.0, size=250), drop=0.0, speedup=1.0, size=1000, macs=left, parameters=left)
    assert advice in found[0]["advice"]
    assert ("params=0.02" if left == 0.1 else "ask for a larger size") in found[1]["advice"]


def test_the_usual_recipe_follows_the_budget() -> None:
    task = Classification(train="sklearn:digits", val="sklearn:digits", augment="none")
    plain = usual_steps(Budget(), 10**6, task)
    assert [step["do"] for step in plain] == ["prune", "distill", "quantize"] and plain[0]["macs"] == 0.5
    fast, faster = (usual_steps(Budget(speedup=ratio), 10**6, task)[0]["macs"] for ratio in (2.0, 4.0))
    assert fast == pytest.approx(2 * faster, abs=0.002)
    assert [step["do"] for step in usual_steps(Budget(speedup=1.1), 10**6, task)] == ["quantize"]
    assert usual_steps(Budget(size=10**5), 10**6, task)[0]["params"] == pytest.approx(0.36)  # int8 alone is a quarter


@pytest.mark.parametrize(
    ("budget", "kept", "said"),
    [
        (Budget(size=10), 0.6, "ask for a larger size"),
        (Budget(size=500), 0.6, "params=0.27"),
        (Budget(speedup=900), 0.6, "ask for less"),
        (Budget(speedup=4), 0.6, "macs=0.27"),
    ],
)
def test_advice_can_be_followed(budget: Budget, kept: float, said: str) -> None:
    (goal,) = goals(budget, drop=0.0, speedup=2.0, size=1000, macs=kept, parameters=kept)
    assert not goal["met"] and said in goal["advice"]


def test_a_goal_in_another_unit_says_it() -> None:
    reached = {"drop": 0.3, "speedup": 1.0, "size": 1, "macs": 1.0, "parameters": 1.0}
    (goal,) = goals(Budget(max_drop=0.5), **reached, unit="years")
    assert goal["unit"] == "years" and goal["met"]
    assert "unit" not in goals(Budget(max_drop=0.5), **reached)[0]


SPEED = {"speedup": 2.0, "size": 1000, "macs": 1.0, "parameters": 1.0}


@pytest.mark.parametrize(
    ("drop", "interval", "status", "advice"),
    [
        (0.001, (-0.003, 0.005), "met", "distil"),  # the whole interval is within it, its end included
        (0.001, (-0.003, 0.0051), "not shown", "about 1,100 would show it"),
        (0.001, (-0.007, 0.009), "not shown", "about 4,000 would show it"),  # half of it: four times the images
        (0.005, (0.001, 0.009), "not shown", "allow a larger drop"),  # no number of images shows it
        (0.006, (0.001, 0.011), "missed", "prune less"),
        (-0.01, None, "met", "distil"),
    ],
)
def test_a_drop_is_met_only_where_its_interval_is(
    drop: float, interval: tuple[float, float] | None, status: str, advice: str
) -> None:
    (goal,) = goals(Budget(max_drop=0.005), drop=drop, interval=interval, samples=1000, **SPEED)
    assert goal["status"] == status and goal["met"] == (status == "met") and advice in goal["advice"]
    assert goal["samples"] == 1000 and goal.get("interval") == interval


def test_speed_and_size_are_told_by_the_number_itself() -> None:
    told = goals(Budget(speedup=2.0, size=999), drop=0.0, **SPEED)
    assert [goal["status"] for goal in told] == ["met", "missed"]
