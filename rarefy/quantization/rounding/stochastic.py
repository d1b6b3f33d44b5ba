"""Stochastic rounding: floor(w / s + u), u uniform in [0, 1). Unbiased, E[q] = w / s, at twice the variance of nearest
in the mean.

Reproducible: u comes from the step's seed and the weight's place, the same on every device
(``kernels/low_bit/packing``).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.kernels.low_bit.packing import ROUND_STOCHASTIC
from rarefy.quantization.formats import Grid


@dataclasses.dataclass(frozen=True)
class Stochastic:
    """Up or down at random, in proportion to the distance.

    For studies of unbiased rounding: nearest has half its variance. Not what rounds gradients in training.
    """

    def codes(self, scaled: Tensor, grid: Grid, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=generator))
        rounded: Tensor = ROUND_STOCHASTIC(scaled, seed)
        return rounded.clamp_(grid.qmin, grid.qmax).to(grid.dtype)
