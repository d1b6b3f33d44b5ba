"""What calibration wants to know of a tensor, in one pass: extremes, moments and a histogram, of all or of a channel.

    statistics   minimum, maximum, largest size, mean, mean of squares                       float64 (channels, 5)
    counts       of value x one in bin clip( trunc( (x - low) bins / (high - low) ) )        int32 (channels, bins)

computed in float32 up to the bin, so that a GPU and a CPU count alike; what lies outside counts in the first or last
bin, NaN in none. NaN is no extreme; the mean tells of it. Sums are taken in an order that hangs on the sizes alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rarefy.kernels.library import define

FIELDS = ("minimum", "maximum", "absolute_maximum", "mean", "mean_of_squares")


def observe(x: Tensor, axis: int | None, low: float, high: float, bins: int) -> tuple[Tensor, Tensor]:
    """x: floats. axis: of the channels; None: one for all. bins: 0 counts nothing, else from ``low`` to ``high``."""
    rows = (x.reshape(1, -1) if axis is None else x.movedim(axis, 0).unsqueeze(-1).flatten(1)).float()
    least, most = rows.aminmax(dim=1)
    known = rows.isnan() if bool(least.isnan().any()) else None
    if known is not None:
        least, most = rows.masked_fill(known, math.inf).amin(1), rows.masked_fill(known, -math.inf).amax(1)
    largest = torch.where(least > most, 0.0, torch.maximum(least.abs(), most.abs()))
    mean = rows.mean(1, dtype=torch.float64)
    squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square() / rows.shape[1]
    counts = torch.zeros(len(rows), bins, dtype=torch.int32, device=x.device)
    for channel, (row, into) in enumerate(zip(rows, counts, strict=True) if bins else ()):
        # to count whole numbers takes a CPU a quarter of what histc takes
        places = (row - low).mul_(bins / (high - low)).clamp_(0, bins - 1).to(torch.int32)
        into += torch.bincount(places if known is None else places[~known[channel]], minlength=bins).to(torch.int32)
    return torch.stack([field.double() for field in (least, most, largest, mean, squares)], 1), counts


def _on_cuda(x: Tensor, axis: int | None, low: float, high: float, bins: int) -> tuple[Tensor, Tensor]:
    from rarefy.kernels.cuda import observe as kernel

    return kernel.observe(x, axis, low, high, bins)


def _shape(x: Tensor, axis: int | None, low: float, high: float, bins: int) -> tuple[Tensor, Tensor]:
    channels = 1 if axis is None else x.shape[axis]
    return x.new_empty((channels, 5), dtype=torch.float64), x.new_empty((channels, bins), dtype=torch.int32)


OBSERVE = define(
    "observe(Tensor x, int? axis, float low, float high, int bins) -> (Tensor, Tensor)", observe, _shape, _on_cuda
)
"""Its statistics and counts; see the module."""
