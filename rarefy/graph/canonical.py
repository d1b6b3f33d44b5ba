from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from rarefy.graph.layers import padding_of
from rarefy.graph.nodes import finish, share_copy
from rarefy.graph.shapes import shapes

aten = torch.ops.aten


def simplify(graph: fx.GraphModule, keep: frozenset[Any] = frozenset()) -> fx.GraphModule:
    """A copy that shares its tensors, in which what can be written in several ways is written in one, but for the operators in ``keep``."""
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


def _mean(graph: fx.Graph, node: fx.Node, found: dict[fx.Node, Any]) -> fx.Node | None:
    source = node.args[0]
    axes: Any = node.args[1] if len(node.args) > 1 else None
    assert isinstance(source, fx.Node)
    if len(found[source].shape) != 4 or axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
        return None
    pooled = graph.call_function(aten.adaptive_avg_pool2d.default, (source, [1, 1]))
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return pooled if keep else graph.call_function(aten.flatten.using_ints, (pooled, 1))


def _pool(graph: fx.Graph, node: fx.Node, found: dict[fx.Node, Any]) -> Any:
    source, size = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    sizes = [int(value) for value in size] if isinstance(size, (list, tuple)) else [int(size)] * 2  # type: ignore[arg-type, union-attr]
    plane = list(found[source].shape[-2:])
    if plane == sizes:
        return source
    if sizes != [1, 1] and all(side % wanted == 0 for side, wanted in zip(plane, sizes, strict=True)):
        kernel = [side // wanted for side, wanted in zip(plane, sizes, strict=True)]
        return graph.call_function(aten.avg_pool2d.default, (source, kernel, kernel))
    return None


def _gated(gate: Any) -> Any:
    def rule(graph: fx.Graph, node: fx.Node, found: dict[fx.Node, Any]) -> fx.Node:
        opened = graph.call_function(gate, (node.args[0],))
        product = graph.call_function(aten.mul.Tensor, (node.args[0], opened))
        opened.meta, product.meta = dict(node.meta), dict(node.meta)
        return product

    return rule


def _attention(graph: fx.Graph, node: fx.Node, found: dict[fx.Node, Any]) -> fx.Node | None:
    """softmax((q scale) k' + mask) v, where it is no more than that."""
    query, key, value = node.args[:3]
    mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    others = (
        *node.args[4:6],
        node.kwargs.get("dropout_p"),
        node.kwargs.get("is_causal"),
        node.kwargs.get("enable_gqa"),
    )
    if any(others) or (mask is not None and found[mask].dtype == torch.bool):
        return None
    scale: Any = node.kwargs.get("scale")
    made = [
        graph.call_function(aten.mul.Tensor, (query, 1 / math.sqrt(found[query].shape[-1]) if scale is None else scale))
    ]  # type: ignore[index]
    made.append(graph.call_function(aten.transpose.int, (key, -2, -1)))
    made.append(graph.call_function(aten.matmul.default, tuple(made)))
    if mask is not None:
        made.append(graph.call_function(aten.add.Tensor, (made[-1], mask)))
    made.append(graph.call_function(aten.softmax.int, (made[-1], -1)))
    made.append(graph.call_function(aten.matmul.default, (made[-1], value)))
    for one in made:
        one.meta = dict(node.meta)
    return made[-1]


def _padded(graph: fx.Graph, node: fx.Node, found: dict[fx.Node, Any]) -> None:
    """A convolution of what has zeros around it puts them there itself, unless there are fewer on one side. In place, so that it keeps its name."""
    around: Any = node.args[0]
    if not isinstance(around, fx.Node) or around.target is not aten.pad.default or padding_of(around) != 0:
        return
    sizes: Any = around.args[1]
    before, after = sizes[::2][::-1], sizes[1::2][::-1]  # the last axis comes first
    spatial = found[node].dim() - 2
    if before != after or len(before) > spatial or min(before) < 0:
        return
    arguments: list[Any] = [*node.args[1:], *[None, [1], [0]][len(node.args) - 2 :]]
    weight, bias, stride, padding, *others = arguments
    before = [0] * (spatial - len(before)) + before
    own = list(padding) * (spatial // len(padding))
    node.args = (
        around.args[0],
        weight,
        bias,
        stride,
        [one + more for one, more in zip(own, before, strict=True)],
        *others,
    )


_SIMPLER = {
    aten.scaled_dot_product_attention.default: _attention,
    aten.mean.dim: _mean,
    aten.adaptive_avg_pool2d.default: _pool,
    aten.hardswish.default: _gated(aten.hardsigmoid.default),
    aten.silu.default: _gated(aten.sigmoid.default),
    aten.conv2d.default: _padded,
    aten.conv1d.default: _padded,
}
