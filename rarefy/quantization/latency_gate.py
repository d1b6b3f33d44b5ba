"""Never slower: which layers of a network pay for being integers, timed on the runtime.

    float ─▶ all that can be integer ─▶ without one kind of layers at a time ─▶ without all that did not pay
          ─▶ the fastest of them, float included

A *stretch* is a set of integer layers that hand codes to each other, with no float operator between. Stretches of the
same layers (the blocks of a transformer) are one candidate, and where a candidate holds layers of several kinds
(depthwise, 1x1, other convolutions, linear), so is each kind of it. What is timed is the whole network with the
candidate in float, since a stretch alone would pay neither for the conversions that its neighbours no longer need nor
for the caches it finds. All files take turns in one run (``rarefy.deployment.latency``); the weights are rounded to the
nearest code for it, as time does not depend on them.

A candidate goes back to float where the network without it is faster by 1 %, and in three of four rounds. Those that do
go together, and the result is the fastest of: all integer, all but these, float in any precision of the runtime
(``floats``: bf16 on OpenVINO). A tie is decided for more integers.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import fx

from rarefy import plugins
from rarefy.deployment import latency
from rarefy.deployment.runtime import Runtime, Session
from rarefy.graph.layers import layer_name
from rarefy.graph.lowering import to_integers
from rarefy.graph.nodes import argument, attribute, example_inputs, finish, share_copy
from rarefy.quantization import formats, qdq
from rarefy.quantization.placement import Placement, place
from rarefy.system.progress import track

CANDIDATES = 12  # at most, in the order of the network
INTEGER, MIXED = "all integer", "without what did not pay"

Ranges = Mapping[str, tuple[float, float]]


class Verdict(TypedDict):
    """undone: names of layers and products that go back to float: all where the whole network is faster there."""

    undone: list[str]
    why: str
    batch: int
    threads: int
    runtime: str


class Timed(TypedDict):
    """A median."""

    what: str
    latency_ms: float


@dataclasses.dataclass(frozen=True)
class Candidate:
    """name: for people. layers: names of the layers, or products, that would go back to float."""

    name: str
    layers: tuple[str, ...]


def candidates(graph: fx.GraphModule, placement: Placement) -> list[Candidate]:
    """Stretches, alike ones together, and their kinds, and the products of activations; none that holds everything."""
    alike: dict[tuple[str, ...], list[fx.Node]] = {}
    for stretch in _stretches(placement):
        alike.setdefault(tuple(_shape(graph, node) for node in stretch), []).extend(stretch)
    found: dict[tuple[str, ...], str] = {}
    for stretch in alike.values():
        kinds: dict[str, list[fx.Node]] = {}
        for node in stretch:
            kinds.setdefault(_kind(graph, node), []).append(node)
        told = f"{layer_name(stretch[0])} and {len(stretch) - 1} more" if len(stretch) > 1 else layer_name(stretch[0])
        for name, nodes in ((told, stretch), *((f"{kind} layers of {told}", nodes) for kind, nodes in kinds.items())):
            found.setdefault(tuple(layer_name(node) for node in nodes), name)
    if products := tuple(node.name for node in placement.products):
        found = {products: f"{len(products)} products of activations", **found}
    everything = set(_everything(placement))
    return [Candidate(name, layers) for layers, name in found.items() if set(layers) != everything][:CANDIDATES]


def _everything(placement: Placement) -> list[str]:
    """Names of all that multiplies in integers."""
    return sorted([*(layer_name(node) for node in placement.layers), *(node.name for node in placement.products)])


def judge(
    graph: fx.GraphModule,
    placement: Placement,
    ranges: Ranges,
    ignore: Sequence[str],
    runtime: Runtime,
    grid: formats.Grid,
    progress: bool = True,
) -> tuple[Verdict, list[Timed]]:
    """What goes back to float, and what was timed, with a batch of one.

    graph: float, folded, with the biases that layers in codes need. ranges: of all values, by name.
    ignore: globs that stay float in any case. grid: of activations.
    """
    threaded = latency.with_threads(runtime)
    example = example_inputs(graph, batch=1)[0]
    tried = candidates(graph, placement)
    everything = _everything(placement)
    with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:

        def opened(model: fx.GraphModule, on: Runtime = threaded) -> Session:
            return on.open(on.export(model, Path(folder) / f"{len(os.listdir(folder))}{on.suffix}"))

        def without(layers: Sequence[str]) -> Session:
            return opened(rounded(graph, ranges, [*ignore, *layers], threaded, grid))

        floats = {f"float on {plugins.describe(form)}": opened(graph, form) for form in threaded.floats}
        whole = {INTEGER: without(())}
        parts = {f"{one.name} in float": without(one.layers) for one in track(tried, len(tried), "gate", progress)}
        times = latency.latency({**whole, **parts, **floats}, example, warmup=3)
        slow = [one for one, name in zip(tried, parts, strict=True) if _faster(times, name, INTEGER)]
        undone = sorted({layer for one in slow for layer in one.layers})
        medians = {name: one["ms"]["median"] for name, one in times.items()}
        if undone and undone != everything:
            whole[MIXED] = without(undone)
            times = latency.latency({**whole, **floats}, example, warmup=3)
            medians |= {name: one["ms"]["median"] for name, one in times.items()}
    best = MIXED if MIXED in whole and _faster(times, MIXED, INTEGER) else INTEGER
    faster = [name for name in floats if _faster(times, name, best)]
    if faster:
        best, undone = min(faster, key=medians.__getitem__), everything
    elif best == INTEGER:
        undone = []
    verdict = Verdict(
        undone=undone, why=_why(best, slow), batch=1, threads=threaded.threads, runtime=plugins.describe(threaded)
    )
    return verdict, [Timed(what=name, latency_ms=ms) for name, ms in medians.items()]


def _faster(times: Mapping[str, latency.Latency], one: str, other: str) -> bool:
    """Clearly, in one run in which both took turns."""
    return latency.is_faster(times[one]["speedup"][other])


def _why(best: str, slow: Sequence[Candidate]) -> str:
    if best == INTEGER:
        return "every stretch pays"
    return (
        f"faster in float: {', '.join(one.name for one in slow)}"
        if best == MIXED
        else f"the whole network is faster in {best}"
    )


def rounded(
    graph: fx.GraphModule, ranges: Ranges, ignore: Sequence[str], runtime: Runtime, grid: formats.Grid
) -> fx.GraphModule:
    """A copy in integers, weights at the nearest of 8 bits."""
    copied = share_copy(graph)
    placement = place(copied, runtime.capabilities, ignore)
    grids = {value: qdq.grid_of(placement, value, grid) for value in placement.values}
    qdq.insert(copied, placement, {value: ranges[value.name] for value in placement.values}, grids)
    for node in placement.layers:
        weight = attribute(copied, argument(node, "weight")).detach()
        scale = torch.maximum(weight.abs().flatten(1).amax(1) / 127, qdq.least_scale(copied, node))
        codes = torch.round(weight / scale.view(-1, *[1] * (weight.dim() - 1))).to(torch.int8)
        qdq.put_codes(copied, node, codes, scale)
    return to_integers(finish(copied)).eval()


def _stretches(placement: Placement) -> list[list[fx.Node]]:
    """The layers of each, in order."""
    held = placement.integer | set(placement.values) | set(placement.fused) | set(placement.carried)
    group = {node: node for node in held}

    def root(node: fx.Node) -> fx.Node:
        while group[node] is not node:
            node = group[node]
        return node

    for node in held:
        for user in node.users:
            if user in held:
                group[root(user)] = root(node)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in placement.layers:
        found.setdefault(root(node), []).append(node)
    return list(found.values())


def _shape(graph: fx.GraphModule, node: fx.Node) -> str:
    """The same for layers that take as long."""
    return f"{node.target} {tuple(attribute(graph, argument(node, 'weight')).shape)} {node.args[3:]}"


def _kind(graph: fx.GraphModule, node: fx.Node) -> str:
    size = attribute(graph, argument(node, "weight")).shape
    if len(size) == 2:
        return "linear"
    if size[1] == 1 and size[0] > 1:
        return "depthwise"
    return "1x1" if all(side == 1 for side in size[2:]) else "spatial"
