"""Activation: how much a channel says on data, where it is read.

    mean      score = reduce over reads of  E |x|
    variance  score = reduce over reads of  Var x         a channel that always says the same can be a bias

arXiv 1607.03250 counts zeros, 1611.06440 takes the mean; here it is the mean of absolute values.
E and Var run over images and positions. Needs no labels. Measured on what the next layer takes (behind the activation
function), not on what this layer makes: a channel that ReLU always cuts off is worth nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rarefy.pruning.criteria._options import check_counts, check_reduce
from rarefy.pruning.criteria._reads import Read, batches_of, check_reads, reads, run_seen
from rarefy.pruning.groups.groups import ClassScores, Coupling
from rarefy.tasks.task import Task


@dataclass(frozen=True)
class Activation:
    """Mean |activation| of a channel, or its variance, on batches of the training split.

    For images without labels; ``statistic=variance`` was the better one. Not what the layer itself makes, but what the
    next one reads of it.

    statistic: mean or variance.  batches: how many.  batch_size: images in each.
    reduce: mean, sum or max over the layers that read the channel.
    """

    statistic: str = "mean"
    batches: int = 8
    batch_size: int = 64
    reduce: str = "mean"

    def __post_init__(self) -> None:
        if self.statistic not in ("mean", "variance"):
            raise ValueError(f"statistic={self.statistic!r} is not mean or variance")
        check_counts(batches=self.batches, batch_size=self.batch_size)
        check_reduce(self.reduce)

    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Task | None, seed: int) -> Tensor:
        """Raises InputError without a task, DataError without data."""
        places = check_reads(reads(coupling), coupling, "activation")
        sums: dict[Read, Tensor] = {}
        counts = dict.fromkeys(places, 0)

        def see(place: Read, activation: Tensor) -> Tensor:
            flat = activation.detach().movedim(place.axis, 0).flatten(1).double()
            own = torch.stack((flat.abs().sum(1), flat.sum(1), flat.square().sum(1))).cpu()
            sums[place] = sums[place] + own if place in sums else own
            counts[place] += flat.shape[1]
            return activation

        with torch.no_grad():
            for inputs, _ in batches_of(task, graph, "activation", self.batches, self.batch_size, seed):
                run_seen(graph, places, inputs, see)
        scores = ClassScores(coupling.count, self.reduce)
        for place in places:
            absolute, mean, square = sums[place] / counts[place]
            scores.add(place.classes, absolute if self.statistic == "mean" else (square - mean.square()).clamp_min(0))
        return scores.reduced()
