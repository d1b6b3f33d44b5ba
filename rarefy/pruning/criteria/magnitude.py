"""Magnitude: the p-norm of the weights that leave with a channel.

    score = reduce over coupled weights W of  sum |W[channel]|^p

Both the weights that make the channel and those that read it count (arXiv 2301.12900); biases and the vectors of batch
norm do not: they are of another scale, and with them a trained ResNet-20 lost more.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from rarefy.pruning.criteria._options import check_reduce
from rarefy.pruning.groups.groups import Coupling
from rarefy.tasks.task import Task


@dataclass(frozen=True)
class Magnitude:
    """The p-norm (p-th power) of a channel's weights.

    The default: needs no data, and is near the best under ranking "global"; ranking "loss" is not for it. Not the
    magnitude of ``mask``, which is of single weights.

    p: 1 or 2, or any positive number.  reduce: mean, sum or max over the coupled weights.
    """

    p: float = 2
    reduce: str = "mean"

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise ValueError(f"p={self.p} must be positive")
        check_reduce(self.reduce)

    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Task | None, seed: int) -> Tensor:
        weights = {name: weight.detach() for name, weight in graph.named_parameters() if weight.dim() > 1}
        return coupling.gather(
            weights,
            reduce=self.reduce,
            element=lambda weight: weight.square() if self.p == 2 else weight.abs() ** self.p,
        )
