"""Networks whose weights alone have codes, on CUDA: linear layers of 2 to 4 bits multiply by them as they are packed.

    linear(x, dequantize(codes))   ->   low_bit_linear(x, words, scales)

for scales a channel or for groups of multiples of 128 inputs, and batches of few rows (``low_bit.linear.FEW``), where
reading the weights is what takes the time. Everything else runs in float16, as the rest of the network does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import argument, attribute, finish, set_attribute, share_copy
from rarefy.graph.shapes import shapes
from rarefy.kernels import is_quantised, makes_codes
from rarefy.kernels.low_bit import linear
from rarefy.kernels.low_bit.linear import GROUP

aten = torch.ops.aten


def weights_alone(graph: fx.GraphModule) -> bool:
    """Do weights have codes, and nothing else?"""
    return is_quantised(graph) and not any(makes_codes(node) for node in graph.graph.nodes)


def packed(graph: fx.GraphModule, batch: int, device: torch.device | None = None) -> fx.GraphModule | None:
    """A copy whose layers of few bits read packed weights, for so many samples; None where no layer can.

    device: where weights are packed, and lie; None: where the graph does.
    """
    names = {node.name: rows for node, rows in _layers(graph, batch).items() if rows <= linear.FEW}
    graph, found = share_copy(graph), 0
    for node in list(graph.graph.nodes):
        one = _packed(graph, argument(node, "weight"), device) if node.name in names else None
        if one is None:
            continue
        parts = {"words": one.words, "scales": one.scales, "zeros": one.zeros}
        for key, value in parts.items():
            if value is not None:
                set_attribute(graph, f"{node.name}_{key}", value)
        with graph.graph.inserting_before(node):
            words, scales, zeros = (
                None if value is None else graph.graph.get_attr(f"{node.name}_{key}") for key, value in parts.items()
            )
            given = (argument(node, "input"), words, scales, zeros, argument(node, "bias"), one.bits, one.outputs)
            layer = graph.graph.call_function(linear.LOW_BIT_LINEAR, given)
        layer.meta = dict(node.meta)
        node.replace_all_uses_with(layer)
        graph.graph.erase_node(node)
        found += 1
    return finish(graph) if found else None


def _layers(graph: fx.GraphModule, batch: int) -> dict[fx.Node, int]:
    """Linear layers with decoded weights, and the rows that each multiplies."""
    layers = [
        node
        for node in graph.graph.nodes
        if node.target is aten.linear.default
        and is_decoded(argument(node, "weight"))
        and argument(argument(node, "weight"), "q").op == "get_attr"
    ]
    known = shapes(graph, batch) if layers else {}
    return {node: math.prod(known[argument(node, "input")].shape[:-1]) for node in layers}


def _packed(graph: fx.GraphModule, weight: fx.Node, device: torch.device | None) -> linear.Packed | None:
    """The weights that a ``dequantize`` decodes; None where the kernel has no form of them."""
    source, axis, group = argument(weight, "q"), argument(weight, "axis"), argument(weight, "group") or 0
    codes, bits = attribute(graph, source).to(device), graph.meta.get("bits", {}).get(str(source.target), 8)
    if (
        bits not in linear.BITS
        or codes.shape[1] % 4
        or group % GROUP
        or (axis is not None and axis % 2 != int(group > 0))
    ):
        return None
    least = -(2 ** (bits - 1)) if codes.dtype == torch.int8 else 0
    scales, zeros = (
        _by_group(attribute(graph, argument(weight, name)).to(device), codes, group) for name in ("scale", "zero_point")
    )
    places, zeros = codes.to(torch.int16) - least, zeros.to(torch.int16) - least
    if not all(0 <= int(one.min()) <= int(one.max()) < 2**bits for one in (places, zeros)):
        return None
    middle = bool((zeros == 2 ** (bits - 1)).all())
    found = linear.pack(places, scales, None if middle else zeros, bits)
    return found if found.scales.dtype == torch.float16 else None  # others are too small for the network's float16


def _by_group(values: Tensor, codes: Tensor, group: int) -> Tensor:
    """One for each 128 inputs of a row: of one for all, of one a row, or of one for ``group`` inputs."""
    outputs, inputs = codes.shape
    groups = -(-inputs // GROUP)
    if not group or not values.dim():
        return values.reshape(-1, 1).expand(outputs, groups)
    return values.expand(outputs, -1).repeat_interleave(group // GROUP, 1)[:, :groups]
