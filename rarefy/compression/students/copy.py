"""Copy: the teacher's own architecture.

Fresh, it is taught by itself from the start (born-again networks, arXiv 1805.04770); else it goes on.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

from torch import fx

from rarefy.compression.students._fresh import fresh
from rarefy.tasks.task import Task


@dataclass(frozen=True)
class Copy:
    """The same network: self-distillation.

    For accuracy, not for speed: nothing gets smaller.

    fresh: with new weights, in place of the teacher's.
    """

    fresh: bool = False

    def make(self, teacher: fx.GraphModule, task: Task | None, seed: int) -> fx.GraphModule:
        return fresh(teacher, seed) if self.fresh else deepcopy(teacher)
