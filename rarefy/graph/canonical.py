"""One form for what can be written in several.

``make_functional``, of a trace: no operator changes its argument, so that a pass may move or drop any node.
``simplify``, before quantization, so that the tables of operators stay short: the mean over the plane is average
pooling; hardswish is x hardsigmoid(x), silu is x sigmoid(x); attention is its two products and a softmax; as many zeros
on either side are the padding of the convolution that reads them.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping

import torch
from torch import fx

from rarefy.errors import CaptureError
from rarefy.graph.layers import TRAINING_FLAG, padding_of
from rarefy.graph.nodes import Value, argument, arguments, finish, share_copy
from rarefy.graph.shapes import shapes
from rarefy.graph.signature import fix_sizes

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
            if node.target is aten.adaptive_avg_pool2d.default:
                fix_sizes(graph)  # its kernel is of this plane
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


def _spelled(graph: fx.Graph, node: fx.Node, found: Shapes) -> None:
    """A convolution's padding "valid", and "same" where it is as much on either side, in numbers. In place."""
    kernel = found[argument(node, "weight")].shape[2:]
    total = [0] * len(kernel)
    if argument(node, "padding") == "same":
        dilation = list(argument(node, "dilation"))
        dilation = dilation * (len(kernel) // len(dilation))
        total = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
    if any(both % 2 for both in total):
        return
    given = arguments(node)
    node.target = _IN_NUMBERS[node.target]
    node.args = tuple(value if name != "padding" else [both // 2 for both in total] for name, value in given.items())
    node.kwargs = {}
    _padded(graph, node, found)


def _line(graph: fx.Graph, node: fx.Node, found: Shapes) -> fx.Node:
    """Max pooling of a line is that of an image of one row, which there is on codes."""
    source, *sizes, ceiling = arguments(node).values()
    kernel, stride, padding, dilation = (list(one) if isinstance(one, (list, tuple)) else [one] for one in sizes)
    places = ([1, *kernel], [1, *(stride or kernel)], [0, *padding], [1, *dilation], ceiling)
    image = graph.call_function(aten.unsqueeze.default, (source, -2))
    pooled = graph.call_function(aten.max_pool2d.default, (image, *places))
    return graph.call_function(aten.squeeze.dim, (pooled, -2))


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
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _padded),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), _spelled),
    aten.max_pool1d.default: _line,
}
_IN_NUMBERS: dict[object, Callable[..., Value]] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def spell_convolutions(graph: fx.GraphModule) -> None:
    """The one operator for all convolutions, of traced parts and decomposed programs, as conv2d and the like. In place.

    Its arguments: input, weight, bias, stride, padding, dilation, transposed, output_padding, groups, and flags.
    """
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target not in _ALL_CONVOLUTIONS:
            continue
        x, weight, bias, stride, padding, dilation, transposed, more, groups, *_ = arguments(node).values()
        rank = len(stride)
        if rank not in (1, 2, 3):
            continue
        if transposed:
            node.target = _TRANSPOSED[rank - 1]
            node.args = (x, weight, bias, stride, padding, more, groups, dilation)
        else:
            node.target = _PLAIN[rank - 1]
            node.args = (x, weight, bias, stride, padding, dilation, groups)
        node.kwargs = {}


_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_PLAIN = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_ALL_CONVOLUTIONS = {aten.convolution.default, aten._convolution.default, aten._convolution.deprecated}


def make_functional(graph: fx.GraphModule) -> list[str]:
    """``relu_(x)`` -> ``relu(x)``, and whoever read the changed ``x`` afterwards reads the result. In place.

    A change to a slice of a tensor is written back to that tensor (``slice_scatter``), as often as it was sliced.
    Returns the names of stored tensors that were written to, which they are no more.
    """
    written: dict[str, None] = {}
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable or node.target in TRAINING_FLAG:
            continue
        where = f"{node.meta.get('stack') or node.name}: {node.target}"
        changed: fx.Node = node.args[0]
        stored = _root(changed)
        if stored.op == "get_attr":
            written[str(stored.target)] = None
        node.target, node.args = _functional(graph, node, where)
        _write_back(graph, node, changed, order, where)
    return list(written)


def _write_back(graph: fx.GraphModule, node: fx.Node, changed: fx.Node, order: dict[fx.Node, int], where: str) -> None:
    """What was read after ``changed`` had been, reads ``node`` or what was made of it. order: place of each node."""

    def is_late(user: fx.Node) -> bool:
        return order.get(user, -1) > order[node]

    changed.replace_all_uses_with(node, delete_user_cb=is_late)
    chain, values = [changed], [node]
    while _is_view(changed):
        base = _base(changed)
        if not any(is_late(user) for alias in _views_of(base) if alias not in chain for user in alias.users):
            break
        with graph.graph.inserting_after(values[-1]):
            written = _written_back(graph.graph, changed, base, values[-1])
        if written is None:
            raise CaptureError(
                f"{where} changes a tensor through {changed.target}, and it is read later; "
                "write it without in-place assignment (torch.cat, torch.where), or capture another part with core="
            )
        order[written] = order[node]
        base.replace_all_uses_with(written, delete_user_cb=is_late)
        chain.append(base)
        values.append(written)
        changed = base
    if any(is_late(user) for part in values[:-1] for user in part.users):
        _look_again(graph.graph, chain, values, order)
    for alias in _views_of(changed):
        if alias not in chain and any(map(is_late, alias.users)) and order[alias] < order[node]:
            raise CaptureError(
                f"{where} changes a tensor that {alias.name} also views, and both are read later; "
                "write it without in-place assignment"
            )


def _look_again(graph: fx.Graph, chain: list[fx.Node], values: list[fx.Node], order: dict[fx.Node, int]) -> None:
    """Who reads a changed part later, sees it as a part of the changed whole, which may be changed once more.

    chain: a part, what it is a view of, and so on; values: what each of them is now.
    """
    seen, place = values[-1], order[values[-1]]
    after = seen
    for view, value in zip(reversed(chain[:-1]), reversed(values[:-1]), strict=True):
        with graph.inserting_after(after):
            seen = after = graph.node_copy(view, functools.partial(_instead, view.args[0], seen))
        seen.meta, order[seen] = dict(view.meta), place
        value.replace_all_uses_with(seen, delete_user_cb=lambda user: order.get(user, -1) > place)


def _instead(old: Value, new: fx.Node, node: fx.Node) -> fx.Node:
    return new if node is old else node


def _written_back(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node | None:
    """``base`` with ``value`` in place of its part ``view``; None for a view of which that can't be said."""
    given: tuple[Value, ...] = view.args[1:]
    if view.target in _SCATTER:
        return graph.call_function(_SCATTER[view.target], (base, value, *given))
    if view.target in _WHOLE:
        return graph.call_function(aten.view_as.default, (value, base))
    if view.target is aten.transpose.int:
        return graph.call_function(aten.transpose.int, (value, *given))
    if view.target is aten.permute.default:
        axes = [axis % len(given[0]) for axis in given[0]]
        return graph.call_function(aten.permute.default, (value, [axes.index(axis) for axis in range(len(axes))]))
    return None


# view operator -> the operator that writes the changed view back
_SCATTER: Mapping[object, Callable[..., Value]] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
# Views of all numbers, in their order, that are never a copy.
_WHOLE = {
    aten.view.default, aten.view_as.default, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim,
}  # fmt: skip


def _functional(graph: fx.GraphModule, node: fx.Node, where: str) -> tuple[Callable[..., Value], tuple[Value, ...]]:
    """Operator and arguments that return what the in-place ``node`` would have left in its first argument."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name = target._schema.name.split("::")[1]
    if name == "copy_":  # x.copy_(y) makes x equal y, in x's shape and type
        with graph.graph.inserting_before(node):
            shaped = graph.graph.call_function(aten.expand_as.default, (node.args[1], node.args[0]))
        return aten.type_as.default, (shaped, node.args[0])
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    if overload is None:
        raise CaptureError(f"{where} has no form that returns a new tensor; capture another part with core=")
    return overload, node.args


def _views_of(node: fx.Node) -> list[fx.Node]:
    """Nodes that may share memory with ``node``: what it is a view of, and the views of that."""
    found, queue = [], [_root(node)]
    while queue:
        current = queue.pop()
        found.append(current)
        views = [user for user in current.users if _is_view(user) or _shares(user)]
        queue.extend(user for user in views if user.args and user.args[0] is current)
    return found


def _root(node: fx.Node) -> fx.Node:
    """What it is a view of, or itself."""
    while node.op == "call_function" and _is_view(node):
        node = _base(node)
    return node


def _base(view: fx.Node) -> fx.Node:
    """What it is a view of; of a part of several (chunk) what was parted."""
    source: Value = view.args[0]
    found: Value = source.args[0] if view.target is operator.getitem else source
    assert isinstance(found, fx.Node)
    return found


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _shares(node.args[0])
    return _shares(node) and not isinstance(_returns(node), torch.ListType)


def _shares(node: fx.Node) -> bool:
    """Does it yield the memory of its first argument, as one tensor or in parts?"""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    first = target._schema.arguments[0] if target._schema.arguments else None
    return bool(first is not None and first.alias_info is not None and not first.alias_info.is_write)


def _returns(node: fx.Node) -> object:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target._schema.returns[0].type
