"""simplify(): one form for what can be written in several, so that the tables of operators stay short.

The mean over the plane is average pooling; hardswish is x hardsigmoid(x), silu is x sigmoid(x); attention is its two
products and a softmax; as many zeros on either side are the padding of the convolution that reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import fx

from rarefy.graph.layers import padding_of
from rarefy.graph.nodes import Value, argument, arguments, finish, share_copy
from rarefy.graph.shapes import shapes

aten = torch.ops.aten
Shapes = Mapping[fx.Node, Value]


def simplify(graph: fx.GraphModule, keep: frozenset[object] = frozenset()) -> fx.GraphModule:
    """A copy that shares its tensors, each operator in its one form, but for the operators in ``keep``."""
    graph = share_copy(graph)
    found = shapes(graph)
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.view.default:
            node.target = aten.reshape.default  # the same, however its source lies in memory
        with graph.graph.inserting_before(node):
            rule = None if node.target in keep else _SIMPLER.get(node.target)
            simpler = rule(graph.graph, node, found) if rule else None
        if simpler is not None:
            node.replace_all_uses_with(simpler)
            found[simpler] = found[node]
    return finish(graph)


def _mean(graph: fx.Graph, node: fx.Node, found: Shapes) -> fx.Node | None:
    source, axes, keep, _ = arguments(node).values()
    if len(found[source].shape) != 4 or axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
        return None
    pooled = graph.call_function(aten.adaptive_avg_pool2d.default, (source, [1, 1]))
    return pooled if keep else graph.call_function(aten.flatten.using_ints, (pooled, 1))


def _pool(graph: fx.Graph, node: fx.Node, found: Shapes) -> fx.Node | None:
    source: fx.Node = argument(node, "self")
    size = argument(node, "output_size")
    sizes = [int(value) for value in size] if isinstance(size, (list, tuple)) else [int(size)] * 2
    plane = list(found[source].shape[-2:])
    if plane == sizes:
        return source
    if sizes != [1, 1] and all(side % wanted == 0 for side, wanted in zip(plane, sizes, strict=True)):
        kernel = [side // wanted for side, wanted in zip(plane, sizes, strict=True)]
        return graph.call_function(aten.avg_pool2d.default, (source, kernel, kernel))
    return None


def _gated(gate: Callable[..., Value]) -> Callable[[fx.Graph, fx.Node, Shapes], fx.Node]:
    def rule(graph: fx.Graph, node: fx.Node, found: Shapes) -> fx.Node:
        opened = graph.call_function(gate, (node.args[0],))
        product = graph.call_function(aten.mul.Tensor, (node.args[0], opened))
        opened.meta, product.meta = dict(node.meta), dict(node.meta)
        return product

    return rule


def _attention(graph: fx.Graph, node: fx.Node, found: Shapes) -> fx.Node | None:
    """softmax((q scale) k' + mask) v, where it is no more than that."""
    query, key, value, mask, *others, scale, grouped = arguments(node).values()
    if any(others) or grouped or (mask is not None and found[mask].dtype == torch.bool):
        return None
    scale = 1 / math.sqrt(found[query].shape[-1]) if scale is None else scale
    scaled = graph.call_function(aten.mul.Tensor, (query, scale))
    turned = graph.call_function(aten.transpose.int, (key, -2, -1))
    nodes = [scaled, turned, graph.call_function(aten.matmul.default, (scaled, turned))]
    if mask is not None:
        nodes.append(graph.call_function(aten.add.Tensor, (nodes[-1], mask)))
    nodes.append(graph.call_function(aten.softmax.int, (nodes[-1], -1)))
    nodes.append(graph.call_function(aten.matmul.default, (nodes[-1], value)))
    for one in nodes:
        one.meta = dict(node.meta)
    return nodes[-1]


def _padded(graph: fx.Graph, node: fx.Node, found: Shapes) -> None:
    """A convolution of what has zeros around it puts them there itself, unless there are fewer on one side.

    In place, so that it keeps its name.
    """
    around = node.args[0]
    if not isinstance(around, fx.Node) or around.target is not aten.pad.default or padding_of(around) != 0:
        return
    sizes = argument(around, "pad")
    before, after = sizes[::2][::-1], sizes[1::2][::-1]  # the last axis comes first
    spatial = found[node].dim() - 2
    if before != after or len(before) > spatial or min(before) < 0:
        return
    before = [0] * (spatial - len(before)) + before
    given: list[Value] = [*node.args[1:], *[None, [1], [0]][len(node.args) - 2 :]]
    weight, bias, stride, padding, *others = given
    padding = [one + more for one, more in zip(list(padding) * (spatial // len(padding)), before, strict=True)]
    node.args = (around.args[0], weight, bias, stride, padding, *others)


_SIMPLER = {
    aten.scaled_dot_product_attention.default: _attention,
    aten.mean.dim: _mean,
    aten.adaptive_avg_pool2d.default: _pool,
    aten.hardswish.default: _gated(aten.hardsigmoid.default),
    aten.silu.default: _gated(aten.sigmoid.default),
    aten.conv2d.default: _padded,
    aten.conv1d.default: _padded,
}
