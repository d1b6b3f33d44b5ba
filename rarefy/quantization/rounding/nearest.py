"""Round to nearest, half to even: |w - s q| <= s / 2 wherever nothing is clipped."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.quantization.formats import Format


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Deterministic, half to even.

    To compare with, and where no images are. The others but stochastic look at what a layer reads.
    """

    def codes(self, scaled: Tensor, grid: Format, generator: torch.Generator) -> Tensor:
        return grid.codes(grid.snap(scaled))
