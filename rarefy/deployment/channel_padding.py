"""Channels padded to the width of a runtime's tile: zero filters beside a layer's own, and zero weights that read them.

A kernel that computes 16 output channels at once takes as long for 9 of them, or longer. What its channels go through
up to the convolutions that mix them is widened with them, so that the answers stay the same.
"""

from __future__ import annotations

import collections
import dataclasses

import torch
from torch import Tensor, fx

from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import Value, argument, attribute, set_argument, set_attribute, share_copy
from rarefy.graph.shapes import shapes

aten = torch.ops.aten
TILE = 16  # output channels of an integer convolution that are computed together
GRID = ("q", "scale", "zero_point")

# Operators on which channels stay apart, and zeros finite.
_APART = {
    torch.ops.rarefy.quantize.default, torch.ops.rarefy.dequantize.default, aten.add.Tensor, aten.mul.Tensor,
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.hardsigmoid.default,
    aten.sigmoid.default, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.max_pool2d.default,
}  # fmt: skip


def pad_channels(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy, which shares its tensors and answers as ``graph`` does, with channels for whole tiles.

    Zero filters are added where an integer convolution is narrower than the tile, or a depthwise one no multiple of it.
    """
    padded = share_copy(graph).eval()
    known = shapes(padded)
    readers = collections.Counter(
        str(node.target) for node in padded.graph.nodes if node.op == "get_attr" for _ in node.users
    )
    visited: set[fx.Node] = set()
    for node in list(padded.graph.nodes):
        if node in visited or not _is_integer_convolution(node):
            continue
        stream = _channels_of(node, known)
        if stream is None:
            continue
        visited.update(stream.makers)
        channels = known[node].shape[1]
        by = -channels % TILE if stream.depthwise or (channels < TILE and not stream.joined) else 0
        parameters = [argument(maker, name) for maker in stream.makers for name in ("weight", "bias")]
        grids = [[argument(parameter, name) for name in GRID] for parameter in parameters]
        mixed = [argument(argument(reader, "weight"), "q") for reader in stream.readers]
        if not by or any(
            readers[str(part.target)] > 1 for part in (*(part for grid in grids for part in grid), *mixed)
        ):
            continue
        for codes, scale, zero in grids:
            _grow(padded, codes, 0, by)
            _grow(padded, scale, 0, by, like_first=True)  # a bias's scale must stay that of the products
            _grow(padded, zero, 0, by)
        for maker in stream.depthwise:
            set_argument(maker, "groups", channels + by)
        for source in mixed:
            _grow(padded, source, 1, by)
    return padded


@dataclasses.dataclass
class Channels:
    """Integer convolutions that make channels and keep them apart from each other.

    makers: all of them. depthwise: those among them. readers: convolutions that mix the channels. joined: values meet
    on the way.
    """

    makers: list[fx.Node] = dataclasses.field(default_factory=list)
    depthwise: list[fx.Node] = dataclasses.field(default_factory=list)
    readers: list[fx.Node] = dataclasses.field(default_factory=list)
    joined: bool = False


def _channels_of(first: fx.Node, known: dict[fx.Node, Value]) -> Channels | None:
    """What the channels of ``first``, an integer convolution, go through.

    None where something else makes, reads or moves them.
    """
    count = known[first].shape[1]
    stream, seen, waiting = Channels(), set[fx.Node](), [first]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        image = known.get(value)  # of the graph's output there is none
        if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[1] != count:
            return None
        if value.target is aten.conv2d.default:
            groups = argument(value, "groups") if _is_integer_convolution(value) else 0
            if groups not in (1, count):
                return None
            stream.makers.append(value)
            if groups > 1:
                stream.depthwise.append(value)
                waiting.append(argument(value, "input"))
        elif value.op == "call_function" and value.target in _APART and not value.kwargs:
            # others are one number for all channels
            sources = [source for source in value.all_input_nodes if known[source].dim()]
            stream.joined |= len(sources) > 1
            waiting += sources
        else:
            return None
        for user in value.users:
            if user.target is not aten.conv2d.default:
                waiting.append(user)
            elif not _is_integer_convolution(user) or argument(user, "input") is not value:
                return None
            elif argument(user, "groups") == 1:
                stream.readers.append(user)
            else:
                waiting.append(user)
    return stream


def _is_integer_convolution(node: fx.Node) -> bool:
    return node.target is aten.conv2d.default and all(
        is_decoded(argument(node, name)) for name in ("input", "weight", "bias")
    )


def _grow(graph: fx.GraphModule, source: fx.Node, axis: int, by: int, like_first: bool = False) -> None:
    """Append ``by`` positions along ``axis``: zeros, or copies of the first."""
    tensor = attribute(graph, source)
    first = tensor.narrow(axis, 0, 1).expand([by if dim == axis else size for dim, size in enumerate(tensor.shape)])
    added = first if like_first else torch.zeros_like(first)
    set_attribute(graph, str(source.target), torch.cat([tensor, added], axis))
