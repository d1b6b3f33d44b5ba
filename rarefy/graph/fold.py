"""Rewrites that leave a network's answers as they are and make it ready for few bits.

* ``fold_constants``: what follows from parameters alone (a weight that is standardised, a table of relative positions, embeddings that are
  resized) is computed and stored, so that a layer with a computed weight is a layer like any other.
* ``fold``: batch norm goes into the convolution or linear layer before it, w <- w g / sqrt(v + e), b <- (b - m) g / sqrt(v + e) + beta;
  one that stands alone (after a concatenation, say) becomes a depthwise 1x1 convolution of the same factors, which every runtime has in
  integers. Dropout goes. The result is for inference only.
* ``simplify``: one form for what can be written in several (mean over the plane is average pooling; hardswish is x hardsigmoid(x), silu
  is x sigmoid(x); attention is its two products and a softmax; as many zeros on either side are the padding of the convolution that reads them), so
  that the tables of operators stay short.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy.errors import InputError
from rarefy.graph.capture import attribute, finish, set_attribute, shapes, share_copy
from rarefy.kernels import OPERATORS

aten = torch.ops.aten
WEIGHTED = {aten.conv2d.default, aten.conv2d.padding, aten.conv1d.default, aten.linear.default}
_TRAINING_ONLY = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.detach.default,
}


def weighted(node: fx.Node) -> bool:
    """A convolution or linear layer whose weight (and bias, if any) is a stored tensor."""
    if node.op != "call_function" or node.target not in WEIGHTED:
        return False
    sources = node.args[1:3]
    return all(source is None or (isinstance(source, fx.Node) and source.op == "get_attr") for source in sources)


def layer_name(node: fx.Node) -> str:
    """``layer1.0.conv1`` for the node that reads ``layer1.0.conv1.weight``."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    return str(source.target).rpartition(".")[0] or str(source.target)


def names(node: fx.Node) -> list[str]:
    """What a user may call a node by: its layer, itself, its module."""
    return [name for name in (layer_name(node) if weighted(node) else "", node.name, node.meta.get("stack", "")) if name]


def padding_of(node: fx.Node) -> float | None:
    """What aten.pad(x, sizes, mode="constant", value=None) puts around, if that has a code: 0, or -inf where only max pooling reads it; else None."""
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    if mode != "constant":
        return None
    if value in (None, 0):
        return 0.0
    return float(value) if value == -math.inf and all(user.target is aten.max_pool2d.default for user in node.users) else None


def check_globs(graph: fx.GraphModule, **given: Iterable[str]) -> None:
    """Raises InputError for a glob of layer names that nothing in the graph goes by; the keyword says which option it stands in."""
    known = {name for node in graph.graph.nodes for name in names(node)}
    for option, globs in given.items():
        for glob in globs:
            if not fnmatch.filter(known, glob):
                example = next((layer_name(node) for node in graph.graph.nodes if weighted(node)), "nothing")
                raise InputError(f"{option}: {glob!r} matches no layer; names look like {example}, and 'NAME.*' is all that lies in NAME")


def fold(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy without batch norm, dropout and detach, constants computed, that answers as ``graph`` does in eval mode."""
    graph = fold_constants(copy.deepcopy(graph))
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _TRAINING_ONLY:
            node.replace_all_uses_with(node.args[0])
        elif node.op == "call_function" and node.target is aten.batch_norm.default and node.args[3] is not None:
            _fold_batch_norm(graph, node)
    return finish(graph)


def fold_constants(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy, in eval mode, that stores what no input has a part in, and shares what it had. What comes of codes stays computed, and so does what is drawn at random."""
    graph = share_copy(graph).eval()
    constant: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and constant.issuperset(node.all_input_nodes) and _repeatable(node.target)):
            constant.add(node)
    values: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node not in constant or node.op == "get_attr" or constant.issuperset(node.users):
            continue
        with torch.no_grad():
            value = _computed(graph, node, values)
        if isinstance(value, Tensor):
            owner = str(node.meta.get("stack") or "")
            with graph.graph.inserting_before(node):
                set_attribute(
                    graph, name := f"{owner}.{node.name}_value".lstrip("."), nn.Parameter(value.clone().contiguous(), requires_grad=False)
                )
                stored = graph.graph.get_attr(name)
            stored.meta = dict(node.meta)
            node.replace_all_uses_with(stored)
        elif isinstance(value, (int, float, bool)):
            numbers = {node: value}
            for user in list(node.users):
                user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda source, numbers=numbers: numbers.get(source, source))  # type: ignore[misc]
    return finish(graph)


def _repeatable(target: Any) -> bool:
    return target not in OPERATORS and torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ())


def _computed(graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node that depends on stored tensors only."""
    waiting = [node]
    while waiting:
        one = waiting[-1]
        missing = [source for source in one.all_input_nodes if source not in values]
        waiting += missing
        if missing:
            continue
        waiting.pop()
        if one.op == "get_attr":
            values[one] = attribute(graph, one)
        elif one not in values:
            args, kwargs = fx.map_arg((one.args, one.kwargs), values.__getitem__)
            values[one] = one.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


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


def _fold_batch_norm(graph: fx.GraphModule, node: fx.Node) -> None:
    source, *parameters = node.args[:5]
    tensors: list[Any] = [None if value is None else attribute(graph, value).detach() for value in parameters]
    gamma, beta, mean, variance = tensors
    factor = torch.rsqrt(variance.double() + float(node.args[7]))  # type: ignore[arg-type]
    factor = factor if gamma is None else factor * gamma.double()
    shift = -mean.double() * factor if beta is None else beta.double() - mean.double() * factor
    assert isinstance(source, fx.Node)
    name = str(parameters[2].target).rpartition(".")[0]
    if weighted(source) and len(source.users) == 1:
        weight = attribute(graph, source.args[1])
        bias = attribute(graph, source.args[2]) if len(source.args) > 2 and source.args[2] is not None else None
        wide = weight.detach().double() * factor.view(-1, *[1] * (weight.dim() - 1))
        moved = shift if bias is None else shift + bias.detach().double() * factor
        put(graph, source, wide.to(weight.dtype), moved.to(weight.dtype))
        node.replace_all_uses_with(source)
    elif _rank(graph, node) == 4:
        channels = len(mean)
        with graph.graph.inserting_before(node):
            weight = _stored(graph, f"{name}.scale.weight", factor.to(mean.dtype).view(-1, 1, 1, 1))
            bias = _stored(graph, f"{name}.scale.bias", shift.to(mean.dtype))
            alone = graph.graph.call_function(aten.conv2d.default, (source, weight, bias, [1, 1], [0, 0], [1, 1], channels))
        alone.meta["stack"] = name
        node.replace_all_uses_with(alone)


def _rank(graph: fx.GraphModule, node: fx.Node) -> int:
    return len(shapes(graph)[node].shape)


def put(graph: fx.GraphModule, node: fx.Node, weight: Tensor, bias: Tensor) -> None:
    """Give a weighted node these tensors as parameters of its own (a weight that other nodes read as well stays as it is for them)."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    base = str(source.target)
    readers = [user for other in graph.graph.nodes if other.op == "get_attr" and other.target == base for user in other.users]
    name = base if len(readers) == 1 else f"{base.rpartition('.')[0]}.{node.name}.weight".lstrip(".")
    owner = name.rpartition(".")[0]
    with graph.graph.inserting_before(node):
        new_weight = _stored(graph, name, weight)
        new_bias = _stored(graph, f"{owner}.bias" if owner else f"{name}_bias", bias)
    node.args = (node.args[0], new_weight, new_bias, *node.args[3:])


def _stored(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    set_attribute(graph, name, nn.Parameter(value))
    return graph.graph.get_attr(name)


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
    others = (*node.args[4:6], node.kwargs.get("dropout_p"), node.kwargs.get("is_causal"), node.kwargs.get("enable_gqa"))
    if any(others) or (mask is not None and found[mask].dtype == torch.bool):
        return None
    scale: Any = node.kwargs.get("scale")
    made = [graph.call_function(aten.mul.Tensor, (query, 1 / math.sqrt(found[query].shape[-1]) if scale is None else scale))]  # type: ignore[index]
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
    node.args = (around.args[0], weight, bias, stride, [one + more for one, more in zip(own, before, strict=True)], *others)


_SIMPLER = {
    aten.scaled_dot_product_attention.default: _attention,
    aten.mean.dim: _mean,
    aten.adaptive_avg_pool2d.default: _pool,
    aten.hardswish.default: _gated(aten.hardsigmoid.default),
    aten.silu.default: _gated(aten.sigmoid.default),
    aten.conv2d.default: _padded,
    aten.conv1d.default: _padded,
}
