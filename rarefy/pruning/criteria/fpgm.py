"""FPGM: how far a filter lies from the others of its layer (arXiv 1811.00250).

    score = reduce over the layers that make the class of  sum over its filters i, all filters j of  ||W_i - W_j||_2

Filters near the geometric median of a layer can be said by the others, so they leave first, be they large or small. Filters are what makes a channel;
the weights that read it do not count, but for classes nothing makes (an embedding of positions), where whatever varies along them does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.graph.nodes import attribute
from rarefy.pruning.groups.groups import Coupling, Row


@dataclass(frozen=True)
class Fpgm:
    """Sum of a filter's distances to all filters of its layer.

    reduce: mean, sum or max over the layers that make the channel.
    """

    reduce: str = "mean"

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "sum", "max"):
            raise ValueError(f"reduce={self.reduce!r} is not mean, sum or max")

    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Any, seed: int) -> Tensor:
        made = torch.zeros(coupling.count, dtype=torch.bool)
        for row in coupling.rows:
            if row.produces:
                made[row.classes] = True
        total, members = torch.zeros(2, coupling.count, dtype=torch.float64)
        for row in coupling.rows:
            if row.produces or not bool(made[row.classes].all()):
                own = _distances(graph, row)
                present, where = row.classes.unique(return_inverse=True)
                own = torch.zeros(len(present), dtype=torch.float64).index_add_(0, where, own)
                counts = present if row.produces else present[~made[present]]
                own = own if row.produces else own[~made[present]]
                total[counts] = torch.maximum(total[counts], own) if self.reduce == "max" else total[counts] + own
                members[counts] += 1
        return total / members.clamp_min(1) if self.reduce == "mean" else total


def _distances(graph: fx.GraphModule, row: Row) -> Tensor:
    """(size,) float64: for each position along the row's axis, the sum of its distances to all."""
    weight = attribute(graph, row.names[0]).detach()
    flat = weight.movedim(row.axis, 0).reshape(weight.shape[row.axis], -1).float()
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").double().sum(1).cpu()
