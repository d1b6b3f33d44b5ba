"""Survivors: the positions that stay along each axis of a tensor, and tensors cut to them, or spread out again.

``Kept`` holds, for each axis, the positions that survive in the large tensor; a ``Cut`` is a part of some axes, taken
of both tensors where a few positions stand for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rarefy.graph.nodes import Value as Yielded
from rarefy.pruning.groups.groups import Coupling
from rarefy.pruning.groups.labels import Kept, values_in

Cut = list[tuple[int, int, int]]  # axis, start, length
# Numbers of a tensor that are copied or compared at a time: they stay in the cache, and torch leaves so few to one
# thread. Threads that wait for each other at every piece cost seconds on a busy machine.
PIECE = 1 << 15


class Survivors:
    """What survives of each node of the coupled graph where the classes ``alive`` (count,) bool do."""

    def __init__(self, coupling: Coupling, alive: Tensor):
        self.coupling, self.alive = coupling, alive
        self._parts: dict[fx.Node, list[Kept]] = {}

    def parts(self, node: fx.Node) -> list[Kept]:
        """Of each tensor that it yields; none for a plain number.

        Raises InputError where what survives is no rectangle.
        """
        if node not in self._parts:
            values = values_in(self.coupling.values[node])
            self._parts[node] = [self.coupling.kept(value, self.alive) for value in values]
        return self._parts[node]

    def kept(self, node: fx.Node) -> Kept:
        """Of the one tensor that it yields; [] for a plain number."""
        return next(iter(self.parts(node)), [])

    def is_whole(self, node: fx.Node) -> bool:
        """Was nothing of it removed?"""
        return all(index is None for kept in self.parts(node) for index in kept)


def narrowed(value: Yielded, cut: Cut) -> Yielded:
    """The part of a tensor; what is none comes with an empty cut."""
    for axis, start, length in cut:
        value = value.narrow(axis, start, length)
    return value


def cut_shape(shape: Sequence[int], cut: Cut) -> list[int]:
    """The shape of such a part."""
    sizes = {axis: length for axis, _, length in cut}
    return [sizes.get(axis, size) for axis, size in enumerate(shape)]


def within(kept: Kept, cut: Cut) -> Kept:
    """The survivors that lie in a cut, from its start."""
    inside = list(kept)
    for axis, start, length in cut:
        index = inside[axis]
        if index is not None:
            inside[axis] = index[(index >= start) & (index < start + length)] - start
    return inside


def size_of(kept: Kept, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what is kept."""
    return tuple(size if index is None else len(index) for index, size in zip(kept, shape, strict=True))


def selected(kept: Kept, tensor: Tensor) -> Tensor:
    """What is kept of it."""
    for axis, index in enumerate(kept):
        if index is not None:
            tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def is_selected(kept: Kept, full: Tensor, small: Tensor) -> bool:
    """Is ``small`` what is kept of ``full``? A few rows at a time."""
    if not small.dim() or not small.numel():
        return torch.equal(selected(kept, full), small)
    rows = torch.arange(len(full)) if kept[0] is None else kept[0]
    pieces = rows.split(max(1, PIECE // (full[0].numel() or 1)))
    return all(
        torch.equal(selected([index, *kept[1:]], full), part)
        for index, part in zip(pieces, small.split([len(index) for index in pieces]), strict=True)
    )


def zeroed(kept: Kept, tensor: Tensor) -> Tensor:
    """The same shape, with zeros where nothing is kept."""
    for axis, index in enumerate(kept):
        if index is not None:
            gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
            gone[index] = False
            tensor = tensor.index_fill(axis, gone.nonzero().flatten().to(tensor.device), 0)
    return tensor


def spread(kept: Kept, shape: Sequence[int], held: Tensor, cut: Cut) -> Tensor:
    """What the small graph holds, cut, in float64, at its places in the large one, with zeros between.

    shape: in the large graph, before the cut.
    """
    parts = [(axis, *survivors_in(kept[axis], start, length)) for axis, start, length in cut]
    tensor: Tensor = double(narrowed(held, parts))
    sizes = cut_shape(shape, cut)
    for axis, index in enumerate(within(kept, cut)):
        if index is not None:
            full = tensor.new_zeros((*tensor.shape[:axis], sizes[axis], *tensor.shape[axis + 1 :]))
            tensor = full.index_copy(axis, index.to(tensor.device), tensor)
    return tensor


def double(value: Yielded) -> Yielded:
    """Floats in float64."""
    return pytree.tree_map(
        lambda one: one.double() if isinstance(one, Tensor) and one.is_floating_point() else one, value
    )


def survivors_in(index: Tensor | None, start: int, length: int) -> tuple[int, int]:
    """(the first, how many) of the positions ``index`` (None: all) that lie in a part of an axis."""
    if index is None:
        return start, length
    first, end = torch.searchsorted(index, torch.tensor([start, start + length])).tolist()
    return first, end - first
