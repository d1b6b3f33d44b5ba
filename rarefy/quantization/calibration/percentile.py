"""Percentile: the range leaves out the given share of the values, half at either end (all at the upper end where
nothing is negative)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.quantization.formats import Grid
from rarefy.quantization.observers import BINS, Histogram


@dataclasses.dataclass(frozen=True)
class Percentile:
    """``percent`` of the values lie inside the range; 99.99 clips one value in 10,000.

    Where outliers are known to mean nothing. The share is of values, not of the error, which mse looks at.
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise InputError(f"percentile: percent={self.percent} must lie above 50 and up to 100")

    def activation_range(self, histogram: Histogram, grid: Grid) -> tuple[float, float]:
        outside = 1 - self.percent / 100
        share = histogram.counts.cumsum(0) / histogram.counts.sum()
        below = 0.0 if histogram.minimum >= 0 else outside / 2
        above = 0.0 if histogram.maximum <= 0 else outside - below
        width = (histogram.hi - histogram.lo) / BINS
        first = int(torch.searchsorted(share, torch.tensor(below, dtype=share.dtype), right=True))
        last = int(torch.searchsorted(share, torch.tensor(1 - above, dtype=share.dtype)))
        lo = histogram.lo + width * first
        hi = histogram.lo + width * (min(last, BINS - 1) + 1)
        return max(lo, histogram.minimum), min(hi, histogram.maximum)

    def weight_scale(self, rows: Tensor, grid: Grid) -> Tensor:
        return torch.quantile(rows.abs().float(), self.percent / 100, dim=1) / grid.qmax
