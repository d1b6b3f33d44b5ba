"""Random: the baseline every criterion must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.pruning.groups.groups import Coupling


@dataclass(frozen=True)
class Random:
    """Scores drawn uniformly from [0, 1); the same for the same seed."""

    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Any, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(coupling.count, generator=generator, dtype=torch.float64)
