"""Budget: what must be reached, the usual recipe for it, and what of it was reached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rarefy.system.options import check, option

if TYPE_CHECKING:  # the command line reads the fields, without torch and numpy
    from rarefy.reports.facts import Goal
    from rarefy.tasks.task import Task

Step = Mapping[str, object]  # {"do": verb, option: value, ...}
QUANTIZED_GAIN = 1.5  # what the usual recipe expects of int8: kernels differ, so less than the 2 to 4 that is common
LEAST = 0.02  # share of the MACs or parameters below which pruning is no advice
SAFETY = 1.2  # latency falls more slowly than MACs


@dataclass(frozen=True)
class Budget:
    """What must be reached; None does not matter.

    max_drop: what the metric may lose, in its unit; of shares such as top-1 0.005 is half a point.
    speedup: how many times faster on the runtime.
    size: largest size of the weights on disk, bytes.
    """

    max_drop: float | None = option(
        None,
        "Accuracy that may be lost: 0.5% or 0.005.",
        lambda drop: drop is None or 0 <= drop < 1,
        "a share from 0 up to 1; half a point is 0.005",
        metavar="SHARE",
    )
    speedup: float | None = option(
        None,
        "How many times faster on the runtime.",
        lambda ratio: ratio is None or 1 <= ratio < 1000,
        "a ratio from 1 up to 1000; twice as fast is 2",
        metavar="RATIO",
    )
    size: int | None = option(
        None,
        "Largest size of the weights on disk: 500kB, 2MB.",
        lambda size: size is None or size >= 1,
        "a number of bytes; 500 kB are 500_000",
        metavar="BYTES",
    )

    def __post_init__(self) -> None:
        check(self, "budget")


def usual_steps(budget: Budget, size_bytes: int, task: Task) -> list[dict[str, object]]:
    """The recipe where none is given: prune, distil, quantise; the last alone where pruning is not needed.

    size_bytes: of the original's weights.
    """
    share = QUANTIZED_GAIN / (SAFETY * budget.speedup) if budget.speedup is not None else 0.5
    target = "macs"
    if budget.size is not None:
        # What may remain, once a weight takes a byte, and scales and biases a tenth.
        stored = 0.9 * 4 * budget.size / size_bytes
        if stored < share:
            target, share = "params", stored
    steps: list[dict[str, object]] = []
    if share < 0.9:
        training = {"epochs": 10, "batch_size": min(128, task.data.length("train"))}
        labels = {} if task.data.labelled("train") else {"hard_weight": 0.0}
        steps.append({"do": "prune", target: round(max(0.1, share), 3), "round_to": 8})
        steps.append({"do": "distill", **training, **labels})
    return [*steps, {"do": "quantize"}]


def goals(
    budget: Budget,
    *,
    drop: float,
    speedup: float,
    size: int,
    macs: float,
    parameters: float,
    unit: str = "%",
    interval: tuple[float, float] | None = None,
    samples: int | None = None,
) -> list[Goal]:
    """What was asked and reached, and what to try where it was missed.

    drop: of the metric, in its ``unit``, "%" for shares. speedup: against the original. size: bytes.
    macs, parameters: what is left of the original's, a share.
    interval, samples: of the drop, paired, and the images it rests on.
    """
    from rarefy.reports.facts import Goal

    found: list[Goal] = []
    if budget.max_drop is not None:
        found.append(_drop(budget.max_drop, drop, unit, interval, samples))
    if budget.speedup is not None:
        share = 0.9 * macs * speedup / budget.speedup
        advice = f"prune to fewer MACs (macs={share:.2f}) and distil for more epochs"
        if share < LEAST:
            advice = (
                "ask for less, or start from a faster architecture (distill with student=): "
                "pruning alone does not get there"
            )
        met = speedup >= budget.speedup
        found.append(
            Goal(name="speedup", asked=budget.speedup, reached=speedup, met=met, status=_status(met), advice=advice)
        )
    if budget.size is not None:
        share = min(1.0, 0.9 * parameters * budget.size / size)
        advice = (
            f"prune to fewer parameters (params={share:.2f}) and distil for more epochs, "
            "or quantise to fewer bits (weights=int4)"
        )
        if share < LEAST:
            advice = (
                "ask for a larger size, or start from a smaller architecture (distill with student=): "
                "pruning alone does not get there"
            )
        met = size <= budget.size
        found.append(Goal(name="size", asked=budget.size, reached=size, met=met, status=_status(met), advice=advice))
    return found


def _status(met: bool) -> str:
    return "met" if met else "missed"


def _drop(asked: float, drop: float, unit: str, interval: tuple[float, float] | None, samples: int | None) -> Goal:
    """The goal of accuracy: met only where the whole interval is within it, which says that it is no chance."""
    from rarefy.reports.facts import Goal

    status, advice = _status(drop <= asked), "distil for more epochs, or prune less"
    if status == "met" and interval is not None and interval[1] > asked:
        status, advice = "not shown", "judge on more validation images, or allow a larger drop"
        if samples and drop < asked:  # an interval shrinks with the root of the number of images
            needed = samples * ((interval[1] - drop) / (asked - drop)) ** 2
            if needed < 1e6:
                rounded = round(needed, 1 - int(math.log10(needed)))
                advice = f"judge on more validation images (about {rounded:,.0f} would show it)"
    goal = Goal(name="max_drop", asked=asked, reached=drop, met=status == "met", status=status, advice=advice)
    if interval is not None:
        goal["interval"] = interval
    if samples is not None:
        goal["samples"] = samples
    return goal if unit == "%" else {**goal, "unit": unit}
