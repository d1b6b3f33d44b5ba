"""check(): is the smaller graph the network with those channels masked?

Both graphs run side by side in float64 on one example. In the large one everything removed is set to zero after every node; what remains
of each node's output must equal what the small one computes, up to rounding: ``|difference| <= 1e-9 * magnitude`` (float64 has eps 2.2e-16,
sums here are below 1e6 terms). Where an operator takes a statistic over a pruned axis (layer norm), zeros would count, so there the
large graph computes on what is kept: that is the definition of pruning such a layer. Parameters must be equal bit for bit.

Memory: weights are widened to float64 where they are read, activations are let go after their last use, and tensors are compared a piece at a
time. What this check cannot see: behaviour at other batch sizes, and in training mode.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rarefy.capturing import attribute, example_inputs
from rarefy.counting import operator_name
from rarefy.coupling import Coupling, Kept
from rarefy.errors import SelfCheckFailed
from rarefy.labels import Value


@dataclass(frozen=True)
class Difference:
    """largest: of |small - masked| / magnitude over all nodes; nodes: how many were compared; statistics: of these on kept parts only."""

    largest: float
    nodes: int
    statistics: int


TOLERANCE = 1e-9
PIECE = 1 << 20  # numbers that are compared at a time: what they need on the way stays in the cache


@torch.no_grad()
def check(coupling: Coupling, small: fx.GraphModule, alive: Tensor, seed: int = 0) -> Difference:
    """Run the masked large graph and the small one side by side, in float64, for one sample.

    Raises SelfCheckFailed with the first layer that differs.
    """
    graph = coupling.graph
    pairs = {new.name: new for new in small.graph.nodes}
    wide: dict[fx.Node, Any] = {}
    narrow: dict[fx.Node, Any] = {}
    inputs = iter(example_inputs(graph, 1, seed))
    last = _last_uses(graph)
    remaining = [node for node in small.graph.nodes if node.op != "output"]
    position = {node: index for index, node in enumerate(remaining)}
    weights = {name for row in coupling.rows if row.produces for name in row.names}
    sizes: dict[fx.Node, float] = {}  # the magnitude of each activation of the large graph
    done, largest, compared = 0, 0.0, 0
    for node in graph.graph.nodes:
        if node.op == "output":
            break
        new = pairs.get(node.name)
        if node.op == "placeholder":
            wide[node] = _double(next(inputs))
            if new is not None:
                narrow[new] = wide[node]
                done = position[new] + 1
            continue
        if new is None:  # a node only the large graph has: nothing in the small one reads it any more
            wide[node] = _run(graph, node, wide)
            continue
        where = f"{node.meta.get('stack') or node.name} ({operator_name(node) or node.op} {node.name})"
        try:
            for step in remaining[done : position[new] + 1]:
                narrow[step] = _run(small, step, narrow)
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise SelfCheckFailed(f"{where}: the pruned network does not run: {why}; please report this model") from error
        done = max(done, position[new] + 1)
        if node.op == "get_attr":
            _compare_parameters(coupling, node, small, alive, where)
            wide[node] = _run(graph, node, wide) if node.target in weights else _masked(coupling, node, new, wide, alive)
            continue
        wide[node] = _masked(coupling, node, new, wide, alive)
        apart, count = _compare(coupling, node, wide, narrow[new], alive, where, sizes)
        largest, compared = max(largest, apart), compared + count
        for finished in last.get(node, ()):
            wide.pop(finished, None)
            sizes.pop(finished, None)
            narrow.pop(pairs[finished.name], None) if finished.name in pairs else None
    return Difference(largest, compared, sum(1 for node in coupling.statistics if node.name in pairs))


def _last_uses(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    uses: dict[fx.Node, list[fx.Node]] = {}
    for source, user in last.items():
        uses.setdefault(user, []).append(source)
    return uses


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [_double(item) for item in value] if isinstance(value, (list, tuple)) else value


def _run(graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """One node, in eval mode, floats as float64: those of a parameter where it is read, because graphs name all of them first."""
    if node.op == "get_attr":
        return False if node.target == "training" else attribute(graph, str(node.target))
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: _double(values[source]))
    args, kwargs = fx.node.map_aggregate((args, kwargs), _wider)
    return _double(node.target(*args, **kwargs))  # type: ignore[operator]


def _wider(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _masked(coupling: Coupling, node: fx.Node, new: fx.Node, wide: dict[fx.Node, Any], alive: Tensor) -> Any:
    """The node in the large graph, with everything removed set to zero."""
    value = coupling.values[node]
    if node in coupling.statistics:
        own = {source: _kept_of(coupling, source, wide[source], alive) for source in node.all_input_nodes}
        by_copy = {copied: own[source] for source, copied in zip(_sources(node), _sources(new), strict=True)}
        outputs = _run(coupling.graph, new, by_copy)
        if isinstance(value, Value):
            return _spread(coupling.kept(value, alive), value.shape, outputs)
        return [_spread(coupling.kept(part, alive), part.shape, output) for part, output in zip(value, outputs, strict=True)]
    result = _run(coupling.graph, node, wide)
    if isinstance(value, Value):
        alone = node.op != "get_attr" and result.is_contiguous() and not _shares(result, node, wide)
        return _zeroed(coupling.kept(value, alive), result, alone)
    if isinstance(value, list):
        return [_zeroed(coupling.kept(part, alive), output) for part, output in zip(value, result, strict=True)]
    return result


def _shares(result: Tensor, node: fx.Node, wide: dict[fx.Node, Any]) -> bool:
    """Is it a view of what the node reads?"""
    read = pytree.tree_leaves([wide[source] for source in node.all_input_nodes])
    place = result.untyped_storage().data_ptr()
    return any(isinstance(one, Tensor) and one.untyped_storage().data_ptr() == place for one in read)


def _sources(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _kept_of(coupling: Coupling, node: fx.Node, tensor: Any, alive: Tensor) -> Any:
    value = coupling.values[node]
    return _selected(coupling.kept(value, alive), tensor) if isinstance(value, Value) else tensor


def _selected(kept: Kept, tensor: Tensor) -> Tensor:
    for axis, index in enumerate(kept):
        if index is not None:
            tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def _zeroed(kept: Kept, tensor: Tensor, own: bool = False) -> Tensor:
    """own: nobody else reads this memory, so it is set to zero in place."""
    for axis, index in enumerate(kept):
        if index is not None:
            gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
            gone[index] = False
            places = gone.nonzero().flatten().to(tensor.device)
            tensor = tensor.index_fill_(axis, places, 0) if own else tensor.index_fill(axis, places, 0)
    return tensor


def _spread(kept: Kept, shape: Sequence[int], tensor: Tensor) -> Tensor:
    for axis, index in enumerate(kept):
        if index is not None:
            full = tensor.new_zeros((*tensor.shape[:axis], shape[axis], *tensor.shape[axis + 1 :]))
            tensor = full.index_copy(axis, index.to(tensor.device), tensor)
    return tensor


def _compare_parameters(coupling: Coupling, node: fx.Node, small: fx.GraphModule, alive: Tensor, where: str) -> None:
    """What is left of a parameter is the same numbers. (A weight needs no zeros: what it reads and makes has them.)"""
    one, other = attribute(coupling.graph, str(node.target)), attribute(small, str(node.target))
    if isinstance(one, Tensor) and not torch.equal(_kept_of(coupling, node, one, alive), other):
        raise SelfCheckFailed(f"{where}: the pruned parameter {tuple(other.shape)} is not what its labels keep of {tuple(one.shape)}")


def _magnitude(tensor: Any) -> float:
    """Largest finite absolute value."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    found = _extent(tensor)
    return found if math.isfinite(found) else _extent(tensor.nan_to_num(0, 0, 0))


def _extent(tensor: Tensor) -> float:
    """The largest absolute value; NaN where there is one."""
    low, high = tensor.aminmax()
    return float(torch.maximum(-low, high))


def _pieces(kept: Kept, full: Tensor, small: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What is kept of ``full`` beside ``small``, in pieces along the longest axis of which nothing is lost."""
    whole = [axis for axis, index in enumerate(kept) if index is None]
    axis = max(whole, key=lambda axis: full.shape[axis], default=None)
    if axis is None or full.numel() <= PIECE:
        yield _selected(kept, full), small
        return
    length = max(1, PIECE * full.shape[axis] // full.numel())
    for one, other in zip(full.split(length, axis), small.split(length, axis), strict=True):
        yield _selected(kept, one), other


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; where something is not finite, it must be the same."""
    found = _extent(one - other) if one.numel() else 0.0
    if math.isfinite(found):
        return found
    same = torch.equal(one.isfinite(), other.isfinite())
    return _magnitude(torch.where(one == other, 0, one - other)) if same else math.inf


def _compare(
    coupling: Coupling, node: fx.Node, wide: dict[fx.Node, Any], small: Any, alive: Tensor, where: str, sizes: dict[fx.Node, float]
) -> tuple[float, int]:
    """The largest difference relative to the magnitude of the node's activations, and the number of tensors compared.

    Of a view only the shape: its numbers are those of what it views, and what it gets wrong the next operator that computes shows.
    """
    value, masked = coupling.values[node], wide[node]
    if not isinstance(value, (Value, list)):
        return 0.0, 0
    parts = [(value, masked, small)] if isinstance(value, Value) else list(zip(value, masked, small, strict=True))
    viewed = isinstance(masked, Tensor) and _shares(masked, node, wide) and all(user.op != "output" for user in node.users)
    activations = [] if viewed else [node, *(source for source in node.all_input_nodes if source.op != "get_attr")]
    for each in activations:
        if each not in sizes:
            sizes[each] = _magnitude(wide[each])
    scale, largest = max((sizes[each] for each in activations), default=0.0), 0.0
    for part, full, other in parts:
        kept = coupling.kept(part, alive)
        shape = tuple(size if index is None else len(index) for index, size in zip(kept, full.shape, strict=True))
        if shape != other.shape:
            raise SelfCheckFailed(f"{where}: the pruned network has shape {tuple(other.shape)}, the masked one keeps {shape}")
        pieces = _pieces(kept, full, other)
        if viewed:
            continue
        if not full.is_floating_point():
            if not all(torch.equal(one, piece) for one, piece in pieces):
                raise SelfCheckFailed(f"{where}: the pruned network differs from the masked one in integers")
            continue
        magnitude = scale if full is masked else max(scale, _magnitude(full))
        apart = max(itertools.starmap(_apart, pieces))
        if not apart <= TOLERANCE * magnitude:
            raise SelfCheckFailed(f"{where}: the pruned network differs from the masked one by {apart:.3g} at magnitude {magnitude:.3g}")
        largest = max(largest, apart / magnitude if magnitude else 0.0)
    return largest, len(parts)
