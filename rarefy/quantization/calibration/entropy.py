"""Entropy: the range whose grid loses the least information, KL(P || Q) over the bins of the histogram.

P: the counts inside the range, with what lies outside added to its first and last bin. Q: the counts inside the range
once more, those of the bins that share a code spread evenly over these (empty bins stay empty). What is clipped is thus
in P and not in Q. ``steps`` ranges down to ``smallest`` of the min-max range, both ends shrunk alike; the widest wins a
tie. As TensorRT calibrates (Migacz, GTC 2017), which shrinks one symmetric threshold.
Weights: the same over each channel's absolute values.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.quantization.formats import Format
from rarefy.quantization.observers import Histogram

_WEIGHT_BINS = 512


@dataclasses.dataclass(frozen=True)
class Entropy:
    """``steps`` candidates down to ``smallest`` of the min-max range.

    As TensorRT calibrates, to compare with it. What it weighs is the shape of a distribution; mse weighs errors.
    """

    steps: int = 100
    smallest: float = 0.3

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.smallest < 1:
            raise InputError(
                f"entropy: steps={self.steps} must be at least 2, smallest={self.smallest} between 0 and 1"
            )

    def activation_range(self, histogram: Histogram, grid: Format) -> tuple[float, float]:
        least, most = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
        best, lost = 1.0, torch.inf
        for share in torch.linspace(1.0, self.smallest, self.steps).tolist():
            lo, hi = share * least, share * most
            scale = max((hi - lo) / (grid.qmax - grid.qmin), 1e-30)
            codes = torch.round((histogram.centers.clamp(lo, hi) - lo) / scale)
            inside = (histogram.centers >= lo) & (histogram.centers <= hi)
            now = float(divergence(histogram.counts[None], codes[None], inside[None], int(grid.qmax - grid.qmin)))
            if now < lost:
                best, lost = share, now
        return best * least, best * most

    def weight_scale(self, rows: Tensor, grid: Format) -> Tensor:
        sizes = rows.abs().float()
        widest = sizes.amax(1).clamp_min(1e-30)
        place = (sizes / widest[:, None] * _WEIGHT_BINS).long().clamp_max(_WEIGHT_BINS - 1)
        counts = torch.zeros(len(rows), _WEIGHT_BINS, dtype=torch.double, device=rows.device)
        counts.scatter_add_(1, place, torch.ones_like(sizes, dtype=torch.double))
        centers = (torch.arange(_WEIGHT_BINS, device=rows.device) + 0.5) / _WEIGHT_BINS
        best, lost = torch.ones_like(widest), torch.full_like(widest, torch.inf, dtype=torch.double)
        for share in torch.linspace(1.0, self.smallest, self.steps).tolist():
            codes = torch.round(centers.clamp_max(share) / share * grid.qmax).expand_as(counts)
            now = divergence(counts, codes, (centers <= share).expand_as(counts), int(grid.qmax))
            best, lost = torch.where(now < lost, share, best), torch.minimum(now, lost)
        return widest * best / grid.qmax


def divergence(counts: Tensor, codes: Tensor, inside: Tensor, levels: int) -> Tensor:
    """(n,) KL(P || Q). counts, codes (0 to levels), inside: (n, bins); infinite where nothing is inside."""
    bins = torch.arange(counts.shape[1], device=counts.device).expand_as(counts)
    first = torch.where(inside, bins, counts.shape[1]).amin(1, keepdim=True)
    last = torch.where(inside, bins, -1).amax(1, keepdim=True)
    edge = torch.minimum(torch.maximum(bins, first), last).clamp(0, counts.shape[1] - 1)
    p = torch.zeros_like(counts).scatter_add_(1, edge, counts)
    own = counts * inside
    filled = (own > 0).double()
    zeros = counts.new_zeros(len(counts), levels + 1)
    codes = codes.long().clamp(0, levels)
    total, places = zeros.scatter_add(1, codes, own), zeros.scatter_add(1, codes, filled)
    q = filled * (total / places.clamp_min(1)).gather(1, codes)
    p, q = p / p.sum(1, keepdim=True).clamp_min(1e-30), q / q.sum(1, keepdim=True).clamp_min(1e-30)
    lost = torch.where(p > 0, p * (p.clamp_min(1e-30) / q.clamp_min(1e-12)).log(), 0.0).sum(1)
    return torch.where(inside.any(1), lost, torch.inf)
