"""MSE: the range whose grid leaves the smallest expected squared error, E[(x - dequantize(quantize(x)))^2].

Activations: the expectation is over the streamed histogram. Both ends are shrunk in turn over ``steps`` shares of the
min-max range (coordinate search, twice), each candidate's error computed for all bins at once. Weights: the exact error
over the channel's elements, for ``steps`` shrunk scales at once a channel.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.quantization.formats import Grid
from rarefy.quantization.observers import Histogram


@dataclasses.dataclass(frozen=True)
class Mse:
    """``steps`` candidates down to ``smallest`` of the min-max range.

    The default of activations, and of weights below 8 bits: what clipping costs is weighed against finer steps.
    """

    steps: int = 100
    smallest: float = 0.3

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.smallest < 1:
            raise InputError(f"mse: steps={self.steps} must be at least 2, smallest={self.smallest} between 0 and 1")

    def activation_range(self, histogram: Histogram, grid: Grid) -> tuple[float, float]:
        lo, hi = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
        shares = torch.linspace(self.smallest, 1.0, self.steps, dtype=torch.double, device=histogram.counts.device)
        for _ in range(2):
            if hi > 0:
                hi = float(self._best(histogram, shares * 0 + lo, shares * max(histogram.maximum, 0.0), grid)[1])
            if lo < 0:
                lo = float(self._best(histogram, shares * histogram.minimum, shares * 0 + hi, grid)[0])
        return lo, hi

    def _best(self, histogram: Histogram, lo: Tensor, hi: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        x = histogram.centers
        scale = ((hi - lo) / grid.levels).clamp_min(1e-30)[:, None]  # (candidates, 1)
        zero = torch.round(grid.qmin - lo[:, None] / scale)
        codes = (torch.round(x / scale) + zero).clamp_(grid.qmin, grid.qmax)
        error = (((codes - zero) * scale - x) ** 2 @ histogram.counts).flip(0)  # the widest wins a tie
        best = len(error) - 1 - int(error.argmin())
        return lo[best], hi[best]

    def weight_scale(self, rows: Tensor, grid: Grid) -> Tensor:
        rows = rows.float()
        widest = rows.abs().amax(1).clamp_min(1e-30) / grid.qmax
        best, least = widest.clone(), torch.full_like(widest, torch.inf)
        # Of few bits the grid reaches further down than up (-2 to 1), and the largest weight may lie on either side.
        for share in torch.linspace(1.0, self.smallest * grid.qmax / max(grid.qmax, -grid.qmin), self.steps).tolist():
            scale = widest * share
            error = grid.snap(rows / scale[:, None]).mul_(scale[:, None]).sub_(rows).square_().sum(1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, scale, best)
        return best
