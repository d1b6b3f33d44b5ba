"""observe(): one pass over the calibration images, streaming what every chosen node yields into a histogram.

Memory is one batch's activations and ``BINS`` counts a node, whatever the number of images. The histogram's range starts at the first
batch's and doubles towards the side that a later batch exceeds (neighbouring bins are merged), so that no value is ever clipped and the
bins stay at most twice as wide as they need be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.capturing import attribute
from rarefy.errors import CheckFailed, DataError

BINS = 2048


@dataclasses.dataclass
class Histogram:
    """counts: (BINS,) over [lo, hi]; minimum, maximum: exact; mean_minimum, mean_maximum: averages of the batches' extremes."""

    counts: Tensor
    lo: float
    hi: float
    minimum: float
    maximum: float
    mean_minimum: float
    mean_maximum: float
    batches: int = 1

    @classmethod
    def of(cls, x: Tensor) -> Histogram:
        lo, hi = (float(value) for value in torch.aminmax(x))
        width = max(hi - lo, 1e-12, abs(hi) * 1e-6, abs(lo) * 1e-6)
        counts = torch.histc(x, BINS, lo, lo + width).double()
        return cls(counts, lo, lo + width, lo, hi, lo, hi)

    def add(self, x: Tensor) -> None:
        lo, hi = (float(value) for value in torch.aminmax(x))
        while hi > self.hi:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), self.counts.new_zeros(BINS // 2)])
            self.hi += self.hi - self.lo
        while lo < self.lo:
            self.counts = torch.cat([self.counts.new_zeros(BINS // 2), self.counts.view(-1, 2).sum(1)])
            self.lo -= self.hi - self.lo
        self.counts += torch.histc(x, BINS, self.lo, self.hi).double()
        self.minimum, self.maximum = min(self.minimum, lo), max(self.maximum, hi)
        self.batches += 1
        self.mean_minimum += (lo - self.mean_minimum) / self.batches
        self.mean_maximum += (hi - self.mean_maximum) / self.batches

    @property
    def centers(self) -> Tensor:
        """(BINS,) the value each bin stands for."""
        width = (self.hi - self.lo) / BINS
        return self.lo + width * (torch.arange(BINS, dtype=torch.double, device=self.counts.device) + 0.5)


class Taps(fx.Interpreter):
    """Runs a graph and hands the value of each node in ``nodes`` to ``see(node, value)``; values are dropped after their last use."""

    def __init__(self, graph: fx.GraphModule, nodes: Iterable[fx.Node], see: Callable[[fx.Node, Any], None]):
        super().__init__(graph)
        self.nodes, self.see = set(nodes), see

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node in self.nodes:
            self.see(node, value)
        return value


def observe(graph: fx.GraphModule, nodes: Iterable[fx.Node], batches: Iterable[tuple[Tensor, ...]]) -> dict[fx.Node, Histogram]:
    """Histogram of each node's values over all batches.

    Raises CheckFailed where a node yields NaN or infinity, and DataError where there is no batch.
    """
    found: dict[fx.Node, Histogram] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        value = value.detach().float().reshape(-1)
        if not bool(torch.isfinite(value.sum())):
            raise CheckFailed(
                f"{node.meta.get('stack') or node.name}: yields NaN or infinity on the calibration images; check the weights and the normalisation"
            )
        if node in found:
            found[node].add(value)
        else:
            found[node] = Histogram.of(value)

    taps = Taps(graph, nodes, see)
    count = 0
    with torch.no_grad():
        for batch in batches:
            taps.run(*batch)
            count += 1
    if not count:
        raise DataError("no calibration images; give at least one batch (128 images are a good number)")
    return found


def in_lockstep(
    float_graph: fx.GraphModule, graph: fx.GraphModule, names: Iterable[str], inputs: tuple[Tensor, ...]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, float value, value) for each named node of both graphs, in order, running both side by side.

    ``graph`` runs a node only after what was yielded before it has been dealt with: a change made then (to a bias, say) is seen by the
    node's successors if it is applied to ``value`` in place.
    """
    wanted = set(names)
    twins = _values(float_graph, inputs)
    for node, value in _values(graph, inputs):
        if node.name in wanted:
            for twin, twin_value in twins:
                if twin.name == node.name:
                    yield node.name, twin_value, value
                    break


def _values(graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Iterator[tuple[fx.Node, Any]]:
    """Each node and its value, in the order of the graph; a value is let go after its last reader.

    No gradient is wanted, but ``no_grad`` must not span a ``yield``: it would hold for the caller, and end whenever the generator is collected,
    with the mode of when it began.
    """
    left = {node: len(node.users) for node in graph.graph.nodes}
    environment: dict[fx.Node, Any] = {}
    arguments = iter(inputs)
    for node in graph.graph.nodes:
        if node.op == "output":
            return
        if node.op == "placeholder":
            value = next(arguments)
        elif node.op == "get_attr":
            value = attribute(graph, node.target)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: environment[source])
            with torch.no_grad():
                value = node.target(*args, **kwargs)
        environment[node] = value
        yield node, value
        for source in node.all_input_nodes:
            left[source] -= 1
            if not left[source]:
                environment.pop(source, None)
