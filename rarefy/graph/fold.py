"""Rewrites that leave a network's answers as they are and make it ready for few bits.

* ``fold_constants``: what follows from parameters alone (a weight that is standardised, a table of relative positions,
  embeddings that are resized) is computed and stored, so that a layer with a computed weight is a layer like any other.
* ``fold``: batch norm goes into the convolution or linear layer before it, w <- w g / sqrt(v + e),
  b <- (b - m) g / sqrt(v + e) + beta; one that stands alone (after a concatenation, say) becomes a depthwise 1x1
  convolution of the same factors, which every runtime has in integers. Dropout goes. The result is for inference only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, fx, nn

from rarefy.graph.interpreter import needed, steps
from rarefy.graph.layers import weighted
from rarefy.graph.nodes import Value, argument, arguments, attribute, finish, set_attribute, share_copy
from rarefy.graph.shapes import shapes
from rarefy.kernels import OPERATORS

aten = torch.ops.aten
_TRAINING_ONLY = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.detach.default,
}


def fold(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy without batch norm, dropout and detach, constants computed; it answers as ``graph`` in eval mode."""
    graph = fold_constants(copy.deepcopy(graph))
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _TRAINING_ONLY:
            node.replace_all_uses_with(node.args[0])
        elif node.op == "call_function" and node.target is aten.batch_norm.default:
            _fold_batch_norm(graph, node)
    return finish(graph)


def fold_constants(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy, in eval mode, that stores what no input has a part in, and shares what it had.

    What comes of codes stays computed, and so does what is drawn at random.
    """
    graph = share_copy(graph).eval()
    nodes = list(graph.graph.nodes)
    constant: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and constant.issuperset(node.all_input_nodes) and _repeatable(node)
        ):
            constant.add(node)
    read = {node for node in constant if node.op != "get_attr" and not constant.issuperset(node.users)}
    with torch.no_grad():
        values = {node: value for node, value in steps(graph, needed(nodes, read), {}) if node in read}
    for node, value in values.items():
        _put_value(graph, node, value)
    return finish(graph)


def _put_value(graph: fx.GraphModule, node: fx.Node, value: Value) -> None:
    """What is computed once, in place of what computes it."""
    if isinstance(value, Tensor):
        name = f"{node.meta.get('stack') or ''}.{node.name}_value".lstrip(".")
        with graph.graph.inserting_before(node):
            set_attribute(graph, name, nn.Parameter(value.clone().contiguous(), requires_grad=False))
            stored = graph.graph.get_attr(name)
        stored.meta = dict(node.meta)
        node.replace_all_uses_with(stored)
    elif isinstance(value, (int, float, bool)):
        for user in list(node.users):
            user.args, user.kwargs = fx.node.map_arg(
                (user.args, user.kwargs), lambda source: value if source is node else source
            )


def _repeatable(node: fx.Node) -> bool:
    target = node.target
    drawn = isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    return target not in OPERATORS and not drawn


def _fold_batch_norm(graph: fx.GraphModule, node: fx.Node) -> None:
    given = arguments(node)
    if given["running_mean"] is None:
        return  # it has no statistics: those of the batch
    parts = [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
    tensors: list[Value] = [None if part is None else attribute(graph, part).detach().double() for part in parts]
    gamma, beta, mean, variance = tensors
    factor = torch.rsqrt(variance + given["eps"])
    factor = factor if gamma is None else factor * gamma
    shift = -mean * factor if beta is None else beta - mean * factor
    source: fx.Node = given["input"]
    if weighted(source) and len(source.users) == 1:
        weight, bias = (argument(source, name) for name in ("weight", "bias"))
        weight = attribute(graph, weight).detach()
        scaled = weight.double() * factor.view(-1, *[1] * (weight.dim() - 1))
        moved = shift if bias is None else shift + attribute(graph, bias).detach().double() * factor
        put(graph, source, scaled.to(weight.dtype), moved.to(weight.dtype))
        node.replace_all_uses_with(source)
    elif shapes(graph)[node].dim() == 4:
        name = str(given["running_mean"].target).rpartition(".")[0]
        dtype = attribute(graph, given["running_mean"]).dtype
        with graph.graph.inserting_before(node):
            weight = _stored(graph, f"{name}.scale.weight", factor.to(dtype).view(-1, 1, 1, 1))
            bias = _stored(graph, f"{name}.scale.bias", shift.to(dtype))
            places = ([1, 1], [0, 0], [1, 1], len(mean))
            alone = graph.graph.call_function(aten.conv2d.default, (source, weight, bias, *places))
        alone.meta["stack"] = name
        node.replace_all_uses_with(alone)


def put(graph: fx.GraphModule, node: fx.Node, weight: Tensor, bias: Tensor) -> None:
    """Give a layer these tensors as parameters of its own; a weight that others read too stays as it is for them."""
    base = str(argument(node, "weight").target)
    readers = [
        user for other in graph.graph.nodes if other.op == "get_attr" and other.target == base for user in other.users
    ]
    name = base if len(readers) == 1 else f"{base.rpartition('.')[0]}.{node.name}.weight".lstrip(".")
    owner = name.rpartition(".")[0]
    with graph.graph.inserting_before(node):
        new_weight = _stored(graph, name, weight)
        new_bias = _stored(graph, f"{owner}.bias" if owner else f"{name}_bias", bias)
    node.args = (node.args[0], new_weight, new_bias, *node.args[3:])


def _stored(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    set_attribute(graph, name, nn.Parameter(value))
    return graph.graph.get_attr(name)


def normed(graph: fx.GraphModule) -> list[str]:
    """Names of the weights of layers that batch norm alone reads."""
    return [
        str(argument(node, "weight").target)
        for node in graph.graph.nodes
        if weighted(node) and len(node.users) == 1 and next(iter(node.users)).target is aten.batch_norm.default
    ]


def fold_parametrizations(graph: fx.GraphModule) -> None:
    """The weight that a parametrization makes, in place of what makes it, under the name that the layer has for it.

    Weight norm and spectral norm in either form, ``torch.nn.utils.parametrize`` with any, masks of
    ``torch.nn.utils.prune``; unless something else reads the tensors that it is made of. In place.
    """
    nodes = list(graph.graph.nodes)
    known = {str(node.target) for node in nodes if node.op == "get_attr"}
    owners: dict[fx.Node, set[str]] = {}  # of what no input has a part in: the weights that it is made for
    for node in nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr":
            owners[node] = {_made_for(str(node.target), known)}
        elif node.op == "call_function" and sources and owners.keys() >= set(sources) and _repeatable(node):
            owners[node] = set().union(*(owners[source] for source in sources))
    ends = {node: min(of) for node, of in owners.items() if any(owners.get(user) != of for user in node.users)}
    read = {name for node, name in ends.items() if node.op == "get_attr"}
    ends = {node: name for node, name in ends.items() if len(owners[node]) == 1 and name not in read | known}
    with torch.no_grad():
        values = {node: value for node, value in steps(graph, needed(nodes, ends), {}) if node in ends}
    for name in sorted(set(ends.values())):
        made = [node for node in values if ends[node] == name]
        if any(not torch.equal(values[node], values[made[0]]) for node in made):
            continue  # something else reads a part of it
        trains = any(parameter.requires_grad for parameter in _parameters_of(graph, made[0]))
        set_attribute(graph, name, nn.Parameter(values[made[0]].clone().contiguous(), trains))
        for node in made:
            with graph.graph.inserting_before(node):
                weight = graph.graph.get_attr(name)
            weight.meta = {"stack": node.meta.get("stack", "")}
            node.replace_all_uses_with(weight)
    graph.graph.eliminate_dead_code()


def _made_for(name: str, known: Collection[str]) -> str:
    """The weight that the tensor of this name is a part of; itself, where that is none."""
    match = re.fullmatch(r"(.*\.)?parametrizations\.(\w+)\..+", name)
    if match:
        return f"{match[1] or ''}{match[2]}"
    whole, _, part = name.rpartition("_")
    if part in ("orig", "mask", "u", "v") and f"{whole}_orig" in known:  # hooks of torch.nn.utils
        return whole
    return whole if part in ("g", "v") and {f"{whole}_g", f"{whole}_v"} <= {*known} else name


def _parameters_of(graph: fx.GraphModule, node: fx.Node) -> Iterator[Tensor]:
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            yield attribute(graph, source)
        else:
            yield from _parameters_of(graph, source)
