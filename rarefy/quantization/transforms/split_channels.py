"""double(): dead channels carry those whose rounding costs most a second time, a part of a step apart.

Training with weight decay leaves channels whose weights have gone to nothing and which a ReLU keeps at zero (4 to 7 of
32 in the stems of EfficientNet-Lite). A value's grid has one step for all channels, and one channel that a depthwise
layer weighs heavily, such as an edge detector on an offset, can make half of all the noise there. For

    x = clip(M(.)),   y = clip(D(x)) with D depthwise,   R(y) with R 1 x 1,   and no other readers,

channel c is put into k - 1 dead ones too, its k copies at offsets o_j = (j - (k - 1) / 2) step / k:

    M_j = M_c + o_j      D_j(x) = D_c(x - o_j)      R_j = R_c / k

In float that is what it was wherever neither clip bends it within a step. Rounded, the mean of k codes is one on a grid
of k times the levels: step^2 / 12 becomes step^2 / (12 k^2), at no cost in time or size. It is done where the noise
that R sums up falls by ``LEAST`` of itself a copy. Splitting channels is 1901.09504's, which widens the layers for it.

A channel is dead if its weights alone keep it below half a step of 8 bits, for inputs up to ``MARGIN`` times as large
as any seen. What it did behind D, a constant, goes to R's bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx

from rarefy.graph.im2col import groups_of
from rarefy.graph.layers import padding_of, weighted
from rarefy.graph.nodes import argument, attribute
from rarefy.quantization.formats import Grid
from rarefy.quantization.placement import clip_bounds
from rarefy.quantization.transforms.equalize import owns, sizes, weight_of

aten = torch.ops.aten

LEAST = 0.08  # of the noise
MARGIN = 2.0
DEAD = 1 / 510  # of the largest value: half a step of 8 bits
_CLIPS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default}


class Place(NamedTuple):
    """maker -> a clip: value -> (zeros around it) -> depthwise -> a clip: bent -> reader."""

    maker: fx.Node
    value: fx.Node
    depthwise: fx.Node
    bent: fx.Node
    reader: fx.Node


def double(
    graph: fx.GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    rounded: Mapping[fx.Node, Grid],
    layers: Mapping[fx.Node, Grid],
) -> int:
    """Double channels of ``graph`` (folded, for inference; layers with weights and biases of their own) in place;
    returns how many dead ones carry another.

    batches: inputs that tell how large channels get. rounded: values that will be, and the grid; layers: those whose
    weights will be.
    """
    found = [
        place
        for place in places(graph)
        if place.value in rounded and {place.maker, place.depthwise, place.reader} <= layers.keys()
    ]
    if not found:
        return 0
    values = {node for place in found for node in (place.maker.all_input_nodes[0], place.value)}
    seen = sizes(graph, dict.fromkeys(values, 1), batches)
    doubled = 0
    for place in found:
        largest = float(seen[place.value].hi.max())
        before = seen[place.maker.all_input_nodes[0]]
        dead = _dead(graph, place.maker, MARGIN * torch.maximum(before.hi, -before.lo), DEAD * largest)
        copies = _chosen(_noise(graph, place), dead)
        if copies:
            _put(graph, place, copies, largest / rounded[place.value].levels)
        doubled += sum(len(others) for others in copies.values())
    return doubled


def places(graph: fx.GraphModule) -> list[Place]:
    """Where it can be done, in order."""
    found = []
    for maker in filter(weighted, graph.graph.nodes):
        value, depthwise = _clipped(maker)
        bent, reader = _clipped(depthwise) if depthwise is not None else (None, None)
        if value is None or depthwise is None or bent is None or reader is None or bent not in reader.args:
            continue
        place = Place(maker, value, depthwise, bent, reader)
        if (
            all(_is_whole(graph, layer) for layer in (maker, depthwise, reader))
            and [groups_of(maker), groups_of(reader), weight_of(graph, reader)[0, 0].numel()] == [1, 1, 1]
            and weight_of(graph, depthwise).shape[:2] == (groups_of(depthwise), 1)
        ):
            found.append(place)
    return found


def _clipped(layer: fx.Node) -> tuple[fx.Node, fx.Node] | tuple[None, None]:
    """The clip at zero behind a layer, and the layer that is all that reads it; zeros may be put around it between."""
    clip = _reader(layer)
    if clip is None or clip.target not in _CLIPS or clip_bounds(clip)[0] != 0:
        return None, None
    after = _reader(clip)
    while after is not None and after.target is aten.pad.default and padding_of(after) == 0:
        after = _reader(after)
    return (clip, after) if after is not None and weighted(after) else (None, None)


def _reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_whole(graph: fx.GraphModule, layer: fx.Node) -> bool:
    """A convolution with a weight and a bias of its own?"""
    is_convolution = layer.target is aten.conv2d.default
    return is_convolution and argument(layer, "bias") is not None and owns(graph, layer)


def _dead(graph: fx.GraphModule, maker: fx.Node, largest: Tensor, most: float) -> Tensor:
    """Indices of channels of ``maker`` that stay below ``most``.

    largest: (channels of what it reads,), of their absolute values.
    """
    offset = attribute(graph, argument(maker, "bias")).detach().double()
    reach = (weight_of(graph, maker).double().abs().flatten(2).sum(2) * largest).sum(1) + offset
    dead: Tensor = (reach < most).nonzero().flatten()
    return dead


def _noise(graph: fx.GraphModule, place: Place) -> Tensor:
    """(channels,) what rounding a channel comes to in all that the reader sums up, in steps^2 / 12."""
    deep, read = weight_of(graph, place.depthwise).double(), weight_of(graph, place.reader).double()
    return deep.square().flatten(1).sum(1) * read.square().sum((0, 2, 3))


def _chosen(noise: Tensor, dead: Tensor) -> dict[int, list[int]]:
    """Channel -> the dead ones that carry it too: each goes where it takes most away."""
    noise, copies = noise.clone(), torch.ones_like(noise)
    noise[dead] = 0
    found: dict[int, list[int]] = {}
    for one in dead.tolist():
        gain = noise / copies.square() - noise / (copies + 1).square()
        channel = int(gain.argmax())
        if not float(gain[channel]) > LEAST * float((noise / copies.square()).sum()):
            break
        copies[channel] += 1
        found.setdefault(channel, []).append(one)
    return found


def _put(graph: fx.GraphModule, place: Place, copies: Mapping[int, list[int]], step: float) -> None:
    made, offset, deep, mean, read, total = (
        attribute(graph, argument(layer, name))
        for layer in (place.maker, place.depthwise, place.reader)
        for name in ("weight", "bias")
    )
    lo, hi = clip_bounds(place.bent)
    with torch.no_grad():
        for channel, others in copies.items():
            total.add_((read[:, others, 0, 0] * mean[others].clamp(lo, hi)).sum(1))
            all_of_it = torch.tensor([channel, *others], device=made.device)
            shift = (torch.arange(len(all_of_it), device=made.device) - (len(all_of_it) - 1) / 2) * (
                step / len(all_of_it)
            )
            made[all_of_it], deep[all_of_it] = made[channel].clone(), deep[channel].clone()
            offset[all_of_it] = offset[channel] + shift
            mean[all_of_it] = mean[channel] - shift * deep[channel].sum()
            read[:, all_of_it] = read[:, [channel]] / len(all_of_it)
