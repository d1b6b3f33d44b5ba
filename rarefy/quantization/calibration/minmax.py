"""Min-max: the range covers everything that was seen. Nothing is clipped, and one outlier costs all other values
resolution."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from rarefy.quantization.formats import Grid
from rarefy.quantization.observers import Histogram


@dataclasses.dataclass(frozen=True)
class MinMax:
    """The exact minimum and maximum.

    For weights of 8 bits, and activations without outliers; else mse.
    """

    def activation_range(self, histogram: Histogram, grid: Grid) -> tuple[float, float]:
        return histogram.minimum, histogram.maximum

    def weight_scale(self, rows: Tensor, grid: Grid) -> Tensor:
        return rows.abs().amax(1) / grid.qmax
