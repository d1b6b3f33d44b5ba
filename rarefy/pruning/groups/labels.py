"""Labels: what leaves together, before it is known what leaves.

Every axis of every parameter gets one integer label a position. An activation carries **layers**: integer tensors of
its rank, each with size 1 on the axes along which its labels do not vary. An element of an activation survives if its
label survives in every layer; an axis no layer varies along always keeps its whole size. A convolution's output thus
carries one layer of C labels, whatever its spatial size, and ViT's position embedding (1, 197, 768) two, of 197 and of
768 labels. Label 0 never leaves.

``Trace`` collects, while the graph runs on labels, what is tied to what (edges) and what is frozen, and by whom.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.graph.nodes import Value as Yielded
from rarefy.graph.nodes import attribute, is_tensor, operator_name

Carried = Any  # what a node carries on labels: a ``Value``, a list of them, or the plain number that it yields
Arguments = dict[str, Carried]  # of a node, by the names of its operator's schema
Kept = list["Tensor | None"]  # for each axis of a tensor, the positions that survive, or None for all


@dataclass(eq=False)
class Value:
    """What is known of an activation.

    shape: for a batch of one.  layers: of labels, int64, of size 1 or the axis's.
    """

    shape: tuple[int, ...]
    layers: list[Tensor] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return len(self.shape)


class Unknown:
    """What a rule returns when it cannot describe this use of its operator."""


def values_in(carried: Carried) -> list[Value]:
    """The ``Value``s of what a node carries: one, a list of them, or a plain number."""
    return [one for one in (carried if isinstance(carried, list) else [carried]) if isinstance(one, Value)]


class Trace:
    """The state of one run on labels: what every node carries, the edges found, and what froze what.

    whole_heads: a product of blocks (attention) ties the dims of each block, so that whole blocks leave, in place of
        the same dims of all.
    """

    def __init__(self, graph: fx.GraphModule, shapes: dict[fx.Node, Yielded], whole_heads: bool = False):
        self.graph, self.shapes, self.whole_heads = graph, shapes, whole_heads
        self.values: dict[fx.Node, Carried] = {}
        self.count = 1  # label 0 is frozen
        self.edges: list[tuple[Tensor, Tensor]] = []
        self.freezes: list[tuple[int, Tensor]] = []
        self.reasons: list[str] = []
        self.tensors: dict[int, tuple[list[str], Value]] = {}
        self.outputs: dict[int, int] = {}  # id of a weight -> the axis along which its layer makes outputs
        self.statistics: set[fx.Node] = set()
        self.unknown: dict[str, list[str]] = {}
        self.node: fx.Node | None = None

    def parameter(self, name: str) -> Carried:
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

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of the one tensor that a node yields."""
        return tuple(self.shapes[node].shape)

    def note_layer(self, weight: fx.Node, axis: int) -> None:
        """A layer makes its outputs along that axis of ``weight``.

        That is a parameter, or stands behind a standardisation of one that keeps its shape.
        """
        source = weight
        while source.op == "call_function" and source.args and isinstance(source.args[0], fx.Node):
            source = source.args[0]
        if source.op == "get_attr" and self.shapes[source].shape == self.shapes[weight].shape:
            self.outputs[id(attribute(self.graph, source))] = axis

    def fresh(self, size: int) -> Tensor:
        self.count += size
        return torch.arange(self.count - size, self.count)

    def created(self, shape: Sequence[int], axes: Iterable[int] | None = None) -> Value:
        """A tensor that comes from nowhere: fresh labels along each axis (or those of ``axes``)."""
        chosen = range(len(shape)) if axes is None else axes
        layers = [along(self.fresh(shape[axis]), axis, len(shape)) for axis in chosen if shape[axis] > 1]
        return Value(tuple(shape), layers)

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Labels at the same (broadcast) place leave together.

        Where each varies along an axis of its own (a row meets a column), all meet all: each with the other's first
        says the same in n + n edges for n * n.
        """
        if one is other:
            return
        mine, its = set(axes_of(one)) - set(axes_of(other)), set(axes_of(other)) - set(axes_of(one))
        pairs = [(one, _first(other, its)), (_first(one, mine), other)] if mine and its else [(one, other)]
        for pair in pairs:
            left, right = torch.broadcast_tensors(*pair)
            self.edges.append((left.reshape(-1), right.reshape(-1)))

    def tie_or_freeze(self, one: Tensor | None, other: Tensor | None, why: str) -> None:
        """Labels that leave together; where one side is fixed (None), so is the other."""
        if one is not None and other is not None:
            self.tie(one, other)
            return
        for labels in (one, other):
            if labels is not None:
                self.freeze(labels, why)

    def freeze(self, layer: Tensor, why: str) -> None:
        node = self.node
        where = (
            f"{operator_name(node) or node.op} at {node.meta.get('stack') or node.name}"
            if node is not None
            else "the request"
        )
        self.reasons.append(f"{why} ({where})")
        self.freezes.append((len(self.reasons) - 1, layer.reshape(-1)))

    def freeze_all(self, arguments: Yielded, why: str) -> bool:
        """Every label of the nodes among the arguments; are there any?"""
        before = len(self.freezes)

        def visit(node: fx.Node) -> fx.Node:
            for value in values_in(self.values[node]):
                for layer in value.layers:
                    self.freeze(layer, why)
            return node

        fx.map_arg(arguments, visit)
        return len(self.freezes) > before

    def only(self, layer: Tensor, axes: Collection[int]) -> Tensor:
        """The layer, its labels tied across every axis but ``axes`` (of one position along those)."""
        reduced = _first(layer, set(axes_of(layer)) - set(axes))
        if reduced is not layer:
            self.tie(layer, reduced)
        return reduced

    def keep(self, layers: Iterable[Tensor], axes: Collection[int], why: str) -> list[Tensor]:
        """Those of ``layers`` that vary along ``axes``, tied across all others; those that do not are frozen."""
        result = []
        for layer in layers:
            varying = axes_of(layer)
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
            taken = {axis for other in chosen for axis in axes_of(other)}
            if layer.numel() == 1:
                self.freeze(layer, "the only one of its kind")
            elif taken & set(axes_of(layer)):
                self.freeze(layer, "two independent axes merged into one")
            else:
                chosen.append(layer)
        return chosen

    def meet(self, operands: Sequence[Value], rank: int) -> list[Tensor]:
        """The layers of the result of an elementwise operator, broadcasting as it does.

        Labels at the same place are tied. An operand without labels along an axis keeps its size there, so the others
        do; an operand of size 1 there is spread over whatever is kept, so it asks for nothing and a map (n, 1, h, w)
        ties no channels.
        """
        sizes = [(1,) * (rank - value.rank) + value.shape for value in operands]
        members = [
            (index, layer.reshape((1,) * (rank - value.rank) + tuple(layer.shape)))
            for index, value in enumerate(operands)
            for layer in value.layers
        ]
        result = []
        for group in _overlapping(members):
            axes = sorted({axis for _, layer in group for axis in axes_of(layer)})
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


def compact(layer: Tensor) -> Tensor:
    """The same labels, of size 1 on each axis along which they do not vary; not in the memory of many more."""
    for axis, (size, stride) in enumerate(zip(layer.shape, layer.stride(), strict=True)):
        if size > 1 and stride == 0:
            layer = layer.narrow(axis, 0, 1)
    for axis in range(layer.dim()):
        if layer.shape[axis] > 1 and bool((layer == layer.narrow(axis, 0, 1)).all()):
            layer = layer.narrow(axis, 0, 1)
    held = layer.untyped_storage().nbytes() // layer.element_size()
    return layer.clone() if held > 4 * layer.numel() else layer


def axes_of(layer: Tensor) -> list[int]:
    return [axis for axis, size in enumerate(layer.shape) if size > 1]


def _first(layer: Tensor, axes: Collection[int]) -> Tensor:
    for axis in axes:
        layer = layer.narrow(axis, 0, 1)
    return layer


def along(labels: Tensor, axis: int, rank: int) -> Tensor:
    """(size,) labels as a layer along ``axis``."""
    return labels.reshape([-1 if index == axis else 1 for index in range(rank)])


def blank(yielded: Yielded) -> Carried:
    """What is carried where nothing is known: no labels, or the plain number."""
    if is_tensor(yielded):
        return Value(tuple(yielded.shape))
    return [blank(item) for item in yielded] if isinstance(yielded, (list, tuple)) else yielded


def replaced(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    """The shape with another size along one axis."""
    return (*shape[:axis], size, *shape[axis + 1 :])


def _overlapping(members: list[tuple[int, Tensor]]) -> list[list[tuple[int, Tensor]]]:
    """Layers that share an axis, directly or through a third, in one group."""
    groups: list[tuple[set[int], list[tuple[int, Tensor]]]] = []
    for index, layer in members:
        axes, group = set(axes_of(layer)), [(index, layer)]
        apart = []
        for other_axes, other in groups:
            if axes & other_axes:
                axes, group = axes | other_axes, other + group
            else:
                apart.append((other_axes, other))
        groups = [*apart, (axes, group)]
    return [group for _, group in groups]
