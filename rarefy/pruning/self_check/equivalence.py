"""check(): is the smaller graph the network with those channels masked?

By induction over the nodes. The small graph runs on one example. Of each node, given the small one's inputs, with zeros
put where channels were removed, the large graph's node must yield, where something is kept, what the small graph's
yields:

    keep(large(spread(x))) = small(x)         up to rounding in float64, |difference| <= 1e-9 * magnitude
                                              (eps is 2.2e-16, sums are below 1e6 terms)

Parameters must be what their labels keep, bit for bit; the outputs must be kept whole; then the outputs are equal,
because each node's are. Operators that only move numbers are run on the numbers 0, 1, 2, ..., so that no two values are
alike by chance, and must agree exactly. Of operators that treat positions alike (``probes.py``) a few positions are
compared, in the middle; the shape of the whole must fit. A node that is the same in both graphs and loses nothing of
what it reads is equal. Where an operator takes a statistic over a pruned axis (layer norm), it is taken over what is
kept, which is the definition of pruning such a layer; of those only shapes and sources are compared.

Memory: beside both networks' weights the small one's activations, let go after their last use, and one node of the
large one. What this check cannot see: behaviour at other batch sizes, and in training mode. Given up: the two networks
are not run from end to end, so the sum of all roundings is not known.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rarefy.errors import SelfCheckFailed
from rarefy.graph.interpreter import steps
from rarefy.graph.nodes import Value as Yielded
from rarefy.graph.nodes import argument, attribute, example_inputs, operator_name
from rarefy.pruning.groups.groups import Coupling
from rarefy.pruning.groups.labels import Kept, Value, values_in
from rarefy.pruning.groups.recurrent import recurrent, recurrent_cell
from rarefy.pruning.groups.rules import only_moves, rule_of
from rarefy.pruning.groups.survivors import (
    Cut,
    Survivors,
    cut_shape,
    double,
    is_selected,
    narrowed,
    selected,
    size_of,
    spread,
    within,
    zeroed,
)
from rarefy.pruning.self_check.probes import Cuts, Probe, sources_of
from rarefy.system.memory import Level

TOLERANCE = 1e-9
LARGE = 1 << 21  # numbers of a convolution's weight that are used at a time: it makes a copy in an order of its own
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TINY = (torch.float16, torch.bfloat16)  # run in float32
NO_SIZES: Mapping[int, int] = types.MappingProxyType({})


@dataclass(frozen=True)
class Difference:
    """How far the pruned network is from the masked one.

    largest: of |small - masked| / magnitude over all nodes.
    nodes: how many were compared.  statistics: of these on kept parts only.
    """

    largest: float
    nodes: int
    statistics: int


@torch.no_grad()
def check(coupling: Coupling, small: fx.GraphModule, alive: Tensor, seed: int = 0) -> Difference:
    """Run the small graph for one sample, and beside each of its nodes the large graph's on the same numbers.

    Raises SelfCheckFailed with the first layer that differs.
    """
    comparison = Comparison(coupling, small, alive)
    largest, compared = 0.0, 0
    for node, new in comparison.run(example_inputs(coupling.graph, 1, seed)):
        if node.op == "get_attr":
            comparison.compare_parameters(node)
        elif node.op == "call_function":
            largest = max(largest, comparison.compare(node, new))
            compared += len(comparison.survivors.parts(node))
    comparison.compare_outputs()
    return Difference(largest, compared, sum(1 for node in coupling.statistics if node.name in comparison.pairs))


class Comparison:
    """The small graph as it runs, and each of its nodes beside the large graph's of the same name."""

    def __init__(self, coupling: Coupling, small: fx.GraphModule, alive: Tensor):
        self.coupling, self.small = coupling, small
        self.survivors = Survivors(coupling, alive)
        self.probe = Probe(self.survivors)
        self.nodes = {node.name: node for node in coupling.graph.graph.nodes}
        self.pairs = {new.name: new for new in small.graph.nodes}
        self.weights = {name for row in coupling.rows if row.produces for name in row.names} - _of_recurrent(coupling)
        self.live: dict[fx.Node, Yielded] = {}  # what the small graph's nodes yielded
        self.level = Level()

    def run(self, inputs: Sequence[Tensor]) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Each node that both graphs have, (of the large one, of the small one), when the small one's has run."""
        *nodes, _ = self.small.graph.nodes
        placeholders = [node for node in nodes if node.op == "placeholder"]
        self.live = {node: _widened(value) for node, value in zip(placeholders, inputs, strict=True)}
        self.live |= {node: False for node in nodes if _is_mode(node)}
        # What the large graph's nodes read and the small one's do not stays until the end.
        kept: set[fx.Node] = set()
        for node in self.coupling.graph.graph.nodes:
            new = self.pairs.get(node.name)
            others = {source.name for source in node.all_input_nodes}
            others -= set() if new is None else {source.name for source in new.all_input_nodes}
            kept |= {self.pairs[name] for name in others & self.pairs.keys()}
        for new, _ in steps(self.small, nodes, self.live, self._computed_small, kept):
            if new.name in self.nodes:
                yield self.nodes[new.name], new

    def compare_outputs(self) -> None:
        """Raises SelfCheckFailed where the graphs yield different nodes, or a part of one is gone."""
        old, new = (next(iter(reversed(graph.graph.nodes))) for graph in (self.coupling.graph, self.small))
        if [source.name for source in sources_of(old)] != [source.name for source in sources_of(new)]:
            raise SelfCheckFailed("output: the pruned network yields other nodes; please report this model")
        for source in sources_of(old):
            if not self.survivors.is_whole(source):
                raise SelfCheckFailed(
                    f"{source.name}: an output of the network lost a part of itself; please report this model"
                )

    def compare_parameters(self, node: fx.Node) -> None:
        """Is what is left of a parameter the same numbers? Raises SelfCheckFailed."""
        one, other = (attribute(graph, node) for graph in (self.coupling.graph, self.small))
        if isinstance(one, Tensor) and isinstance(self.coupling.values[node], Value):
            kept = self.survivors.kept(node)
            if size_of(kept, one.shape) != tuple(other.shape) or not is_selected(kept, one, other):
                raise SelfCheckFailed(
                    f"{_where(node)}: the pruned parameter {tuple(other.shape)} is not what its labels keep of "
                    f"{tuple(one.shape)}"
                )

    def compare(self, node: fx.Node, new: fx.Node) -> float:
        """The largest difference relative to the magnitude of the node's activations. Raises SelfCheckFailed."""
        values = values_in(self.coupling.values[node])
        if not values:
            return 0.0  # a plain number
        for value, kept, tensor in zip(values, self.survivors.parts(node), _listed(self.live[new]), strict=True):
            _same_shape(node, tensor, size_of(kept, value.shape))
        if only_moves(node):
            self._compare_moved(node, new)
        elif node in self.coupling.statistics:
            self._same_sources(node, new)
        elif not self._is_same(node, new):
            return self._compare_computed(node, new)
        return 0.0

    def _compare_moved(self, node: fx.Node, new: fx.Node) -> None:
        """Both operators on 0, 1, 2, ... in place of the floats they read."""
        self._same_sources(node, new)
        cuts, sources = self.probe.cuts(node, new), sources_of(node)
        shapes: dict[str, list[int]] = {}
        kept: dict[str, Kept] = {}
        for source, cut in zip(sources, cuts.large, strict=True):
            if self._floating(source) and source.name not in shapes:
                shapes[source.name] = cut_shape(self.coupling.values[source].shape, cut)
                kept[source.name] = within(self.survivors.kept(source), cut)
        # Floats, as an operator may fill in others, such as -inf.
        dtype = torch.float32 if sum(map(math.prod, shapes.values())) < 2**24 else torch.float64
        device, end = _listed(self.live[new])[0].device, 0
        large: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape)
            large[name] = torch.arange(start, end, dtype=dtype, device=device).reshape(shape)
        small = {name: selected(kept[name], numbers) for name, numbers in large.items()}
        read = [large[source.name] if source.name in large else self._large(source, []) for source in sources]
        others = [small[source.name] if source.name in small else self.live[source] for source in sources_of(new)]
        one, other = _called(node, read, sizes=cuts.sizes[0]), _called(new, others, sizes=cuts.sizes[1])
        for full, tensor in self._aligned(node, cuts, one, other):
            _same_numbers(node, full, tensor)

    def _compare_computed(self, node: fx.Node, new: fx.Node) -> float:
        """Both operators in float64 on the positions that stand for all."""
        cuts, others = self.probe.cuts(node, new), sources_of(new)
        small = [double(narrowed(self.live[source], cut)) for source, cut in zip(others, cuts.small, strict=True)]
        large = [self._large(source, cut) for source, cut in zip(sources_of(node), cuts.large, strict=True)]
        read = [value for source, value in zip(others, small, strict=True) if source.op != "get_attr"]
        magnitude = max((_magnitude(value) for value in pytree.tree_leaves(read)), default=0.0)
        one = _called(node, large, torch.float64, cuts.sizes[0], cuts.groups)
        other = _called(new, small, torch.float64, cuts.sizes[1], cuts.groups)
        largest = 0.0
        for full, tensor in self._aligned(node, cuts, one, other):
            if not full.is_floating_point():
                _same_numbers(node, full, tensor)
                continue
            scale, apart = max(magnitude, _magnitude(full)), _apart(full, tensor)
            if not apart <= TOLERANCE * scale:
                raise SelfCheckFailed(
                    f"{_where(node)}: the pruned network differs from the masked one by {apart:.3g} at magnitude "
                    f"{scale:.3g}"
                )
            largest = max(largest, apart / scale if scale else 0.0)
        return largest

    def _aligned(self, node: fx.Node, cuts: Cuts, one: Yielded, other: Yielded) -> Iterator[tuple[Tensor, Tensor]]:
        """What is kept of each tensor that the large graph's operator yields, and the small one's."""
        for kept, full, tensor in zip(self.survivors.parts(node), _listed(one), _listed(other), strict=True):
            full = selected(within(kept, cuts.result), full)
            _same_shape(node, tensor, tuple(full.shape))
            yield full, tensor

    def _same_sources(self, node: fx.Node, new: fx.Node) -> None:
        one, other = ([source.name for source in sources_of(each) if self._floating(source)] for each in (node, new))
        if one != other:
            raise SelfCheckFailed(
                f"{_where(node)}: the pruned network reads {other}, the masked one {one}; please report this model"
            )

    def _floating(self, source: fx.Node) -> bool:
        """Of either graph: does it yield a tensor of floats? (What only the small one has are indices, sizes.)"""
        found = self.coupling.shapes[source] if source in self.coupling.shapes else self.live[source]
        return isinstance(found, Tensor) and found.is_floating_point()

    def _is_same(self, node: fx.Node, new: fx.Node) -> bool:
        """The same operator with the same arguments, of which nothing was removed."""
        if not all(self.survivors.is_whole(each) for each in (node, *sources_of(node))):
            return False
        named = [fx.map_arg((each.args, each.kwargs), lambda source: source.name) for each in (node, new)]
        return bool(node.target == new.target and named[0] == named[1])

    def _computed_small(self, new: fx.Node, live: Mapping[fx.Node, Yielded]) -> Yielded:
        """A node of the small graph, in float32 at least."""
        read = [_widened(live[source]) for source in sources_of(new)]
        in_parts = operator_name(new) in CONVOLUTIONS
        try:
            result = _by_outputs(new, read) if in_parts else _called(new, read, torch.float32)
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            where = _where(self.nodes.get(new.name, new))
            raise SelfCheckFailed(
                f"{where}: the pruned network does not run: {why}; please report this model"
            ) from error
        self.level.hold()
        return _widened(result)

    def _large(self, source: fx.Node, cut: Cut) -> Yielded:
        """What the node of the large graph holds, in float64, with everything removed set to zero.

        Of a weight nothing is set to zero: what it reads and makes has the zeros.
        """
        carried, new = self.coupling.values[source], self.pairs.get(source.name)
        if source.op == "get_attr":
            if _is_mode(source):
                return False
            held = double(narrowed(attribute(self.coupling.graph, source), cut))
            masked = isinstance(carried, Value) and source.target not in self.weights
            return zeroed(within(self.survivors.kept(source), cut), held) if masked else held
        values = values_in(carried)
        if not values:
            return carried
        if new is None:
            read = [self._large(each, []) for each in sources_of(source)]
            return narrowed(_called(source, read, torch.float64), cut)
        parts = [
            spread(kept, value.shape, held, cut)
            for value, kept, held in zip(values, self.survivors.parts(source), _listed(self.live[new]), strict=True)
        ]
        return parts if isinstance(carried, list) else parts[0]


def _where(node: fx.Node) -> str:
    return f"{node.meta.get('stack') or node.name} ({operator_name(node) or node.op} {node.name})"


def _of_recurrent(coupling: Coupling) -> set[str]:
    """Tensors of recurrent layers, whose units read each other inside, where no zeros can be put but in the weights."""
    readers = [node for node in coupling.graph.graph.nodes if rule_of(node) in (recurrent, recurrent_cell)]
    return {str(source.target) for node in readers for source in node.all_input_nodes if source.op == "get_attr"}


def _is_mode(node: fx.Node) -> bool:
    """Does it read whether the graph is in training mode? Here it never is."""
    return node.op == "get_attr" and node.target == "training"


def _same_shape(node: fx.Node, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise SelfCheckFailed(
            f"{_where(node)}: the pruned network has shape {tuple(tensor.shape)}, the masked one keeps {shape}"
        )


def _same_numbers(node: fx.Node, full: Tensor, tensor: Tensor) -> None:
    if not torch.equal(full, tensor):
        raise SelfCheckFailed(
            f"{_where(node)}: the pruned network differs from the masked one in where it puts its numbers"
        )


# ------------------------------------------------------------------------------------------------------------ running


def _called(
    node: fx.Node,
    values: Sequence[Yielded],
    dtype: torch.dtype | None = None,
    sizes: Mapping[int, int] = NO_SIZES,
    groups: int | None = None,
) -> Yielded:
    """The node's operator, ``values`` in place of ``sources_of(node)``.

    dtype: in place of any float's among the arguments.
    sizes: axis -> size, in the list that is the second argument.
    groups: in place of a convolution's.
    """
    waiting = iter(values)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(waiting))
    if sizes:
        asked: Yielded = args[1]
        cut = [sizes.get(axis, size) if size != -1 else size for axis, size in enumerate(asked)]
        args = (args[0], cut, *args[2:])
    if groups is not None:
        args, kwargs = args[:6], {**kwargs, "groups": groups}
    if dtype is not None:
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs),
            lambda one: (
                torch.promote_types(one, dtype) if isinstance(one, torch.dtype) and one.is_floating_point else one
            ),
        )
    operator: Yielded = node.target
    return operator(*args, **kwargs)


def _by_outputs(step: fx.Node, read: Sequence[Tensor]) -> Tensor:
    """A convolution, some of its outputs at a time where its weight is large and not in groups."""
    image, weight, *bias = read
    rows = max(1, LARGE * len(weight) // max(1, weight.numel()))
    if argument(step, "groups") != 1 or rows >= len(weight):
        whole: Tensor = _called(step, read, torch.float32)
        return whole
    parts = [
        _called(step, [image, *part], torch.float32)
        for part in zip(*(one.split(rows) for one in (weight, *bias)), strict=True)
    ]
    return torch.cat(parts, image.dim() - weight.dim() + 1)


def _listed(value: Yielded) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _widened(value: Yielded) -> Yielded:
    return pytree.tree_map(lambda one: one.float() if isinstance(one, Tensor) and one.dtype in TINY else one, value)


# -------------------------------------------------------------------------------------------------------- differences


def _magnitude(tensor: Yielded) -> float:
    """Largest finite absolute value."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    extent = _extent(tensor)
    return extent if math.isfinite(extent) else _extent(tensor.nan_to_num(0, 0, 0))


def _extent(tensor: Tensor) -> float:
    """The largest absolute value; NaN where there is one."""
    low, high = tensor.aminmax()
    return float(torch.maximum(-low, high))


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; where something is not finite, it must be the same."""
    difference = _extent(one - other) if one.numel() else 0.0
    if math.isfinite(difference):
        return difference
    same = torch.equal(one.isfinite(), other.isfinite())
    return _magnitude(torch.where(one == other, 0, one - other)) if same else math.inf
