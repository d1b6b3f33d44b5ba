"""Values inside a graph: which ones are worth comparing between two networks, and a graph that returns them.

A *cut* is a value all of the network's work passes through: no path from input to output goes around it. Ends of
residual blocks are cuts, values inside a block are not. The last cut of each resolution is the end of a stage, whatever
the family: no list of layer names per architecture. Found in one sweep: in execution order, a node is a cut when
nothing made before it is read after it.

A *neck* is what the heads at one resolution read, of a network that answers at several: the last map that all its
answers at that resolution come through, with a layer behind it. A *branch* is the map that goes into the last layer but
one of a head. Both are found by dominators, of the ends at which maps become lists of places.

Taps are extra outputs of a copy of the graph that shares its parameters and buffers, so they cost nothing and work
under ``torch.compile`` and DDP, where hooks and interpreters do not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from rarefy.errors import InputError
from rarefy.graph.layers import TRAINING_FLAG
from rarefy.graph.nodes import is_tensor
from rarefy.graph.shapes import shapes

aten = torch.ops.aten

DEPTHS = 4  # features of a network of one resolution

_BATCH = 2
_CONVOLUTIONS = frozenset({aten.conv2d.default, aten.conv2d.padding, aten.convolution.default})
_LAYERS_BEHIND = 2  # a branch: so many layers before the end


class Tap(NamedTuple):
    """A node whose value is wanted.

    shape: without the batch, channels first; order: how to permute the value into that (or None).
    """

    node: fx.Node
    shape: tuple[int, ...]
    order: tuple[int, ...] | None

    @property
    def resolution(self) -> tuple[int, ...]:
        return self.shape[1:]


def tapped(graph: fx.GraphModule, taps: Sequence[Tap]) -> fx.GraphModule:
    """``graph``, returning (its output, (value of each tap: (N, channels, ...))).

    Parameters and buffers are the very same tensors.
    """
    copied: dict[fx.Node, fx.Node] = {}
    nodes = fx.Graph()
    output = nodes.graph_copy(graph.graph, copied)
    values = [
        copied[tap.node]
        if tap.order is None
        else nodes.call_function(aten.permute.default, (copied[tap.node], list(tap.order)))
        for tap in taps
    ]
    nodes.output((output, tuple(values)))
    module = fx.GraphModule(graph, nodes)
    module.meta["inputs"] = graph.meta["inputs"]
    return module


def matched(student: fx.GraphModule, teacher: fx.GraphModule, on: str) -> list[tuple[Tap, Tap]]:
    """(student's, teacher's) taps for a loss's ``on`` (see rarefy/distillation/losses).

    Raises InputError if nothing fits.
    """
    if on in ("logits", "answers"):
        return []
    if on == "embedding":
        return [(_embedding(student, "student"), _embedding(teacher, "teacher"))]
    if on == "stages":
        return _stages(student, teacher)
    if on == "neck":
        return _necks(student, teacher) or _stages(student, teacher)
    if on == "cross":
        return _branches(student, teacher)
    pairs = [pair.partition("=") for pair in on.split(";")]
    return [
        (_named(student, ours.strip(), "student"), _named(teacher, (theirs or ours).strip(), "teacher"))
        for ours, _, theirs in pairs
    ]


def behind(graph: fx.GraphModule, taps: Sequence[Tap]) -> fx.GraphModule:
    """What a graph makes of the values of its taps: (its inputs, value of each tap) to its output.

    The inputs are asked for by what goes around the taps alone. Parameters are copies, which do not learn.
    """
    nodes = fx.Graph()
    places = {tap.node: number for number, tap in enumerate(taps)}
    copied = {node: nodes.placeholder(node.name) for node in graph.graph.nodes if node.op == "placeholder"}
    copied |= {node: nodes.placeholder(f"tap_{number}") for node, number in places.items()}
    for node in graph.graph.nodes:
        if node not in copied:
            copied[node] = nodes.node_copy(node, copied.__getitem__)
    nodes.eliminate_dead_code()
    return copy.deepcopy(fx.GraphModule(graph, nodes)).requires_grad_(False)


def cuts(graph: fx.GraphModule) -> list[Tap]:
    """Every cut behind the first weight, in order; values of one position and dropout's outputs are left out."""
    values = shapes(graph, _BATCH)
    carried: set[fx.Node] = set()
    place = {node: index for index, node in enumerate(graph.graph.nodes)}
    found, weighted, open_until = [], False, 0
    for node in graph.graph.nodes:
        value = values.get(node)
        if node.op == "placeholder" or (
            _holds_tensors(value) and any(source in carried for source in node.all_input_nodes)
        ):
            carried.add(node)
        else:
            continue
        weighted = weighted or _reads_weight(node, values, carried)
        tap = _tap(graph, node, value)
        if (
            weighted
            and tap is not None
            and open_until <= place[node]
            and node.target not in TRAINING_FLAG.keys() - {aten.batch_norm.default}
        ):
            found.append(tap)
        readers = [place[user] for user in node.users if user.op == "output" or _holds_tensors(values.get(user))]
        open_until = max(open_until, *readers, 0)
    return found


def _stages(student: fx.GraphModule, teacher: fx.GraphModule) -> list[tuple[Tap, Tap]]:
    ours, theirs = (_by_resolution(tap for tap in cuts(graph) if tap.resolution) for graph in (student, teacher))
    common = [resolution for resolution in ours if resolution in theirs]
    if not common:
        seen = " and ".join(
            "/".join("x".join(map(str, resolution)) for resolution in found) or "none" for found in (ours, theirs)
        )
        raise InputError(
            f"stages: student and teacher share no resolution ({seen}); "
            "name the pairs: on=student_node=teacher_node;..."
        )
    columns = [resolution for resolution in common if _dominates(resolution, ours) and _dominates(resolution, theirs)]
    if columns:
        return list(zip(_at_depths(ours[columns[0]]), _at_depths(theirs[columns[0]])))
    return [(ours[resolution][-1], theirs[resolution][-1]) for resolution in common]


Resolution = tuple[int, ...]


class _Heads:
    """Where a network's answers come from, resolution by resolution.

    maps: shape of each value of pictures' layout that is as wide and high as one that a convolution makes. parent: of a
    node the last that all paths to it lead through. ends: maps that are read by what makes no map any more.
    """

    def __init__(self, graph: fx.GraphModule):
        values, nodes = shapes(graph, _BATCH), list(graph.graph.nodes)
        self.layers = {node for node in nodes if node.target in _CONVOLUTIONS}
        wide = {tuple(values[node].shape[2:]) for node in self.layers if _is_map(values[node])}
        self.maps: dict[fx.Node, tuple[int, ...]] = {
            node: tuple(value.shape[1:])
            for node, value in values.items()
            if _is_map(value) and tuple(value.shape[2:]) in wide
        }
        self.place = {node: number for number, node in enumerate(nodes)}
        self.parent: dict[fx.Node, fx.Node | None] = {}
        self.depth: dict[fx.Node | None, int] = {None: 0}
        for node in nodes:
            sources = [one for one in node.all_input_nodes if one in self.parent]
            if node.op == "placeholder" or (sources and _holds_tensors(values.get(node))):
                self._found(node, sources)
        makes_maps: set[fx.Node] = set()
        ends: list[fx.Node] = []
        for node in reversed(nodes):
            readers = [one for one in node.users if one.op == "output" or one in self.parent]
            if any(one in self.maps or one in makes_maps for one in readers):
                makes_maps.add(node)
            if node in self.maps and any(one not in self.maps and one not in makes_maps for one in readers):
                ends.insert(0, node)
        self.ends: dict[Resolution, list[fx.Node]] = {}
        for node in ends:
            self.ends.setdefault(self.maps[node][1:], []).append(node)

    def _found(self, node: fx.Node, sources: Sequence[fx.Node]) -> None:
        parent: fx.Node | None = sources[0] if sources else None
        for other in sources[1:]:
            parent = self._shared(parent, other)
        self.parent[node], self.depth[node] = parent, self.depth[parent] + 1

    def _shared(self, one: fx.Node | None, other: fx.Node | None) -> fx.Node | None:
        """The last node that all paths to both lead through."""
        while one is not other:
            if self.depth[one] >= self.depth[other]:
                one = None if one is None else self.parent[one]
            else:
                other = None if other is None else self.parent[other]
        return one

    def neck(self, resolution: Resolution) -> fx.Node | None:
        """The last map of that resolution before all its ends, with a layer behind it."""
        ends = self.ends[resolution]
        node: fx.Node | None = ends[0]
        for other in ends[1:]:
            node = self._shared(node, other)
        while node is not None and not (
            self.maps.get(node, ())[1:] == resolution
            and any(self.maps.get(one, ())[1:] == resolution and self._behind(node, one) for one in self.layers)
        ):
            node = self.parent[node]
        return node

    def _behind(self, node: fx.Node, other: fx.Node) -> bool:
        one: fx.Node | None = self.parent.get(other)
        while self.depth[one] > self.depth[node]:
            one = None if one is None else self.parent[one]
        return one is node

    def branches(self, resolution: Resolution, neck: fx.Node) -> list[fx.Node]:
        """The maps that go into the last layers but one on the way from the neck to the ends, or the neck itself."""
        front = list(self.ends[resolution])
        for _ in range(_LAYERS_BEHIND):
            front = [source for end in front for source in self._read_by_layer(end, neck)]
        return sorted(dict.fromkeys(front), key=self.place.__getitem__)

    def _read_by_layer(self, end: fx.Node, neck: fx.Node) -> list[fx.Node]:
        """What the last layers before ``end``, or at it, read."""
        found, seen, left = [], set(), [end]
        while left:
            node = left.pop()
            if node in seen or node not in self.parent or self.place[node] < self.place[neck]:
                continue
            seen.add(node)
            if node is neck:
                found.append(node)
            elif node in self.layers:
                found.append(node.all_input_nodes[0])
            else:
                left.extend(node.all_input_nodes)
        return found

    def tap(self, node: fx.Node) -> Tap:
        return Tap(node, self.maps[node], None)


def _necks(student: fx.GraphModule, teacher: fx.GraphModule) -> list[tuple[Tap, Tap]]:
    ours, theirs = _Heads(student), _Heads(teacher)
    pairs = [(ours.neck(one), theirs.neck(one), one) for one in ours.ends if one in theirs.ends]
    return [(ours.tap(a), theirs.tap(b)) for a, b, _ in pairs if a is not None and b is not None]


def _branches(student: fx.GraphModule, teacher: fx.GraphModule) -> list[tuple[Tap, Tap]]:
    ours, theirs = _Heads(student), _Heads(teacher)
    found: list[tuple[Tap, Tap]] = []
    for resolution in theirs.ends:
        if resolution not in ours.ends:
            continue
        necks = ours.neck(resolution), theirs.neck(resolution)
        if necks[0] is None or necks[1] is None:
            continue
        both = ours.branches(resolution, necks[0]), theirs.branches(resolution, necks[1])
        if len(both[0]) != len(both[1]):
            raise InputError(
                f"cross: at {'x'.join(map(str, resolution))} the student's heads have {len(both[0])} branches, the "
                f"teacher's {len(both[1])}; compare answers or necks (loss='quality', loss='pkd')"
            )
        found += [(ours.tap(a), theirs.tap(b)) for a, b in zip(*both)]
    if not found:
        raise InputError("cross: no heads at a common resolution; compare answers or stages (loss='quality')")
    return found


def _is_map(value: object) -> bool:
    """(N, channels, rows, columns), of more than one place and channel."""
    return (
        isinstance(value, (Tensor, FakeTensor))
        and value.is_floating_point()
        and value.dim() == 4
        and value.shape[0] == _BATCH
        and value.shape[1] > 1
        and value.shape[2] * value.shape[3] > 1
    )


def _embedding(graph: fx.GraphModule, which: str) -> Tap:
    flat = [tap for tap in cuts(graph) if not tap.resolution]
    values = shapes(graph, _BATCH)
    reads = [
        index
        for index, node in enumerate(graph.graph.nodes)
        if node.op == "call_function" and _reads_weight(node, values, set())
    ]
    place = {node: index for index, node in enumerate(graph.graph.nodes)}
    before = [tap for tap in flat if reads and place[tap.node] < reads[-1]]
    if not before:
        raise InputError(
            f"embedding: the {which} has no vector before its last layer; name the pair: on=student_node=teacher_node"
        )
    return before[-1]


def _named(graph: fx.GraphModule, name: str, which: str) -> Tap:
    values = shapes(graph, _BATCH)
    called = [node for node in graph.graph.nodes if node.op == "call_function" and is_tensor(values.get(node))]
    inside = [node for node in graph.graph.nodes if node.name == name] or [
        node for node in called if f"{node.meta.get('stack', '')}.".startswith(f"{name}.")
    ]
    tap = _tap(graph, inside[-1], values.get(inside[-1])) if inside else None
    if tap is None:
        modules = sorted({stack.split(".")[0] for node in graph.graph.nodes if (stack := node.meta.get("stack"))})
        raise InputError(
            f"{name}: no value of that name in the {which}; "
            f"give a node's or a module's name ({', '.join(modules[:12])}, ...)"
        )
    return tap


def _tap(graph: fx.GraphModule, node: fx.Node, value: object) -> Tap | None:
    """None for what is no feature: not a float tensor, not batch first, or a single position."""
    if (
        not isinstance(value, (Tensor, FakeTensor))
        or not value.is_floating_point()
        or value.dim() not in (2, 3, 4)
        or value.shape[0] != _BATCH
    ):
        return None
    shape = tuple(value.shape)
    order: tuple[int, ...] | None = None
    images = len(graph.meta["inputs"][0]["shape"]) == 3
    if len(shape) == 3 and images:  # tokens (N, positions, channels)
        order = (0, 2, 1)
    elif len(shape) == 4 and shape[1] == shape[2] != shape[3]:  # (N, H, W, channels)
        order = (0, 3, 1, 2)
    shape = tuple(shape[axis] for axis in order) if order else shape
    if len(shape) > 2 and all(size == 1 for size in shape[2:]):
        return None
    return Tap(node, shape[1:], order)


def _by_resolution(taps: Iterable[Tap]) -> dict[tuple[int, ...], list[Tap]]:
    found: dict[tuple[int, ...], list[Tap]] = {}
    for tap in taps:
        found.setdefault(tap.resolution, []).append(tap)
    return found


def _dominates(resolution: tuple[int, ...], taps: dict[tuple[int, ...], list[Tap]]) -> bool:
    """A network of one resolution, but for its stem: half of its cuts are tokens of one length, or nearly all are maps
    of one size."""
    share = 0.5 if len(resolution) == 1 else 0.75  # ResNet-152 has two thirds of its cuts at 14x14, and four stages
    return len(taps[resolution]) > share * sum(map(len, taps.values()))


def _at_depths(taps: list[Tap]) -> list[Tap]:
    return [taps[-(-len(taps) * depth // DEPTHS) - 1] for depth in range(1, DEPTHS + 1)]


def _reads_weight(node: fx.Node, values: dict[fx.Node, object], carried: set[fx.Node]) -> bool:
    """A weight: it does not come from the input, and has at least two axes longer than one (constants of a
    normalisation have not)."""
    sources = [values.get(source) for source in node.all_input_nodes if source not in carried and _constant(source)]
    return any(
        isinstance(value, (Tensor, FakeTensor)) and sum(size > 1 for size in value.shape) >= 2 for value in sources
    )


def _constant(node: fx.Node) -> bool:
    """Computed from parameters and buffers alone."""
    return node.op == "get_attr" or (
        node.op == "call_function" and bool(node.all_input_nodes) and all(map(_constant, node.all_input_nodes))
    )


def _holds_tensors(value: object) -> bool:
    return is_tensor(value) or (isinstance(value, (list, tuple)) and any(map(is_tensor, value)))
