"""Scales a channel around an activation function that is computed on numbers, so that equalising reaches it.

SiLU and GELU are no positive multiples: f(s x) is not s f(x), so that a stream of channels ends before and begins
behind them. Where the runtime computes such a function on numbers, between two roundings, its channels may be scaled
within that step for the price of a product:

    y = f(x)    ->    y' = t f(s x'),    x' = x / s,    y' = t y

``open_up`` puts s and t there as ones, in the form of depthwise layers of one weight, which ``equalize`` knows how to
use: x' is rounded as evenly as its maker's rows can be divided, y' as its readers' columns. ``settle`` writes what came
of them as products, and takes out what stayed one.
"""

from __future__ import annotations

import torch
from torch import fx

from rarefy.graph.layers import weighted
from rarefy.graph.nodes import argument, attribute, device_of, set_attribute
from rarefy.graph.shapes import shapes

aten = torch.ops.aten

PREFIX = "quantization.scaling."
FUNCTIONS = frozenset({aten.silu.default, aten.gelu.default, aten.hardswish.default})


def open_up(graph: fx.GraphModule) -> int:
    """Scales of one around each such function between layers; returns how many functions have them."""
    known = shapes(graph)
    found = 0
    for node in list(graph.graph.nodes):
        if not weighted(node) or len(known[node].shape) != 4:
            continue
        behind = result(node)
        if behind is None or not all(weighted(user) for user in behind.users):
            continue
        channels = known[node].shape[1]
        for place in (behind, node):
            _insert(graph, place, channels)
        found += 1
    return found


def result(x: fx.Node) -> fx.Node | None:
    """f(x), where nothing else reads x."""
    users = list(x.users)
    if len(users) == 1 and users[0].target in FUNCTIONS:
        return users[0]
    gate = next((user for user in users if user.target is aten.sigmoid.default), None)
    if gate is None or len(gate.users) != 1:
        return None
    (product,) = gate.users
    both = set(users) == {gate, product} and product.target is aten.mul.Tensor
    return product if both and set(product.args) == {x, gate} else None


def is_scaling(node: fx.Node) -> bool:
    """Is it a layer that ``open_up`` put there?"""
    return weighted(node) and str(argument(node, "weight").target).startswith(PREFIX)


def settle(graph: fx.GraphModule) -> int:
    """Products in place of the layers; returns how many there are."""
    left = 0
    for node in [node for node in graph.graph.nodes if is_scaling(node)]:
        source, weight = node.all_input_nodes[0], argument(node, "weight")
        scale = attribute(graph, weight).detach()
        if bool((scale == 1).all()):
            node.replace_all_uses_with(source)
        else:
            name = f"{PREFIX}{node.name}.scale"
            set_attribute(graph, name, scale.reshape(-1, 1, 1).clone())
            with graph.graph.inserting_before(node):
                vector = graph.graph.get_attr(name)
                product = graph.graph.call_function(aten.mul.Tensor, (source, vector))
            product.meta["stack"] = node.meta.get("stack", "")
            node.replace_all_uses_with(product)
            left += 1
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    return left


def _insert(graph: fx.GraphModule, value: fx.Node, channels: int) -> None:
    name = f"{PREFIX}{value.name}"
    device = device_of(graph)
    set_attribute(graph, f"{name}.weight", torch.ones(channels, 1, 1, 1, device=device))
    set_attribute(graph, f"{name}.bias", torch.zeros(channels, device=device))
    with graph.graph.inserting_after(value):
        weight = graph.graph.get_attr(f"{name}.weight")
    with graph.graph.inserting_after(weight):
        bias = graph.graph.get_attr(f"{name}.bias")
    with graph.graph.inserting_after(bias):
        layer = graph.graph.call_function(aten.conv2d.default, (value, weight, bias, [1, 1], [0, 0], [1, 1], channels))
    layer.meta["stack"] = value.meta.get("stack", "")
    value.replace_all_uses_with(layer, delete_user_cb=lambda user: user is not layer)
