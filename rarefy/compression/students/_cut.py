"""A student by pruning: the record of ``prune`` becomes the student's own."""

from __future__ import annotations

from typing import Any

from torch import fx

from rarefy.compression.students._fresh import fresh as anew
from rarefy.pruning.prune import prune


def narrowed(
    teacher: fx.GraphModule, task: Any, seed: int, keep: float, macs: float | None, fresh: bool, **options: Any
) -> fx.GraphModule:
    """The teacher without channels: to a share of them, or of the MACs. Raises what ``prune`` raises."""
    target: dict[str, Any] = {"keep": keep} if macs is None else {"macs": macs}
    small = prune(teacher, **target, task=task, seed=seed, progress=False, **options)
    facts = small.meta["history"].pop()["facts"]
    small = anew(small, seed) if fresh else small
    small.meta["student"] = {name: facts[name] for name in ("reached", "channels")}
    return small
