"""cut(): the smaller graph.

Cutting is one index-select on every parameter and buffer, and new sizes in the nodes that carry sizes: the table
``RESIZE``, one row an operator that has a size, a start, an index or a number of groups among its arguments. The new
numbers are read off the labels that survive, so no row knows what a layer is. Whether the result is right is not
believed but checked: ``self_check/equivalence.py``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from rarefy.errors import InputError
from rarefy.graph.nodes import (
    argument,
    attribute,
    device_of,
    finish,
    operator_name,
    set_argument,
    set_attribute,
    share_copy,
)
from rarefy.pruning.groups.groups import Coupling
from rarefy.pruning.groups.labels import Carried, Kept
from rarefy.pruning.groups.survivors import PIECE, Survivors

aten = torch.ops.aten


def cut(coupling: Coupling, alive: Tensor) -> fx.GraphModule:
    """A new graph with the classes ``alive`` (count,) bool only; the coupled graph is left as it is.

    Raises InputError where the surviving positions cannot be expressed (named by node).
    """
    graph = coupling.graph
    small = share_copy(graph)
    slicer = Slicer(coupling, alive, small)
    for old, new in zip(graph.graph.nodes, small.graph.nodes, strict=True):
        resize = RESIZE.get(operator_name(old)) if old.op == "call_function" else None
        if resize is not None:
            try:
                resize(slicer, old, new)
            except InputError as error:
                raise InputError(f"{old.meta.get('stack') or old.name}: {error}") from error
    _cut_tensors(coupling, alive, small)
    return finish(small)


def _cut_tensors(coupling: Coupling, alive: Tensor, small: fx.GraphModule) -> None:
    kept: dict[str, dict[int, Tensor]] = {}
    for row in coupling.rows:
        mask = alive[row.classes]
        if not bool(mask.all()):
            kept.setdefault(row.names[0], {})[row.axis] = mask.nonzero().flatten()
    first = {name: row.names[0] for row in coupling.rows for name in row.names}
    done: dict[int, Tensor] = {}
    named = [*small.named_parameters(remove_duplicate=False), *small.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if id(tensor) not in done:
            data = _copied(tensor.detach(), kept.get(first.get(name, name), {}))
            done[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
        set_attribute(small, name, done[id(tensor)])


def _copied(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """A copy of the positions ``kept`` of some axes.

    Along several, a few rows at a time, so that no larger tensor is made on the way.
    """
    chosen = [(axis, index.to(tensor.device)) for axis, index in sorted(kept.items())]
    if not chosen:
        return tensor.clone()
    (first, rows), *others = chosen
    if not others:
        return tensor.index_select(first, rows)
    copied = tensor.new_empty([len(kept[axis]) if axis in kept else size for axis, size in enumerate(tensor.shape)])
    pieces = rows.split(max(1, PIECE * tensor.shape[first] // max(1, tensor.numel())))
    for part, target in zip(pieces, copied.split([len(part) for part in pieces], first), strict=True):
        part = tensor.index_select(first, part)
        for axis, index in others:
            part = part.index_select(axis, index)
        target.copy_(part)
    return copied


class Slicer:
    """What a row of ``RESIZE`` asks: the surviving positions of an axis of a node, and concrete arguments."""

    def __init__(self, coupling: Coupling, alive: Tensor, small: fx.GraphModule):
        self.coupling, self.small = coupling, small
        self.survivors = Survivors(coupling, alive)

    def kept(self, node: fx.Node) -> Kept:
        return self.survivors.kept(node)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """In the large graph."""
        shape: tuple[int, ...] = self.coupling.values[node].shape
        return shape

    def along(self, old: fx.Node) -> tuple[int, int, Tensor | None]:
        """Of the axis ``dim`` of the node's first argument: which it is, its size, and what survives of it."""
        source = source_of(old)
        shape = self.shape(source)
        axis = argument(old, "dim") % len(shape)
        return axis, shape[axis], self.kept(source)[axis]

    def size(self, node: fx.Node, axis: int) -> int:
        index = self.kept(node)[axis]
        return self.shape(node)[axis] if index is None else len(index)

    def number(self, old: fx.Node, name: str) -> Carried:
        """A plain number for an argument that may be a node."""
        value = argument(old, name)
        return self.coupling.values[value] if isinstance(value, fx.Node) else value

    def sizes(self, old: fx.Node, new: fx.Node, asked: Iterable[int | fx.Node], offset: int = 0) -> list[int | fx.Node]:
        """The sizes ``asked`` for the axes of ``old`` from ``offset`` on; of a pruned axis, what survives."""
        kept, shape = self.kept(old), self.shape(old)
        result: list[int | fx.Node] = []
        for axis, size in enumerate(asked, offset):
            index = kept[axis]
            if index is None or (isinstance(size, int) and size == -1):
                result.append(size)
            elif isinstance(size, fx.Node):  # a multiple of the batch: n * heads
                with new.graph.inserting_before(new):
                    times = new.graph.call_function(operator.mul, (size, len(index)))
                    result.append(new.graph.call_function(operator.floordiv, (times, shape[axis])))
            else:
                result.append(len(index))
        return result

    def constant(self, new: fx.Node, value: Tensor) -> fx.Node:
        """A node that reads ``value``, kept as a buffer."""
        name = f"{new.name}_index"
        set_attribute(self.small, name, value.to(device_of(self.small)))
        with new.graph.inserting_before(new):
            return new.graph.get_attr(name)


def source_of(node: fx.Node) -> fx.Node:
    """The first argument."""
    return node.all_input_nodes[0]


# ------------------------------------------------------------------------------------------------------------- resize
# A row takes the slicer, the node of the coupled graph and its copy, whose arguments it sets.

Resize = Callable[[Slicer, fx.Node, fx.Node], None]


def _sizes(name: str) -> Resize:
    def resize(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
        if not slicer.survivors.is_whole(old):
            set_argument(new, name, slicer.sizes(old, new, argument(new, name)))

    return resize


def _unflatten(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
    axis, _, _ = slicer.along(old)
    set_argument(new, "sizes", slicer.sizes(old, new, argument(new, "sizes"), axis))


def _pieces(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
    """split, chunk and their kin become ``split_with_sizes`` where the pieces may have become unequal."""
    axis, _, kept = slicer.along(old)
    if kept is None:
        return
    sizes = []
    for part, survivors in zip(slicer.coupling.values[old], slicer.survivors.parts(old), strict=True):
        index = survivors[axis]
        sizes.append(part.shape[axis] if index is None else len(index))
    new.target, new.args, new.kwargs = aten.split_with_sizes.default, (new.args[0], sizes, axis), {}


def _take(slicer: Slicer, new: fx.Node, axis: int, kept: Tensor, wanted: Tensor) -> None:
    """Positions ``wanted`` of an axis of which ``kept`` survive: a slice if they are evenly spaced, else an index."""
    place = torch.searchsorted(kept, wanted[torch.isin(wanted, kept)])
    steps = place.diff().unique()
    if len(place) == 1 or (len(steps) == 1 and int(steps[0]) > 0):
        step = int(steps[0]) if len(steps) else 1
        new.target, new.args = aten.slice.Tensor, (new.args[0], axis, int(place[0]), int(place[-1]) + 1, step)
    else:
        new.target, new.args = aten.index_select.default, (new.args[0], axis, slicer.constant(new, place))
    new.kwargs = {}


def _slice(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
    axis, size, kept = slicer.along(old)
    if kept is None:
        return
    if operator_name(old) == "narrow":
        start = slicer.number(old, "start") % size
        wanted = range(start, start + slicer.number(old, "length"))
    else:
        wanted = range(*slice(*(slicer.number(old, name) for name in ("start", "end", "step"))).indices(size))
    _take(slicer, new, axis, kept, torch.tensor(list(wanted)))


def _scatter(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
    """The replaced part starts and ends where its survivors do."""
    _, size, kept = slicer.along(old)
    if kept is None:
        return
    if operator_name(old) == "select_scatter":
        _select(slicer, old, new)
        return
    start, end, _ = slice(slicer.number(old, "start"), slicer.number(old, "end")).indices(size)
    set_argument(new, "start", int((kept < start).sum()))
    set_argument(new, "end", int((kept < end).sum()))


def _select(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
    _, size, kept = slicer.along(old)
    if kept is not None:
        set_argument(new, "index", int(torch.searchsorted(kept, slicer.number(old, "index") % size)))


def _index(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
    """A constant index along a pruned axis: the survivors of its result, at their new places."""
    source = source_of(old)
    kept = slicer.kept(source)
    single = operator_name(old) == "index_select"
    asked = argument(old, "index" if single else "indices")
    axes = [slicer.along(old)[0]] if single else [axis for axis, index in enumerate(asked) if index is not None]
    if all(kept[axis] is None for axis in axes):
        return
    axis = axes[0]
    survivors = kept[axis]
    assert survivors is not None
    index = attribute(slicer.coupling.graph, asked if single else asked[axis]).cpu()
    index = torch.where(index < 0, index + slicer.shape(source)[axis], index)
    for place, positions in enumerate(slicer.kept(old)[axis : axis + index.dim()]):
        if positions is not None:
            index = index.index_select(place, positions)
    constant = slicer.constant(new, torch.searchsorted(survivors, index))
    if single:
        set_argument(new, "index", constant)
    else:
        held = argument(new, "indices")
        set_argument(new, "indices", [constant if place == axis else value for place, value in enumerate(held)])


def _pad(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
    source, pad = source_of(old), list(argument(old, "pad"))
    shape, padded = slicer.shape(source), slicer.shape(old)
    for pair in range(len(pad) // 2):
        axis = len(shape) - 1 - pair
        before, after = pad[2 * pair], pad[2 * pair + 1]
        read, made = slicer.kept(source)[axis], slicer.kept(old)[axis]
        if (before, after) == (0, 0) or (made is None and read is None):
            continue
        made = torch.arange(padded[axis]) if made is None else made
        read = torch.arange(shape[axis]) if read is None else read
        lost_before = int((read < -before).sum()) if before < 0 else 0
        lost_after = int((read >= shape[axis] + after).sum()) if after < 0 else 0
        pad[2 * pair] = int((made < before).sum()) if before > 0 else -lost_before
        pad[2 * pair + 1] = int((made >= padded[axis] - after).sum()) if after > 0 else -lost_after
    set_argument(new, "pad", pad)


def _groups(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
    """Depthwise: as many groups as channels. Otherwise each group became narrower and their number stays."""
    source, groups = source_of(old), argument(old, "groups")
    shape = slicer.shape(source)
    axis = len(shape) - len(slicer.shape(argument(old, "weight"))) + 1
    if groups > 1 and groups == shape[axis]:
        set_argument(new, "groups", slicer.size(source, axis))


def _normalized_shape(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
    shape: Sequence[int] = argument(old, "normalized_shape")
    set_argument(new, "normalized_shape", slicer.sizes(old, new, shape, len(slicer.shape(old)) - len(shape)))


def _group_norm(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
    if argument(old, "num_groups") == slicer.shape(old)[1]:
        set_argument(new, "num_groups", slicer.size(old, 1))


def _attention(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
    """The scale stays that of the trained network."""
    query = source_of(old)
    if argument(old, "scale") is None and slicer.kept(query)[-1] is not None:
        set_argument(new, "scale", float(slicer.shape(query)[-1]) ** -0.5)


def _squeeze(slicer: Slicer, old: fx.Node, new: fx.Node) -> None:
    """``squeeze()`` of every axis of size 1 must not take one that pruning made so."""
    if old.target is aten.squeeze.default:
        ones = [axis for axis, size in enumerate(slicer.shape(source_of(old))) if size == 1]
        new.target, new.args = aten.squeeze.dims, (new.args[0], ones)


RESIZE: dict[str, Resize] = {
    **dict.fromkeys(
        ("view", "_unsafe_view", "expand", "broadcast_to", "new_zeros", "new_ones", "new_full", "new_empty"),
        _sizes("size"),
    ),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), _sizes("size")),
    "reshape": _sizes("shape"),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk"), _pieces),
    **dict.fromkeys(("slice", "narrow"), _slice),
    "select": _select,
    **dict.fromkeys(("slice_scatter", "select_scatter"), _scatter),
    **dict.fromkeys(("index", "index_select"), _index),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _groups
    ),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized_shape),
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _attention,
    "squeeze": _squeeze,
}
