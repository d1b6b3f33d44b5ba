"""observe(): one pass over the calibration images, streaming what every chosen node yields into a histogram, and
layers' mean outputs.

Memory is one batch's activations, ``BINS`` counts a node and two numbers a batch, whatever the number of images. The
histogram's range starts at the first batch's and doubles towards the side that a later batch exceeds (neighbouring bins
are merged), so that no value is ever clipped and the bins stay at most twice as wide as they need be. Extremes are
those of all values; of a large batch, the bins count ``COUNTED`` values spread evenly (with a step that shares no
factor with the size, so that no channel or column is preferred), since counting all took half of the whole time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from rarefy.errors import CheckFailed, DataError, InputError
from rarefy.graph import im2col
from rarefy.graph.capture.batches import Arranger, each
from rarefy.graph.interpreter import laid_out, run
from rarefy.graph.nodes import Value, argument, attribute, device_of
from rarefy.graph.shapes import shapes
from rarefy.kernels.observe import OBSERVE
from rarefy.quantization.formats import Format, Grid
from rarefy.quantization.sensitivity import Cost
from rarefy.tasks.task import Task

aten = torch.ops.aten

NONE = "no calibration images; give at least one batch (128 images are a good number)"
BINS = 2048
# bytes of a batch's largest activation on a CPU: from 32 MiB on each is mapped anew at its use, which takes a tenth to
# a third of the time
PIECE = 27e6
SENSED = 3e8  # activations of all images that gradients are taken on
HELD = 6e7  # numbers of activations behind which gradients are asked for at once: four times their bytes are taken
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
    cost: Cost | None = None

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


class Calibration(Protocol):
    """A rule that chooses the range a grid covers; those that come with rarefy are in ``calibration/``."""

    def activation_range(self, histogram: Histogram, grid: Grid) -> tuple[float, float]:
        """(lo, hi) of a tensor that streamed into ``histogram``."""

    def weight_scale(self, rows: Tensor, grid: Format) -> Tensor:
        """(n,) of the weights (n, elements) of n channels or groups."""


@runtime_checkable
class ByAnswers(Protocol):
    """A calibration that looks at what a histogram's errors cost the answers (``Histogram.cost``)."""

    by_answers: bool

    def activation_ranges(self, histograms: Sequence[Histogram], grids: Sequence[Grid]) -> list[tuple[float, float]]:
        """(lo, hi) of each of all tensors, chosen together."""


class Images:
    """Samples to calibrate ``graph`` on, of a task's training split or of the caller's batches, an iterator perhaps.

    Every reading begins with the first of them, whatever was looked at before.
    """

    def __init__(self, graph: fx.GraphModule, task: Task | None, batches: object | None, seed: int) -> None:
        """seed: of which images of the task are taken."""
        self._graph, self._task, self._seed = graph, task, seed
        self._batches = None if batches is None else each(batches, "batches")
        self._arranged = Arranger(graph, "calibration batch")
        self._front: list[Value] = []  # was looked at
        self.are_drawn = batches is None

    def first(self, count: int) -> tuple[Tensor, ...]:
        """The first ``count`` samples, at most one batch of the caller's: (count, ...) of each input of the graph."""
        if self._batches is None:
            return next(self._checked(self._drawn(count, count), count))
        self._front = self._front or list(itertools.islice(self._batches, 1))
        if not self._front:
            raise DataError(NONE)
        return next(self._checked(self._front, count))

    def read(self, count: int, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
        """The first ``count`` samples, batch by batch; batches of the caller's are as large as they are. Once only."""
        if self._batches is None:
            yield from self._checked(self._drawn(count, batch_size), count)
        else:
            yield from self._checked(itertools.chain(self._front, self._batches), count)

    def pieces(self, batches: Iterable[tuple[Tensor, ...]], most: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        """The same samples as a CPU likes them: few at a time, and at most ``most``."""
        if device_of(self._graph).type != "cpu" and most is None:
            yield from batches
            return
        count = min(self._at_once, most or self._at_once)
        for batch in batches:
            yield from zip(*(value.split(count) for value in batch), strict=True)

    def sensed(self, most: int) -> int:
        """So many samples, at least 16, as one pass backwards over their activations is worth."""
        return max(16, min(most, int(SENSED / self._numbers)))

    @property
    def in_gradients(self) -> int:
        """Samples whose activations and their gradients are held at once."""
        return max(1, min(2, int(HELD / self._numbers)))

    @property
    def bytes_each(self) -> int:
        """Of one sample."""
        specs = self._graph.meta["inputs"]
        return sum(math.prod(spec["shape"]) * getattr(torch, spec["dtype"]).itemsize for spec in specs)

    @cached_property
    def _values(self) -> list[Tensor]:
        """Of two samples, on the meta device."""
        found = shapes(self._graph, 2).items()
        return [value for node, value in found if node.op != "get_attr" and isinstance(value, Tensor)]

    @property
    def _numbers(self) -> float:
        """Of all activations of a sample."""
        return sum(value.numel() for value in self._values) / 2

    @property
    def _at_once(self) -> int:
        return max(1, int(PIECE // max(value.numel() * value.element_size() / 2 for value in self._values)))

    def _drawn(self, count: int, batch_size: int) -> Iterator[Tensor]:
        if self._task is None:
            raise InputError("no calibration images: pass a task, or batches=")
        return self._task.data.inputs("train", count, batch_size, seed=self._seed)

    def _checked(self, batches: Iterable[Value], count: int) -> Iterator[tuple[Tensor, ...]]:
        """At most ``count`` samples, on the graph's device. Raises InputError for what is no input of the graph."""
        left = count
        for batch in batches:
            given = self._arranged(batch)
            yield tuple(value[:left] for value in given)
            left -= len(given[0])
            if left <= 0:
                return


@dataclasses.dataclass
class Observed:
    """What ``observe`` found.

    histograms: of each node. read: of each layer the means of what it reads, of every other piece of the images and of
    those between. batches: the first of all, which are kept.
    """

    histograms: dict[fx.Node, Histogram]
    read: dict[fx.Node, tuple[im2col.Mean, im2col.Mean]]
    batches: list[tuple[Tensor, ...]]


def observe(
    graph: fx.GraphModule,
    nodes: Iterable[fx.Node],
    batches: Iterable[tuple[Tensor, ...]],
    layers: Iterable[fx.Node] = (),
    keep: Callable[[int], bool] = lambda samples: False,
) -> Observed:
    """Histograms of the nodes and means of what the layers read.

    keep: whether a batch is kept when that many samples are, with it; the first always is.
    Raises CheckFailed where a node yields NaN or infinity, and DataError where there is no batch.
    """
    found: dict[fx.Node, Histogram] = {}
    means: dict[fx.Node, tuple[im2col.Mean, im2col.Mean]] = {}
    readers: dict[fx.Node, list[tuple[im2col.Mean, im2col.Mean]]] = {}
    for layer in layers:
        shape = attribute(graph, argument(layer, "weight")).shape
        means[layer] = im2col.Mean(layer, shape), im2col.Mean(layer, shape)
        readers.setdefault(layer.all_input_nodes[0], []).append(means[layer])
    kept: list[tuple[Tensor, ...]] = []
    observed, keeping = set(nodes), True

    def see(node: fx.Node, value: Tensor) -> None:
        for halves in readers.get(node, ()):
            halves[count % 2].add(value)
        if node not in observed:
            return
        value = _flat(value.detach().float())
        lo, hi = (float(end) for end in torch.aminmax(value))
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise CheckFailed(
                f"{node.meta.get('stack') or node.name}: yields NaN or infinity on the calibration images; "
                "check the weights and the normalisation"
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
        raise DataError(NONE)
    return Observed(found, means, kept)


def channel_axis(layer: fx.Node, value: Tensor) -> int:
    """Of what a layer makes: the axis of its output channels."""
    return value.dim() - 1 if layer.target is aten.linear.default else 1


def _flat(x: Tensor) -> Tensor:
    """All numbers in the order they lie in memory, without a copy where they lie side by side."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset()) if _dense(x) else x.reshape(-1)


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _counts(x: Tensor, lo: float, hi: float) -> Tensor:
    """(BINS,) float64: how many of ``x``, none outside, lie in each."""
    counts: Tensor = OBSERVE(_spread(x), None, lo, hi, BINS)[1]
    return counts[0].double()


def _spread(x: Tensor) -> Tensor:
    """At most ``COUNTED`` of the values."""
    step = -(-x.numel() // COUNTED)
    while math.gcd(step, x.numel()) > 1:
        step += 1
    return x[::step]
