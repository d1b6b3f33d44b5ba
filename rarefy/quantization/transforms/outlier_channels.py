"""relieve(): channels of a value that layers read are brought to one range by a product in front of its rounding.

Where the runtime computes a value on numbers before it is rounded (GELU or a norm between linear layers, attention's
result), a channel many times as large as the rest costs the rest its resolution, and nothing in front takes a factor.
SmoothQuant (2211.10438) puts it into a norm; behind any other operator it is a product:

    y = W x    ->    y = (W s) (x / s)

for the price of one multiplication a number. The factor is ``equalize``'s, by its estimate of the noise of the rounded
value and of the weights, made on some images and judged on others. A norm's own weight takes it for nothing where only
these layers read the norm; elsewhere a product is written where it wins at least ``WORTH`` of the noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from rarefy.graph.layers import weighted
from rarefy.graph.nodes import set_attribute
from rarefy.graph.shapes import shapes
from rarefy.quantization.formats import Grid
from rarefy.quantization.observers import channel_axis
from rarefy.quantization.placement import Placement
from rarefy.quantization.transforms import equalize
from rarefy.quantization.transforms.channel_scales import PREFIX
from rarefy.quantization.transforms.smoothquant import is_smoothable, stored_in

aten = torch.ops.aten
WORTH = 0.5  # share of a layer's noise that a product has to win


def relieve(
    graph: fx.GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    placement: Placement,
    rounded: Mapping[fx.Node, Grid],
    layers: Mapping[fx.Node, Grid],
    held_out: Iterable[tuple[Tensor, ...]] = (),
) -> int:
    """Change ``graph`` (folded, for inference) in place; returns how many values were relieved.

    batches: inputs that tell how large channels get. placement, rounded, layers: what will be rounded, on which grids.
    held_out: inputs that judge what the others say; none: the same.
    """
    found = _streams(graph, placement, rounded, layers)
    axes = {node: stream.axis for stream, _ in found for node in (*stream.values, *stream.readers)}
    seen = equalize.sizes(graph, axes, batches) if found else {}
    judging = (equalize.sizes(graph, axes, held_out) if found else {}) or seen
    count = 0
    for stream, grid in found:
        (value,) = stream.values
        free = is_smoothable(graph, value) and list(value.users) == stream.readers
        least = equalize.LEAST if free else WORTH
        factor = equalize.best_factor(graph, stream, seen, judging, {value: grid}, layers, least)
        if factor is None:
            continue
        if free:
            equalize.divide(graph, stored_in(value), factor)
        else:
            _put_product(graph, stream, factor)
        equalize.multiply(graph, stream.readers, factor)
        count += 1
    return count


def _streams(
    graph: fx.GraphModule, placement: Placement, rounded: Mapping[fx.Node, Grid], layers: Mapping[fx.Node, Grid]
) -> list[tuple[equalize.Stream, Grid]]:
    """Values that layers read and that are numbers before they are rounded, and the grid of each."""
    known, found = shapes(graph), []
    for value in graph.graph.nodes:
        if value.op != "call_function" or value in placement.integer or value in placement.fused:
            continue
        source = placement.carried.get(value, value)
        if source not in rounded or source in placement.integer or source in placement.fused:
            continue
        readers = [user for user in value.users if user in layers and user.all_input_nodes[0] is value]
        if not readers or not all(weighted(one) and equalize.owns(graph, one) for one in readers):
            continue
        axis = {channel_axis(one, known[one]) for one in readers}
        channels = {equalize.channels_of(graph, one) for one in readers}
        if len(axis) == 1 and channels == {known[value].shape[next(iter(axis))]}:
            found.append((equalize.Stream([value], [], readers, axis.pop()), rounded[source]))
    return found


def _put_product(graph: fx.GraphModule, stream: equalize.Stream, factor: Tensor) -> None:
    """x / s, for the readers alone."""
    (value,) = stream.values
    behind = shapes(graph)[value].dim() - 1 - stream.axis
    name = f"{PREFIX}{value.name}.relief"
    like = equalize.weight_of(graph, stream.readers[0])
    set_attribute(graph, name, (1 / factor).to(like).view(-1, *[1] * behind))
    with graph.graph.inserting_before(min(stream.readers, key=list(graph.graph.nodes).index)):
        vector = graph.graph.get_attr(name)
        product = graph.graph.call_function(aten.mul.Tensor, (value, vector))
    product.meta["stack"] = value.meta.get("stack", "")
    for reader in stream.readers:
        reader.replace_input_with(value, product)
