"""Moving average: the range follows the batches' extremes, lo <- m lo + (1 - m) min, hi <- m hi + (1 - m) max
(1712.05877).

A batch with an outlier moves the range by a share only. It hangs on the order of the batches and on their size. Weights
don't come in batches: min-max.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from rarefy.errors import InputError
from rarefy.quantization.formats import Format
from rarefy.quantization.observers import Histogram


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """The extremes of the batches, averaged with weights that fall by ``momentum`` a batch.

    For ranges as quantization-aware training tracks them. Not an average of values.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InputError(f"moving_average: momentum={self.momentum} must lie in 0 to 1, 1 excluded")

    def activation_range(self, histogram: Histogram, grid: Format) -> tuple[float, float]:
        (lo, hi), *later = histogram.extremes
        for least, most in later:
            lo += (1 - self.momentum) * (least - lo)
            hi += (1 - self.momentum) * (most - hi)
        return lo, hi

    def weight_scale(self, rows: Tensor, grid: Format) -> Tensor:
        return rows.abs().amax(1) / grid.qmax
