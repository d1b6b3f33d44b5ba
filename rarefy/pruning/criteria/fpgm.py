"""FPGM: how far a filter lies from the others of its layer (arXiv 1811.00250).

    score = reduce over the layers that make the class of  sum over its filters i, all filters j of  ||W_i - W_j||_2

Filters near the geometric median of a layer can be said by the others, so they leave first, be they large or small.
Filters are what makes a channel; the weights that read it do not count, but for classes nothing makes (an embedding of
positions), where whatever varies along them does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rarefy.graph.nodes import attribute
from rarefy.pruning.criteria._options import check_reduce
from rarefy.pruning.groups.groups import ClassScores, Coupling, Row
from rarefy.tasks.task import Task


@dataclass(frozen=True)
class Fpgm:
    """Sum of a filter's distances to all filters of its layer.

    Without data, as good as magnitude under ranking "global", and worse under all others. Not a size: small filters
    that are unlike all others stay.

    reduce: mean, sum or max over the layers that make the channel.
    """

    reduce: str = "mean"

    def __post_init__(self) -> None:
        check_reduce(self.reduce)

    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Task | None, seed: int) -> Tensor:
        by_layer = torch.zeros(coupling.count, dtype=torch.bool)
        for row in coupling.rows:
            if row.produces:
                by_layer[row.classes] = True
        scores = ClassScores(coupling.count, self.reduce)
        for row in coupling.rows:
            if row.produces or not bool(by_layer[row.classes].all()):
                scores.add(row.classes, _distances(graph, row), among=None if row.produces else ~by_layer)
        return scores.reduced()


def _distances(graph: fx.GraphModule, row: Row) -> Tensor:
    """(size,) float64: for each position along the row's axis, the sum of its distances to all."""
    weight = attribute(graph, row.names[0]).detach()
    flat = weight.movedim(row.axis, 0).reshape(weight.shape[row.axis], -1).float()
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").double().sum(1).cpu()
