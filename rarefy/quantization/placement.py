"""place(): which values of a graph become integers, from a runtime's table of what it can run in integers.

A runtime says which operators have an integer kernel (``Capabilities``), and the values are chosen so that such kernels
follow each other without a float operator between them:

* a *layer* (convolution, linear) is integer wherever its weights are stored;
* a *join* (add, multiply, concatenate, average, sigmoid) is integer where all it reads comes from integers and somebody
  reads it as integers;
* a *clip* (ReLU, ReLU6) after an integer operator costs nothing: the grid of the result ends where the clip does, and
  the node goes;
* a *product* of two activations (attention's queries and keys) is integer where the runtime has one: both are rounded
  on signed grids around zero, which the second factor of an integer product has to be on, and the sums stay float.
  Probabilities (a softmax) times values stay float;
* a *post* (hardswish, GELU) right after a layer is computed on the layer's own sums before these are rounded, where the
  runtime melts it into the kernel;
* a *carrier* (reshape, max pooling, a maximum over axes, slice) moves codes as they are, on the grid of what it reads;
* *padding* with zeros is a carrier too, done on the codes (zero is one of them); where only layers read it, it melts
  into their own padding. Padding with -inf before max pooling is the lowest code.

The model's answers stay float: the last layer's sums are not rounded. What else stays in float is told with its reason
(``Placement.floats``).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import operator
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from rarefy.deployment.runtime import EXTREMES, Capabilities
from rarefy.graph.layers import WEIGHTED, names, padding_of, weighted
from rarefy.graph.nodes import argument, operator_name
from rarefy.quantization.transforms.channel_scales import is_scaling, result

aten = torch.ops.aten
# carriers that yield all they read
TURNS = frozenset(
    {
        aten.permute.default, aten.transpose.int, aten.view.default, aten.reshape.default, aten.flatten.using_ints,
        aten.squeeze.dim, aten.unsqueeze.default, aten.contiguous.default, aten.clone.default,
    }
)  # fmt: skip


@dataclasses.dataclass
class Placement:
    """Which nodes of a graph are integer.

    layers, products: those that multiply, in order. values: nodes whose result is rounded, in order. centered: values
    whose grid is signed, zero in the middle. halved: values of no sign on a grid of 7 bits. fused: clip -> the node
    that does its work. carried: carrier -> the value whose grid it has. integer: all integer nodes. floats: operator on
    activations that stays in float -> why.
    """

    layers: list[fx.Node]
    products: list[fx.Node]
    values: list[fx.Node]
    centered: set[fx.Node]
    halved: set[fx.Node]
    fused: dict[fx.Node, fx.Node]
    carried: dict[fx.Node, fx.Node]
    integer: set[fx.Node]
    floats: dict[fx.Node, str]


def clip_bounds(node: fx.Node) -> tuple[float, float]:
    """What a clip lets through."""
    if node.target in (aten.relu.default, aten.relu6.default):
        return 0.0, 6.0 if node.target is aten.relu6.default else math.inf
    ends = ("min_val", "max_val") if node.target is aten.hardtanh.default else ("min", "max")
    lo, hi = (argument(node, end) for end in ends)
    return -math.inf if lo is None else float(lo), math.inf if hi is None else float(hi)


@dataclasses.dataclass(frozen=True)
class _Roles:
    """What each node can be on a runtime. fused: clip or post -> the layer or join that does its work. summed: layers
    to whose sums the join that reads them adds another value before anything is rounded."""

    can: Capabilities
    layers: frozenset[fx.Node]
    joins: frozenset[fx.Node]
    products: frozenset[fx.Node]
    fused: Mapping[fx.Node, fx.Node]
    summed: frozenset[fx.Node] = frozenset()

    @property
    def integer(self) -> frozenset[fx.Node]:
        return self.layers | self.joins | self.products

    def is_carrier(self, node: fx.Node) -> bool:
        if node.target is operator.getitem:
            source = _source(node)
            return self.is_carrier(source) and not (source.target in EXTREMES and node.args[1])
        return node.op == "call_function" and (
            node.target in self.can.carriers or (node.target in self.can.paddings and padding_of(node) is not None)
        )

    def melts(self, node: fx.Node) -> bool:
        """Is it padding that becomes that of the layers which read it?"""
        return node.target in self.can.paddings and all(user in self.layers for user in node.users)

    def source_of(self, node: fx.Node) -> fx.Node:
        """What carriers carry to here."""
        while self.is_carrier(node):
            node = _source(node)
        return node

    def turned_from(self, node: fx.Node) -> fx.Node:
        """The same, where all of it is carried."""
        while node.target in TURNS and self.is_carrier(node):
            node = _source(node)
        return node

    def leads_to_integers(self, node: fx.Node, integer: Collection[fx.Node], whole: bool = True) -> bool:
        """Does one of ``integer`` read it, behind carriers and clips?

        whole: ``node`` is all of what is asked about: a part of it that only a product reads is rounded as that part.
        """
        return any(
            (user in integer and (whole or user not in self.products))
            or (
                (self.is_carrier(user) or user in self.fused)
                and self.leads_to_integers(user, integer, whole and user.target in TURNS)
            )
            for user in node.users
        )


def place(graph: fx.GraphModule, can: Capabilities, ignore: Sequence[str] = ()) -> Placement:
    """Choose. can: the runtime's. ignore: globs of layer names that stay float."""
    nodes = list(graph.graph.nodes)
    ignored = {node: glob for node in nodes if (glob := _ignored(node, ignore)) is not None}
    roles, why = _settled(_roles(nodes, can, ignored))
    centered = {roles.turned_from(source) for node in roles.products for source in node.all_input_nodes}
    halved = set[fx.Node]()
    if can.padded_zero:
        padded = {value for layer in roles.layers if _is_padded(layer) for value in [roles.source_of(_source(layer))]}
        halved = {value for value in padded - centered if _is_clipped(value)}
        centered |= {value for value in padded - halved if value.op != "placeholder" and value.target not in can.clips}
    values, roles = _values(roles, centered)
    centered |= values if can.centered else set()
    carried: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if roles.is_carrier(node) and not roles.melts(node) and node not in values:
            value = node
            while value not in values and roles.is_carrier(value):
                value = _source(value)
            if value in values and roles.leads_to_integers(node, roles.integer, node.target in TURNS):
                carried[node] = value
    for node in nodes:
        is_told = node in roles.integer or node in values or node in roles.fused or node in why
        if not is_told and _computes(node) and not roles.is_carrier(node) and not roles.melts(node):
            why[node] = f"ignored: {ignored[node]}" if node in ignored else _reason(node, can)
    return Placement(
        layers=[node for node in nodes if node in roles.layers],
        products=[node for node in nodes if node in roles.products],
        values=[node for node in nodes if node in values],
        centered=centered & values,
        halved=halved & values,
        fused=dict(roles.fused),
        carried=carried,
        integer=set(roles.integer),
        floats={node: why[node] for node in nodes if node in why},
    )


def _ignored(node: fx.Node, globs: Sequence[str]) -> str | None:
    """The glob that leaves it in float."""
    return next((glob for glob in globs if any(fnmatch.fnmatch(name, glob) for name in names(node))), None)


def _roles(nodes: Sequence[fx.Node], can: Capabilities, ignored: Collection[fx.Node]) -> _Roles:
    """By the operators alone."""
    open_to = [node for node in nodes if node.op == "call_function" and node not in ignored]
    layers = {node for node in open_to if weighted(node) and node.target in can.layers and not is_scaling(node)}
    joins = {node for node in open_to if node.target in can.joins and _joinable(node) and not _gates_itself(node)}
    products = {node for node in open_to if node.target in can.products and _is_product(node)}
    fused: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "call_function" and node.target in can.clips | can.posts:
            source = _source(node)
            if (source in layers or (source in joins and node.target in can.clips)) and len(source.users) == 1:
                fused[node] = source
            elif node.target in can.clips:
                joins.add(node)
    roles = _Roles(can, frozenset(layers), frozenset(joins), frozenset(products), fused)
    return dataclasses.replace(roles, summed=_summed(nodes, roles)) if can.residuals else roles


def _summed(nodes: Sequence[fx.Node], roles: _Roles) -> frozenset[fx.Node]:
    """Of the layers that an addition reads, the last one, if nothing else reads it."""
    place = {node: index for index, node in enumerate(nodes)}
    found = set()
    for node in roles.joins:
        if node.target is aten.add.Tensor:
            sources = node.all_input_nodes
            alone = [one for one in sources if one in roles.layers and len(one.users) == 1]
            if len(sources) == 2 and alone:
                found.add(max(alone, key=place.__getitem__))
    return frozenset(found)


def _is_padded(layer: fx.Node) -> bool:
    """A convolution with padding, of one group."""
    if layer.target is aten.linear.default or argument(layer, "groups") != 1:
        return False
    padding = argument(layer, "padding")
    if isinstance(padding, str):
        return padding != "valid"
    return _source(layer).target is aten.pad.default or any(padding if isinstance(padding, Sequence) else [padding])


def _is_clipped(node: fx.Node) -> bool:
    """Is none of its numbers below 0, by what it is?"""
    clips = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default)
    return node.target is aten.sigmoid.default or (node.target in clips and clip_bounds(node)[0] >= 0)


def _settled(roles: _Roles) -> tuple[_Roles, dict[fx.Node, str]]:
    """Without joins that read floats or that no integer operator reads, and why those are float."""
    why: dict[fx.Node, str] = {}
    while True:
        integer = roles.layers | roles.joins
        yielding = integer | {clip for clip, source in roles.fused.items() if source in integer}
        dropped = set()
        for node in roles.joins:
            sources = [roles.source_of(source) for source in _tensors(node)]
            entry = next((source for source in sources if source not in yielding), None)
            if entry is not None:
                why[node] = f"reads {names(entry)[0]}, which is in float"
                dropped.add(node)
            elif not roles.leads_to_integers(node, integer):
                why[node] = "no integer operator reads it"
                dropped.add(node)
        if not dropped:
            return roles, why
        fused = {clip: source for clip, source in roles.fused.items() if source not in dropped}
        roles = dataclasses.replace(roles, joins=roles.joins - dropped, fused=fused)


def _values(roles: _Roles, centered: Collection[fx.Node]) -> tuple[set[fx.Node], _Roles]:
    """The nodes whose result is rounded; and the roles without clips behind sums that stay float, and without posts."""
    values = set(centered)
    result_of = {source: clip for clip, source in roles.fused.items()}
    stays = set()
    summed = {node for node in roles.summed if any(user in roles.joins for user in node.users)}
    for node in roles.layers | roles.joins:
        values.update(roles.source_of(source) for source in _tensors(node) if source not in summed)
        if node in summed:
            continue
        result = result_of.get(node, node)
        may_stay = node in roles.layers and node.target in roles.can.float_result
        if not may_stay or roles.leads_to_integers(result, roles.integer):
            values.add(result)
        else:
            stays.add(result)
    fused = {
        clip: source for clip, source in roles.fused.items() if clip not in stays and clip.target in roles.can.clips
    }
    return values, dataclasses.replace(roles, fused=fused)


def _reason(node: fx.Node, can: Capabilities) -> str:
    """Why an operator that nothing rounds stays in float."""
    if node.target in can.products:
        return "probabilities times values, or a factor that is stored"
    if node.target not in can.layers | can.joins | can.clips | can.posts | can.paddings:
        return f"the runtime has no integer kernel for {operator_name(node)}"
    if node.target in WEIGHTED and not weighted(node):
        return "its weight is computed, not stored"
    if node.target in can.joins | can.paddings:
        return f"this form of {operator_name(node)} has no integer kernel"
    return "what it reads or yields is in float"


def _computes(node: fx.Node) -> bool:
    """Does it make a tensor of others?"""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not node.all_input_nodes:
        return False
    made = node.target._schema.returns
    return len(made) > 0 and made[0].type.kind() == "TensorType"


def _source(node: fx.Node) -> fx.Node:
    """What it reads first."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The activations a node reads: for a layer its first argument."""
    return [_source(node)] if weighted(node) else node.all_input_nodes


def _is_product(node: fx.Node) -> bool:
    """Of two activations, none of them probabilities."""
    sources = node.all_input_nodes
    return len(sources) == 2 and not any(
        source.op == "get_attr" or source.target is aten.softmax.int for source in sources
    )


def _gates_itself(node: fx.Node) -> bool:
    """SiLU, x sigmoid(x), is one step between two roundings: rounded too, the gate would cost as much as its result."""
    return node.target is aten.sigmoid.default and result(node.all_input_nodes[0]) is not None


def _joinable(node: fx.Node) -> bool:
    """A join of activations: no scaled addition, no scalar, and only global pooling among the adaptive ones."""
    if node.target in (aten.add.Tensor, aten.mul.Tensor):
        return not node.kwargs and all(isinstance(one, fx.Node) and one.op != "get_attr" for one in node.args)
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(argument(node, "output_size")) == [1, 1]
    if node.target is aten.avg_pool2d.default:
        return not argument(node, "ceil_mode") and argument(node, "divisor_override") is None
    return all(source.op != "get_attr" for source in node.all_input_nodes)
