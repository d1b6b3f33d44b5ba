"""Gates: does a step pay, where do the steps lead, which model is the result. Functions of measurements alone.

**Pays** (``pays``). A distillation has to bring the metric up. Any other step, and a distillation that puts another
network in place (``student=``), must not be clearly slower, and has to be smaller by 1 % or clearly faster. *Clearly*
is by 10 %, in three of four rounds: the quartile of the ratios that speaks against it counts, so a difference inside
the noise never decides, and two runs decide alike.

**Walk** (``walk``). Each step starts from the last model that was kept. A step whose successor is a distillation is
judged on the drop together with it, since that is what repairs it; if the drop is then above the budget's, both are
undone.

**Choice** (``chosen``). The last model that was kept, unless it clearly misses a goal of speed or size that another one
meets, an undone one perhaps: then the smallest of those. All are within ``max_drop``: accuracy is never traded for
speed that was asked in vain.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rarefy.compression.budget import Budget, Step
from rarefy.deployment.latency import CLEARLY
from rarefy.tasks.metric import Metric, shown, shown_change, worth

SMALLER = 0.99  # of the size before: what counts as smaller


@dataclass(frozen=True)
class Ratio:
    """How many times as fast, over the rounds of an interleaved run: median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """What the gates know of a model.

    index: of the step that made it; 0: the original.
    value: the metric's. drop: against the original, in the metric's unit; positive is worse.
    size: bytes of the weights on disk. speedup: against other models, by their names.
    """

    index: int
    name: str
    value: float
    drop: float
    size: int
    speedup: Mapping[str, Ratio] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What the gate said of a step. result: None where the step could not be done."""

    step: Step
    result: Measurement | None
    kept: bool
    why: str


@dataclass(frozen=True)
class Walk:
    """Where the steps lead.

    outcomes: of the steps so far. current: what the next step starts from. accepted: the last model that was kept, its
        drop judged.
    """

    outcomes: tuple[Outcome, ...]
    current: Measurement
    accepted: Measurement


def only_trains(step: Step) -> bool:
    """Is it a distillation of the model that is there, and not one that puts another in its place?"""
    return step["do"] == "distill" and "student" not in step


def is_repaired(steps: Sequence[Step], index: int) -> bool:
    """Does the step after that of ``index`` (from 0) train what it leaves? Then the drop is judged after both."""
    return index + 1 < len(steps) and only_trains(steps[index + 1])


def pays(step: Step, before: Measurement, after: Measurement, metric: Metric) -> tuple[bool, str]:
    """Is the step worth keeping, apart from the drop, and why. after: holds the speed-up against ``before``."""
    if only_trains(step):
        told = f"{metric.label} {shown(before.value, metric.unit)} before, {shown(after.value, metric.unit)} after"
        return worth(after.value, metric.better) > worth(before.value, metric.better), told
    ratio = after.speedup.get(before.name)
    if ratio is None:
        return True, f"{before.size / after.size:.2f}x smaller; it was not timed by itself"
    told = f"{ratio.median:.2f}x as fast ({ratio.low:.2f} to {ratio.high:.2f}), {before.size / after.size:.2f}x smaller"
    if ratio.high < 1 / CLEARLY:
        return False, f"it is slower: {told}"
    if after.size > SMALLER * before.size and ratio.low < CLEARLY:
        return False, f"neither faster nor smaller: {told}"
    return True, told


def walk(
    original: Measurement, steps: Sequence[Step], results: Sequence[Measurement | str], budget: Budget, metric: Metric
) -> Walk:
    """The verdicts on the first ``len(results)`` steps. results: what each step made, or why it could not be done."""
    outcomes: list[Outcome] = []
    accepted = current = original
    judged = 0  # outcomes from here on wait for the verdict on the drop
    for index, result in enumerate(results):
        step = steps[index]
        if isinstance(result, str):
            outcomes.append(Outcome(step, None, False, result))
        else:
            kept, why = pays(step, current, result, metric)
            outcomes.append(Outcome(step, result, kept, why))
            current = result if kept else current
        if is_repaired(steps, index):
            continue
        if not within(current, budget):
            why = f"{current.name} loses {shown_change(current.drop, metric.unit)}, more than "
            why += shown_change(budget.max_drop or 0.0, metric.unit)
            outcomes[judged:] = [
                dataclasses.replace(one, kept=False, why=why) if one.kept else one for one in outcomes[judged:]
            ]
            current = accepted
        accepted, judged = current, len(outcomes)
    return Walk(tuple(outcomes), current, accepted)


def chosen(candidates: Sequence[Measurement], last: Measurement, budget: Budget) -> Measurement:
    """The result. candidates: the original and all that the steps made, kept or not; last: the one last kept."""
    met = [one for one in candidates if within(one, budget) and shortfall(one, budget) == 0]
    if shortfall(last, budget) < math.log(CLEARLY) or not met:
        return last
    return min(met, key=lambda one: (one.size, -one.index))


def within(model: Measurement, budget: Budget) -> bool:
    """Is the drop at most what the budget allows?"""
    return budget.max_drop is None or model.drop <= budget.max_drop


def shortfall(model: Measurement, budget: Budget) -> float:
    """How far it is from the goals of speed and size: the sum of the logarithms of the ratios, 0 where both are met."""
    short = 0.0
    if budget.speedup is not None:
        short += max(0.0, math.log(budget.speedup / model.speedup[ORIGINAL].median))
    if budget.size is not None:
        short += max(0.0, math.log(model.size / budget.size))
    return short


ORIGINAL = "original"  # the name of the model that the run was given
