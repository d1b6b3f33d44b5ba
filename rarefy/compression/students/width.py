"""Width: the teacher with the same share of channels left everywhere, as ``prune`` cuts by ``ranking="local"``.

The channels that stay keep their weights, unless ``fresh``: then only the shape is inherited, as in a family scaled by
a multiplier (MobileNet's, arXiv 1704.04861).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rarefy.compression.students import _cut
from rarefy.tasks.task import Task


@dataclass(frozen=True)
class Width:
    """A narrower copy: every group of channels loses the same share.

    For a network of the family that an author would have published. Not ``pruned``, where layers lose unequally.

    keep: share of the channels.
    macs: share of the MACs, in its place.
    criterion: which channels stay.
    round_to: channels are a multiple of it.
    fresh: with new weights.
    """

    keep: float = 0.5
    macs: float | None = None
    criterion: str = "magnitude"
    round_to: int = 1
    fresh: bool = False

    def __post_init__(self) -> None:
        _cut.check("width", self.keep, self.macs, self.round_to)

    def make(self, teacher: fx.GraphModule, task: Task | None, seed: int) -> fx.GraphModule:
        return _cut.narrowed(
            teacher,
            task,
            seed,
            self.keep,
            self.macs,
            self.fresh,
            criterion=self.criterion,
            ranking="local",
            round_to=self.round_to,
        )
