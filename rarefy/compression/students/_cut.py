"""A student by pruning: the record of ``prune`` becomes the student's own."""

from __future__ import annotations

from typing import TypedDict, Unpack

from torch import fx

from rarefy.compression.students._fresh import fresh as anew
from rarefy.errors import InputError
from rarefy.graph import history
from rarefy.pruning.prune import prune
from rarefy.tasks.task import Task


class Options(TypedDict):
    """Of ``prune``."""

    criterion: str
    ranking: str
    round_to: int


def check(student: str, keep: float, macs: float | None, round_to: int) -> None:
    """Raises InputError for shares and multiples that are none."""
    if not 0 < keep <= 1 or (macs is not None and not 0 < macs <= 1) or round_to < 1:
        raise InputError(
            f"{student}: keep={keep} and macs={macs} are shares above 0 and up to 1, round_to={round_to} at least 1"
        )


def narrowed(
    teacher: fx.GraphModule,
    task: Task | None,
    seed: int,
    keep: float,
    macs: float | None,
    fresh: bool,
    **options: Unpack[Options],
) -> fx.GraphModule:
    """The teacher without channels: to a share of them, or of the MACs. Raises what ``prune`` raises."""
    small = prune(
        teacher, keep=keep if macs is None else None, macs=macs, task=task, seed=seed, progress=False, **options
    )
    facts = history.records(small)[-1]["facts"]
    small.meta["history"] = history.records(teacher)
    small = anew(small, seed) if fresh else small
    small.meta["student"] = {name: facts[name] for name in ("reached", "channels")}
    return small
