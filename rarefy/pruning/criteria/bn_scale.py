"""BN scale: the factor |gamma| of the batch norm behind a channel (Network Slimming, arXiv 1708.06519).

    score = reduce over the batch norms N that a class passes through of  sum over its positions of |gamma_N|

A channel that its batch norm multiplies by little says little, whatever its weights. Means most where training drove
gammas to zero (an L1 term on them). A class that passes no batch norm has no such score, and is an error rather than a
guess.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rarefy.errors import InputError
from rarefy.graph.nodes import attribute, operator_name
from rarefy.pruning.criteria._options import check_reduce
from rarefy.pruning.groups.groups import Coupling
from rarefy.tasks.task import Task


@dataclass(frozen=True)
class BnScale:
    """|gamma| of the batch norms behind a channel.

    For networks trained with a penalty on these factors; without it, most others were better. No data is needed.

    reduce: mean, sum or max over the batch norms that lose the channel.
    """

    reduce: str = "mean"

    def __post_init__(self) -> None:
        check_reduce(self.reduce)

    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Task | None, seed: int) -> Tensor:
        """Raises InputError where channels that could leave pass no batch norm."""
        names = {
            str(node.args[1].target)
            for node in graph.graph.nodes
            if operator_name(node) == "batch_norm"
            and isinstance(node.args[1], fx.Node)
            and node.args[1].op == "get_attr"
        }
        gammas = {name: attribute(graph, name).detach().abs() for name in names}
        scored = torch.zeros(coupling.count, dtype=torch.bool)
        scored[0] = True
        for row in coupling.rows:
            if names.intersection(row.names):
                scored[row.classes] = True
        without = [row.names[0] for row in coupling.rows if row.produces and not bool(scored[row.classes].all())]
        if without or not bool(scored.all()):
            which = (
                without[0]
                if without
                else next(row.names[0] for row in coupling.rows if not bool(scored[row.classes].all()))
            )
            raise InputError(
                f"criterion 'bn_scale': the channels of {max(len(without), 1)} layers pass no batch norm with a "
                f"scale, such as {which}; "
                "list them in ignore, or use criterion='magnitude'"
            )
        return coupling.gather(gammas, reduce=self.reduce)
