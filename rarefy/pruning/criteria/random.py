"""Random: the baseline every criterion must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rarefy.pruning.groups.groups import Coupling
from rarefy.tasks.task import Task


@dataclass(frozen=True)
class Random:
    """Scores drawn uniformly from [0, 1); the same for the same seed.

    For comparisons only.
    """

    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Task | None, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(coupling.count, generator=generator, dtype=torch.float64)
