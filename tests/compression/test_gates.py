"""Gates: what pays, where the steps lead, which model is the result. On measurements made up: nothing is run."""

from __future__ import annotations

import dataclasses

from rarefy.compression import gates
from rarefy.compression.budget import Budget, goals
from rarefy.compression.gates import Measurement, Outcome, Ratio
from rarefy.tasks.metric import Metric
from rarefy.tasks.metrics.accuracy import Accuracy


def measured(
    index: int, name: str, *, drop: float = 0.0, speed: float = 1.0, size: int = 1000, spread: float = 0.02
) -> Measurement:
    """As fast against the original as against what it was made of."""
    ratio = Ratio(speed, (1 - spread) * speed, (1 + spread) * speed)
    return Measurement(index, name, 0.9 - drop, drop, size, dict.fromkeys(("original", "p", "p + d", "q"), ratio))


def walked(
    budget: Budget, verbs: list[str], *results: Measurement | str, metric: Metric | None = None
) -> tuple[tuple[Outcome, ...], Measurement, Measurement]:
    """What the gates say of each step, the last model kept, and the result."""
    steps = [{"do": verb} for verb in verbs]
    original = measured(0, "original")
    walk = gates.walk(original, steps, results, budget, metric or Accuracy())
    candidates = [original, *(one for one in results if isinstance(one, Measurement))]
    return walk.outcomes, walk.accepted, gates.chosen(candidates, walk.accepted, budget)


def test_pruning_is_judged_with_its_distillation() -> None:
    pruned = measured(1, "p", drop=0.6, speed=1.5, size=500)
    taught = measured(2, "p + d", drop=0.004, speed=1.5, size=500)
    outcomes, last, chosen = walked(Budget(max_drop=0.005), ["prune", "distill"], pruned, taught)
    assert [one.kept for one in outcomes] == [True, True] and last is chosen is taught


def test_until_its_distillation_is_done_a_pruning_waits_for_the_verdict_on_the_drop() -> None:
    pruned, original = measured(1, "p", drop=0.6, speed=1.5, size=500), measured(0, "original")
    steps = [{"do": "prune"}, {"do": "distill"}]
    walk = gates.walk(original, steps, [pruned], Budget(max_drop=0.005), Accuracy())
    assert walk.current is pruned and walk.accepted is original and walk.outcomes[0].kept


def test_both_are_undone_if_the_drop_remains() -> None:
    pruned = measured(1, "p", drop=0.6, speed=1.5, size=500)
    taught = measured(2, "p + d", drop=0.02, speed=1.5, size=500)
    integer = measured(3, "q", drop=0.001, speed=2.0, size=250)
    outcomes, last, chosen = walked(Budget(max_drop=0.005), ["prune", "distill", "quantize"], pruned, taught, integer)
    assert [one.kept for one in outcomes] == [False, False, True] and last is chosen is integer
    assert "2.00 points" in outcomes[0].why and "0.50 points" in outcomes[1].why


def test_a_slower_step_is_undone_and_noise_is_not_slower() -> None:
    outcomes, last, _ = walked(Budget(), ["quantize"], measured(1, "q", speed=0.8, size=250))
    assert not outcomes[0].kept and "slower" in outcomes[0].why and last.index == 0
    outcomes, _, _ = walked(Budget(), ["quantize"], measured(1, "q", speed=0.8, size=250, spread=0.6))
    assert outcomes[0].kept


def test_neither_smaller_nor_faster_is_undone() -> None:
    outcomes, _, _ = walked(Budget(), ["prune"], measured(1, "p", speed=1.05, size=999))
    assert not outcomes[0].kept and "neither" in outcomes[0].why


def test_what_a_step_has_to_bring_at_the_bounds() -> None:
    """1 % smaller or, in three of four rounds, 10 % faster; undone as slower only where three of four rounds say so."""

    def kept(size: int, low: float, median: float, high: float) -> bool:
        after = dataclasses.replace(measured(1, "p", size=size), speedup={"original": Ratio(median, low, high)})
        return gates.pays({"do": "prune"}, measured(0, "original"), after, Accuracy())[0]

    assert kept(990, 0.99, 1.0, 1.01) and not kept(991, 0.99, 1.0, 1.01)
    assert kept(1000, 1.1, 1.2, 1.3) and not kept(1000, 1.09, 1.2, 1.3)
    assert kept(500, 0.5, 0.6, 1 / 1.1) and not kept(500, 0.5, 0.6, 0.9)
    untimed = dataclasses.replace(measured(1, "p", size=500), speedup={})
    told = gates.pays({"do": "prune"}, measured(0, "original"), untimed, Accuracy())
    assert told == (True, "2.00x smaller; it was not timed by itself")
    student = {"do": "distill", "student": "timm:x"}  # another network: judged as any step, not by its accuracy
    assert gates.pays(student, measured(0, "original"), measured(1, "p", drop=0.1, size=500), Accuracy())[0]


def test_what_is_undone_goes_back_to_the_last_that_was_accepted() -> None:
    pruned, smaller = measured(1, "p", speed=1.5, size=500), measured(2, "q", drop=0.02, speed=2.0, size=250)
    outcomes, last, chosen = walked(Budget(max_drop=0.01), ["prune", "quantize"], pruned, smaller)
    assert [one.kept for one in outcomes] == [True, False] and last is chosen is pruned


def test_a_distillation_that_teaches_nothing_is_undone() -> None:
    outcomes, last, _ = walked(Budget(), ["distill"], measured(1, "d", drop=0.01))
    assert not outcomes[0].kept and last.index == 0
    assert outcomes[0].why == "top-1 90.00% before, 89.00% after"
    outcomes, _, _ = walked(Budget(), ["distill"], measured(1, "d"))
    assert not outcomes[0].kept, "the same is not better"


class Error(Accuracy):
    """Of two the lower is better."""

    label, unit, better = "error", "years", "lower"


def test_what_is_better_is_for_the_metric_to_say() -> None:
    lower, higher = measured(1, "d", drop=-0.25), measured(1, "d", drop=0.25)
    for metric, kept, undone in ((Accuracy(), lower, higher), (Error(), higher, lower)):
        assert walked(Budget(), ["distill"], kept, metric=metric)[0][0].kept
        assert not walked(Budget(), ["distill"], undone, metric=metric)[0][0].kept
    outcomes, _, _ = walked(Budget(max_drop=0.125), ["prune"], measured(1, "p", drop=0.25, size=9), metric=Error())
    assert outcomes[0].why == "p loses 0.25 years, more than 0.125 years"
    outcomes, _, _ = walked(Budget(), ["distill"], measured(1, "d", drop=0.25), metric=Error())
    assert outcomes[0].why == "error 0.9 years before, 0.65 years after"


def test_a_step_that_fails_is_said_and_left_out() -> None:
    outcomes, last, _ = walked(Budget(), ["prune", "quantize"], "nothing can be pruned", measured(2, "q", size=250))
    assert outcomes[0].why == "nothing can be pruned" and not outcomes[0].kept and last.index == 2


def test_an_undone_model_that_meets_the_goals_is_the_result() -> None:
    """Only size is asked for: the slower int8 model has it."""
    slow = measured(1, "q", speed=0.8, size=250)
    outcomes, last, chosen = walked(Budget(size=300), ["quantize"], slow)
    assert not outcomes[0].kept and last.index == 0 and chosen is slow


def test_accuracy_is_not_traded_for_speed_asked_in_vain() -> None:
    wild = measured(1, "p", drop=0.3, speed=9.0, size=100)
    _, _, chosen = walked(Budget(max_drop=0.01, speedup=5.0), ["prune"], wild)
    assert chosen.index == 0


def test_goals_that_are_met_exactly_are_met() -> None:
    exact = measured(1, "p", drop=0.0, speed=2.0, size=500)
    budget = Budget(max_drop=0.0, speedup=2.0, size=500)
    outcomes, last, chosen = walked(budget, ["prune"], exact)
    assert outcomes[0].kept and last is chosen is exact and gates.shortfall(exact, budget) == 0
    told = goals(budget, drop=0.0, speedup=2.0, size=500, macs=0.5, parameters=0.5)
    assert [goal["name"] for goal in told if goal["met"]] == ["max_drop", "speedup", "size"]
    told = goals(budget, drop=1e-9, speedup=2 - 1e-9, size=501, macs=0.5, parameters=0.5)
    assert not any(goal["met"] for goal in told)
    slow = dataclasses.replace(exact, index=2, speedup={"original": Ratio(0.8, 0.78, 0.82)})
    assert gates.chosen([slow, exact], slow, budget) is exact, "a goal met exactly counts as met"


def test_of_those_that_meet_the_goals_the_smallest_is_chosen_and_of_equals_the_last() -> None:
    budget, last = Budget(size=300), measured(0, "original")
    made = [measured(1, "p", size=300), measured(2, "q", size=200), measured(3, "r", size=200)]
    assert gates.chosen([last, *made], last, budget) is made[2]
    nearly = measured(0, "original", size=329)
    assert gates.chosen([nearly, *made], nearly, budget) is nearly, "a goal missed by less than 10 % is no reason"
