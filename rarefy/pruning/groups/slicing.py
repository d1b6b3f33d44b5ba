"""cut(): the smaller graph.

Cutting is one index-select on every parameter and buffer, and new sizes in the nodes that carry sizes: the table ``RESIZE``, one row an
operator that has a size, a start, an index or a number of groups among its arguments. The new numbers are read off the labels that survive,
so no row knows what a layer is. Whether the result is right is not believed but checked: ``twin.py``.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy.errors import InputError
from rarefy.graph.nodes import attribute, finish, operator_name, set_attribute, share_copy
from rarefy.pruning.groups.groups import Coupling, Kept
from rarefy.pruning.groups.labels import Value

aten = torch.ops.aten
# Numbers of a tensor that are copied or compared at a time: they stay in the cache, and torch leaves so few to one thread. Threads that wait for each other
# at every piece cost seconds on a busy machine.
PIECE = 1 << 15


def cut(coupling: Coupling, alive: Tensor) -> fx.GraphModule:
    """A new graph with the classes ``alive`` (count,) bool only; the coupled graph is left as it is.

    Raises InputError where the surviving positions cannot be expressed (named by node).
    """
    graph = coupling.graph
    small = share_copy(graph)
    knife = _Knife(coupling, alive, small)
    for old, new in zip(graph.graph.nodes, small.graph.nodes, strict=True):
        resize = RESIZE.get(operator_name(old)) if old.op == "call_function" else None
        if resize is not None:
            try:
                resize(knife, old, new)
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
            data = _selected(tensor.detach(), kept.get(first.get(name, name), {}))
            done[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
        set_attribute(small, name, done[id(tensor)])


def _selected(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """A copy of the positions ``kept`` of some axes; along several, a few rows at a time, so that no larger tensor is made on the way."""
    chosen = [(axis, index.to(tensor.device)) for axis, index in sorted(kept.items())]
    if not chosen:
        return tensor.clone()
    (first, rows), *others = chosen
    if not others:
        return tensor.index_select(first, rows)
    made = tensor.new_empty([len(kept[axis]) if axis in kept else size for axis, size in enumerate(tensor.shape)])
    pieces = rows.split(max(1, PIECE * tensor.shape[first] // max(1, tensor.numel())))
    for part, target in zip(pieces, made.split([len(part) for part in pieces], first), strict=True):
        part = tensor.index_select(first, part)
        for axis, index in others:
            part = part.index_select(axis, index)
        target.copy_(part)
    return made


class _Knife:
    """What a row of ``RESIZE`` asks: the surviving positions of an axis of a node, and concrete arguments."""

    def __init__(self, coupling: Coupling, alive: Tensor, small: fx.GraphModule):
        self.coupling, self.alive, self.small = coupling, alive, small

    def kept(self, node: Any) -> Kept:
        value = self.coupling.values[node]
        return self.coupling.kept(value, self.alive) if isinstance(value, Value) else []

    def size(self, node: Any, axis: int) -> int:
        kept, shape = self.kept(node), self.coupling.values[node].shape
        index = kept[axis]
        return shape[axis] if index is None else len(index)

    def number(self, argument: Any) -> Any:
        """A plain number for an argument that may be a node."""
        return self.coupling.values[argument] if isinstance(argument, fx.Node) else argument

    def sizes(self, old: fx.Node, new: fx.Node, asked: Sequence[Any], offset: int = 0) -> list[Any]:
        """The sizes ``asked`` for the axes of ``old`` from ``offset`` on, where these are pruned replaced by what survives."""
        kept, shape = self.kept(old), self.coupling.values[old].shape
        result = []
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
        device = next(
            (tensor.device for tensor in itertools.chain(self.small.parameters(), self.small.buffers())), value.device
        )
        set_attribute(self.small, name, value.to(device))
        with new.graph.inserting_before(new):
            return new.graph.get_attr(name)


# ---------------------------------------------------------------------------------------------------------------- resize
# A row takes the knife, the node of the coupled graph and its copy, whose arguments it sets.


def _set(new: fx.Node, name: str, value: Any) -> None:
    """Set an argument by its name in the operator's schema."""
    names = [argument.name for argument in new.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name)
    if place < len(new.args):
        new.update_arg(place, value)
    else:
        new.update_kwarg(name, value)


def _get(node: fx.Node, name: str) -> Any:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    place = next(index for index, argument in enumerate(schema) if argument.name == name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, schema[place].default_value)


def _sizes(name: str) -> Callable[[_Knife, fx.Node, fx.Node], None]:
    def resize(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
        if any(index is not None for index in knife.kept(old)):
            _set(new, name, knife.sizes(old, new, _get(new, name)))

    return resize


def _unflatten(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
    source: Any = old.args[0]
    axis = _get(old, "dim") % knife.coupling.values[source].rank
    _set(new, "sizes", knife.sizes(old, new, _get(new, "sizes"), axis))


def _pieces(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
    """split, chunk and their kin become ``split_with_sizes`` where the pieces may have become unequal."""
    source: Any = old.args[0]
    axis = _get(old, "dim") % knife.coupling.values[source].rank
    if knife.kept(source)[axis] is None:
        return
    sizes = []
    for part in knife.coupling.values[old]:
        index = knife.coupling.kept(part, knife.alive)[axis]
        sizes.append(part.shape[axis] if index is None else len(index))
    new.target = aten.split_with_sizes.default
    new.args, new.kwargs = (new.args[0], sizes, axis), {}


def _take(knife: _Knife, new: fx.Node, axis: int, kept: Tensor, wanted: Tensor) -> None:
    """Positions ``wanted`` of an axis of which ``kept`` survive: a slice if they are evenly spaced, else an index."""
    place = torch.searchsorted(kept, wanted[torch.isin(wanted, kept)])
    steps = place.diff().unique()
    if len(place) == 1 or (len(steps) == 1 and int(steps[0]) > 0):
        step = int(steps[0]) if len(steps) else 1
        new.target, new.args, new.kwargs = (
            aten.slice.Tensor,
            (new.args[0], axis, int(place[0]), int(place[-1]) + 1, step),
            {},
        )
    else:
        new.target, new.args, new.kwargs = (
            aten.index_select.default,
            (new.args[0], axis, knife.constant(new, place)),
            {},
        )


def _slice(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
    source: Any = old.args[0]
    shape = knife.coupling.values[source].shape
    axis = _get(old, "dim") % len(shape)
    kept = knife.kept(source)[axis]
    if kept is None:
        return
    if operator_name(old) == "narrow":
        start, length = knife.number(_get(old, "start")), knife.number(_get(old, "length"))
        start %= shape[axis]
        wanted = range(start, start + length)
    else:
        start, end, step = (knife.number(_get(old, name)) for name in ("start", "end", "step"))
        wanted = range(*slice(start, end, step).indices(shape[axis]))
    _take(knife, new, axis, kept, torch.tensor(list(wanted)))


def _scatter(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
    """The replaced part starts and ends where its survivors do."""
    source: Any = old.args[0]
    shape = knife.coupling.values[source].shape
    axis = _get(old, "dim") % len(shape)
    kept = knife.kept(source)[axis]
    if kept is None:
        return
    if operator_name(old) == "select_scatter":
        _set(new, "index", int(torch.searchsorted(kept, knife.number(_get(old, "index")) % shape[axis])))
        return
    start, end, _ = slice(knife.number(_get(old, "start")), knife.number(_get(old, "end"))).indices(shape[axis])
    _set(new, "start", int((kept < start).sum()))
    _set(new, "end", int((kept < end).sum()))


def _select(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
    source: Any = old.args[0]
    shape = knife.coupling.values[source].shape
    axis = _get(old, "dim") % len(shape)
    kept = knife.kept(source)[axis]
    if kept is not None:
        index = knife.number(_get(old, "index")) % shape[axis]
        _set(new, "index", int(torch.searchsorted(kept, index)))


def _index(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
    """A constant index along a pruned axis: the survivors of its result, at their new places."""
    source: Any = old.args[0]
    kept = knife.kept(source)
    single = operator_name(old) == "index_select"
    raw: Any = old.args[2] if single else old.args[1]
    axes = [_get(old, "dim") % len(kept)] if single else [axis for axis, index in enumerate(raw) if index is not None]
    if all(kept[axis] is None for axis in axes):
        return
    axis = axes[0]
    survivors = kept[axis]
    assert survivors is not None
    index = attribute(knife.coupling.graph, str((raw if single else raw[axis]).target)).cpu()
    index = torch.where(index < 0, index + knife.coupling.values[source].shape[axis], index)
    for place, positions in enumerate(knife.kept(old)[axis : axis + index.dim()]):
        if positions is not None:
            index = index.index_select(place, positions)
    constant = knife.constant(new, torch.searchsorted(survivors, index))
    if single:
        new.update_arg(2, constant)
    else:
        new.update_arg(1, [constant if place == axis else value for place, value in enumerate(new.args[1])])  # type: ignore[arg-type]


def _pad(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
    source: Any = old.args[0]
    pad = list(_get(old, "pad"))
    shape = knife.coupling.values[source].shape
    before_kept, after_kept = knife.kept(source), knife.kept(old)
    for pair in range(len(pad) // 2):
        axis = len(shape) - 1 - pair
        before, after = pad[2 * pair], pad[2 * pair + 1]
        index, own = after_kept[axis], before_kept[axis]
        if (before, after) == (0, 0) or (index is None and own is None):
            continue
        total = knife.coupling.values[old].shape[axis]
        index = torch.arange(total) if index is None else index
        own = torch.arange(shape[axis]) if own is None else own
        lost_before = int((own < -before).sum()) if before < 0 else 0
        lost_after = int((own >= shape[axis] + after).sum()) if after < 0 else 0
        pad[2 * pair] = int((index < before).sum()) if before > 0 else -lost_before
        pad[2 * pair + 1] = int((index >= total - after).sum()) if after > 0 else -lost_after
    _set(new, "pad", pad)


def _groups(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
    """Depthwise: as many groups as channels. Otherwise each group became narrower and their number stays."""
    source: Any = old.args[0]
    made_by: Any = old.args[1]
    groups = _get(old, "groups")
    value, weight = knife.coupling.values[source], knife.coupling.values[made_by]
    axis = value.rank - weight.rank + 1
    if groups > 1 and groups == value.shape[axis]:
        _set(new, "groups", knife.size(source, axis))


def _normalized_shape(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
    shape = _get(old, "normalized_shape")
    _set(new, "normalized_shape", knife.sizes(old, new, shape, knife.coupling.values[old].rank - len(shape)))


def _group_norm(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
    if _get(old, "num_groups") == knife.coupling.values[old].shape[1]:
        _set(new, "num_groups", knife.size(old, 1))


def _attention(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
    """The scale stays that of the trained network."""
    query: Any = old.args[0]
    if _get(old, "scale") is None and knife.kept(query)[-1] is not None:
        _set(new, "scale", float(knife.coupling.values[query].shape[-1]) ** -0.5)


def _squeeze(knife: _Knife, old: fx.Node, new: fx.Node) -> None:
    """``squeeze()`` of every axis of size 1 must not take one that pruning made so."""
    if old.target is aten.squeeze.default:
        source: Any = old.args[0]
        shape = knife.coupling.values[source].shape
        new.target, new.args = aten.squeeze.dims, (new.args[0], [axis for axis, size in enumerate(shape) if size == 1])


RESIZE: dict[str, Callable[[_Knife, fx.Node, fx.Node], None]] = {
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
