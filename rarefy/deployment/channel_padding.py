from __future__ import annotations

import collections
import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import attribute, set_attribute, share_copy
from rarefy.graph.shapes import shapes

aten = torch.ops.aten
TILE = 16  # output channels of an integer convolution that are computed together

# Operators on which channels stay apart, and zeros finite.
_APART = {
    torch.ops.rarefy.quantize.default, torch.ops.rarefy.dequantize.default, aten.add.Tensor, aten.mul.Tensor, aten.relu.default, aten.relu6.default, aten.hardtanh.default,
    aten.clamp.default, aten.hardsigmoid.default, aten.sigmoid.default, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.max_pool2d.default,
}  # fmt: skip

# Nodes of an optimised file that compute with integers, or only move or convert values.
_MOVING = {
    "QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Concat", "Slice", "Split", "Gather", "MaxPool",
    "Shape", "Flatten", "Identity", "Cast", "Pad", "ReorderInput", "ReorderOutput", "Expand", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip


def _widened(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy, which shares its tensors, with zero filters where a layer is narrower than the tile or a depthwise one no multiple of it; answers as ``graph`` does."""
    wide = share_copy(graph).eval()
    known = shapes(wide)
    readers = collections.Counter(
        str(node.target) for node in wide.graph.nodes if node.op == "get_attr" for _ in node.users
    )
    taken: set[fx.Node] = set()
    for node in list(wide.graph.nodes):
        if node in taken or not _is_integer_convolution(node):
            continue
        stream = _channels_of(wide, node, known)
        if stream is None:
            continue
        taken.update(stream.makers)
        channels = known[node].shape[1]
        by = -channels % TILE if stream.depthwise or (channels < TILE and not stream.joined) else 0
        grown = [part for maker in stream.makers for parameter in maker.args[1:3] for part in parameter.args[:3]]  # type: ignore[union-attr]
        mixed = [reader.args[1].args[0] for reader in stream.readers]  # type: ignore[union-attr]
        if not by or any(readers[str(part.target)] > 1 for part in (*grown, *mixed)):
            continue
        for maker in stream.makers:
            for parameter in maker.args[1:3]:
                codes, scale, zero = parameter.args[:3]  # type: ignore[union-attr]
                _grow(wide, codes, 0, by)
                _grow(wide, scale, 0, by, like_first=True)  # a bias's scale must stay that of the products
                _grow(wide, zero, 0, by)
            if maker in stream.depthwise:
                maker.args = (*maker.args[:6], channels + by)
        for source in mixed:
            _grow(wide, source, 1, by)
    return wide


@dataclasses.dataclass
class _Channels:
    """Integer convolutions that make channels and keep them apart from each other: makers, the depthwise ones among them, and those that read and mix them.
    joined: whether values meet on the way."""

    makers: list[fx.Node] = dataclasses.field(default_factory=list)
    depthwise: list[fx.Node] = dataclasses.field(default_factory=list)
    readers: list[fx.Node] = dataclasses.field(default_factory=list)
    joined: bool = False


def _channels_of(graph: fx.GraphModule, first: fx.Node, known: dict[fx.Node, Any]) -> _Channels | None:
    """What the channels of ``first``, an integer convolution, go through; None where something else makes, reads or moves them."""
    count = known[first].shape[1]
    found, seen, waiting = _Channels(), set[fx.Node](), [first]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if not isinstance(known[value], Tensor) or known[value].dim() != 4 or known[value].shape[1] != count:
            return None
        if value.target is aten.conv2d.default:
            groups = _groups(value) if _is_integer_convolution(value) else 0
            if groups not in (1, count):
                return None
            found.makers.append(value)
            if groups > 1:
                found.depthwise.append(value)
                waiting.append(value.args[0])  # type: ignore[arg-type]
        elif value.op == "call_function" and value.target in _APART and not value.kwargs:
            sources = [
                source for source in value.all_input_nodes if known[source].dim()
            ]  # others are one number for all channels
            found.joined |= len(sources) > 1
            waiting += sources
        else:
            return None
        for user in value.users:
            if user.target is not aten.conv2d.default:
                waiting.append(user)
            elif not _is_integer_convolution(user) or user.args[0] is not value:
                return None
            elif _groups(user) == 1:
                found.readers.append(user)
            else:
                waiting.append(user)
    return found


def _groups(node: fx.Node) -> int:
    return int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[call-overload, no-any-return]


def _is_integer_convolution(node: fx.Node) -> bool:
    return node.target is aten.conv2d.default and len(node.args) >= 3 and all(map(is_decoded, node.args[:3]))


def _grow(graph: fx.GraphModule, source: fx.Node, axis: int, by: int, like_first: bool = False) -> None:
    """Append ``by`` positions along ``axis``: zeros, or copies of the first."""
    tensor = attribute(graph, source)
    first = tensor.narrow(axis, 0, 1).expand([by if dim == axis else size for dim, size in enumerate(tensor.shape)])
    set_attribute(
        graph, str(source.target), torch.cat([tensor, first if like_first else torch.zeros_like(first)], axis)
    )


def _is_integer(node: Any) -> bool:
    return node.op_type.startswith(("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QMoE", "QAttention"))
