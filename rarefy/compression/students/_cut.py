"""A student by pruning: the record of ``prune`` becomes the student's own."""

from __future__ import annotations

from typing import TypedDict, Unpack

from torch import fx

from rarefy.compression.students._fresh import fresh as anew
from rarefy.graph import history
from rarefy.pruning.prune import prune
from rarefy.tasks.task import Task


class Options(TypedDict):
    """Of ``prune``."""

    criterion: str
    ranking: str
    round_to: int


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
