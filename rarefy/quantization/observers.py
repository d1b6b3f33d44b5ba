"""observe(): one pass over the calibration images, streaming what every chosen node yields into a histogram, and layers' mean outputs.

Memory is one batch's activations, ``BINS`` counts a node and two numbers a batch, whatever the number of images. The histogram's range starts at
the first batch's and doubles towards the side that a later batch exceeds (neighbouring bins are merged), so that no value is ever clipped and the
bins stay at most twice as wide as they need be. Extremes are those of all values; of a large batch, the bins count ``COUNTED`` values spread evenly
(with a step that shares no factor with the size, so that no channel or column is preferred), since counting all took half of the whole time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, fx

from rarefy.errors import CheckFailed, DataError
from rarefy.graph.interpreter import laid_out, run

aten = torch.ops.aten

BINS = 2048
COUNTED = 2**18  # 2**16 of these few images leaves EfficientNet-Lite2 at 20.7 dB in place of 21.5


@dataclasses.dataclass
class Histogram:
    """counts: (BINS,) over [lo, hi]; minimum, maximum: exact; extremes: (minimum, maximum) of each batch, in order."""

    counts: Tensor
    lo: float
    hi: float
    minimum: float
    maximum: float
    extremes: list[tuple[float, float]]

    @classmethod
    def of(cls, x: Tensor, ends: tuple[float, float] | None = None) -> Histogram:
        """ends: the extremes of ``x``, if they are known."""
        lo, hi = ends or (float(value) for value in torch.aminmax(x))
        width = max(hi - lo, 1e-12, abs(hi) * 1e-6, abs(lo) * 1e-6)
        return cls(_counts(x, lo, lo + width), lo, lo + width, lo, hi, [(lo, hi)])

    def add(self, x: Tensor, ends: tuple[float, float] | None = None) -> None:
        lo, hi = ends or (float(value) for value in torch.aminmax(x))
        while hi > self.hi:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), self.counts.new_zeros(BINS // 2)])
            self.hi += self.hi - self.lo
        while lo < self.lo:
            self.counts = torch.cat([self.counts.new_zeros(BINS // 2), self.counts.view(-1, 2).sum(1)])
            self.lo -= self.hi - self.lo
        self.counts += _counts(x, self.lo, self.hi)
        self.minimum, self.maximum = min(self.minimum, lo), max(self.maximum, hi)
        self.extremes.append((lo, hi))

    @property
    def centers(self) -> Tensor:
        """(BINS,) the value each bin stands for."""
        width = (self.hi - self.lo) / BINS
        return self.lo + width * (torch.arange(BINS, dtype=torch.double, device=self.counts.device) + 0.5)


@dataclasses.dataclass
class Observed:
    """histograms: of each node. means: (channels,) float64, the mean output of each layer on ``batches``, the first of all, which are kept. spreads: of some
    layers the deviation of the output around these means."""

    histograms: dict[fx.Node, Histogram]
    means: dict[fx.Node, Tensor]
    spreads: dict[fx.Node, float]
    batches: list[tuple[Tensor, ...]]


def observe(
    graph: fx.GraphModule,
    nodes: Iterable[fx.Node],
    batches: Iterable[tuple[Tensor, ...]],
    layers: Iterable[fx.Node] = (),
    keep: Callable[[int], bool] = lambda samples: False,
    spread: Collection[fx.Node] = (),
) -> Observed:
    """Histograms of the nodes over all batches, mean outputs of the layers over the batches that are kept, and how far those in ``spread`` are from them.

    keep: whether a batch is kept when that many samples are, with it; the first always is.
    Raises CheckFailed where a node yields NaN or infinity, and DataError where there is no batch.
    """
    found: dict[fx.Node, Histogram] = {}
    averages: dict[fx.Node, Average] = {node: Average(node in spread) for node in layers}
    kept: list[tuple[Tensor, ...]] = []
    observed, keeping = set(nodes), True

    def see(node: fx.Node, value: Tensor) -> None:
        if keeping and node in averages:
            averages[node].add(node, value)
        if node not in observed:
            return
        value = _flat(value.detach().float())
        lo, hi = (float(end) for end in torch.aminmax(value))
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise CheckFailed(
                f"{node.meta.get('stack') or node.name}: yields NaN or infinity on the calibration images; check the weights and the normalisation"
            )
        if node in found:
            found[node].add(value, (lo, hi))
        else:
            found[node] = Histogram.of(value, (lo, hi))

    count = samples = 0
    with torch.no_grad():
        for batch in batches:
            samples += len(batch[0])
            keeping = keeping and (not kept or keep(samples))
            if keeping:
                kept.append(batch)
            run(graph, [laid_out(value, value.device) for value in batch], see=see)
            count += 1
    if not count:
        raise DataError("no calibration images; give at least one batch (128 images are a good number)")
    means = {node: average.mean for node, average in averages.items()}
    return Observed(found, means, {node: average.spread for node, average in averages.items() if node in spread}, kept)


class Average:
    """Mean of a layer's output over images and places, a channel; streaming, (channels,) float64. spreads: whether squares are added up too."""

    def __init__(self, spreads: bool = False) -> None:
        self.sum, self.count = torch.zeros((), dtype=torch.float64), 0
        self.spreads, self.squares = spreads, 0.0

    def add(self, layer: fx.Node, value: Tensor) -> None:
        axis = value.dim() - 1 if layer.target is aten.linear.default else 1
        rows = value.detach().float().movedim(axis, -1).flatten(0, -2)
        own = (rows.new_ones(1, len(rows)) @ rows)[0].double()
        self.sum = self.sum.to(own.device) + own
        self.count += value.numel() // value.shape[axis]
        if self.spreads:
            self.squares += float(rows.square().sum(dtype=torch.float64))

    @property
    def mean(self) -> Tensor:
        return self.sum / max(self.count, 1)

    @property
    def spread(self) -> float:
        """Deviation around the channels' means, over all channels."""
        return math.sqrt(max(self.squares / max(self.count, 1) - float(self.mean.square().sum()), 0.0))


def _flat(x: Tensor) -> Tensor:
    """All numbers in the order they lie in memory, without a copy where they lie side by side."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset()) if _dense(x) else x.reshape(-1)


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _counts(x: Tensor, lo: float, hi: float) -> Tensor:
    """(BINS,) float64: how many of ``x``, none outside, lie in each. Counting whole numbers takes a CPU a quarter of what ``histc`` takes."""
    at = (_spread(x) - lo).mul_(BINS / (hi - lo)).to(torch.int32).clamp_(0, BINS - 1)
    return torch.bincount(at, minlength=BINS).double()


def _spread(x: Tensor) -> Tensor:
    """At most ``COUNTED`` of the values."""
    step = -(-x.numel() // COUNTED)
    while math.gcd(step, x.numel()) > 1:
        step += 1
    return x[::step]
