"""Layers around values that 8 bits can't hold, left in float.

Where a value's noise alone, by its gradient (``quantization/sensitivity``), costs the answers more than ``MOST``, its
range is wide and what matters lies close to zero: a stem on raw pixels before SiLU, say. Such values are taken out of
the integers, the worst first, with the layer that makes them and those that read them, as long as these are a small
part of the network's products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from rarefy.graph.layers import layer_name, weighted
from rarefy.graph.macs import layer_macs
from rarefy.quantization.formats import Grid
from rarefy.quantization.observers import Histogram
from rarefy.quantization.placement import Placement

MOST = 0.01  # of the answers' power that the noise of one value may have
SHARE = 0.25  # of all products that may be left in float for it


def noise(histogram: Histogram, grid: Grid, ends: tuple[float, float]) -> float:
    """What rounding to a grid over ``ends`` costs the answers, as a share of their power."""
    if histogram.cost is None:
        return 0.0
    step = (ends[1] - ends[0]) / grid.levels
    return step * step / 12 * histogram.cost.power


def noisy(
    graph: fx.GraphModule,
    placement: Placement,
    ranges: Mapping[fx.Node, tuple[float, float]],
    grids: Mapping[fx.Node, Grid],
    histograms: Mapping[fx.Node, Histogram],
) -> list[str]:
    """Names of the layers to leave in float."""
    cost = {value: noise(histograms[value], grids[value], ranges[value]) for value in placement.values}
    products = layer_macs(graph)
    budget = SHARE * sum(products.get(node.name, 0) for node in placement.layers)
    left: list[fx.Node] = []
    for value in sorted(placement.values, key=lambda one: -cost[one]):
        if cost[value] <= MOST:
            break
        around = [node for node in _around(placement, value) if node not in left]
        spent = sum(products.get(node.name, 0) for node in around)
        if around and spent <= budget:
            budget -= spent
            left += around
    return [layer_name(node) for node in placement.layers if node in left]


def _around(placement: Placement, value: fx.Node) -> Sequence[fx.Node]:
    """The layers that make a value, if it is one's own, and that read it, behind what carries it."""
    made = placement.fused.get(value, value)
    found, waiting = [made] if weighted(made) else [], [value]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user in placement.layers:
                found.append(user)
            elif user in placement.carried or user in placement.fused:
                waiting.append(user)
    return [node for node in found if node in placement.layers]
