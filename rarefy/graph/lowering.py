"""The two forms of a quantised layer, and the passes between them; both give the same answers but for float rounding.

numbers   quantize(conv2d(dequantize(x), dequantize(w), dequantize(b)))     what ONNX writes, and runtimes fuse
integers  rarefy.conv2d_codes(x, w, b, scales)                              what they then compute; the form a graph is kept in

A layer whose sums are not rounded, or are read before they are, is ``rarefy.conv2d`` in the second form, which yields numbers. Sums and products of two
decoded tensors that are rounded (``quantize(dequantize(a) + dequantize(b))``) are one operator on codes likewise, and so is the matrix product of two,
whose sums are numbers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from rarefy.graph.nodes import attribute, finish, set_attribute

aten = torch.ops.aten
OPERATORS = torch.ops.rarefy

_CONVOLUTION_DEFAULTS: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], 1)


def is_decoded(node: Any) -> bool:
    """Does ``node`` turn codes into numbers?"""
    return isinstance(node, fx.Node) and node.target is OPERATORS.dequantize.default


def to_integers(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy whose layers and joins on codes are integer operators."""
    graph = copy.deepcopy(graph)
    _join_codes(graph)
    for node in list(graph.graph.nodes):
        if (
            node.target not in (aten.conv2d.default, aten.linear.default)
            or len(node.args) < 3
            or not all(map(is_decoded, node.args[1:3]))
        ):
            continue
        entry = node.args[0]
        padded = isinstance(entry, fx.Node) and entry.target is aten.pad.default and is_decoded(entry.args[0])
        source = entry.args[0] if padded else entry
        if not is_decoded(source):
            continue
        (weight, weight_scale, *_), (bias, *_) = node.args[1].args, node.args[2].args
        codes, scale, zero, _ = source.args
        with graph.graph.inserting_before(node):
            if padded:
                codes = graph.graph.call_function(
                    aten.pad.default, (codes, entry.args[1], "constant", int(attribute(graph, zero)))
                )
            arguments = (codes, weight, bias, scale, zero, weight_scale)
            if node.target is aten.conv2d.default:
                options = tuple(
                    _pair(value) for value in (*node.args[3:], *_CONVOLUTION_DEFAULTS[len(node.args[3:]) :])
                )
                layer = graph.graph.call_function(OPERATORS.conv2d.default, (*arguments, *options))
            else:
                layer = graph.graph.call_function(OPERATORS.linear.default, arguments)
        layer.meta = dict(node.meta)
        node.replace_all_uses_with(layer)
    _product_codes(graph)
    _round_layers(graph)
    return finish(graph)


def to_numbers(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy whose integer layers and joins are float ones of decoded numbers."""
    graph = copy.deepcopy(graph)
    _join_numbers(graph)
    _unround_layers(graph)
    _product_numbers(graph)
    for node in list(graph.graph.nodes):
        if node.target not in (OPERATORS.conv2d.default, OPERATORS.linear.default):
            continue
        codes, weight, bias, scale, zero, weight_scale = node.args[:6]
        set_attribute(graph, f"{bias.target}_scale", attribute(graph, scale) * attribute(graph, weight_scale))
        with graph.graph.inserting_before(node):
            around = codes.target is aten.pad.default and all(
                user.target is OPERATORS.conv2d.default for user in codes.users
            )
            number = graph.graph.call_function(
                OPERATORS.dequantize.default, (codes.args[0] if around else codes, scale, zero, None)
            )
            if around:
                number = graph.graph.call_function(aten.pad.default, (number, codes.args[1]))
            parts = []
            for source, step in ((weight, weight_scale), (bias, graph.graph.get_attr(f"{bias.target}_scale"))):
                set_attribute(
                    graph,
                    f"{source.target}_zero_point",
                    torch.zeros_like(attribute(graph, step), dtype=attribute(graph, source).dtype),
                )
                zeros = graph.graph.get_attr(f"{source.target}_zero_point")
                parts.append(graph.graph.call_function(OPERATORS.dequantize.default, (source, step, zeros, 0)))
            target = aten.conv2d.default if node.target is OPERATORS.conv2d.default else aten.linear.default
            layer = graph.graph.call_function(target, (number, *parts, *node.args[6:]))
        layer.meta = dict(node.meta)
        node.replace_all_uses_with(layer)
    return finish(graph)


_CODED = {
    OPERATORS.conv2d.default: OPERATORS.conv2d_codes.default,
    OPERATORS.linear.default: OPERATORS.linear_codes.default,
}
LAYERS = frozenset((*_CODED, *_CODED.values()))  # layers in integers


def _round_layers(graph: fx.GraphModule) -> None:
    """quantize(rarefy.conv2d(...)) -> rarefy.conv2d_codes(...), where nothing else reads the sums."""
    for node in list(graph.graph.nodes):
        if node.target is not OPERATORS.quantize.default or node.args[3] is not None:
            continue
        layer = node.args[0]
        if layer.target not in _CODED or len(layer.users) != 1 or attribute(graph, node.args[1]).dim():
            continue
        with graph.graph.inserting_before(node):
            rounded = graph.graph.call_function(_CODED[layer.target], (*layer.args, *node.args[1:3], *node.args[4:7]))
        rounded.meta = dict(layer.meta)
        node.replace_all_uses_with(rounded)
        graph.graph.erase_node(node)


def _unround_layers(graph: fx.GraphModule) -> None:
    sums = {codes: numbers for numbers, codes in _CODED.items()}
    for node in list(graph.graph.nodes):
        if node.target not in sums:
            continue
        *read, scale, zero, qmin, qmax, dtype = node.args
        with graph.graph.inserting_before(node):
            layer = graph.graph.call_function(sums[node.target], tuple(read))
            codes = graph.graph.call_function(OPERATORS.quantize.default, (layer, scale, zero, None, qmin, qmax, dtype))
        layer.meta, codes.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(codes)
        graph.graph.erase_node(node)


_JOINS = {
    aten.add.Tensor: OPERATORS.add.default,
    aten.mul.Tensor: OPERATORS.mul.default,
    aten.adaptive_avg_pool2d.default: OPERATORS.mean.default,
    aten.avg_pool2d.default: OPERATORS.avg_pool2d.default,
}
_GRID = 5  # last arguments of what makes codes: scale, zero_point, qmin, qmax, dtype


def _join_codes(graph: fx.GraphModule) -> None:
    """quantize(dequantize(a) + dequantize(b)) -> rarefy.add(a, b), for one scale a tensor."""
    for node in list(graph.graph.nodes):
        if node.target is not OPERATORS.quantize.default or node.args[3] is not None:
            continue
        join = node.args[0]
        if join.target not in _JOINS or len(join.users) != 1 or join.kwargs or (options := _options(join)) is None:
            continue
        read = [source for source in join.args if isinstance(source, fx.Node)]
        if not all(map(is_decoded, read)) or any(attribute(graph, source.args[1]).dim() for source in read):
            continue
        parts = [part for source in read for part in source.args[:3]]
        with graph.graph.inserting_before(node):
            joined = graph.graph.call_function(_JOINS[join.target], (*parts, *options, *node.args[1:3], *node.args[4:]))
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)


def _options(join: fx.Node) -> tuple[Any, ...] | None:
    """What the operator on codes reads beside codes and grids; None where it has no such form."""
    if join.target is aten.adaptive_avg_pool2d.default:
        return () if list(join.args[1]) == [1, 1] else None  # type: ignore[arg-type]
    if join.target is aten.avg_pool2d.default:
        kernel, stride, padding, ceil, included, divisor = (*join.args[1:], *(None,) * (7 - len(join.args)))  # type: ignore[misc]
        if ceil or divisor is not None:
            return None
        return _pair(kernel), _pair(stride or kernel), _pair(padding or [0, 0]), included is not False
    return () if all(isinstance(source, fx.Node) for source in join.args) else None


def _join_numbers(graph: fx.GraphModule) -> None:
    targets = {codes: numbers for numbers, codes in _JOINS.items()}
    for node in list(graph.graph.nodes):
        if node.target not in targets:
            continue
        target = targets[node.target]
        count = 2 if target in (aten.add.Tensor, aten.mul.Tensor) else 1
        options: tuple[Any, ...] = tuple(node.args[3 * count : -_GRID])
        if target is aten.adaptive_avg_pool2d.default:
            options = ([1, 1],)
        elif target is aten.avg_pool2d.default:
            options = (*options[:3], False, options[3])
        grid = node.args[-_GRID:]
        with graph.graph.inserting_before(node):
            numbers = [
                graph.graph.call_function(OPERATORS.dequantize.default, (*node.args[3 * at : 3 * at + 3], None))
                for at in range(count)
            ]
            join = graph.graph.call_function(target, (*numbers, *options))
            join.meta = dict(node.meta)
            codes = graph.graph.call_function(OPERATORS.quantize.default, (join, *grid[:2], None, *grid[2:]))
        codes.meta = dict(node.meta)
        node.replace_all_uses_with(codes)


def _product_codes(graph: fx.GraphModule) -> None:
    """dequantize(a) @ dequantize(b) -> rarefy.matmul(a, b), for one scale a tensor."""
    for node in list(graph.graph.nodes):
        if node.target is not aten.matmul.default or not all(map(is_decoded, node.args)):
            continue
        (a, *own), (b, *other) = (source.args[:3] for source in node.args)
        if attribute(graph, own[0]).dim() or attribute(graph, other[0]).dim():
            continue
        with graph.graph.inserting_before(node):
            product = graph.graph.call_function(OPERATORS.matmul.default, (a, b, *own, *other))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product)


def _product_numbers(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.target is not OPERATORS.matmul.default:
            continue
        a, b, *read = node.args
        with graph.graph.inserting_before(node):
            factors = [
                graph.graph.call_function(OPERATORS.dequantize.default, (*one, None))
                for one in ((a, *read[:2]), (b, *read[2:]))
            ]
            product = graph.graph.call_function(aten.matmul.default, tuple(factors))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product)


def _pair(value: Any) -> Any:
    """A stride, padding or dilation for both sides; ``groups`` stays a number."""
    if not isinstance(value, (list, tuple)):
        return value
    return list(value) * 2 if len(value) == 1 else list(value)
