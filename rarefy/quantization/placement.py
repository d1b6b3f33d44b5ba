"""place(): which values of a graph become integers, from a runtime's table of what it can run in integers.

A runtime says which operators have an integer kernel (``Capabilities``), and the values are chosen so that such kernels follow each other
without a float operator between them:

* a *layer* (convolution, linear) is integer wherever its weights are stored;
* a *join* (add, multiply, concatenate, average, sigmoid) is integer where all it reads comes from integers and somebody reads it as integers;
* a *clip* (ReLU, ReLU6) after an integer operator costs nothing: the grid of the result ends where the clip does, and the node goes;
* a *product* of two activations (attention's queries and keys) is integer where the runtime has one: both are rounded on signed grids around zero, which
  the second factor of an integer product has to be on, and the sums stay float. Probabilities (a softmax) times values stay float;
* a *post* (hardswish, GELU) right after a layer is computed on the layer's own sums before these are rounded, where the runtime melts it into the kernel;
* a *carrier* (reshape, max pooling, slice) moves codes as they are, on the grid of what it reads;
* *padding* with zeros is a carrier too, done on the codes (zero is one of them); where only layers read it, it melts into their own padding. Padding with
  -inf before max pooling is the lowest code.

The model's answers stay float: the last layer's sums are not rounded. What else stays in float is told with its reason (``Placement.floats``).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from rarefy.deployment.runtime import Capabilities
from rarefy.graph.layers import WEIGHTED, names, padding_of, weighted

aten = torch.ops.aten
# carriers that yield all they read
TURNS = frozenset(
    {
        aten.permute.default, aten.transpose.int, aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.squeeze.dim,
        aten.unsqueeze.default, aten.contiguous.default, aten.clone.default,
    }
)  # fmt: skip


@dataclasses.dataclass
class Placement:
    """layers, products: the integer ones in order. values: nodes whose result is rounded, in order. centered: values whose grid is signed, zero in the
    middle. fused: clip -> the node that does its work. carried: carrier -> the value whose grid it keeps. integer: all integer nodes. floats: operator on
    activations that stays in float -> why."""

    layers: list[fx.Node]
    products: list[fx.Node]
    values: list[fx.Node]
    centered: set[fx.Node]
    fused: dict[fx.Node, fx.Node]
    carried: dict[fx.Node, fx.Node]
    integer: set[fx.Node]
    floats: dict[fx.Node, str]

    def root(self, node: fx.Node) -> fx.Node:
        """The value whose codes ``node`` yields."""
        return self.carried.get(node, node)


def clip_bounds(node: fx.Node) -> tuple[float, float]:
    """What a clip lets through."""
    if node.target is aten.relu.default:
        return 0.0, float("inf")
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    bounds = [*node.args[1:], *node.kwargs.values()]
    default = (-1.0, 1.0) if node.target is aten.hardtanh.default else (float("-inf"), float("inf"))
    lo, hi = (*bounds, None, None)[:2]
    return default[0] if lo is None else float(lo), default[1] if hi is None else float(hi)  # type: ignore[arg-type]


def place(
    graph: fx.GraphModule, can: Capabilities, ignore: Sequence[str] = (), found: dict[fx.Node, Any] | None = None
) -> Placement:
    """Choose. ignore: globs of layer names that stay float."""

    def ignored(node: fx.Node) -> str | None:
        """The glob that does."""
        return next((glob for glob in ignore if any(fnmatch.fnmatch(name, glob) for name in names(node))), None)

    nodes = list(graph.graph.nodes)
    layers = {node for node in nodes if weighted(node) and node.target in can.layers and ignored(node) is None}
    joins = {
        node
        for node in nodes
        if node.op == "call_function" and node.target in can.joins and _joinable(node) and ignored(node) is None
    }
    products = {
        node
        for node in nodes
        if node.op == "call_function" and node.target in can.products and _is_product(node) and ignored(node) is None
    }
    why: dict[fx.Node, str] = {}
    fused: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "call_function" and node.target in can.clips | can.posts:
            source = node.args[0]
            if (source in layers or (source in joins and node.target in can.clips)) and len(source.users) == 1:
                fused[node] = source
            elif node.target in can.clips:
                joins.add(node)

    def is_carrier(node: fx.Node) -> bool:
        if node.target is operator.getitem:
            return isinstance(node.args[0], fx.Node) and is_carrier(node.args[0])
        return node.op == "call_function" and (
            node.target in can.carriers or (node.target in can.paddings and padding_of(node) is not None)
        )

    def melts(node: fx.Node) -> bool:
        return node.target in can.paddings and all(user in layers for user in node.users)

    def source_of(node: fx.Node) -> fx.Node:
        while is_carrier(node):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def turned_from(node: fx.Node) -> fx.Node:
        while node.target in TURNS and is_carrier(node):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def nearest(node: fx.Node) -> fx.Node | None:
        """The value that a carrier carries."""
        while node not in values and is_carrier(node):
            node = node.args[0]  # type: ignore[assignment]
        return node if node in values else None

    def leads_to_integers(node: fx.Node, integer: set[fx.Node], whole: bool = True) -> bool:
        """whole: ``node`` is all of what is asked about: a part of it that only a product reads is rounded as that part."""
        return any(
            (user in integer and (whole or user not in products))
            or (
                (is_carrier(user) or user in fused) and leads_to_integers(user, integer, whole and user.target in TURNS)
            )
            for user in node.users
        )

    while True:
        integer = layers | joins
        yielding = integer | {clip for clip, source in fused.items() if source in integer}
        dropped = {
            node
            for node in joins
            if not all(source_of(source) in yielding for source in _tensors(node))
            or not leads_to_integers(node, integer)
        }
        if not dropped:
            break
        for node in dropped:
            entry = next((source_of(source) for source in _tensors(node) if source_of(source) not in yielding), None)
            why[node] = (
                "no integer operator reads it" if entry is None else f"reads {names(entry)[0]}, which is in float"
            )
        joins -= dropped
        for clip in [clip for clip, source in fused.items() if source in dropped]:
            del fused[clip]
    integer = layers | joins | products
    result_of = {source: clip for clip, source in fused.items()}
    values: set[fx.Node] = set()
    centered = {turned_from(source) for node in products for source in node.all_input_nodes}
    values |= centered
    for node in layers | joins:
        values.update(source_of(source) for source in _tensors(node))
        result = result_of.get(node, node)
        if node not in layers or node.target not in can.float_result or leads_to_integers(result, integer):
            values.add(result)
        elif result is not node:
            del fused[result]  # the clip stays: the sums before it are float
    fused = {clip: source for clip, source in fused.items() if clip.target in can.clips}
    carried = {
        node: value
        for node in nodes
        if is_carrier(node)
        and not melts(node)
        and node not in values
        and (value := nearest(node)) is not None
        and leads_to_integers(node, integer, node.target in TURNS)
    }
    for node in nodes:
        if (
            node in integer
            or node in values
            or node in fused
            or node in why
            or is_carrier(node)
            or melts(node)
            or not _computes(node)
        ):
            continue
        glob = ignored(node)
        if glob is not None:
            why[node] = f"ignored: {glob}"
        elif node.target in can.products:
            why[node] = "probabilities times values, or a factor that is stored"
        elif node.target not in can.layers | can.joins | can.clips | can.posts | can.paddings:
            why[node] = f"the runtime has no integer kernel for {_operator(node)}"
        elif node.target in WEIGHTED and not weighted(node):
            why[node] = "its weight is computed, not stored"
        elif node.target in can.joins | can.paddings:
            why[node] = f"this form of {_operator(node)} has no integer kernel"
        else:
            why[node] = "what it reads or yields is in float"
    return Placement(
        layers=[node for node in nodes if node in layers],
        products=[node for node in nodes if node in products],
        values=[node for node in nodes if node in values],
        centered=centered,
        fused=fused,
        carried=carried,
        integer=integer,
        floats={node: why[node] for node in nodes if node in why},
    )


def _computes(node: fx.Node) -> bool:
    """Does it make a tensor of others?"""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not node.all_input_nodes:
        return False
    made = node.target._schema.returns
    return len(made) > 0 and made[0].type.kind() == "TensorType"


def _operator(node: fx.Node) -> str:
    """``gelu`` for ``aten::gelu``, ``add`` for ``aten::add.Tensor``."""
    return str(node.target._schema.name).rpartition("::")[2]  # type: ignore[union-attr]


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The activations a node reads: for a layer its first argument."""
    return [node.args[0]] if weighted(node) else list(node.all_input_nodes)  # type: ignore[list-item]


def _is_product(node: fx.Node) -> bool:
    """Of two activations, none of them probabilities."""
    sources = node.all_input_nodes
    return len(sources) == 2 and not any(
        source.op == "get_attr" or source.target is aten.softmax.int for source in sources
    )


def _joinable(node: fx.Node) -> bool:
    """A join of activations: no scaled addition, no scalar, and only global pooling among the adaptive ones."""
    if node.target in (aten.add.Tensor, aten.mul.Tensor):
        return not node.kwargs and all(
            isinstance(argument, fx.Node) and argument.op != "get_attr" for argument in node.args
        )
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(node.args[1]) == [1, 1]  # type: ignore[arg-type]
    if node.target is aten.avg_pool2d.default:
        ceil, divisor = (*node.args[4:5], False)[0], (*node.args[6:7], None)[0]
        return not ceil and divisor is None
    return all(source.op != "get_attr" for source in node.all_input_nodes)
