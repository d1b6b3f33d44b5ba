"""Pruned: the teacher without the channels that matter least, wherever they are (``prune`` with ``ranking="global"``).

``fresh`` keeps only the shape that pruning found (arXiv 1810.05270 asks whether the weights matter).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rarefy.compression.students import _cut
from rarefy.tasks.task import Task


@dataclass(frozen=True)
class Pruned:
    """The pruned teacher: all channels compete.

    For the smallest loss at the same cost. Not ``width``, where all layers lose alike.

    keep: share of the channels.
    macs: share of the MACs, in its place.
    criterion: what a channel is worth.
    round_to: channels are a multiple of it.
    fresh: with new weights.
    """

    keep: float = 0.5
    macs: float | None = None
    criterion: str = "magnitude"
    round_to: int = 1
    fresh: bool = False

    def __post_init__(self) -> None:
        _cut.check("pruned", self.keep, self.macs, self.round_to)

    def make(self, teacher: fx.GraphModule, task: Task | None, seed: int) -> fx.GraphModule:
        return _cut.narrowed(
            teacher,
            task,
            seed,
            self.keep,
            self.macs,
            self.fresh,
            criterion=self.criterion,
            ranking="global",
            round_to=self.round_to,
        )
