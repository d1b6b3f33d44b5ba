"""indexed(): a channel shuffle written as one constant index.

    view (n, c, ...) -> (n, g, c / g, ...), transpose, view (n, c, ...)     =     index_select(x, 1, p)

p is a permutation of the c channels.

Seen as views, the channels must stay a rectangle of g rows, so each block keeps the same ones; and a network that
shuffles again and again (ShuffleNet) ties the channels of a whole stage together. Seen as an index they leave one by
one, and the cut writes the index of those that are left.

Whether a chain of views is such a shuffle is found by running it on the numbers 0, 1, 2, ... at a batch of two. What is
given up: the chain's own form in the result (an index reads memory as a transposition does).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx

from rarefy.graph.nodes import Value as Yielded
from rarefy.graph.nodes import device_of, finish, operator_name, set_attribute, share_copy
from rarefy.graph.shapes import shapes

aten = torch.ops.aten

_ORDERS = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"}
_SHAPES = {"view", "_unsafe_view", "reshape", "flatten", "unflatten", "contiguous", "clone"}


def indexed(graph: fx.GraphModule, found: Mapping[fx.Node, Yielded]) -> fx.GraphModule:
    """A copy (sharing tensors) in which every shuffle along one axis is an ``index_select``; with none, the graph.

    found: its ``shapes``, at any batch.
    """
    chains = [chain for chain in _chains(graph) if found[chain[-1]].shape == found[chain[0].all_input_nodes[0]].shape]
    at_two = shapes(graph, 2) if chains else {}
    shuffles = {
        chain[-1].name: (chain[0].all_input_nodes[0], *order)
        for chain in chains
        if (order := _order(chain, at_two)) is not None
    }
    if not shuffles:
        return graph
    copied = share_copy(graph)
    nodes = {node.name: node for node in copied.graph.nodes}
    for name, (source, axis, places) in shuffles.items():
        last, target = nodes[name], f"{name}_index"
        set_attribute(copied, target, places.to(device_of(graph)))
        with copied.graph.inserting_before(last):
            index = copied.graph.get_attr(target)
            shuffled = copied.graph.call_function(aten.index_select.default, (nodes[source.name], axis, index))
        index.meta["stack"] = shuffled.meta["stack"] = last.meta.get("stack", "")
        last.replace_all_uses_with(shuffled)
    return finish(copied)


def _chains(graph: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """Views with a change of order among them, each read by the next alone."""
    for last in graph.graph.nodes:
        if operator_name(last) == "channel_shuffle":
            yield [last]
        chain = [last]
        while operator_name(chain[0]) in _ORDERS | _SHAPES:
            if operator_name(last) in _SHAPES and any(operator_name(node) in _ORDERS for node in chain):
                yield list(chain)
            before = chain[0].all_input_nodes[0]
            if len(before.users) > 1:
                break
            chain.insert(0, before)


def _order(chain: list[fx.Node], found: Mapping[fx.Node, Yielded]) -> tuple[int, Tensor] | None:
    """(axis, permutation) if the chain does nothing but that along one axis behind the batch."""
    source = chain[0].all_input_nodes[0]
    shape = tuple(found[source].shape)
    if tuple(found[chain[-1]].shape) != shape or math.prod(shape) >= 2**31:
        return None
    numbers = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    moved = numbers
    for node in chain:
        args, kwargs = fx.map_arg((node.args[1:], node.kwargs), found.__getitem__)
        operator: Yielded = aten.reshape.default if operator_name(node) in ("view", "_unsafe_view") else node.target
        moved = operator(moved, *args, **kwargs)
    for axis in range(1, len(shape)):
        line = tuple(slice(None) if other == axis else 0 for other in range(len(shape)))
        order = (moved[line].long() - int(numbers[line][0])) // math.prod(shape[axis + 1 :])
        fits = bool(((order >= 0) & (order < shape[axis])).all()) and not torch.equal(order, torch.arange(shape[axis]))
        if fits and torch.equal(numbers.index_select(axis, order), moved):
            return axis, order
    return None
