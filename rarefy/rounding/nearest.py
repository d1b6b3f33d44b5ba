"""Round to nearest, half to even: |w - s q| <= s / 2 wherever nothing is clipped."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.grids import Grid


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Deterministic, half to even."""

    def codes(self, scaled: Tensor, grid: Grid, generator: torch.Generator) -> Tensor:
        return torch.round(scaled).clamp_(grid.qmin, grid.qmax).to(grid.dtype)
