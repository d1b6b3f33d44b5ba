"""Sensitivity: the ranges whose errors, of rounding and of clipping, move the model's answers least, to first order.

Every value's gradient, from one pass backwards on calibration images, weighs its errors (``quantization/sensitivity``).
What is clipped adds up over the layers with its signs, as all of it makes answers smaller, so that the ends of all
ranges are chosen together: each in turn over 64 shares of what was seen, for the least of

    sum over values of (step^2 / 12 sum(g^2) + E c_v^2)  +  E (sum over values of c_v)^2

where c_v is what clipping of v moves an image's answers by. The second term in the first sum keeps the choice from
playing the clippings of a few images off against each other. Of ends that may be as good (within a standard error, and
several where images are few, among which those that are large hardly show) the widest is taken. One image in four, on
which nothing is fitted, says whether a range is better than all that was seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.quantization.calibration.mse import Mse
from rarefy.quantization.formats import Grid
from rarefy.quantization.observers import Histogram
from rarefy.quantization.sensitivity import Cost

SWEEPS = 3
FEW = 8  # images, below which nothing is clipped
HELD_OUT = 4  # one image of so many judges what the others say
DOUBT = 1.0  # standard errors, of many images
RARE = 24  # images: of fewer, one that is unlike the others may well be missing


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The ranges that cost the answers least, by their gradients, chosen for all values together.

    The default of activations. Values that no gradient reaches, and weights, are left to ``mse``.
    """

    by_answers = True

    def activation_range(self, histogram: Histogram, grid: Grid) -> tuple[float, float]:
        return self.activation_ranges([histogram], [grid])[0]

    def activation_ranges(self, histograms: Sequence[Histogram], grids: Sequence[Grid]) -> list[tuple[float, float]]:
        """(lo, hi) of each."""
        chosen = [
            _Ends(one.cost, grid) if one.cost is not None and one.cost.power > 0 else None
            for one, grid in zip(histograms, grids, strict=True)
        ]
        open_to = [ends for ends in chosen if ends is not None and len(ends.others) >= FEW]
        total = sum((ends.clipped for ends in open_to), start=torch.zeros((), dtype=torch.float64))
        for _ in range(SWEEPS):
            for ends in open_to:
                others = total - ends.clipped
                ends.choose(others)
                total = others + ends.clipped
        for ends in open_to:
            ends.judge()
        return [
            Mse().activation_range(histogram, grid) if ends is None else ends.range
            for ends, histogram, grid in zip(chosen, histograms, grids, strict=True)
        ]

    def weight_scale(self, rows: Tensor, grid: Grid) -> Tensor:
        return Mse().weight_scale(rows, grid)


class _Ends:
    """The ends of one value's range; at first those of all that was seen."""

    def __init__(self, cost: Cost, grid: Grid) -> None:
        self.cost, self.levels = cost, grid.levels
        powers = torch.cat(cost.powers).cpu()
        self.others = torch.arange(len(powers)) % HELD_OUT != HELD_OUT - 1  # are fitted on
        self.powers = powers[self.others]
        self.sides = [(side.ends(), side.costs()[self.others]) for side in (cost.low, cost.high)]
        self.at = [0, 0]

    @property
    def range(self) -> tuple[float, float]:
        lo, hi = (float(ends[at]) for (ends, _), at in zip(self.sides, self.at, strict=True))
        return lo, hi

    @property
    def clipped(self) -> Tensor:
        """(samples,) what is clipped moves the answers by."""
        (_, low), (_, high) = self.sides
        return low[:, self.at[0]] + high[:, self.at[1]]

    def choose(self, others: Tensor) -> None:
        """others: (samples,) what is clipped of the other values."""
        believed = DOUBT * (1 + RARE / len(self.powers))
        for side in (1, 0):
            ends, costs = self.sides[side]
            other_ends, other_costs = self.sides[1 - side]
            own = costs + other_costs[:, self.at[1 - side], None]
            step = (ends - other_ends[self.at[1 - side]]) / self.levels
            noise = step.square() / 12 * self.powers[:, None] + own.square() + (own + others[:, None]).square()
            more = noise - noise[:, int(noise.mean(0).argmin()), None]
            doubt = more.std(0) / len(more) ** 0.5
            self.at[side] = int((more.mean(0) <= believed * doubt).int().argmax())  # the widest that may be as good

    def judge(self) -> None:
        """Back to all that was seen where images that were not fitted on say that the choice costs more."""
        held = ~self.others
        if int(held.sum()) < 2 or self.at == [0, 0]:
            return
        powers = torch.cat(self.cost.powers).cpu()[held]
        low, high = self.cost.low, self.cost.high

        def noise(at: Sequence[int]) -> float:
            step = (high.ends()[at[1]] - low.ends()[at[0]]) / self.levels
            clipped = low.costs()[held, at[0]] + high.costs()[held, at[1]]
            return float((step.square() / 12 * powers + clipped.square()).mean())

        if noise(self.at) > noise((0, 0)):
            self.at, self.cost.undone = [0, 0], True
