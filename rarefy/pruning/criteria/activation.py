"""Activation: how much a channel says on data, where it is read.

    mean      score = reduce over reads of  E |x|         (arXiv 1607.03250 counts zeros, 1611.06440 takes the mean; here of absolute values)
    variance  score = reduce over reads of  Var x         a channel that always says the same can be a bias

E and Var run over images and positions. Needs no labels. Measured on what the next layer takes (behind the activation function), not on what this
layer makes: a channel that ReLU always cuts off is worth nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.pruning.criteria._reads import Read, Reading, batches_of, check_reads, reads
from rarefy.pruning.groups.groups import Coupling


@dataclass(frozen=True)
class Activation:
    """Mean |activation| of a channel, or its variance, on batches of the training split.

    statistic: mean or variance.  batches: how many.  batch_size: images in each.  reduce: mean, sum or max over the layers that read the channel.
    """

    statistic: str = "mean"
    batches: int = 8
    batch_size: int = 64
    reduce: str = "mean"

    def __post_init__(self) -> None:
        if self.statistic not in ("mean", "variance"):
            raise ValueError(f"statistic={self.statistic!r} is not mean or variance")
        if self.batches < 1 or self.batch_size < 1:
            raise ValueError(f"batches={self.batches} and batch_size={self.batch_size} must be at least 1")
        if self.reduce not in ("mean", "sum", "max"):
            raise ValueError(f"reduce={self.reduce!r} is not mean, sum or max")

    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Any, seed: int) -> Tensor:
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

        reading = Reading(graph, places, see)
        with torch.no_grad():
            for inputs, _ in batches_of(task, graph, "activation", self.batches, self.batch_size, seed):
                reading.run(inputs)
        total, members = torch.zeros(2, coupling.count, dtype=torch.float64)
        for place in places:
            absolute, mean, square = sums[place] / counts[place]
            values = absolute if self.statistic == "mean" else (square - mean.square()).clamp_min(0)
            present, where = place.classes.unique(return_inverse=True)
            own = torch.zeros(len(present), dtype=torch.float64).index_add_(0, where, values)
            total[present] = torch.maximum(total[present], own) if self.reduce == "max" else total[present] + own
            members[present] += 1
        return total / members.clamp_min(1) if self.reduce == "mean" else total
