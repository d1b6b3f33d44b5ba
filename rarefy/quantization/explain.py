"""explain(): what quantisation made of each layer, and why the others stay in float.

Noise is measured where it is made: with y a layer's sums in the float model and y~ those of the rounded one, both on
the same few images,

    signal to noise = 10 log10( sum (y - E y)^2 / sum (y - y~)^2 )    dB, E over images and places, a channel

The layers before have been rounded too, so that each layer shows what has come about up to it, and the one at which it
falls is the one to look at. Sums that a ReLU cuts off afterwards count: what a layer's readers see may be less noisy.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, fx, nn

from rarefy.errors import InputError
from rarefy.graph import history
from rarefy.graph.interpreter import in_lockstep
from rarefy.graph.layers import layer_name, names, weighted
from rarefy.graph.nodes import Value
from rarefy.quantization.observers import channel_axis
from rarefy.quantization.placement import Placement

Row = dict[str, Value]
IMAGES = 8


def noise(
    float_graph: fx.GraphModule, graph: fx.GraphModule, batches: Iterable[tuple[Tensor, ...]]
) -> dict[str, float | None]:
    """Signal to noise (dB) of each layer's sums, by the name of its node in both graphs, on the first ``IMAGES``; None:
    no noise, or no signal."""
    layers = {node.name: node for node in float_graph.graph.nodes if weighted(node)}
    sums: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}
    left = IMAGES
    for batch in batches:
        for name, exact, value in in_lockstep(float_graph, graph, layers, tuple(one[:left] for one in batch)):
            axis = channel_axis(layers[name], exact)
            others = [dim for dim in range(exact.dim()) if dim != axis]
            own = [part.sum(others).double() for part in (exact, exact.square(), (exact - value).square())]
            sums[name] = [one + more for one, more in zip(sums[name], own, strict=True)] if name in sums else own
            counts[name] = counts.get(name, 0) + exact.numel() // exact.shape[axis]
        left -= len(batch[0])
        if left <= 0:
            break
    found: dict[str, float | None] = {}
    for name, (mean, squares, lost) in sums.items():
        signal = float((squares - mean.square() / counts[name]).clamp_min(0).sum())
        found[name] = 10 * math.log10(signal / float(lost.sum())) if signal > 0 and float(lost.sum()) > 0 else None
    return found


def floats(
    float_graph: fx.GraphModule,
    placement: Placement,
    unassigned: Collection[fx.Node],
    undone: Collection[str],
    noise: Mapping[str, float | None],
) -> dict[str, object]:
    """Facts on what stays in float: layers, [name, why] of each operator in order, and signal to noise (dB) of layers.

    unassigned: layers that their own format leaves in float; undone: names of those that the gate put back.
    """
    reasons: dict[str, str] = {}
    for node, why in placement.floats.items():
        name = names(node)[0]
        if node in unassigned:
            why = "weights=float for this layer"
        elif name in undone:
            why = "gate: faster in float"
        reasons[name if name not in reasons else node.name] = why
    integer = {node.name for node in placement.layers}
    layers = [node for node in float_graph.graph.nodes if weighted(node) and node.name not in integer]
    return {
        "float": sorted(map(layer_name, layers)),
        "reasons": [[name, why] for name, why in reasons.items()],
        "float_sqnr_db": {layer_name(node): noise[node.name] for node in layers if node.name in noise},
    }


def explain(graph: nn.Module) -> dict[str, list[Row]]:
    """Of a quantised graph, also of one that was loaded: ``{"layers": rows, "float": rows}``, in the order of the
    network.

    layers: name; bits, grid of the weights; error, what rounding did to them (noise power / signal power); input, the
    value read, with activation_bits, activation_grid and range (lo, hi); sqnr_db, signal to noise of the layer's sums.
    float: name, why, and sqnr_db of layers. Keys that are not known are None.

    Raises InputError where nothing was quantised.
    """
    record = history.last(graph, "quantize")
    if record is None:
        raise InputError(
            "the model is not quantised: nothing to explain; call quantize first (rarefy quantize --explain does both)"
        )
    facts = record["facts"]
    ranges = facts.get("ranges") or {}
    keys = ("name", "bits", "grid", "error", "input", "activation_bits", "activation_grid", "sqnr_db")
    layers = [
        {**{key: told.get(key) for key in keys}, "range": ranges.get(told.get("input"))} for told in facts["layers"]
    ]
    reasons: dict[str, str | None] = dict(facts.get("reasons") or ())
    reasons |= {name: None for name in facts.get("float") or () if name not in reasons}
    noisy = facts.get("float_sqnr_db") or {}
    return {
        "layers": layers,
        "float": [{"name": name, "why": why, "sqnr_db": noisy.get(name)} for name, why in reasons.items()],
    }
