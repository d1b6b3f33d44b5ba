"""check(): is the smaller graph the network with those channels masked?

By induction over the nodes. The small graph runs on one example. Of each node, given the small one's inputs, with zeros put where channels were removed,
the large graph's node must yield, where something is kept, what the small graph's yields:

    keep(large(spread(x))) = small(x)         up to rounding in float64, |difference| <= 1e-9 * magnitude (eps is 2.2e-16, sums are below 1e6 terms)

Parameters must be what their labels keep, bit for bit; the outputs must be kept whole; then the outputs are equal, because each node's are.
Operators that only move numbers are run on the numbers 0, 1, 2, ..., so that no two values are alike by chance, and must agree exactly. Of operators that treat
positions alike (``alike.py``) a few positions are compared, in the middle; the shape of the whole must fit. A node that is the same in both graphs and loses
nothing of what it reads is equal. Where an operator takes a statistic over a pruned axis (layer norm), it is taken over what is kept, which is the
definition of pruning such a layer; of those only shapes and sources are compared.

Memory: beside both networks' weights the small one's activations, let go after their last use, and one node of the large one. What this check cannot see:
behaviour at other batch sizes, and in training mode. Given up: the two networks are not run from end to end, so the sum of all roundings is not known.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rarefy.alike import Run, alike, lengths, sources_of
from rarefy.capturing import attribute, example_inputs
from rarefy.counting import operator_name
from rarefy.coupling import Coupling, Kept
from rarefy.errors import SelfCheckFailed
from rarefy.labels import Value
from rarefy.ties import only_moves


@dataclass(frozen=True)
class Difference:
    """largest: of |small - masked| / magnitude over all nodes; nodes: how many were compared; statistics: of these on kept parts only."""

    largest: float
    nodes: int
    statistics: int


TOLERANCE = 1e-9
MOST = 1 << 16  # numbers of a tensor that stand for all, about, where an operator treats positions alike
TINY = (torch.float16, torch.bfloat16)  # run in float32


@torch.no_grad()
def check(coupling: Coupling, small: fx.GraphModule, alive: Tensor, seed: int = 0) -> Difference:
    """Run the small graph for one sample, and beside each of its nodes the large graph's on the same numbers.

    Raises SelfCheckFailed with the first layer that differs.
    """
    graph = coupling.graph
    twins = _Twins(coupling, small, alive)
    inputs = iter(example_inputs(graph, 1, seed))
    last = _last_uses(graph)
    remaining = [node for node in small.graph.nodes if node.op != "output"]
    position = {node: index for index, node in enumerate(remaining)}
    done, largest, compared = 0, 0.0, 0
    for node in graph.graph.nodes:
        if node.op == "output":
            twins.compare_outputs(node, next(iter(reversed(small.graph.nodes))))
            break
        new = twins.pairs.get(node.name)
        if node.op == "placeholder":
            value = next(inputs)
            if new is not None:
                twins.narrow[new] = _widened(value)
                done = position[new] + 1
            continue
        if new is None:  # a node only the large graph has: what reads it there asks for it
            continue
        where = f"{node.meta.get('stack') or node.name} ({operator_name(node) or node.op} {node.name})"
        try:
            for step in remaining[done : position[new] + 1]:
                twins.run(step)
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise SelfCheckFailed(f"{where}: the pruned network does not run: {why}; please report this model") from error
        done = max(done, position[new] + 1)
        if node.op == "get_attr":
            twins.compare_parameters(node, where)
            continue
        apart, count = twins.compare(node, new, where)
        largest, compared = max(largest, apart), compared + count
        for finished in last.get(node, ()):
            if finished.name in twins.pairs:
                twins.narrow.pop(twins.pairs[finished.name], None)
    return Difference(largest, compared, sum(1 for node in coupling.statistics if node.name in twins.pairs))


def _last_uses(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    uses: dict[fx.Node, list[fx.Node]] = {}
    for source, user in last.items():
        uses.setdefault(user, []).append(source)
    return uses


Cut = list[tuple[int, int, int]]  # axis, start, length


class _Twins:
    """Both graphs, and what the small one computed so far (``narrow``, by its nodes)."""

    def __init__(self, coupling: Coupling, small: fx.GraphModule, alive: Tensor):
        self.coupling, self.small, self.alive = coupling, small, alive
        self.pairs = {new.name: new for new in small.graph.nodes}
        self.narrow: dict[fx.Node, Any] = {}
        self.weights = {name for row in coupling.rows if row.produces for name in row.names}
        self.known: dict[fx.Node, Any] = {}

    def run(self, step: fx.Node) -> None:
        """One node of the small graph."""
        if step.op == "get_attr":
            self.narrow[step] = _attribute(self.small, step)
            return
        self.narrow[step] = _widened(_called(step, [_widened(self.narrow[source]) for source in sources_of(step)], torch.float32))

    def kept(self, node: fx.Node) -> Any:
        """Kept of a tensor, a list of them for a list; [] for a plain number."""
        if node not in self.known:
            value = self.coupling.values[node]
            if isinstance(value, list):
                self.known[node] = [self.coupling.kept(part, self.alive) for part in value]
            else:
                self.known[node] = self.coupling.kept(value, self.alive) if isinstance(value, Value) else []
        return self.known[node]

    def compare_outputs(self, old: fx.Node, new: fx.Node) -> None:
        if [source.name for source in sources_of(old)] != [source.name for source in sources_of(new)]:
            raise SelfCheckFailed("output: the pruned network yields other nodes; please report this model")
        for source in sources_of(old):
            if any(index is not None for index in pytree.tree_leaves(self.kept(source))):
                raise SelfCheckFailed(f"{source.name}: an output of the network lost a part of itself; please report this model")

    def compare_parameters(self, node: fx.Node, where: str) -> None:
        """What is left of a parameter is the same numbers."""
        one, other = attribute(self.coupling.graph, str(node.target)), attribute(self.small, str(node.target))
        if isinstance(one, Tensor) and isinstance(self.coupling.values[node], Value):
            one_kept = _selected(self.kept(node), one)
            if not torch.equal(one_kept, other):
                raise SelfCheckFailed(
                    f"{where}: the pruned parameter {tuple(other.shape)} is not what its labels keep of {tuple(one.shape)}"
                )

    def compare(self, node: fx.Node, new: fx.Node, where: str) -> tuple[float, int]:
        """The largest difference relative to the magnitude of the node's activations, and the number of tensors compared."""
        value, found = self.coupling.values[node], self.narrow[new]
        if not isinstance(value, (Value, list)):
            return 0.0, 0
        parts = [value] if isinstance(value, Value) else value
        kepts = [self.kept(node)] if isinstance(value, Value) else self.kept(node)
        for part, kept, tensor in zip(parts, kepts, [found] if isinstance(value, Value) else found, strict=True):
            shape = _size(kept, part.shape)
            if shape != tuple(tensor.shape):
                raise SelfCheckFailed(f"{where}: the pruned network has shape {tuple(tensor.shape)}, the masked one keeps {shape}")
        if only_moves(node):
            one, other, magnitude = *self._moved(node, new, where), 0.0
        elif node in self.coupling.statistics:
            self._same_sources(node, new, where)
            return 0.0, len(parts)
        elif self._same(node, new):
            return 0.0, len(parts)
        else:
            one, other, magnitude = self._computed(node, new)
        largest = 0.0
        for kept, full, tensor in zip(kepts, _listed(one), _listed(other), strict=True):
            full = _selected(kept, full)
            if full.shape != tensor.shape:
                raise SelfCheckFailed(
                    f"{where}: the pruned network has shape {tuple(tensor.shape)}, the masked one keeps {tuple(full.shape)}"
                )
            if not full.is_floating_point():
                if not torch.equal(full, tensor):
                    raise SelfCheckFailed(f"{where}: the pruned network differs from the masked one in where it puts its numbers")
                continue
            scale = max(magnitude, _magnitude(full))
            apart = _apart(full, tensor)
            if not apart <= TOLERANCE * scale:
                raise SelfCheckFailed(f"{where}: the pruned network differs from the masked one by {apart:.3g} at magnitude {scale:.3g}")
            largest = max(largest, apart / scale if scale else 0.0)
        return largest, len(parts)

    def _same_sources(self, node: fx.Node, new: fx.Node, where: str) -> None:
        one, other = ([source.name for source in sources_of(each) if self._floating(source)] for each in (node, new))
        if one != other:
            raise SelfCheckFailed(f"{where}: the pruned network reads {other}, the masked one {one}; please report this model")

    def _floating(self, source: fx.Node) -> bool:
        """Of either graph: does it yield a tensor of floats? (A node only the small graph has holds sizes and indices.)"""
        found = self.coupling.found[source] if source in self.coupling.found else self.narrow[source]
        return isinstance(found, Tensor) and found.is_floating_point()

    def _same(self, node: fx.Node, new: fx.Node) -> bool:
        """The same operator with the same arguments, of which nothing was removed."""
        if any(index is not None for each in (node, *sources_of(node)) for index in pytree.tree_leaves(self.kept(each))):
            return False
        named = [fx.map_arg((each.args, each.kwargs), lambda source: source.name) for each in (node, new)]
        return bool(node.target == new.target and named[0] == named[1])

    def _moved(self, node: fx.Node, new: fx.Node, where: str) -> tuple[Any, Any]:
        """Both operators on 0, 1, 2, ... in place of the floats they read."""
        self._same_sources(node, new, where)
        sources = sources_of(node)
        cuts, sizes = self._cuts(node, new)
        full: dict[str, Tensor] = {}
        part: dict[str, Tensor] = {}
        count = 0
        for source, cut in zip(sources, _filled(cuts, len(sources)), strict=True):
            if self._floating(source) and source.name not in full:
                shape = list(self.coupling.values[source].shape)
                for axis, _, length in cut:
                    shape[axis] = length
                size = math.prod(shape)
                full[source.name] = torch.arange(count, count + size, dtype=torch.int32, device=self._device(new)).reshape(shape)
                part[source.name] = _selected(self.kept(source), full[source.name])
                count += size
        one = _called(node, [full[source.name] if source.name in full else self._large(source) for source in sources], sizes=sizes)
        other = _called(new, [part[source.name] if source.name in part else self.narrow[source] for source in sources_of(new)], sizes=sizes)
        return one, other

    def _device(self, new: fx.Node) -> torch.device:
        first: Tensor = _listed(self.narrow[new])[0]
        return first.device

    def _computed(self, node: fx.Node, new: fx.Node) -> tuple[Any, Any, float]:
        """Both operators in float64 on the positions that stand for all; and the magnitude of the activations they read."""
        sources, news = sources_of(node), sources_of(new)
        cuts, sizes = self._cuts(node, new)
        own = [_double(_narrowed(self.narrow[source], cut)) for source, cut in zip(news, _filled(cuts, len(news)), strict=True)]
        wide = [self._large(source, cut) for source, cut in zip(sources, _filled(cuts, len(sources)), strict=True)]
        read = [value for source, value in zip(news, own, strict=True) if source.op != "get_attr"]
        magnitude = max((_magnitude(value) for value in pytree.tree_leaves(read)), default=0.0)
        return _called(node, wide, torch.float64, sizes), _called(new, own, torch.float64, sizes), magnitude

    def _cuts(self, node: fx.Node, new: fx.Node) -> tuple[list[Cut], dict[int, int]]:
        """For each source of both nodes, where to cut it, and the sizes among their arguments that change so.

        Nothing is cut where they read different things, or the same one at two places that are cut in two ways.
        """
        sources, value = sources_of(node), self.coupling.values[node]
        values = [self.coupling.values[source] for source in sources]
        if any(isinstance(one, list) for one in values):
            return [], {}
        result = value[0].shape if isinstance(value, list) else value.shape
        shapes = [one.shape if isinstance(one, Value) else None for one in values]
        runs = [run for run in alike(node, shapes, result) if self._whole(run, node, sources)]
        if any(run.sources.keys() - range(len(sources_of(new))) for run in runs) or not all(
            sources[place].name == sources_of(new)[place].name for run in runs for place in run.sources
        ):
            return [], {}
        cuts: list[Cut] = [[] for _ in sources]
        sizes: dict[int, int] = {}
        for run, length in lengths(runs, shapes, result, MOST):
            for place, axis in run.sources.items():
                size = shapes[place][axis]  # type: ignore[index]
                cuts[place].append((axis, (size - length) // 2, length))
            if run.sized:
                sizes[run.result] = length
        return cuts, sizes

    def _whole(self, run: Run, node: fx.Node, sources: Sequence[fx.Node]) -> bool:
        """Is nothing removed along those axes?"""
        made = self.kept(node) if isinstance(self.coupling.values[node], list) else [self.kept(node)]
        return all(kept[run.result] is None for kept in made) and all(
            self.kept(sources[place])[axis] is None for place, axis in run.sources.items()
        )

    def _large(self, source: fx.Node, cut: Sequence[tuple[int, int, int]] = ()) -> Any:
        """What the node of the large graph holds, in float64, with everything removed set to zero.

        Of a weight nothing is set to zero: what it reads and makes has the zeros.
        """
        value, new = self.coupling.values[source], self.pairs.get(source.name)
        if source.op == "get_attr":
            held = _double(_narrowed(_attribute(self.coupling.graph, source), cut))
            return _zeroed(self.kept(source), held) if isinstance(value, Value) and source.target not in self.weights else held
        if not isinstance(value, (Value, list)):
            return value
        if new is None:
            return _narrowed(_called(source, [self._large(each) for each in sources_of(source)], torch.float64), cut)
        held = self.narrow[new]
        if isinstance(value, list):
            return [_spread(kept, part.shape, _double(one)) for part, kept, one in zip(value, self.kept(source), held, strict=True)]
        return _spread(self.kept(source), value.shape, _double(_narrowed(held, cut)))


def _filled(cuts: list[Cut], count: int) -> list[Cut]:
    """As many as ``count``: what only the small graph reads, an index or a size, stands last and is not cut."""
    return [*cuts[:count], *([] for _ in range(count - len(cuts)))]


def _listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _attribute(graph: fx.GraphModule, node: fx.Node) -> Any:
    """In eval mode."""
    return False if node.target == "training" else attribute(graph, str(node.target))


def _called(
    node: fx.Node, values: Sequence[Any], dtype: torch.dtype | None = None, sizes: Mapping[int, int] = types.MappingProxyType({})
) -> Any:
    """The node's operator, ``values`` in place of ``sources_of(node)``; dtype: in place of any float's among the arguments.

    sizes: axis -> size, in the list that is the second argument.
    """
    waiting = iter(values)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(waiting))
    if sizes:
        asked: Any = args[1]
        args = (args[0], [sizes.get(axis, size) if size != -1 else size for axis, size in enumerate(asked)], *args[2:])
    if dtype is not None:
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda one: torch.promote_types(one, dtype) if isinstance(one, torch.dtype) and one.is_floating_point else one
        )
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _widened(value: Any) -> Any:
    return pytree.tree_map(lambda one: one.float() if isinstance(one, Tensor) and one.dtype in TINY else one, value)


def _double(value: Any) -> Any:
    return pytree.tree_map(lambda one: one.double() if isinstance(one, Tensor) and one.is_floating_point() else one, value)


def _narrowed(value: Any, cut: Sequence[tuple[int, int, int]]) -> Any:
    for axis, start, length in cut:
        value = value.narrow(axis, start, length)
    return value


def _size(kept: Kept, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size if index is None else len(index) for index, size in zip(kept, shape, strict=True))


def _selected(kept: Kept, tensor: Tensor) -> Tensor:
    for axis, index in enumerate(kept):
        if index is not None:
            tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def _zeroed(kept: Kept, tensor: Tensor) -> Tensor:
    for axis, index in enumerate(kept):
        if index is not None:
            gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
            gone[index] = False
            tensor = tensor.index_fill(axis, gone.nonzero().flatten().to(tensor.device), 0)
    return tensor


def _spread(kept: Kept, shape: Sequence[int], tensor: Tensor) -> Tensor:
    for axis, index in enumerate(kept):
        if index is not None:
            full = tensor.new_zeros((*tensor.shape[:axis], shape[axis], *tensor.shape[axis + 1 :]))
            tensor = full.index_copy(axis, index.to(tensor.device), tensor)
    return tensor


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


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; where something is not finite, it must be the same."""
    found = _extent(one - other) if one.numel() else 0.0
    if math.isfinite(found):
        return found
    same = torch.equal(one.isfinite(), other.isfinite())
    return _magnitude(torch.where(one == other, 0, one - other)) if same else math.inf
