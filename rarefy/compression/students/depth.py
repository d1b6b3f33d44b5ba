"""Depth: the teacher without some of its blocks, found in the graph, whatever it calls them.

A **unit** is a stretch between two values that all of the network's work passes through (``cuts`` of
graph/features.py), with products inside, whose two ends have the same shape: then its end can be read off its start,
and the unit is gone. The end is the last such value before the next product that is made by the same operator as the
start (ReLU to ReLU in a ResNet, sum to sum in a pre-norm transformer, norm to norm in a post-norm one), else the first,
or where a chain of such units begins. Units that a path without weights goes around are **residual**: only they are
taken out where there are any, else all count (VGG).

Units that follow one another are one **block** where they repeat: attention and MLP of a transformer leave together,
because the smallest period of the stretch, by shapes of weights, is two. A run that repeats nothing is one block.

Which blocks leave: those that change their input least, 1 - cos(input, output), averaged over images (block influence,
arXiv 2403.03853): one pass for all of them; or evenly. What stays keeps its weights. Given up: that the others'
influence changes once a block is gone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from rarefy.compression.students._fresh import fresh as anew
from rarefy.errors import InputError
from rarefy.graph.features import Tap, cuts, tapped
from rarefy.graph.macs import count_macs, layer_macs
from rarefy.graph.nodes import Value, attribute, device_of, finish, operator_name
from rarefy.graph.shapes import shapes
from rarefy.tasks.task import Task

BATCH = 32


@dataclass(frozen=True)
class Depth:
    """A shallower copy: whole blocks leave, the others keep their weights.

    For deep networks of like blocks, on runtimes that pay by the layer. Not ``width``, which keeps all layers.

    keep: share of the blocks.
    macs: share of the MACs, in its place.
    choose: influence (looks at images) or even.
    images: how many it looks at.
    fresh: with new weights.
    """

    keep: float = 0.5
    macs: float | None = None
    choose: str = "influence"
    images: int = 128
    fresh: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or (self.macs is not None and not 0 < self.macs <= 1):
            raise ValueError(f"keep={self.keep} and macs={self.macs} are shares above 0 and up to 1")
        if self.choose not in ("influence", "even") or self.images < 1:
            raise ValueError(f"choose={self.choose!r} is influence or even, and images={self.images} at least 1")

    def make(self, teacher: fx.GraphModule, task: Task | None, seed: int) -> fx.GraphModule:
        """Raises InputError where the network has no block that could leave, or not enough of them for ``macs``."""
        every = blocks(teacher)
        if not every:
            raise InputError(
                "student=depth: no stretch of the network ends in the shape it starts with, so no block can leave; "
                "choose width"
            )
        if self.choose == "even":
            order = _evenly(len(every))
        else:
            moved = influence(teacher, every, _images(task, self.images, seed))
            order = torch.tensor(moved).argsort(stable=True).tolist()
        leaving = self._enough(teacher, every, order)
        small = without(teacher, [every[index] for index in sorted(leaving)])
        small = anew(small, seed) if self.fresh else small
        small.meta["student"] = {
            "blocks": [len(every), len(every) - len(leaving)],
            "removed": [every[index].name for index in sorted(leaving)],
        }
        return small

    def _enough(self, teacher: fx.GraphModule, every: Sequence[Block], order: Sequence[int]) -> list[int]:
        if self.macs is None:
            return list(order[: len(every) - max(1, round(self.keep * len(every)))])
        whole = count_macs(teacher)
        gone: list[int] = []
        left = whole
        for index in order:
            if left <= self.macs * whole:
                break
            gone.append(index)
            left -= every[index].macs
        if left > self.macs * whole:
            raise InputError(
                f"student=depth: macs={self.macs} is out of reach, without all {len(every)} blocks that can leave "
                f"{left / whole:.3f} remain; raise macs, or choose width"
            )
        return gone


class Block(NamedTuple):
    """start, end: the values it lies between. name: of the modules it was made of. macs: of one sample."""

    start: Tap
    end: Tap
    name: str
    macs: int


class _Unit(NamedTuple):
    start: Tap
    end: Tap
    residual: bool
    macs: int
    weights: tuple[tuple[int, ...], ...]
    stacks: tuple[str, ...]


def blocks(graph: fx.GraphModule) -> list[Block]:
    """The blocks that can leave, in execution order."""
    units = _units(graph)
    units = [unit for unit in units if unit.residual] or units
    runs: list[list[_Unit]] = []
    for unit in units:
        if runs and runs[-1][-1].end.node is unit.start.node:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    repeated = []
    for run in runs:
        period = next(
            size for size in range(1, len(run) + 1) if all(a.weights == b.weights for a, b in zip(run, run[size:]))
        )
        first = len(run) % period  # what does not fill a period came before the others
        for place in range(first, len(run), period):
            part = run[place : place + period]
            stacks = [stack for unit in part for stack in unit.stacks]
            repeated.append(Block(part[0].start, part[-1].end, _common(stacks), sum(unit.macs for unit in part)))
    return repeated


def without(graph: fx.GraphModule, leaving: Sequence[Block]) -> fx.GraphModule:
    """A copy of the graph in which whoever read the end of a block reads its start. leaving: in execution order."""
    small = copy.deepcopy(graph)
    nodes = {node.name: node for node in small.graph.nodes}
    instead: dict[str, str] = {}
    for block in leaving:
        start = instead.get(block.start.node.name, block.start.node.name)
        instead[block.end.node.name] = start
        nodes[block.end.node.name].replace_all_uses_with(nodes[start])
    finish(small)
    kept = {name for name, _ in small.named_parameters(remove_duplicate=False)}
    for key in small.meta.keys() & {"sparse", "shared"}:
        small.meta[key] = [name for name in small.meta[key] if name in kept]
    return small


@torch.no_grad()
def influence(graph: fx.GraphModule, every: Sequence[Block], images: Sequence[Tensor]) -> list[float]:
    """1 - cos(input, output) of each block, mean over the images."""
    taps = list({tap.node: tap for block in every for tap in (block.start, block.end)}.values())
    place = {tap.node: index for index, tap in enumerate(taps)}
    seen = tapped(graph, taps).eval()
    total, count = torch.zeros(len(every), dtype=torch.float64), 0
    for batch in images:
        _, values = seen(batch.to(device_of(graph)))
        pairs = (
            (values[place[block.start.node]].flatten(1), values[place[block.end.node]].flatten(1)) for block in every
        )
        total += torch.stack(
            [nn.functional.cosine_similarity(a.float(), b.float()).double().sum() for a, b in pairs]
        ).cpu()
        count += len(batch)
    return [1 - value for value in (total / count).tolist()]


def _units(graph: fx.GraphModule) -> list[_Unit]:
    values, macs = shapes(graph), layer_macs(graph)
    nodes = list(graph.graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    marks = cuts(graph)
    heavy = [
        any(node.name in macs for node in nodes[place[a.node] + 1 : place[b.node] + 1])
        for a, b in itertools.pairwise(marks)
    ]
    starts = [index for index, weighs in enumerate(heavy) if weighs]
    stretches = list(zip(starts, [*starts[1:], len(marks) - 1]))
    ends = [_end(values, marks[index], marks[index + 1 : following + 1]) for index, following in stretches]
    units = []
    for number, (index, following) in enumerate(stretches):
        start, end = marks[index], ends[number]
        if end is None:
            continue
        last, after = marks[following], ends[number + 1] if number + 1 < len(ends) else None
        if (
            not _same_operator(start, end)
            and _alike(values, start, last)
            and after is not None
            and _same_operator(last, after)
        ):
            end = last  # the next unit starts there and ends like it, so here a chain of them begins
        inside = nodes[place[start.node] + 1 : place[end.node] + 1]
        weights = [
            attribute(graph, source) for node in inside for source in node.all_input_nodes if source.op == "get_attr"
        ]
        units.append(
            _Unit(
                start,
                end,
                _goes_around(start.node, end.node, inside, macs),
                sum(macs.get(node.name, 0) for node in inside),
                tuple(sorted(tuple(one.shape) for one in weights if isinstance(one, Tensor))),
                tuple(stack for node in inside if (stack := node.meta.get("stack"))),
            )
        )
    return units


def _end(values: Mapping[fx.Node, Value], start: Tap, following: Sequence[Tap]) -> Tap | None:
    """Where the unit ends, if it is one: at the last value made like the start, else at the first."""
    alike = [tap for tap in following if _alike(values, start, tap)]
    same = [tap for tap in alike if _same_operator(start, tap)]
    return same[-1] if same else alike[0] if alike and alike[0] is following[0] else None


def _same_operator(one: Tap, other: Tap) -> bool:
    return operator_name(one.node) == operator_name(other.node)


def _alike(values: Mapping[fx.Node, Value], one: Tap, other: Tap) -> bool:
    a, b = values[one.node], values[other.node]
    return (a.shape, a.dtype) == (b.shape, b.dtype)


def _goes_around(start: fx.Node, end: fx.Node, inside: Sequence[fx.Node], macs: dict[str, int]) -> bool:
    """Does a path lead from start to end past all products?

    Not through a gate: there the value is multiplied by what products made of it.
    """
    reached = {start}
    for node in inside:
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        gate = operator_name(node) == "mul" and not all(source in reached for source in sources)
        if node.name not in macs and not gate and any(source in reached for source in sources):
            reached.add(node)
    return end in reached


def _common(stacks: Sequence[str]) -> str:
    """``layer1.1`` of ``layer1.1.conv1`` and ``layer1.1.bn2``; the first of them where they share nothing."""
    levels = zip(*(stack.split(".") for stack in stacks))
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    return ".".join(level[0] for level in shared) or next(iter(stacks), "a block")


def _evenly(count: int) -> list[int]:
    """An order of which every beginning is spread out: by the bits of the place, read backwards (van der Corput)."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda index: int(f"{(index + 1) % 2**bits:0{bits}b}"[::-1], 2))


def _images(task: Task | None, count: int, seed: int) -> list[Tensor]:
    if task is None:
        raise InputError("student=depth: choose=influence looks at images; pass task=, or choose=even")
    return list(task.data.inputs("train" if task.data.train is not None else "val", count, BATCH, seed=seed))
