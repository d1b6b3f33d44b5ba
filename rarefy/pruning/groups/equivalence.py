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

from rarefy.errors import SelfCheckFailed
from rarefy.graph.nodes import attribute, example_inputs, operator_name
from rarefy.pruning.groups.groups import Coupling, Kept
from rarefy.pruning.groups.labels import Value
from rarefy.pruning.groups.probes import Run, alike, lengths, sources_of
from rarefy.pruning.groups.rules import only_moves
from rarefy.pruning.groups.slicing import PIECE
from rarefy.system.memory import Level


@dataclass(frozen=True)
class Difference:
    """largest: of |small - masked| / magnitude over all nodes; nodes: how many were compared; statistics: of these on kept parts only."""

    largest: float
    nodes: int
    statistics: int


TOLERANCE = 1e-9
MOST = 1 << 16  # numbers of a tensor that stand for all, about, where an operator treats positions alike
LARGE = 1 << 21  # numbers of a convolution's weight that are used at a time: it makes a copy in an order of its own
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
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
            raise SelfCheckFailed(
                f"{where}: the pruned network does not run: {why}; please report this model"
            ) from error
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


@dataclass
class Cuts:
    """Where the sources of a node and its result are cut, in the large graph and in the small one.

    sizes: the large and the small one's axis -> size, among the arguments.  groups: how many are left of a convolution's, None for all.
    """

    wide: list[Cut]
    narrow: list[Cut]
    result: Cut
    sizes: tuple[dict[int, int], dict[int, int]]
    groups: int | None = None


class _Twins:
    """Both graphs, and what the small one computed so far (``narrow``, by its nodes)."""

    def __init__(self, coupling: Coupling, small: fx.GraphModule, alive: Tensor):
        self.coupling, self.small, self.alive = coupling, small, alive
        self.pairs = {new.name: new for new in small.graph.nodes}
        self.narrow: dict[fx.Node, Any] = {}
        self.weights = {name for row in coupling.rows if row.produces for name in row.names}
        self.known: dict[fx.Node, Any] = {}
        self.level = Level()

    def run(self, step: fx.Node) -> None:
        """One node of the small graph."""
        if step.op == "get_attr":
            self.narrow[step] = _attribute(self.small, step)
            return
        read = [_widened(self.narrow[source]) for source in sources_of(step)]
        self.narrow[step] = _widened(
            _by_outputs(step, read) if operator_name(step) in CONVOLUTIONS else _called(step, read, torch.float32)
        )
        self.level.hold()

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
                raise SelfCheckFailed(
                    f"{source.name}: an output of the network lost a part of itself; please report this model"
                )

    def compare_parameters(self, node: fx.Node, where: str) -> None:
        """What is left of a parameter is the same numbers."""
        one, other = attribute(self.coupling.graph, str(node.target)), attribute(self.small, str(node.target))
        if isinstance(one, Tensor) and isinstance(self.coupling.values[node], Value):
            kept = self.kept(node)
            if _size(kept, one.shape) != tuple(other.shape) or not _equal(kept, one, other):
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
                raise SelfCheckFailed(
                    f"{where}: the pruned network has shape {tuple(tensor.shape)}, the masked one keeps {shape}"
                )
        cuts, moves = self._cuts(node, new), only_moves(node)
        if moves:
            one, other, magnitude = *self._moved(node, new, cuts, where), 0.0
        elif node in self.coupling.statistics:
            self._same_sources(node, new, where)
            return 0.0, len(parts)
        elif self._same(node, new):
            return 0.0, len(parts)
        else:
            one, other, magnitude = self._computed(node, new, cuts)
        largest = 0.0
        for kept, full, tensor in zip(kepts, _listed(one), _listed(other), strict=True):
            full = _selected(_within(kept, cuts.result), full)
            if full.shape != tensor.shape:
                raise SelfCheckFailed(
                    f"{where}: the pruned network has shape {tuple(tensor.shape)}, the masked one keeps {tuple(full.shape)}"
                )
            if moves or not full.is_floating_point():
                if not torch.equal(full, tensor):
                    raise SelfCheckFailed(
                        f"{where}: the pruned network differs from the masked one in where it puts its numbers"
                    )
                continue
            scale = max(magnitude, _magnitude(full))
            apart = _apart(full, tensor)
            if not apart <= TOLERANCE * scale:
                raise SelfCheckFailed(
                    f"{where}: the pruned network differs from the masked one by {apart:.3g} at magnitude {scale:.3g}"
                )
            largest = max(largest, apart / scale if scale else 0.0)
        return largest, len(parts)

    def _same_sources(self, node: fx.Node, new: fx.Node, where: str) -> None:
        one, other = ([source.name for source in sources_of(each) if self._floating(source)] for each in (node, new))
        if one != other:
            raise SelfCheckFailed(
                f"{where}: the pruned network reads {other}, the masked one {one}; please report this model"
            )

    def _floating(self, source: fx.Node) -> bool:
        """Of either graph: does it yield a tensor of floats? (A node only the small graph has holds sizes and indices.)"""
        found = self.coupling.found[source] if source in self.coupling.found else self.narrow[source]
        return isinstance(found, Tensor) and found.is_floating_point()

    def _same(self, node: fx.Node, new: fx.Node) -> bool:
        """The same operator with the same arguments, of which nothing was removed."""
        if any(
            index is not None for each in (node, *sources_of(node)) for index in pytree.tree_leaves(self.kept(each))
        ):
            return False
        named = [fx.map_arg((each.args, each.kwargs), lambda source: source.name) for each in (node, new)]
        return bool(node.target == new.target and named[0] == named[1])

    def _moved(self, node: fx.Node, new: fx.Node, cuts: Cuts, where: str) -> tuple[Any, Any]:
        """Both operators on 0, 1, 2, ... in place of the floats they read."""
        self._same_sources(node, new, where)
        sources = sources_of(node)
        shapes: dict[str, list[int]] = {}
        full: dict[str, Tensor] = {}
        part: dict[str, Tensor] = {}
        for source, cut in zip(sources, cuts.wide, strict=True):
            if self._floating(source) and source.name not in shapes:
                shapes[source.name] = list(self.coupling.values[source].shape)
                for axis, _, length in cut:
                    shapes[source.name][axis] = length
        numbers = sum(math.prod(shape) for shape in shapes.values())
        whole = (
            torch.float32 if numbers < 2**24 else torch.float64
        )  # floats, as an operator may fill in others, such as -inf
        count = 0
        for source, cut in zip(sources, cuts.wide, strict=True):
            if source.name in shapes and source.name not in full:
                size = math.prod(shapes[source.name])
                made = torch.arange(count, count + size, dtype=whole, device=self._device(new))
                full[source.name] = made.reshape(shapes[source.name])
                part[source.name] = _selected(_within(self.kept(source), cut), full[source.name])
                count += size
        wide = [full[source.name] if source.name in full else self._large(source, []) for source in sources]
        own = [part[source.name] if source.name in part else self.narrow[source] for source in sources_of(new)]
        return _called(node, wide, sizes=cuts.sizes[0]), _called(new, own, sizes=cuts.sizes[1])

    def _device(self, new: fx.Node) -> torch.device:
        first: Tensor = _listed(self.narrow[new])[0]
        return first.device

    def _computed(self, node: fx.Node, new: fx.Node, cuts: Cuts) -> tuple[Any, Any, float]:
        """Both operators in float64 on the positions that stand for all; and the magnitude of the activations they read."""
        own = [
            _double(_narrowed(self.narrow[source], cut))
            for source, cut in zip(sources_of(new), cuts.narrow, strict=True)
        ]
        wide = [self._large(source, cut) for source, cut in zip(sources_of(node), cuts.wide, strict=True)]
        read = [value for source, value in zip(sources_of(new), own, strict=True) if source.op != "get_attr"]
        magnitude = max((_magnitude(value) for value in pytree.tree_leaves(read)), default=0.0)
        one = _called(node, wide, torch.float64, cuts.sizes[0], cuts.groups)
        return one, _called(new, own, torch.float64, cuts.sizes[1], cuts.groups), magnitude

    def _cuts(self, node: fx.Node, new: fx.Node) -> Cuts:
        """A few positions in the middle of the axes that the operator treats alike.

        Nothing is cut where the nodes read different things, and no run of axes of which different positions survive.
        """
        sources, news = sources_of(node), sources_of(new)
        cuts = Cuts([[] for _ in sources], [[] for _ in news], [], ({}, {}))
        value, values = self.coupling.values[node], [self.coupling.values[source] for source in sources]
        if any(isinstance(one, list) for one in values) or not self._alike(node, new):
            return cuts
        result = value[0].shape if isinstance(value, list) else value.shape
        shapes = [one.shape if isinstance(one, Value) else None for one in values]
        left = {
            run: self._left_of_groups(run, node, sources) if run.groups else self._left(run, node, sources)
            for run in alike(node, shapes, result)
        }
        runs = {run: index for run, index in left.items() if index is not False}
        for run, length in lengths(list(runs), shapes, result, MOST):
            index = runs[run]
            if run.groups:
                self._cut_groups(cuts, run, length, node)
                continue
            size = min(shapes[place][axis] for place, axis in run.sources.items())  # type: ignore[index]
            start = (size - length) // 2
            first, count = start, length
            if index is not None:
                first, end = torch.searchsorted(index, torch.tensor([start, start + length])).tolist()
                count = end - first
                if not count:
                    continue
            for place, axis in run.sources.items():
                cuts.wide[place].append((axis, start, length))
                cuts.narrow[place].append((axis, first, count))
            cuts.result.append((run.result, start, length))
            if run.sized:
                cuts.sizes[0][run.result], cuts.sizes[1][run.result] = length, count
        return cuts

    def _cut_groups(self, cuts: Cuts, run: Run, length: int, node: fx.Node) -> None:
        """Some groups in the middle, of which equally many channels survive."""
        cuts.groups, start = length, (run.groups - length) // 2

        def part(channels: int) -> tuple[int, int]:
            return start * channels // run.groups, length * channels // run.groups

        for place, axis in run.sources.items():
            source = sources_of(node)[place]
            shape = self.coupling.values[source].shape
            cuts.wide[place].append((axis, *part(shape[axis])))
            cuts.narrow[place].append((axis, *part(_size(self.kept(source), shape)[axis])))
        cuts.result.append((run.result, *part(self.coupling.values[node].shape[run.result])))

    def _left(self, run: Run, node: fx.Node, sources: Sequence[fx.Node]) -> Any:
        """The positions that survive along all of a run's axes, None for all; False where the axes differ."""
        made = self.kept(node) if isinstance(self.coupling.values[node], list) else [self.kept(node)]
        found = [kept[run.result] for kept in made] + [
            self.kept(sources[place])[axis] for place, axis in run.sources.items()
        ]
        if all(index is None for index in found):
            return None
        if any(index is None for index in found) or not all(torch.equal(index, found[0]) for index in found):
            return False
        return found[0]

    def _left_of_groups(self, run: Run, node: fx.Node, sources: Sequence[fx.Node]) -> Any:
        """None where every group keeps as many outputs, along all axes of these, and the same of its inputs; else False."""
        read, groups = self.kept(sources[0])[run.sources[0]], run.groups
        outputs = Run({place: axis for place, axis in run.sources.items() if place}, run.result)
        made = self._left(outputs, node, sources)
        if read is not None:
            size = self.coupling.values[sources[0]].shape[run.sources[0]] // groups
            if len(read) % groups or not torch.equal(
                read, (read[: len(read) // groups] + size * torch.arange(groups)[:, None]).flatten()
            ):
                return False
        if isinstance(made, Tensor):
            size = self.coupling.values[node].shape[run.result] // groups
            return None if len(torch.bincount(made // size, minlength=groups).unique()) == 1 else False
        return made

    def _alike(self, node: fx.Node, new: fx.Node) -> bool:
        """Do both read nodes of the same names, at the same places?"""
        return [source.name for source in sources_of(node)] == [source.name for source in sources_of(new)]

    def _large(self, source: fx.Node, cut: Cut) -> Any:
        """What the node of the large graph holds, in float64, with everything removed set to zero.

        Of a weight nothing is set to zero: what it reads and makes has the zeros.
        """
        value, new = self.coupling.values[source], self.pairs.get(source.name)
        if source.op == "get_attr":
            held = _double(_narrowed(_attribute(self.coupling.graph, source), cut))
            masked = isinstance(value, Value) and source.target not in self.weights
            return _zeroed(_within(self.kept(source), cut), held) if masked else held
        if not isinstance(value, (Value, list)):
            return value
        if new is None:
            return _narrowed(
                _called(source, [self._large(each, []) for each in sources_of(source)], torch.float64), cut
            )
        if isinstance(value, list):
            return [
                _spread(kept, part.shape, _double(one))
                for part, kept, one in zip(value, self.kept(source), self.narrow[new], strict=True)
            ]
        return self._spread(source, self.narrow[new], cut)

    def _spread(self, source: fx.Node, held: Tensor, cut: Cut) -> Tensor:
        """What the small graph holds, cut, in float64, at its places in the large one."""
        shape, kept, own = list(self.coupling.values[source].shape), self.kept(source), []
        for axis, start, length in cut:
            index = kept[axis]
            first, end = (
                (start, start + length)
                if index is None
                else torch.searchsorted(index, torch.tensor([start, start + length])).tolist()
            )
            own.append((axis, first, end - first))
            shape[axis] = length
        return _spread(_within(kept, cut), shape, _double(_narrowed(held, own)))


def _within(kept: Kept, cut: Cut) -> Kept:
    """The survivors that lie in a cut, from its start."""
    found = list(kept)
    for axis, start, length in cut:
        index = found[axis]
        if index is not None:
            found[axis] = index[(index >= start) & (index < start + length)] - start
    return found


def _listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _attribute(graph: fx.GraphModule, node: fx.Node) -> Any:
    """In eval mode."""
    return False if node.target == "training" else attribute(graph, str(node.target))


def _called(
    node: fx.Node,
    values: Sequence[Any],
    dtype: torch.dtype | None = None,
    sizes: Mapping[int, int] = types.MappingProxyType({}),
    groups: int | None = None,
) -> Any:
    """The node's operator, ``values`` in place of ``sources_of(node)``; dtype: in place of any float's among the arguments.

    sizes: axis -> size, in the list that is the second argument.  groups: in place of a convolution's.
    """
    waiting = iter(values)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(waiting))
    if sizes:
        asked: Any = args[1]
        args = (args[0], [sizes.get(axis, size) if size != -1 else size for axis, size in enumerate(asked)], *args[2:])
    if groups is not None:
        args, kwargs = (args[:6], {**kwargs, "groups": groups})
    if dtype is not None:
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs),
            lambda one: (
                torch.promote_types(one, dtype) if isinstance(one, torch.dtype) and one.is_floating_point else one
            ),
        )
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _by_outputs(step: fx.Node, read: Sequence[Any]) -> Tensor:
    """A convolution, some of its outputs at a time where its weight is large and not in groups."""
    image, weight, *bias = read
    groups: Any = step.args[6] if len(step.args) > 6 else step.kwargs.get("groups", 1)
    rows = max(1, LARGE * len(weight) // max(1, weight.numel()))
    if groups != 1 or rows >= len(weight):
        return _called(step, read, torch.float32)  # type: ignore[no-any-return]
    parts = [
        _called(step, [image, *own], torch.float32)
        for own in zip(*(one.split(rows) for one in (weight, *bias)), strict=True)
    ]
    return torch.cat(parts, image.dim() - weight.dim() + 1)


def _widened(value: Any) -> Any:
    return pytree.tree_map(lambda one: one.float() if isinstance(one, Tensor) and one.dtype in TINY else one, value)


def _double(value: Any) -> Any:
    return pytree.tree_map(
        lambda one: one.double() if isinstance(one, Tensor) and one.is_floating_point() else one, value
    )


def _narrowed(value: Any, cut: Cut) -> Any:
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


def _equal(kept: Kept, full: Tensor, small: Tensor) -> bool:
    """Is ``small`` what is kept of ``full``? A few rows at a time."""
    if not small.dim() or not small.numel():
        return torch.equal(_selected(kept, full), small)
    rows = torch.arange(len(full)) if kept[0] is None else kept[0]
    pieces = rows.split(max(1, PIECE // (full[0].numel() or 1)))
    return all(
        torch.equal(_selected([index, *kept[1:]], full), part)
        for index, part in zip(pieces, small.split([len(index) for index in pieces]), strict=True)
    )


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
