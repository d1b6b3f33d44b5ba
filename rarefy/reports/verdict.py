"""The verdict: were the goals met, do the images show it, and what else has to be said before the model is used.

A goal is **met** where what was reached is within what was asked, its interval included. Where only the interval
reaches beyond (a drop of 0.3 points, -0.4 to 1.0, asked at most 0.5), it is **not shown** by so many images: another
set of images might say otherwise. Speed and size are told by the number itself.

Robustness that falls by more than twice the interval of the drop (its half: the +- of it), in the mean or under one
corruption, stands in the verdict, which is not green then, whatever was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypedDict

from rarefy.reports.comparison import Row
from rarefy.reports.facts import Evaluation, Facts, Goal, Interval, is_number, status
from rarefy.reports.units import Metric, mean, ms, short, size

FALLS = 2.0  # times the interval: what of robustness is no chance
WORDS = {"met": "Goals met", "missed": "Goal missed", "not shown": "Goal not shown"}
LIGHTS = {"met": "good", "missed": "bad"}  # others: neutral

Robustness = Mapping[str, Mapping[str, float | None]]  # {corruption: {severity: value}}


class VerdictView(TypedDict):
    """status: as of facts. light: "good", "bad" or "neutral". word: of the heading."""

    status: str
    light: str
    word: str
    sentence: str
    advice: list[str]


class GoalView(TypedDict):
    """status: "met", "not shown" or "missed"; verdict: the same in words. light: "good", "warn" or "bad"."""

    label: str
    asked: str
    reached: str
    met: bool
    status: str
    verdict: str
    light: str
    advice: str


def verdict_view(
    facts: Facts, goals: Sequence[GoalView], comparison: Sequence[Row], metric: Metric
) -> VerdictView | None:
    """What the page says first. None where there is nothing to say."""
    given, falls = facts["verdict"], fallen(facts, metric)
    found = given["status"] or _status([goal["status"] for goal in goals])
    sentence = given["sentence"] or " ".join(filter(None, (_sentence(goals, comparison), falls)))
    if not sentence:
        return None
    concerns = facts["warnings"] or falls
    return VerdictView(
        status=found,
        light="neutral" if found == "met" and concerns else LIGHTS.get(found, "neutral"),
        word=WORDS.get(found, "Result"),
        sentence=sentence.strip(),
        advice=given["advice"] or [goal["advice"] for goal in goals if goal["advice"]],
    )


def _status(goals: Sequence[str]) -> str:
    return next((one for one in ("missed", "not shown", "met") if one in goals), "none")


def _sentence(goals: Sequence[GoalView], comparison: Sequence[Row]) -> str:
    gains = "; ".join(f"{row['label']}: {row['change']}" for row in comparison if row["tile"] and row["change"])
    if not goals:
        return f"No goal was set. {gains}." if gains else ""
    missed, unshown = ([goal for goal in goals if goal["status"] == one] for one in ("missed", "not shown"))
    if not missed and not unshown:
        all_of_them = {1: "The goal was", 2: "Both goals were"}.get(len(goals), f"All {len(goals)} goals were")
        return f"{all_of_them} met. {gains}."
    told = []
    if missed:
        which = "; ".join(f"{goal['label']} {goal['reached']} instead of {goal['asked']}" for goal in missed)
        told.append(f"{len(missed)} of {len(goals)} goals missed: {which}.")
    for goal in unshown:
        told.append(f"{goal['label'].capitalize()} {goal['asked']} is {goal['verdict']}: {goal['reached']}.")
    return " ".join(told if missed else [*told, f"{gains}."])


# -------------------------------------------------------------------------------------------------------------- goals

_GOALS = {
    "max_drop": ("accuracy drop", "share", "at most"),
    "speedup": ("speed", "ratio", "at least"),
    "size": ("size", "bytes", "at most"),
}
_FORMS: Mapping[str, Callable[[float], str]] = {
    "": short,
    "share": lambda value: f"{short(100 * value)} points",
    "ratio": lambda value: f"{short(value)}×",
    "bytes": size,
    "ms": ms,
}


def goal_view(goal: Goal, metric: Metric) -> GoalView:
    label, unit, bound = _GOALS.get(goal["name"], (goal["name"] or "goal", "", ""))
    if goal["name"] == "max_drop" and not metric.of_classes:
        label = f"drop of the {metric.name}"
    unit, found = goal["unit"] or unit, status(goal)
    images = f" by {goal['samples']:,} images" if found == "not shown" and "samples" in goal else ""
    return GoalView(
        label=label,
        asked=f"{bound} {_in_unit(goal['asked'], unit)}".strip(),
        reached=_in_unit(goal["reached"], unit) + _spread(goal.get("interval"), unit),
        met=found == "met",
        status=found,
        verdict=f"{found}{images}",
        light={"met": "good", "missed": "bad"}.get(found, "warn"),
        advice="" if found == "met" else goal["advice"],
    )


def _in_unit(value: object, unit: str) -> str:
    if not is_number(value):
        return str(value) if value is not None else "not measured"
    form = _FORMS.get(unit)
    return form(value) if form else f"{short(value)} {unit}"


def _spread(interval: Interval | None, unit: str) -> str:
    if interval is None:
        return ""
    scale = 100.0 if unit == "share" else 1.0
    low, high = (short(scale * bound) for bound in interval)
    return f" ({low} to {high})"


# --------------------------------------------------------------------------------------------------------- robustness


def robustness_of(facts: Facts) -> tuple[Robustness, Robustness]:
    """Of the original and of the result."""
    given = facts["robustness"]
    before, after = facts["before"]["evaluation"]["robustness"], facts["after"]["evaluation"]["robustness"]
    return given.get("before") or before, given.get("after") or after


class _Fall(NamedTuple):
    """How much worse the mean over severities became; positive is worse."""

    name: str
    value: float


def fallen(facts: Facts, metric: Metric) -> str:
    """A sentence on robustness that fell by more than twice the interval; none where it did not."""
    interval = (facts["after"]["evaluation"].get("drop") or {}).get("interval")
    before, after = robustness_of(facts)
    falls = list(_falls(before, after, metric.lower))
    if interval is None or not falls:
        return ""
    half = (interval[1] - interval[0]) / 2
    overall, worst = mean(fall.value for fall in falls) or 0.0, max(falls, key=lambda fall: fall.value)
    if max(overall, worst.value) <= FALLS * half:
        return ""
    sign = 1 if metric.lower else -1
    change, most = (metric.difference(sign * value) for value in (overall, worst.value))
    return (
        f"Robustness falls: the {metric.name} on images made worse on purpose changes by {change} in the mean, under "
        f"{worst.name.replace('_', ' ')} by {most}; the interval of the drop is ±{metric.number(half)}."
    )


def _falls(before: Robustness, after: Robustness, lower: bool) -> Iterator[_Fall]:
    for name, row in before.items():
        values = mean(row.values()), mean(after.get(name, {}).values())
        if values[0] is not None and values[1] is not None:
            yield _Fall(name, (values[1] - values[0]) * (1 if lower else -1))


# -------------------------------------------------------------------------------------------------------------- risks

FEW_IMAGES, FEW_OF_A_CLASS = 1000, 30
CLASS_FELL = 0.05  # of its accuracy: what of the worst class is told


def risks(facts: Facts, goals: Sequence[GoalView], metric: Metric) -> list[str]:
    """What the figures do not show, in plain words."""
    before, after = facts["before"]["evaluation"], facts["after"]["evaluation"]
    samples, interval, told = after.get("samples"), after.get("interval"), list[str]()
    if samples is not None and samples < FEW_IMAGES and interval is not None:
        half = (interval[1] - interval[0]) / 2
        told.append(
            f"It was judged on {samples:,} images only: the true {metric.name} may lie {metric.number(half)} "
            f"{'points' if metric.unit == '%' else metric.unit} higher or lower. More images would tell."
        )
    told += [
        f"The {goal['label']} was not shown to hold: other images might say otherwise."
        for goal in goals
        if goal["status"] == "not shown"
    ]
    told.append(_of_robustness(facts, metric))
    told += _of_the_worst_class(before, after)
    if any(side["latency_ms"].get("disturbed") for side in (facts["before"], facts["after"])):
        told.append("Other programs ran while times were measured: speed may differ. Measure again on a quiet machine.")
    parity = facts["parity"]
    if parity and parity["passed"] is False:
        told.append("The exported file does not answer as the model does. Do not use it before that is mended.")
    return [text for text in told if text] if samples is not None else []


def _of_robustness(facts: Facts, metric: Metric) -> str:
    if not any(robustness_of(facts)):
        return "How it does on bad pictures (noise, blur, fog) was not measured."
    return fallen(facts, metric)


def _of_the_worst_class(before: Evaluation, after: Evaluation) -> list[str]:
    now, was = after["worst_class"], before["worst_class"]
    if "value" not in now:
        return []
    name = now["name"] or str(now.get("index"))
    told = []
    if "value" in was and was["value"] - now["value"] > CLASS_FELL:
        told.append(
            f"The worst class, {name}, is right on {100 * now['value']:.0f} % of its images; the original's worst was "
            f"right on {100 * was['value']:.0f} %. Look at it before the model is used."
        )
    if now.get("samples", FEW_OF_A_CLASS) < FEW_OF_A_CLASS:
        told.append(f"Class {name} has {now['samples']} images only: its accuracy is hardly known.")
    return told
