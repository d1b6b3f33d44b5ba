"""The two forms of a quantised layer, and the passes between them; both give the same answers but for float rounding.

numbers   quantize(conv2d(dequantize(x), dequantize(w), dequantize(b)))     what ONNX writes, and runtimes fuse
integers  rarefy.conv2d_codes(x, w, b, scales)                              what they then compute

A layer whose sums are not rounded, or are read before they are, is ``rarefy.conv2d`` in the second form, which yields
numbers. Sums and products of two decoded tensors that are rounded (``quantize(dequantize(a) + dequantize(b))``) are one
operator on codes likewise, and so is the matrix product of two, whose sums are numbers.

Integers are the form that a graph is kept and saved in, though export, parity and training read numbers: it is what
runs. A graph judged in PyTorch then gives the runtime's codes, where float sums of decoded numbers turn one in ten
thousand into its neighbour; it holds a weight as codes only, decoded nowhere; and its file holds nothing twice (in
numbers, each bias has a scale of its own, which must be its input's times its weight's). Numbers follow from it in one
pass, which shares all tensors and so costs nodes, not memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeGuard

import torch
from torch import fx

from rarefy.graph.nodes import Value, argument, arguments, attribute, finish, set_attribute, share_copy
from rarefy.kernels import GRID

aten = torch.ops.aten
OPERATORS = torch.ops.rarefy

_NAMES = ("conv1d", "conv2d", "conv3d", "linear")
_INTEGER = {getattr(aten, name).default: getattr(OPERATORS, name).default for name in _NAMES}
_CODED = {getattr(OPERATORS, name).default: getattr(OPERATORS, f"{name}_codes").default for name in _NAMES}
_JOINS = {
    aten.add.Tensor: OPERATORS.add.default,
    aten.mul.Tensor: OPERATORS.mul.default,
    aten.adaptive_avg_pool2d.default: OPERATORS.mean.default,
    aten.avg_pool2d.default: OPERATORS.avg_pool2d.default,
}
LAYERS = frozenset((*_CODED, *_CODED.values()))  # layers in integers


def is_decoded(node: object) -> TypeGuard[fx.Node]:
    """Does ``node`` turn codes into numbers?"""
    return isinstance(node, fx.Node) and node.target is OPERATORS.dequantize.default


def to_integers(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares its tensors, whose layers and joins on codes are integer operators."""
    graph = share_copy(graph)
    _join_codes(graph)
    _layers_to_integers(graph)
    _product_codes(graph)
    _round_layers(graph)
    return finish(graph)


def to_numbers(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares its tensors, whose integer layers and joins are float ones of decoded numbers."""
    graph = share_copy(graph)
    _join_numbers(graph)
    _unround_layers(graph)
    _product_numbers(graph)
    _layers_to_numbers(graph)
    return finish(graph)


def _layers_to_integers(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.target not in _INTEGER:
            continue
        entry, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
        padded = isinstance(entry, fx.Node) and entry.target is aten.pad.default and is_decoded(entry.args[0])
        source = entry.args[0] if padded else entry
        if not (is_decoded(weight) and is_decoded(bias) and is_decoded(source)):
            continue
        codes, scale, zero, _ = source.args
        with graph.graph.inserting_before(node):
            if padded:
                around = (codes, entry.args[1], "constant", int(attribute(graph, zero)))
                codes = graph.graph.call_function(aten.pad.default, around)
            options: list[Value] = []
            if node.target is not aten.linear.default:
                axes = attribute(graph, weight.args[0]).dim() - 2
                options = [_each(argument(node, name), axes) for name in ("stride", "padding", "dilation")]
                options.append(argument(node, "groups"))
            read = (codes, weight.args[0], bias.args[0], scale, zero, weight.args[1])
            layer = _call(graph, _INTEGER[node.target], (*read, *options), node)
        node.replace_all_uses_with(layer)


def _layers_to_numbers(graph: fx.GraphModule) -> None:
    numbers = {integer: number for number, integer in _INTEGER.items()}
    for node in list(graph.graph.nodes):
        if node.target not in numbers:
            continue
        codes, weight, bias, scale, zero, weight_scale, *options = arguments(node).values()
        set_attribute(graph, f"{bias.target}_scale", attribute(graph, scale) * attribute(graph, weight_scale))
        with graph.graph.inserting_before(node):
            around = codes.target is aten.pad.default and all(
                user.target in numbers and user.target is not OPERATORS.linear.default for user in codes.users
            )
            number = _decode(graph, codes.args[0] if around else codes, scale, zero)
            if around:
                number = graph.graph.call_function(aten.pad.default, (number, codes.args[1]))
            parts = []
            for source, step in ((weight, weight_scale), (bias, graph.graph.get_attr(f"{bias.target}_scale"))):
                zeros = torch.zeros_like(attribute(graph, step), dtype=attribute(graph, source).dtype)
                set_attribute(graph, f"{source.target}_zero_point", zeros)
                parts.append(_decode(graph, source, step, graph.graph.get_attr(f"{source.target}_zero_point"), 0))
            layer = _call(graph, numbers[node.target], (number, *parts, *options), node)
        node.replace_all_uses_with(layer)


def _round_layers(graph: fx.GraphModule) -> None:
    """quantize(rarefy.conv2d(...)) -> rarefy.conv2d_codes(...), where nothing else reads the sums."""
    for node in list(graph.graph.nodes):
        layer = _rounded(graph, node)
        if layer is None or layer.target not in _CODED:
            continue
        with graph.graph.inserting_before(node):
            rounded = _call(graph, _CODED[layer.target], (*layer.args, *_grid(node)), layer)
        node.replace_all_uses_with(rounded)
        graph.graph.erase_node(node)


def _unround_layers(graph: fx.GraphModule) -> None:
    sums = {codes: numbers for numbers, codes in _CODED.items()}
    for node in list(graph.graph.nodes):
        if node.target not in sums:
            continue
        with graph.graph.inserting_before(node):
            layer = _call(graph, sums[node.target], _read(node), node)
            codes = _round(graph, layer, node)
        node.replace_all_uses_with(codes)
        graph.graph.erase_node(node)


def _join_codes(graph: fx.GraphModule) -> None:
    """quantize(dequantize(a) + dequantize(b)) -> rarefy.add(a, b), for one scale a tensor."""
    for node in list(graph.graph.nodes):
        join = _rounded(graph, node)
        if join is None or join.target not in _JOINS or join.kwargs or (options := _options(join)) is None:
            continue
        parts = _codes_of(graph, [source for source in join.args if isinstance(source, fx.Node)])
        if parts is None:
            continue
        with graph.graph.inserting_before(node):
            read = [part for operand in parts for part in operand]
            joined = _call(graph, _JOINS[join.target], (*read, *options, *_grid(node)), node)
        node.replace_all_uses_with(joined)


def _options(join: fx.Node) -> tuple[Value, ...] | None:
    """What the operator on codes reads beside codes and grids; None where it has no such form."""
    if join.target is aten.adaptive_avg_pool2d.default:
        return () if list(argument(join, "output_size")) == [1, 1] else None
    if join.target is aten.avg_pool2d.default:
        _, kernel, stride, padding, ceil, included, divisor = arguments(join).values()
        if ceil or divisor is not None:
            return None
        return _each(kernel, 2), _each(stride or kernel, 2), _each(padding or 0, 2), included is not False
    return () if all(isinstance(source, fx.Node) for source in join.args) else None


def _join_numbers(graph: fx.GraphModule) -> None:
    targets = {codes: numbers for numbers, codes in _JOINS.items()}
    for node in list(graph.graph.nodes):
        if node.target not in targets:
            continue
        target = targets[node.target]
        options: tuple[Value, ...] = ()
        if target is aten.adaptive_avg_pool2d.default:
            options = ([1, 1],)
        elif target is aten.avg_pool2d.default:
            kernel, stride, padding, included = _read(node)[3:]
            options = (kernel, stride, padding, False, included)
        with graph.graph.inserting_before(node):
            join = _call(graph, target, (*_operands(graph, node), *options), node)
            codes = _round(graph, join, node)
        node.replace_all_uses_with(codes)


def _product_codes(graph: fx.GraphModule) -> None:
    """dequantize(a) @ dequantize(b) -> rarefy.matmul(a, b), for one scale a tensor."""
    for node in list(graph.graph.nodes):
        parts = _codes_of(graph, node.args) if node.target is aten.matmul.default else None
        if parts is None:
            continue
        (a, *a_grid), (b, *b_grid) = parts
        with graph.graph.inserting_before(node):
            product = _call(graph, OPERATORS.matmul.default, (a, b, *a_grid, *b_grid), node)
        node.replace_all_uses_with(product)


def _product_numbers(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.target is not OPERATORS.matmul.default:
            continue
        with graph.graph.inserting_before(node):
            product = _call(graph, aten.matmul.default, _operands(graph, node), node)
        node.replace_all_uses_with(product)


def _rounded(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What a ``quantize`` of one scale rounds, if nothing else reads it; None for other nodes."""
    if node.target is not OPERATORS.quantize.default or argument(node, "axis") is not None:
        return None
    source: fx.Node = argument(node, "x")
    return source if len(source.users) == 1 and not attribute(graph, argument(node, "scale")).dim() else None


def _round(graph: fx.GraphModule, number: fx.Node, node: fx.Node) -> fx.Node:
    """``quantize`` of ``number`` to the codes that ``node`` makes."""
    scale, zero, *ends = _grid(node)
    return _call(graph, OPERATORS.quantize.default, (number, scale, zero, None, *ends), node)


def _grid(node: fx.Node) -> list[Value]:
    """The arguments that say which codes a node makes."""
    return [argument(node, name) for name in GRID]


def _read(node: fx.Node) -> list[Value]:
    """The others."""
    return [value for name, value in arguments(node).items() if name not in GRID]


def _codes_of(graph: fx.GraphModule, numbers: Sequence[object]) -> list[list[Value]] | None:
    """Codes, scale and zero point of each; None unless all are decoded, with one scale for the tensor."""
    parts = [[argument(one, name) for name in ("q", "scale", "zero_point")] for one in numbers if is_decoded(one)]
    good = len(parts) == len(numbers) and not any(attribute(graph, scale).dim() for _, scale, _ in parts)
    return parts if good else None


def _decode(graph: fx.GraphModule, codes: Value, scale: Value, zero: Value, axis: int | None = None) -> fx.Node:
    return graph.graph.call_function(OPERATORS.dequantize.default, (codes, scale, zero, axis))


def _operands(graph: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The numbers of each operand of an operator on codes (``a`` beside ``a_scale`` and ``a_zero_point``)."""
    given = arguments(node)
    names = [name for name in given if f"{name}_zero_point" in given]
    return [_decode(graph, given[name], given[f"{name}_scale"], given[f"{name}_zero_point"]) for name in names]


def _call(graph: fx.GraphModule, target: Callable[..., Value], args: Iterable[Value], like: fx.Node) -> fx.Node:
    """A new node where the graph inserts; it stands for ``like`` in messages and reports."""
    node = graph.graph.call_function(target, tuple(args))
    node.meta = dict(like.meta)
    return node


def _each(value: Value, axes: int) -> list[Value]:
    """A stride, padding or dilation for every axis."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * axes if len(values) == 1 else values
