"""couple(): which slices of which tensors must leave together, found by running the graph on labels.

Every axis of every parameter gets one integer label a position. An activation carries **layers**: integer tensors of its rank, each
with size 1 on the axes along which its labels do not vary. An element of an activation survives if its label survives in every
layer; an axis no layer varies along always keeps its whole size. A convolution's output thus carries one layer of C labels,
whatever its spatial size, and ViT's position embedding (1, 197, 768) two, of 197 and of 768 labels.

* Operators that only move values (view, permute, cat, chunk, slice, roll, ...) run *as they are* on each layer.
* Operators that compute say which labels they tie; that is the table ``RULES`` at the end of the file, one row an operator.
* An operator without a row freezes every label it touches: unknown is never wrong, only unpruned.

Ties are edges; ``scipy``'s connected components, once, turn labels into classes, and a class is what prunes as one. A layer that
varies along two axes (channels viewed as blocks: heads, channel shuffle, fused q, k and v) must keep a rectangle, so its labels are tied
across all axes but one: the same positions leave each block. Where an operator computes a statistic over a pruned axis (layer norm, a mean
over channels), the smaller network takes it over what is kept; such nodes are listed in ``statistics``, because for them masking is not removal.

The idea of the dependency group is DepGraph's (arXiv 2301.12900); finding it by labels instead of by rules per layer class, so that it works
on any view and index, is this file's. Given up: attention loses the same dims in every head rather than whole heads; a convolution loses
the same channels in each group rather than whole groups; a recurrent layer is an unknown operator.
"""

from __future__ import annotations

import fnmatch
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn

from rarefy.capturing import attribute, is_tensor, shapes
from rarefy.counting import einsum_letters, operator_name
from rarefy.errors import InputError

aten = torch.ops.aten

Kept = list["Tensor | None"]  # for each axis, the positions that survive, or None for all


@dataclass(eq=False)
class Value:
    """What is known of an activation: its shape (for a batch of one) and its layers of labels, int64, (1 or size) an axis."""

    shape: tuple[int, ...]
    layers: list[Tensor] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True, eq=False)
class Row:
    """One axis of one parameter or buffer. ``names``: all names of that tensor; ``classes``: (size,) the class of each position, 0 is frozen.

    ``produces``: is it the axis along which a convolution or linear layer makes its outputs?
    """

    names: tuple[str, ...]
    axis: int
    labels: Tensor
    classes: Tensor
    produces: bool


@dataclass(frozen=True, eq=False)
class Coupling:
    """Who leaves with whom.

    graph: the graph that was coupled.  values: node -> Value (or a list of them, or a plain number).  found: ``shapes`` at batch 1.
    classes: (labels,) int64, label -> class; class 0 never leaves.  count: number of classes, the frozen one included.
    rows: one an axis of a parameter or buffer.  statistics: nodes for which masking is not removal.
    frozen: parameter name -> what froze its output axis, for layers of which nothing can be pruned.
    unknown: operator -> nodes, for operators the table does not know.
    """

    graph: fx.GraphModule
    values: dict[fx.Node, Any]
    found: dict[fx.Node, Any]
    classes: Tensor
    count: int
    rows: list[Row]
    statistics: set[fx.Node]
    frozen: dict[str, str]
    unknown: dict[str, list[str]]

    def kept(self, value: Value, alive: Tensor) -> Kept:
        """Per axis the positions that survive when the classes ``alive`` (count,) bool do.

        Raises InputError where what survives is no rectangle.
        """
        found: Kept = [None] * value.rank
        for layer in value.layers:
            mask = compact(alive[self.classes[layer]])
            axes = _axes_of(mask)
            if mask.numel() == 1 and bool(mask):
                continue
            if len(axes) != 1 or found[axes[0]] is not None:
                raise InputError(f"an activation of shape {value.shape} would not stay a rectangle along axes {axes}")
            found[axes[0]] = mask.flatten().nonzero().flatten()
        return found

    def gather(self, elements: dict[str, Tensor], position: Callable[[Tensor], Tensor] | None = None, reduce: str = "mean") -> Tensor:
        """Scores of classes (count,) float64 from scores of the elements of parameters.

        elements: parameter name -> tensor of its shape; parameters that are left out do not count.
        position: applied to the sums over one position of one axis (``torch.abs`` for a signed score).
        reduce: how the axes that leave together make one score: "mean", "sum" or "max".
        """
        total = torch.zeros(self.count, dtype=torch.float64)
        members = torch.zeros(self.count, dtype=torch.float64)
        for row in self.rows:
            name = next((name for name in row.names if name in elements), None)
            if name is None:
                continue
            values = elements[name].detach()
            others = [axis for axis in range(values.dim()) if axis != row.axis]
            values = (values.sum(others) if others else values).double().cpu()
            present, where = row.classes.unique(return_inverse=True)
            per_class = torch.zeros(len(present), dtype=torch.float64).index_add_(0, where, values)
            per_class = position(per_class) if position is not None else per_class
            if reduce == "max":
                total[present] = torch.maximum(total[present], per_class)
            else:
                total[present] += per_class
            members[present] += 1
        return total / members.clamp_min(1) if reduce == "mean" else total

    def explain(self) -> list[str]:
        """Lines for people: the groups that prune together, then what is frozen and by which operator."""
        groups: dict[bytes, list[Row]] = {}
        for row in self.rows:
            if bool((row.classes > 0).any()):
                groups.setdefault(row.classes.unique().numpy().tobytes(), []).append(row)
        lines = []
        for rows in groups.values():
            width = int((rows[0].classes.unique() > 0).sum())
            lines.append(f"{width} channels: " + ", ".join(f"{row.names[0]}[{row.axis}]" for row in rows))
        lines += [f"frozen {name}: {why}" for name, why in self.frozen.items()]
        lines += [f"unknown operator {name}: {', '.join(nodes)}" for name, nodes in self.unknown.items()]
        return lines


def couple(graph: fx.GraphModule, ignore: Sequence[str] = ()) -> Coupling:
    """The coupling of a graph.

    ignore: globs on the dotted names of parameters or modules whose outputs must all stay.
    Raises InputError if a glob matches nothing.
    """
    trace = _Trace(graph, shapes(graph, 1))
    for node in graph.graph.nodes:
        trace.run(node)
    _ignore(trace, ignore)
    return _settle(trace)


# ---------------------------------------------------------------------------------------------------------------- labels


class _Trace:
    """The state of one run on labels: what every node carries, the edges found, and what froze what."""

    def __init__(self, graph: fx.GraphModule, found: dict[fx.Node, Any]):
        self.graph, self.found = graph, found
        self.values: dict[fx.Node, Any] = {}
        self.labels = 1  # label 0 is frozen
        self.edges: list[tuple[Tensor, Tensor]] = []
        self.freezes: list[tuple[int, Tensor]] = []
        self.reasons: list[str] = []
        self.tensors: dict[int, tuple[list[str], Value]] = {}
        self.outputs: dict[int, int] = {}  # id of a weight -> the axis along which its layer makes outputs
        self.statistics: set[fx.Node] = set()
        self.unknown: dict[str, list[str]] = {}
        self.node: fx.Node | None = None

    def run(self, node: fx.Node) -> None:
        self.node = node
        if node.op == "placeholder":
            self.values[node] = _blank(self.found.get(node))
        elif node.op == "get_attr":
            self.values[node] = self.parameter(str(node.target))
        elif node.op == "output":
            self.freeze_all(node.args, "output of the network")
        else:
            self.values[node] = self.call(node)

    def call(self, node: fx.Node) -> Any:
        result = self.found.get(node)
        if not _holds_tensor(result):
            return result
        arguments = _bound(node, self.values)
        if node.target is operator.getitem:
            return arguments["self"][arguments["index"]]
        rule = RULES.get(operator_name(node))
        if rule is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
            rule = _pointwise
        made = rule(self, node, arguments) if rule is not None else _Unknown
        if made is _Unknown:
            self.unknown.setdefault(str(node.target), []).append(node.name)
            self.freeze_all((node.args, node.kwargs), "unknown operator")
            made = _blank(result)
        if isinstance(made, Value):
            made.layers = self.disjoint(made.layers)
        elif isinstance(made, list):
            for value in made:
                value.layers = self.disjoint(value.layers)
        return made

    def parameter(self, name: str) -> Any:
        tensor = attribute(self.graph, name)
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in self.tensors:
            names: list[str] = []
            value = self.created(tuple(tensor.shape)) if tensor.is_floating_point() else Value(tuple(tensor.shape))
            self.tensors[id(tensor)] = (names, value)
        names, value = self.tensors[id(tensor)]
        if name not in names:
            names.append(name)
        return Value(value.shape, list(value.layers))

    def fresh(self, size: int) -> Tensor:
        self.labels += size
        return torch.arange(self.labels - size, self.labels)

    def created(self, shape: Sequence[int], axes: Iterable[int] | None = None) -> Value:
        """A tensor that comes from nowhere: fresh labels along each axis (or those of ``axes``)."""
        chosen = range(len(shape)) if axes is None else axes
        layers = [_along(self.fresh(shape[axis]), axis, len(shape)) for axis in chosen if shape[axis] > 1]
        return Value(tuple(shape), layers)

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Labels at the same (broadcast) place leave together."""
        if one is other:
            return
        one, other = torch.broadcast_tensors(one, other)
        self.edges.append((one.reshape(-1), other.reshape(-1)))

    def freeze(self, layer: Tensor, why: str) -> None:
        node = self.node
        where = f"{operator_name(node) or node.op} at {node.meta.get('stack') or node.name}" if node is not None else "the request"
        self.reasons.append(f"{why} ({where})")
        self.freezes.append((len(self.reasons) - 1, layer.reshape(-1)))

    def freeze_all(self, arguments: Any, why: str) -> None:
        def visit(node: fx.Node) -> fx.Node:
            values = self.values[node]
            for value in values if isinstance(values, list) else [values]:
                for layer in value.layers if isinstance(value, Value) else ():
                    self.freeze(layer, why)
            return node

        fx.map_arg(arguments, visit)

    def only(self, layer: Tensor, axes: Sequence[int]) -> Tensor:
        """The layer, its labels tied across every axis but ``axes`` (of one position along those)."""
        reduced = layer
        for axis in _axes_of(layer):
            if axis not in axes:
                reduced = reduced.narrow(axis, 0, 1)
        if reduced is not layer:
            self.tie(layer, reduced)
        return reduced

    def keep(self, layers: Iterable[Tensor], axes: Sequence[int], why: str) -> list[Tensor]:
        """Those of ``layers`` that vary along ``axes`` alone; a layer that varies along others too is tied across these, or frozen."""
        result = []
        for layer in layers:
            varying = _axes_of(layer)
            if not set(varying) & set(axes):
                self.freeze(layer, why)
            else:
                result.append(self.only(layer, axes))
        return result

    def channel(self, value: Value, axis: int) -> tuple[Tensor | None, list[Tensor]]:
        """The one layer along ``axis``, as (size,) labels, and the layers that do not touch it."""
        touching = [layer for layer in value.layers if layer.shape[axis] > 1]
        rest = [layer for layer in value.layers if layer.shape[axis] == 1]
        return (self.only(touching[0], (axis,)).reshape(-1) if touching else None), rest

    def disjoint(self, layers: list[Tensor]) -> list[Tensor]:
        """No two layers on one axis: the one with fewer positions is frozen; a layer of a single position is, too."""
        chosen: list[Tensor] = []
        for layer in sorted(layers, key=lambda layer: -layer.numel()):
            taken = {axis for other in chosen for axis in _axes_of(other)}
            if layer.numel() == 1:
                self.freeze(layer, "the only one of its kind")
            elif taken & set(_axes_of(layer)):
                self.freeze(layer, "two independent axes merged into one")
            else:
                chosen.append(layer)
        return chosen

    def meet(self, operands: Sequence[Value], rank: int) -> list[Tensor]:
        """The layers of the result of an elementwise operator, broadcasting as it does.

        Labels at the same place are tied. An operand without labels along an axis keeps its size there, so the others do; an
        operand of size 1 there is spread over whatever is kept, so it asks for nothing and a map (n, 1, h, w) ties no channels.
        """
        sizes = [(1,) * (rank - value.rank) + value.shape for value in operands]
        members = [
            (index, layer.reshape((1,) * (rank - value.rank) + tuple(layer.shape)))
            for index, value in enumerate(operands)
            for layer in value.layers
        ]
        result = []
        for group in _overlapping(members):
            axes = sorted({axis for _, layer in group for axis in _axes_of(layer)})
            owners = [index for index, _ in group]
            if len(set(owners)) < len(owners):
                for _, layer in group:
                    self.freeze(layer, "axes that are one in one operand and two in the other")
                continue
            stays = {axis for index, size in enumerate(sizes) if index not in owners for axis in axes if size[axis] > 1}
            free = [axis for axis in axes if axis not in stays]
            if not free:
                for _, layer in group:
                    self.freeze(layer, "meets an operand whose size is fixed")
                continue
            layers = self.keep([layer for _, layer in group], free, "meets an operand whose size is fixed")
            smallest = min(layers, key=lambda layer: layer.numel())
            for layer in layers:
                self.tie(smallest, layer)
            result.append(smallest)
        return result


class _Unknown:
    """What a rule returns when it cannot describe this use of its operator."""


def compact(layer: Tensor) -> Tensor:
    """The same labels, with size 1 on each axis along which they do not vary."""
    for axis, (size, stride) in enumerate(zip(layer.shape, layer.stride(), strict=True)):
        if size > 1 and stride == 0:
            layer = layer.narrow(axis, 0, 1)
    for axis in range(layer.dim()):
        if layer.shape[axis] > 1 and bool((layer == layer.narrow(axis, 0, 1)).all()):
            layer = layer.narrow(axis, 0, 1)
    return layer


def _axes_of(layer: Tensor) -> list[int]:
    return [axis for axis, size in enumerate(layer.shape) if size > 1]


def _along(labels: Tensor, axis: int, rank: int) -> Tensor:
    """(size,) labels as a layer along ``axis``."""
    return labels.reshape([-1 if index == axis else 1 for index in range(rank)])


def _overlapping(members: list[tuple[int, Tensor]]) -> list[list[tuple[int, Tensor]]]:
    """Layers that share an axis, directly or through a third, in one group."""
    groups: list[tuple[set[int], list[tuple[int, Tensor]]]] = []
    for index, layer in members:
        axes, group = set(_axes_of(layer)), [(index, layer)]
        apart = []
        for other_axes, other in groups:
            if axes & other_axes:
                axes, group = axes | other_axes, other + group
            else:
                apart.append((other_axes, other))
        groups = [*apart, (axes, group)]
    return [group for _, group in groups]


def _holds_tensor(result: Any) -> bool:
    return is_tensor(result) or (isinstance(result, (list, tuple)) and any(is_tensor(item) for item in result))


def _blank(result: Any) -> Any:
    if is_tensor(result):
        return Value(tuple(result.shape))
    if isinstance(result, (list, tuple)):
        return [_blank(item) for item in result]
    return result


def _bound(node: fx.Node, values: dict[fx.Node, Any]) -> dict[str, Any]:
    """Arguments by their names in the operator's schema, nodes replaced by what they carry."""
    target = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
    if not isinstance(target, torch._ops.OpOverload):
        return dict(zip(("self", "index"), args, strict=False))
    bound = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(args):
            bound[argument.name] = args[index]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound


# ----------------------------------------------------------------------------------------------------------------- rules
# A rule takes the trace, the node and its arguments by name, and returns the Value (or list of Values) of the node.


def _pointwise(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    shape = tuple(trace.found[node].shape)
    operands = [value for value in a.values() if isinstance(value, Value)]
    if len(operands) == 1 and operands[0].shape == shape:
        return Value(shape, list(operands[0].layers))
    return Value(shape, trace.meet(operands, len(shape)))


def _first(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """Elementwise in the first argument; the others are no part of the result."""
    value = next(iter(a.values()))
    return Value(tuple(trace.found[node].shape), list(value.layers))


def _moves(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Any:
    """The operator itself, on each layer as if it were the tensor."""
    source = a["self"] if "self" in a else a.get("input")
    if not isinstance(source, Value):
        return _Unknown
    rest = {name: value for name, value in a.items() if value is not source}
    target = aten.reshape.default if operator_name(node) in ("view", "_unsafe_view") else node.target
    if target is aten.reshape.default:
        rest = {"shape": rest.get("size", rest.get("shape"))}
    result = trace.found[node]
    blank = _blank(result)
    for layer in source.layers:
        full = layer.expand(source.shape)
        moved = target(full, **rest)
        if isinstance(blank, list):
            for value, part in zip(blank, moved, strict=True):
                value.layers.append(compact(part))
        else:
            blank.layers.append(compact(moved))
    return blank


def _expand(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """Axes that come to be by repetition are as free as those of a created tensor."""
    source, shape = a["self"], tuple(trace.found[node].shape)
    lead = len(shape) - source.rank
    asked: Any = node.args[1]
    made = [
        axis
        for axis, size in enumerate(shape)
        if size > 1 and isinstance(asked[axis], int) and (axis < lead or source.shape[axis - lead] == 1)
    ]
    layers = [layer.reshape((1,) * lead + tuple(layer.shape)) for layer in source.layers]
    return Value(shape, layers + trace.created(shape, made).layers)


def _creates(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    shape = tuple(trace.found[node].shape)
    asked: Any = node.args[_SIZE_ARGUMENT[operator_name(node)]]
    return trace.created(shape, [axis for axis, size in enumerate(asked) if isinstance(size, int)])


def _constant(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """Its values say where they stand (arange, eye), so none may leave."""
    return Value(tuple(trace.found[node].shape))


def _cat(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    shape = tuple(trace.found[node].shape)
    parts: list[Value] = a["tensors"]
    if operator_name(node) == "stack":
        axis = a["dim"] % len(shape)
        parts = [Value(_inserted(part.shape, axis), [layer.unsqueeze(axis) for layer in part.layers]) for part in parts]
    parts = [part for part in parts if part.rank == len(shape)]
    axis = a["dim"] % len(shape)
    return Value(shape, _joined(trace, parts, axis))


def _joined(trace: _Trace, parts: list[Value], axis: int) -> list[Tensor]:
    """Layers along ``axis`` are joined, all others are met."""
    rank = parts[0].rank
    along = [[layer for layer in part.layers if layer.shape[axis] > 1 or _axes_of(layer) == []] for part in parts]
    across = [Value(_replaced(part.shape, axis, 1), [layer for layer in part.layers if layer.shape[axis] == 1]) for part in parts]
    layers = trace.meet(across, rank)
    if any(along):
        pieces = []
        for part, own in zip(parts, along, strict=True):
            size = part.shape[axis]
            pieces.append(trace.only(own[0], (axis,)).reshape(-1) if own else torch.zeros(size, dtype=torch.int64))
        layers.append(_along(torch.cat(pieces), axis, rank))
    return layers


def _scatter(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """slice_scatter, select_scatter: ``src`` takes the place of a part of ``self`` along ``dim``, and leaves as that part would."""
    base, part = a["self"], a["src"]
    axis = a["dim"] % base.rank
    if operator_name(node) == "select_scatter":
        part = Value(_inserted(part.shape, axis), [layer.unsqueeze(axis) for layer in part.layers])
        places = range(a["index"] % base.shape[axis], a["index"] % base.shape[axis] + 1)
    else:
        places = range(*slice(a["start"], a["end"], a["step"]).indices(base.shape[axis]))
    labels, rest = trace.channel(base, axis)
    source, source_rest = trace.channel(part, axis)
    layers = trace.meet([Value(_replaced(base.shape, axis, 1), rest), Value(_replaced(part.shape, axis, 1), source_rest)], base.rank)
    if places.step != 1 or labels is None:
        for own in (labels, source):
            if own is not None:
                trace.freeze(own, "written into at places that cannot move")
        return Value(base.shape, layers)
    _tie_or_freeze(trace, labels[places.start : places.stop], source, "is replaced by a part whose size is fixed")
    return Value(base.shape, [*layers, _along(labels, axis, base.rank)])


def _pad(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """Created elements get fresh labels; where the labels do not vary along a padded axis, the padding follows its neighbour."""
    source, pad = a["self"], a["pad"]
    constant = operator_name(node) == "constant_pad_nd" or a.get("mode", "") == "constant"
    amounts = {source.rank - 1 - index: (pad[2 * index], pad[2 * index + 1]) for index in range(len(pad) // 2)}
    layers = []
    for layer in source.layers:
        for axis, (before, after) in amounts.items():
            if layer.shape[axis] == 1 or (before, after) == (0, 0):
                continue
            if not constant:
                trace.freeze(layer, "padded with its own values")
            layer = layer.narrow(axis, max(-before, 0), layer.shape[axis] + min(before, 0) + min(after, 0))
            pieces = [trace.fresh(math.prod(_replaced(layer.shape, axis, max(size, 0)))).reshape(_replaced(layer.shape, axis, max(size, 0)))
                      for size in (before, after)]
            layer = torch.cat((pieces[0], layer, pieces[1]), axis)
        layers.append(layer)
    return Value(tuple(trace.found[node].shape), layers)


def _roll(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    source = a["self"]
    axes = [axis % source.rank for axis in a["dims"]] or list(range(source.rank))
    kept = []
    for layer in source.layers:
        if any(layer.shape[axis] > 1 for axis in axes):
            trace.freeze(layer, "rolled along that axis")
        else:
            kept.append(layer)
    return Value(source.shape, kept)


def _index(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value | type[_Unknown]:
    """``x[:, index]``: labels are looked up as the values are, if the index is a constant."""
    source = a["self"]
    single = operator_name(node) == "index_select"
    raw: Any = node.args[2] if single else node.args[1]
    indices: list[Any] = [None] * (a["dim"] % source.rank) + [raw] if single else list(raw)
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    constants = {axis: _constant_index(trace, indices[axis]) for axis in axes}
    if any(trace.found[indices[axis]].dtype == torch.bool for axis in axes):
        return _Unknown
    looked_up = {
        axis: constants[axis] if constants[axis] is not None else torch.zeros(tuple(trace.found[indices[axis]].shape), dtype=torch.int64)
        for axis in axes
    }
    moved = []
    for layer in source.layers:
        if any(layer.shape[axis] > 1 for axis in axes) and (len(axes) > 1 or constants[axes[0]] is None):
            trace.freeze(layer, "looked up by an index that is not one constant")
            continue
        full = layer.expand(source.shape)
        moved.append(compact(full[tuple(looked_up[axis] if axis in looked_up else slice(None) for axis in range(len(indices)))]))
    return Value(tuple(trace.found[node].shape), moved)


def _constant_index(trace: _Trace, node: fx.Node) -> Tensor | None:
    return attribute(trace.graph, str(node.target)).cpu() if node.op == "get_attr" else None


def _embedding(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    weight, shape = a["weight"], tuple(trace.found[node].shape)
    for layer in weight.layers:
        if layer.shape[0] > 1:
            trace.freeze(layer, "rows of a table looked up by the input")
    _made_by(trace, node.args[0], 1)
    return Value(shape, [_along(layer.reshape(-1), len(shape) - 1, len(shape)) for layer in weight.layers if layer.shape[0] == 1])


def _made_by(trace: _Trace, weight: Any, axis: int) -> None:
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        trace.outputs[id(attribute(trace.graph, str(weight.target)))] = axis


def _convolution(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """weight (out, in / groups, ...): out and in of one group, the same positions in each; depthwise: output o follows input o // multiplier."""
    source, weight, groups = a["input"], a["weight"], a["groups"]
    shape = tuple(trace.found[node].shape)
    axis = source.rank - weight.rank + 1
    labels, rest = trace.channel(source, axis)
    rest = trace.keep(rest, range(axis), "a spatial axis of a convolution")
    out, _ = trace.channel(weight, 0)
    inner, kernel = trace.channel(weight, 1)
    for layer in kernel:
        if layer.shape[0] == 1:
            trace.freeze(layer, "the kernel of a convolution")
    _made_by(trace, node.args[1], 0)
    outputs, inputs = weight.shape[0], source.shape[axis]
    if groups > 1 and inputs == groups:
        _tie_or_freeze(trace, out, labels.repeat_interleave(outputs // groups) if labels is not None else None, "follows an input that is fixed")
    elif groups > 1:
        blocks = labels.reshape(groups, -1) if labels is not None else None
        _tie_or_freeze(trace, inner[None] if inner is not None else None, blocks, "follows an input that is fixed")
        if out is not None and outputs > groups:
            out_blocks = out.reshape(groups, -1)
            trace.tie(out_blocks, out_blocks[:1])
        elif out is not None:
            trace.freeze(out, "one output a group")
    else:
        _tie_or_freeze(trace, inner, labels, "follows an input that is fixed")
    layers = list(rest)
    if out is not None:
        _affine(trace, out, a["bias"])
        layers.append(_along(out, axis, len(shape)))
    return Value(shape, layers)


def _transposed_convolution(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """weight (in, out / groups, ...)."""
    source, weight, groups = a["input"], a["weight"], a["groups"]
    shape = tuple(trace.found[node].shape)
    axis = source.rank - weight.rank + 1
    labels, rest = trace.channel(source, axis)
    rest = trace.keep(rest, range(axis), "a spatial axis of a convolution")
    inner, _ = trace.channel(weight, 0)
    out, kernel = trace.channel(weight, 1)
    for layer in kernel:
        if layer.shape[0] == 1:
            trace.freeze(layer, "the kernel of a convolution")
    _made_by(trace, node.args[1], 1)
    _tie_or_freeze(trace, inner, labels, "follows an input that is fixed")
    if groups > 1 and inner is not None:
        blocks = inner.reshape(groups, -1)
        if groups == source.shape[axis] and weight.shape[1] == 1:
            out = inner
        elif groups == source.shape[axis]:
            trace.freeze(inner, "the groups of a transposed convolution")
            out = None if out is None else out.repeat(groups)
        else:
            trace.tie(blocks, blocks[:1])
            out = None if out is None else out.repeat(groups)
    layers = list(rest)
    if out is not None:
        _affine(trace, out, a["bias"])
        layers.append(_along(out, axis, len(shape)))
    return Value(shape, layers)


def _tie_or_freeze(trace: _Trace, one: Tensor | None, other: Tensor | None, why: str) -> None:
    if one is not None and other is not None:
        trace.tie(one, other)
    elif one is not None or other is not None:
        trace.freeze(one if one is not None else other, why)  # type: ignore[arg-type]


def _affine(trace: _Trace, labels: Tensor, *vectors: Any) -> None:
    """Vectors of one number a channel leave with it."""
    for vector in vectors:
        if isinstance(vector, Value):
            _tie_or_freeze(trace, trace.channel(vector, 0)[0], labels, "one number a channel")


def _batch_norm(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """Batch and instance norm: statistics of each channel alone."""
    source = a["input"]
    labels, _ = trace.channel(source, 1)
    vectors = [value for name, value in a.items() if name != "input" and isinstance(value, Value)]
    if labels is not None:
        _affine(trace, labels, *vectors)
    else:
        for vector in vectors:
            trace.keep(vector.layers, (), "one number a channel, and the channels are fixed")
    if operator_name(node) == "instance_norm":
        return Value(source.shape, trace.keep(source.layers, (0, 1), "an axis that instance norm averages over"))
    return Value(source.shape, list(source.layers))


def _layer_norm(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    source = a["input"]
    axes = range(source.rank - len(a["normalized_shape"]), source.rank)
    layers = [trace.only(layer, axes) if any(layer.shape[axis] > 1 for axis in axes) else layer for layer in source.layers]
    trace.statistics.add(node)
    return Value(source.shape, trace.meet([Value(source.shape, layers), *(a[name] for name in ("weight", "bias") if isinstance(a.get(name), Value))], source.rank))


def _group_norm(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    source, groups = a["input"], a["num_groups"]
    labels, rest = trace.channel(source, 1)
    rest = trace.keep(rest, (0,), "an axis that group norm averages over")
    vectors = [a[name] for name in ("weight", "bias") if isinstance(a[name], Value)]
    if labels is None:
        for vector in vectors:
            trace.keep(vector.layers, (), "one number a channel, and the channels are fixed")
        return Value(source.shape, rest)
    _affine(trace, labels, *vectors)
    if 1 < groups < source.shape[1]:
        blocks = labels.reshape(groups, -1)
        trace.tie(blocks, blocks[:1])
    if groups < source.shape[1]:
        trace.statistics.add(node)
    return Value(source.shape, [*rest, _along(labels, 1, source.rank)])


def _prelu(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    source, weight = a["self"], a["weight"]
    slope = Value((weight.shape[0],) + (1,) * (source.rank - 2), [layer.reshape(-1, *[1] * (source.rank - 2)) for layer in weight.layers])
    return Value(source.shape, trace.meet([source, slope], source.rank))


def _glu(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """glu(x) = first half times sigmoid of the second."""
    source = a["self"]
    axis, shape = a["dim"] % source.rank, tuple(trace.found[node].shape)
    halves = [
        Value(shape, [compact(layer.narrow(axis, start, shape[axis]) if layer.shape[axis] > 1 else layer) for layer in source.layers])
        for start in (0, shape[axis])
    ]
    return Value(shape, trace.meet(halves, source.rank))


def _blocks_tied(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """channel_shuffle(x, groups): the same channels in each group."""
    source, groups = a["self"], a["groups"]
    labels, rest = trace.channel(source, 1)
    if labels is None:
        return Value(source.shape, rest)
    blocks = labels.reshape(groups, -1)
    trace.tie(blocks, blocks[:1])
    return Value(source.shape, [*rest, _along(blocks.t().reshape(-1), 1, source.rank)])


def _unfold(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """im2col: (n, c, h, w) -> (n, c * kh * kw, places)."""
    source, kernel = a["self"], a["kernel_size"]
    labels, rest = trace.channel(source, source.rank - 3)
    trace.keep(rest, (), "a spatial axis of a convolution")
    shape = tuple(trace.found[node].shape)
    size = kernel[0] * kernel[-1]
    return Value(shape, [_along(labels.repeat_interleave(size), len(shape) - 2, len(shape))] if labels is not None else [])


def _spatial(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value | list[Value]:
    """Pooling and resizing: axes from the second on are mixed, the batch and the channels are not."""
    source = next(iter(a.values()))
    lead = 1 if source.rank == 2 else source.rank - _spatial_rank(node)
    layers = []
    for layer in source.layers:
        if any(layer.shape[axis] > 1 for axis in range(lead, source.rank)):
            trace.freeze(layer, "an axis that pooling or resizing mixes")
        else:
            layers.append(layer)
    result = trace.found[node]
    if isinstance(result, (list, tuple)):
        return [Value(tuple(item.shape), list(layers)) for item in result]
    return Value(tuple(result.shape), layers)


def _spatial_rank(node: fx.Node) -> int:
    name = operator_name(node)
    return next((int(name[index - 1]) for index in range(len(name), 0, -1) if name[index - 1] in "123"), 2)


def _reduces(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value | list[Value]:
    """Sums, means, norms, maxima: over a pruned axis they run over what is kept; of blocks (dims of heads), the same is kept in each."""
    source = a["self"]
    dim = a.get("dim")
    axes = [axis % max(source.rank, 1) for axis in ([dim] if isinstance(dim, int) else dim or range(source.rank))]
    layers = []
    for layer in source.layers:
        varying = _axes_of(layer)
        if set(varying) & set(axes):
            trace.statistics.add(node)
            trace.only(layer, axes)
        else:
            layers.append(layer)
    if not a.get("keepdim", False):
        layers = [layer.squeeze(tuple(axes)) for layer in layers]
    result = trace.found[node]
    if isinstance(result, (list, tuple)):
        return [Value(tuple(item.shape), list(layers)) for item in result]
    return Value(tuple(result.shape), layers)


def _mixes(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """softmax, cumsum: each result depends on the whole of one axis, which therefore stays."""
    source = a["self"]
    layers = []
    for layer in source.layers:
        if layer.shape[a["dim"] % source.rank] > 1:
            trace.freeze(layer, f"{operator_name(node)} runs over it")
        else:
            layers.append(layer)
    return Value(source.shape, layers)


def _linear(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    source, weight, bias = a["input"], a["weight"], a["bias"]
    shape = tuple(trace.found[node].shape)
    lead = [f"lead{axis}" for axis in range(source.rank - 1)]
    _made_by(trace, node.args[1], 0)
    layers = _contract(trace, [source, weight], [[*lead, "in"], ["out", "in"][2 - weight.rank :]], [*lead, "out"][: len(shape)])
    if bias is not None:
        layers = trace.meet([Value(shape, layers), bias], len(shape))
    return Value(shape, layers)


def _matmul(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """matmul, mm, bmm, mv; addmm and baddbmm add ``self``."""
    shape = tuple(trace.found[node].shape)
    factors = [a[name] for name in ("mat1", "batch1", "self", "other", "mat2", "batch2", "vec") if name in a]
    added = [a["self"]] if "mat1" in a or "batch1" in a else []
    left, right = [factor for factor in factors if not any(factor is value for value in added)]
    lead = max(left.rank, right.rank, 2) - 2
    names = [f"batch{index}" for index in range(lead)]
    one = [*names[lead - max(left.rank - 2, 0) :], "rows", "inner"] if left.rank > 1 else ["inner"]
    two = [*names[lead - max(right.rank - 2, 0) :], "inner", "columns"] if right.rank > 1 else ["inner"]
    out = [*names, *(["rows"] if left.rank > 1 else []), *(["columns"] if right.rank > 1 else [])]
    layers = _contract(trace, [left, right], [one, two], out)
    if added:
        layers = trace.meet([Value(shape, layers), *added], len(shape))
    return Value(shape, layers)


def _einsum(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value | type[_Unknown]:
    operands: list[Value] = a["tensors"]
    letters, out = einsum_letters(a["equation"], [value.rank for value in operands])
    if any(len(set(names)) < len(names) for names in letters):
        return _Unknown
    return Value(tuple(trace.found[node].shape), _contract(trace, operands, letters, out))


def _attention(trace: _Trace, node: fx.Node, a: dict[str, Any]) -> Value:
    """softmax(q k' / sqrt(d)) v, as the two products it is."""
    query, key, value = a["query"], a["key"], a["value"]
    if a.get("enable_gqa") and query.rank > 3 and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (
            Value(
                _replaced(part.shape, part.rank - 3, query.shape[-3]),
                [layer.repeat_interleave(repeats, -3) if layer.shape[-3] > 1 else layer for layer in part.layers],
            )
            for part in (key, value)
        )
    lead = [f"batch{index}" for index in range(query.rank - 2)]
    scores_shape = (*query.shape[:-1], key.shape[-2])
    scores = Value(scores_shape, _contract(trace, [query, key], [[*lead, "rows", "inner"], [*lead, "keys", "inner"]], [*lead, "rows", "keys"]))
    if isinstance(a["attn_mask"], Value):
        scores = Value(scores_shape, trace.meet([scores, a["attn_mask"]], len(scores_shape)))
    for layer in scores.layers:
        if layer.shape[-1] > 1:
            trace.freeze(layer, "softmax runs over it")
    scores.layers = [layer for layer in scores.layers if layer.shape[-1] == 1]
    layers = _contract(trace, [scores, value], [[*lead, "rows", "keys"], [*lead, "keys", "columns"]], [*lead, "rows", "columns"])
    return Value(tuple(trace.found[node].shape), layers)


def _contract(trace: _Trace, operands: list[Value], letters: list[list[str]], out: list[str]) -> list[Tensor]:
    """Layers of an einsum. Labels of a letter are met; those of summed letters leave the sum together and the result does not see them.

    A layer along a summed and another letter (dims of heads) is tied across the other: the same dims leave each head.
    """
    names = sorted({letter for own in letters for letter in own}, key=lambda letter: (letter not in out, out.index(letter) if letter in out else 0, letter))
    summed = [index for index, letter in enumerate(names) if letter not in out]
    spread = []
    for value, own in zip(operands, letters, strict=True):
        order = sorted(range(len(own)), key=lambda axis: names.index(own[axis]))
        place = [names.index(own[axis]) for axis in order]

        def placed(sizes: Sequence[int], order: list[int] = order, place: list[int] = place) -> list[int]:
            full = [1] * len(names)
            for axis, index in zip(order, place, strict=True):
                full[index] = sizes[axis]
            return full

        layers = []
        for layer in value.layers:
            layer = layer.permute(order).reshape(placed(layer.shape))
            inner = [axis for axis in _axes_of(layer) if axis in summed]
            layers.append(trace.only(layer, inner) if inner else layer)
        spread.append(Value(tuple(placed(value.shape)), layers))
    met = trace.meet(spread, len(names))
    return [layer.squeeze(tuple(summed)) for layer in met if not any(layer.shape[axis] > 1 for axis in summed)]


def _inserted(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis:])


def _replaced(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


# The place of the sizes among the arguments of operators that create a tensor.
_SIZE_ARGUMENT = {"new_zeros": 1, "new_ones": 1, "new_full": 1, "new_empty": 1, "zeros": 0, "ones": 0, "full": 0, "empty": 0}

RULES: dict[str, Callable[[_Trace, fx.Node, dict[str, Any]], Any]] = {
    **dict.fromkeys(
        (
            "view _unsafe_view reshape permute transpose t swapaxes swapdims movedim moveaxis numpy_T mT adjoint chunk split "
            "split_with_sizes tensor_split unsafe_chunk unsafe_split slice select narrow flatten unflatten squeeze unsqueeze unbind "
            "flip repeat tile repeat_interleave pixel_shuffle pixel_unshuffle"
        ).split(),
        _moves,
    ),
    **dict.fromkeys("to _to_copy type_as contiguous alias detach zeros_like ones_like full_like empty_like zero fill".split(), _first),
    **dict.fromkeys("hardswish log_sigmoid dropout feature_dropout alpha_dropout feature_alpha_dropout rrelu hardshrink".split(), _first),
    **dict.fromkeys("masked_fill expand_as floor_divide view_as reshape_as where clamp".split(), _pointwise),
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    **dict.fromkeys(_SIZE_ARGUMENT, _creates),
    **dict.fromkeys("arange eye linspace scalar_tensor tril_indices triu_indices".split(), _constant),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _cat),
    **dict.fromkeys(("slice_scatter", "select_scatter"), _scatter),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "roll": _roll,
    **dict.fromkeys(("index", "index_select"), _index),
    "embedding": _embedding,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    **dict.fromkeys(("batch_norm", "instance_norm"), _batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "group_norm": _group_norm,
    "prelu": _prelu,
    "glu": _glu,
    "channel_shuffle": _blocks_tied,
    "im2col": _unfold,
    **dict.fromkeys(
        (
            "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
            "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_bilinear2d "
            "upsample_linear1d upsample_bicubic2d upsample_trilinear3d upsample_nearest3d reflection_pad2d replication_pad2d"
        ).split(),
        _spatial,
    ),
    **dict.fromkeys("mean sum prod amax amin var std linalg_vector_norm norm logsumexp var_mean std_mean any all".split(), _reduces),
    **dict.fromkeys("softmax _softmax log_softmax cumsum cumprod softmin".split(), _mixes),
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "addmm", "baddbmm"), _matmul),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}


# --------------------------------------------------------------------------------------------------------------- classes


def _ignore(trace: _Trace, globs: Sequence[str]) -> None:
    trace.node = None
    for glob in globs:
        matched = False
        for key, (names, value) in trace.tensors.items():
            if any(_matches(name, glob) for name in names):
                matched = True
                axis = trace.outputs.get(key, 0)
                for layer in value.layers:
                    if layer.shape[axis] > 1:
                        trace.freeze(layer, f"ignore={glob!r}")
        if not matched:
            raise InputError(f"ignore={glob!r} matches no parameter or module; names look like {next(iter(trace.tensors.values()))[0][0]}" if trace.tensors
                             else f"ignore={glob!r}: the network has no parameters")


def _matches(name: str, glob: str) -> bool:
    """Does the glob match the parameter, its module, or a module around that?"""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:length]), glob) for length in range(1, len(parts) + 1))


def _settle(trace: _Trace) -> Coupling:
    """Components of the edges, until every layer that varies along several axes keeps a rectangle."""
    one = [torch.zeros(0, dtype=torch.int64), *(edge[0] for edge in trace.edges)]
    other = [torch.zeros(0, dtype=torch.int64), *(edge[1] for edge in trace.edges)]
    edges = torch.stack((torch.cat(one), torch.cat(other)))
    zero = (edges == 0).any(0)
    touching_frozen = edges[:, zero].reshape(-1)
    reasons = [*trace.reasons, "meets an operand whose size is fixed"]
    freezes = [*trace.freezes, (len(reasons) - 1, touching_frozen)]
    marked = torch.cat([labels for _, labels in freezes])
    reason_of_mark = torch.cat([torch.full((len(labels),), index) for index, labels in freezes])
    edges = edges[:, ~zero]
    joint = list({
        id(layer): layer
        for values in trace.values.values()
        for value in (values if isinstance(values, list) else [values])
        if isinstance(value, Value)
        for layer in value.layers
        if len(_axes_of(layer)) > 1
    }.values())
    while True:
        component = _components(edges, trace.labels)
        frozen = torch.zeros(int(component.max()) + 1, dtype=torch.bool)
        frozen[component[marked]] = True
        frozen[component[0]] = True
        classes = torch.where(frozen[component], 0, component + 1)
        added = [edge for layer in joint for edge in _rectangle(layer, classes)]
        if not added:
            break
        edges = torch.cat((edges, *added), 1)
    reason = torch.full((len(frozen),), len(reasons)).scatter_reduce_(0, component[marked], reason_of_mark, "amin")
    return _numbered(trace, classes, component, reason, reasons)


def _components(edges: Tensor, labels: int) -> Tensor:
    one, other = edges.numpy()
    matrix = coo_matrix((np.ones(len(one), dtype=np.int8), (one, other)), shape=(labels, labels))
    return torch.from_numpy(connected_components(matrix, directed=False)[1].astype(np.int64))


def _rectangle(layer: Tensor, classes: Tensor) -> list[Tensor]:
    """Edges that tie a layer's labels across all axes but the one that has most classes to offer, if they vary along several."""
    own = compact(classes[layer])
    axes = _axes_of(own)
    if len(axes) < 2:
        return []
    keep = max(axes, key=lambda axis: own.shape[axis])
    first = layer
    for axis in _axes_of(layer):
        if axis != keep:
            first = first.narrow(axis, 0, 1)
    full, first = torch.broadcast_tensors(layer, first)
    return [torch.stack((full.reshape(-1), first.reshape(-1)))]


def _numbered(trace: _Trace, classes: Tensor, component: Tensor, reason: Tensor, reasons: list[str]) -> Coupling:
    """Classes no parameter makes (inputs, coordinates kept in a buffer) are frozen, the others numbered from 1."""
    made = [
        classes[layer].reshape(-1)
        for key, (names, value) in trace.tensors.items()
        for layer in value.layers
        if isinstance(attribute(trace.graph, names[0]), nn.Parameter) and trace.outputs.get(key, _axes_of(layer)[0]) == _axes_of(layer)[0]
    ]
    used = torch.cat([torch.zeros(1, dtype=torch.int64), *made]).unique()
    number = torch.zeros(int(classes.max()) + 1, dtype=torch.int64)
    number[used] = torch.arange(len(used))
    classes = number[classes]
    rows, frozen = [], {}
    for key, (names, value) in trace.tensors.items():
        produced = trace.outputs.get(key)
        for layer in value.layers:
            axis = _axes_of(layer)[0]
            own = classes[layer.reshape(-1)]
            rows.append(Row(tuple(names), axis, layer.reshape(-1), own, produced == axis))
            if produced == axis and not bool(own.any()):
                first = int(reason[component[layer.reshape(-1)]].min())
                frozen[names[0]] = reasons[first] if first < len(reasons) else "nothing prunes with it"
    return Coupling(trace.graph, trace.values, trace.found, classes, len(used), rows, trace.statistics, frozen, trace.unknown)
