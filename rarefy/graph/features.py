"""Values inside a graph: which ones are worth comparing between two networks, and a graph that returns them.

A *cut* is a value all of the network's work passes through: no path from input to output goes around it. Ends of
residual blocks are cuts, values inside a block are not. The last cut of each resolution is the end of a stage, whatever
the family: no list of layer names per architecture. Found in one sweep: in execution order, a node is a cut when
nothing made before it is read after it.

Taps are extra outputs of a copy of the graph that shares its parameters and buffers, so they cost nothing and work
under ``torch.compile`` and DDP, where hooks and interpreters do not.
"""

from __future__ import annotations

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
    if on == "logits":
        return []
    if on == "embedding":
        return [(_embedding(student, "student"), _embedding(teacher, "teacher"))]
    if on == "stages":
        return _stages(student, teacher)
    pairs = [pair.partition("=") for pair in on.split(";")]
    return [
        (_named(student, ours.strip(), "student"), _named(teacher, (theirs or ours).strip(), "teacher"))
        for ours, _, theirs in pairs
    ]


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
