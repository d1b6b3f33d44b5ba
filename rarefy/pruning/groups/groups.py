"""couple(): which slices of which tensors must leave together, found by running the graph on labels.

Labels (``labels.py``) go through the graph; every operator ties some of them (``rules.py``). An operator without a rule
freezes every label it touches: unknown is never wrong, only unpruned. Ties are edges; their connected components, found
once at the end, turn labels into **classes**, and a class is what leaves as one.

A layer of labels that varies along two axes (channels viewed as blocks: heads, fused q, k and v) must keep a rectangle,
so its labels are tied across all axes but the one that offers most classes: the same positions leave every block.

The idea of the dependency group is DepGraph's (arXiv 2301.12900). Finding it by labels instead of by rules for each
kind of layer, so that it works through any view and index, is this file's.
"""

from __future__ import annotations

import fnmatch
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rarefy.errors import InputError
from rarefy.graph.nodes import Value as Yielded
from rarefy.graph.nodes import arguments, attribute, is_tensor
from rarefy.graph.shapes import shapes
from rarefy.kernels import is_quantised
from rarefy.pruning.groups.channel_shuffle import indexed
from rarefy.pruning.groups.labels import (
    Arguments,
    Carried,
    Kept,
    Trace,
    Unknown,
    Value,
    axes_of,
    blank,
    compact,
    values_in,
)
from rarefy.pruning.groups.rules import rule_of

HEADS = ("dims", "whole")


@dataclass(frozen=True, eq=False)
class Row:
    """One axis of one parameter or buffer.

    ``names``: all names of that tensor; ``classes``: (size,) the class of each position, 0 is frozen.
    ``produces``: is it the axis along which a convolution or linear layer makes its outputs?
    """

    names: tuple[str, ...]
    axis: int
    classes: Tensor
    produces: bool


class ClassScores:
    """Scores of classes (count,) float64 from scores of positions, axis by axis.

    reduce: how the axes that leave together make one score: "mean", "sum" or "max".
    """

    def __init__(self, count: int, reduce: str):
        self.reduce = reduce
        self.total, self.members = torch.zeros(2, count, dtype=torch.float64)

    def add(
        self,
        classes: Tensor,
        values: Tensor,
        position: Callable[[Tensor], Tensor] | None = None,
        among: Tensor | None = None,
    ) -> None:
        """One axis: classes, values: (size,).

        position: applied to the sums over each class's positions.
        among: (count,) bool, the classes that count; None: all.
        """
        present, where = torch.unique(classes, return_inverse=True)
        values = torch.zeros(len(present), dtype=torch.float64).index_add_(0, where, values.double().cpu())
        values = position(values) if position is not None else values
        if among is not None:
            present, values = present[among[present]], values[among[present]]
        total = self.total[present]
        self.total[present] = torch.maximum(total, values) if self.reduce == "max" else total + values
        self.members[present] += 1

    def reduced(self) -> Tensor:
        mean: Tensor = self.total / self.members.clamp_min(1)
        return mean if self.reduce == "mean" else self.total


@dataclass(frozen=True, eq=False)
class Coupling:
    """Who leaves with whom.

    graph: the graph that was coupled.
    values: node -> Value (or a list of them, or a plain number), its layers of classes in place of labels; class 0
        never leaves.
    shapes: what each node yields at batch 1.
    count: number of classes, the frozen one included.
    rows: one an axis of a parameter or buffer.
    statistics: nodes for which masking is not removal.
    frozen: parameter name -> what froze its output axis, for layers of which nothing can be pruned.
    unknown: operator -> nodes, for operators the table does not know.
    """

    graph: fx.GraphModule
    values: dict[fx.Node, Carried]
    shapes: dict[fx.Node, Yielded]
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
            mask = compact(alive[layer])
            axes = axes_of(mask)
            if mask.numel() == 0 or (mask.numel() == 1 and bool(mask)):
                continue
            if len(axes) != 1 or found[axes[0]] is not None:
                raise InputError(f"an activation of shape {value.shape} would not stay a rectangle along axes {axes}")
            found[axes[0]] = mask.flatten().nonzero().flatten()
        return found

    def producers(self) -> Tensor:
        """(count,) int64: the first row that makes each class (of any kind, if no layer does); -1 if none has it."""
        rows = len(self.rows)
        first = torch.full((self.count,), 2 * rows)
        for index, row in enumerate(self.rows):
            rank = torch.tensor(index if row.produces else index + rows)
            first[row.classes] = torch.minimum(first[row.classes], rank)
        return torch.where(first < 2 * rows, first % rows, -1)

    def gather(
        self,
        elements: Mapping[str, Tensor],
        position: Callable[[Tensor], Tensor] | None = None,
        reduce: str = "mean",
        element: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Scores of classes (count,) float64 from scores of the elements of parameters.

        elements: parameter name -> tensor of its shape; parameters that are left out do not count.
        position: applied to the sums over one position of one axis (``torch.abs`` for a signed score).
        reduce: how the axes that leave together make one score: "mean", "sum" or "max".
        element: applied to each tensor first, one at a time.
        """
        scores = ClassScores(self.count, reduce)
        for names, rows in itertools.groupby(self.rows, key=lambda row: row.names):
            name = next((name for name in names if name in elements), None)
            if name is None:
                continue
            values = elements[name].detach()
            values = element(values) if element is not None else values
            for row in rows:
                others = [axis for axis in range(values.dim()) if axis != row.axis]
                scores.add(row.classes, values.sum(others) if others else values, position)
        return scores.reduced()

    def groups(self) -> list[tuple[int, list[str]]]:
        """Channels and members of each group that prunes together; a member is "name[axis]"."""
        found: dict[bytes, tuple[int, list[str]]] = {}
        for row in self.rows:
            own = row.classes.unique()
            if bool((own > 0).any()):
                _, members = found.setdefault(own.numpy().tobytes(), (int((own > 0).sum()), []))
                members.append(f"{row.names[0]}[{row.axis}]")
        return list(found.values())

    def explain(self) -> list[str]:
        """Lines for people: the groups that prune together, then what is frozen and by which operator."""
        lines = [f"{width} channels: {', '.join(members)}" for width, members in self.groups()]
        lines += [f"frozen {name}: {why}" for name, why in self.frozen.items()]
        lines += [f"unknown operator {name}: {', '.join(nodes)}" for name, nodes in self.unknown.items()]
        return lines


def couple(graph: fx.GraphModule, ignore: Sequence[str] = (), heads: str = "dims") -> Coupling:
    """The coupling of a graph, in which channel shuffles became indices (``channel_shuffle.py``): the result's own
    ``graph``, if there are any.

    ignore: globs on the dotted names of parameters or modules whose outputs must all stay.
    heads: attention loses the same "dims" of each head, or "whole" heads.
    Raises InputError for a quantised graph, and if a glob matches nothing.
    """
    if is_quantised(graph):
        raise InputError("the model is quantised already; prune its float original, and quantise what is left")
    if heads not in HEADS:
        raise InputError(f"heads={heads!r} is not one of {', '.join(HEADS)}")
    found = shapes(graph, 1)
    direct = indexed(graph, found)
    trace = Trace(direct, found if direct is graph else shapes(direct, 1), heads == "whole")
    for node in direct.graph.nodes:
        _run(trace, node)
    _ignore(trace, ignore)
    return _settle(trace)


def _run(trace: Trace, node: fx.Node) -> None:
    """One node on labels."""
    trace.node = node
    if node.op == "placeholder":
        trace.values[node] = blank(trace.shapes.get(node))
    elif node.op == "get_attr":
        trace.values[node] = trace.parameter(str(node.target))
    elif node.op == "output":
        trace.freeze_all(node.args, "output of the network")
    else:
        trace.values[node] = _call(trace, node)


def _call(trace: Trace, node: fx.Node) -> Carried:
    result = trace.shapes.get(node)
    if not (is_tensor(result) or (isinstance(result, (list, tuple)) and any(map(is_tensor, result)))):
        return result
    given = _carried(node, trace.values)
    if node.target is operator.getitem:
        return given["self"][given["index"]]
    rule = rule_of(node)
    carried: Carried = rule(trace, node, given) if rule is not None else Unknown
    if carried is Unknown:
        if trace.freeze_all((node.args, node.kwargs), "unknown operator"):
            trace.unknown.setdefault(str(node.target), []).append(node.name)
        carried = blank(result)
    for value in values_in(carried):
        value.layers = trace.disjoint(value.layers)
    return carried


def _carried(node: fx.Node, values: Mapping[fx.Node, Carried]) -> Arguments:
    """Arguments by their names in the operator's schema, nodes replaced by what they carry."""
    given: Arguments = fx.map_arg(arguments(node), values.__getitem__)
    return given


def _ignore(trace: Trace, globs: Sequence[str]) -> None:
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
            example = next((names[0] for names, _ in trace.tensors.values()), "nothing")
            raise InputError(f"ignore={glob!r} matches no parameter or module; names look like {example}")


def _matches(name: str, glob: str) -> bool:
    """Does the glob match the parameter, its module, or a module around that?"""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:length]), glob) for length in range(1, len(parts) + 1))


def _settle(trace: Trace) -> Coupling:
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
    joint = list(
        {
            id(layer): layer
            for carried in trace.values.values()
            for value in values_in(carried)
            for layer in value.layers
            if len(axes_of(layer)) > 1
        }.values()
    )
    while True:
        component = _components(edges, trace.count)
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
    """(labels,) the component of each, numbered by their least labels.

    Trees are hooked to the least neighbour's and flattened, in a logarithm of rounds; scipy sorts the edges twice.
    """
    root = torch.arange(labels)
    one, other = edges
    while len(one):
        apart = one != other
        one, other = one[apart], other[apart]
        root.scatter_reduce_(0, torch.maximum(one, other), torch.minimum(one, other), "amin")
        while not torch.equal(root, above := root[root]):
            root = above
        one, other = root[one], root[other]
    number = (root == torch.arange(labels)).cumsum(0) - 1
    return number[root]


def _rectangle(layer: Tensor, classes: Tensor) -> list[Tensor]:
    """Edges that tie labels that vary along several axes, across all but the one that has most classes to offer."""
    own = compact(classes[layer])
    axes = axes_of(own)
    if len(axes) < 2:
        return []
    keep = max(axes, key=lambda axis: own.shape[axis])
    first = layer
    for axis in axes_of(layer):
        if axis != keep:
            first = first.narrow(axis, 0, 1)
    full, first = torch.broadcast_tensors(layer, first)
    return [torch.stack((full.reshape(-1), first.reshape(-1)))]


def _numbered(trace: Trace, classes: Tensor, component: Tensor, reason: Tensor, reasons: list[str]) -> Coupling:
    """Classes no parameter makes (inputs, coordinates kept in a buffer) are frozen, the others numbered from 1."""
    made = [
        classes[layer].reshape(-1)
        for key, (names, value) in trace.tensors.items()
        for layer in value.layers
        if isinstance(attribute(trace.graph, names[0]), nn.Parameter)
        and trace.outputs.get(key, axes_of(layer)[0]) == axes_of(layer)[0]
    ]
    used = torch.cat([torch.zeros(1, dtype=torch.int64), *made]).unique()
    number = torch.zeros(int(classes.max()) + 1, dtype=torch.int64)
    number[used] = torch.arange(len(used))
    classes = number[classes]
    shared = _SharedLayers(classes)
    rows, frozen = [], {}
    for key, (names, value) in trace.tensors.items():
        produced = trace.outputs.get(key)
        for layer in value.layers:
            axis = axes_of(layer)[0]
            own = shared(layer.reshape(-1))
            rows.append(Row(tuple(names), axis, own, produced == axis))
            if produced == axis and not bool(own.any()):
                first = int(reason[component[layer.reshape(-1)]].min())
                frozen[names[0]] = reasons[first] if first < len(reasons) else "nothing prunes with it"
    every = {id(value): value for carried in trace.values.values() for value in values_in(carried)}
    for value, layers in [(value, [shared(layer) for layer in value.layers]) for value in every.values()]:
        value.layers = layers
    return Coupling(trace.graph, trace.values, trace.shapes, len(used), rows, trace.statistics, frozen, trace.unknown)


class _SharedLayers:
    """Layers of labels -> layers of classes.

    Equal ones are one tensor: the four vectors of a batch norm, most activations.
    """

    def __init__(self, classes: Tensor):
        self.classes = classes
        # id of a layer of labels -> that layer, so that it keeps its id, and the layer of classes.
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self.layers: dict[object, Tensor] = {}  # content -> layer of classes

    def __call__(self, layer: Tensor) -> Tensor:
        if id(layer) not in self.pairs:
            self.pairs[id(layer)] = (layer, self._of(layer))
        return self.pairs[id(layer)][1]

    def _of(self, layer: Tensor) -> Tensor:
        once = layer
        for axis, (size, stride) in enumerate(zip(layer.shape, layer.stride(), strict=True)):
            once = once.narrow(axis, 0, 1) if size > 1 and stride == 0 else once
        classes = self.classes[once]
        content = classes.numpy().tobytes()
        flat = self.layers.setdefault(content, classes.flatten())
        return self.layers.setdefault((content, once.shape, layer.shape), flat.reshape(once.shape).expand(layer.shape))
