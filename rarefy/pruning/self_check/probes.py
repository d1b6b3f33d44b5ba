"""Which part of an operator's work stands for all: axes along which it treats every position alike, cut to a few.

A linear layer maps each token by itself, so its rows may be cut to a few; a convolution is the same function on a
smaller image. A row of ``AXES`` names, for one operator, runs of axes that are cut together: of which arguments, and of
the result. An operator without a row is not cut. ``Probe`` says where a node of the large graph and the same one of the
small graph are cut, so that both compute the same positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rarefy.graph.macs import einsum_letters
from rarefy.graph.nodes import Value as Argument
from rarefy.graph.nodes import argument, operator_name
from rarefy.pruning.groups.labels import Value, values_in
from rarefy.pruning.groups.rules import is_elementwise
from rarefy.pruning.groups.survivors import Cut, Survivors, survivors_in

Shape = tuple[int, ...]


# Numbers of a tensor that stand for all, about, where an operator treats positions alike.
MOST = 1 << 16


@dataclass(frozen=True, eq=False)
class Run:
    """Axes cut together.

    sources: place among the node's arguments -> axis.  result: axis of what it yields.  least: no shorter than that.
    sized: the operator's second argument is a list of sizes, of which the one at ``result`` is cut too.
    groups: of a convolution; the axes are cut to a few whole groups, and lengths are counted in these.
    """

    sources: dict[int, int]
    result: int
    least: int = 1
    sized: bool = False
    groups: int = 0


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The nodes among its arguments, in their order, one that stands twice twice."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def alike(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    """shapes: of each of ``sources_of(node)``, None for a plain number.  result: of what it yields."""
    rule = AXES.get(operator_name(node))
    if rule is None and is_elementwise(node):
        rule = _elementwise
    return rule(node, shapes, result) if rule is not None else []


def lengths(runs: Sequence[Run], shapes: Sequence[Shape | None], result: Shape, most: int) -> list[tuple[Run, int]]:
    """How far to cut each run so that no tensor holds more than ``most`` numbers, as far as there are runs."""
    sizes = [list(shape) for shape in (*shapes, result) if shape is not None]
    tensors = [place for place, shape in enumerate(shapes) if shape is not None] + [len(shapes)]
    axes = {run: run.sources | {len(shapes): run.result} for run in runs}
    waiting, found = list(runs), []
    while waiting:
        large = {place: math.prod(size) for place, size in zip(tensors, sizes, strict=True) if math.prod(size) > most}
        useful = [run for run in waiting if large.keys() & axes[run].keys()]
        if not useful:
            break
        run = max(useful, key=lambda run: max(large.get(place, 0) for place in axes[run]) * sizes[-1][run.result])
        waiting.remove(run)
        total = max(large.get(place, 0) for place in axes[run])
        members = [(size, axes[run][place]) for place, size in zip(tensors, sizes, strict=True) if place in axes[run]]
        length = run.groups or min(size[axis] for size, axis in members)
        least = max(run.least, -(-length * most // total))
        if least < length:
            found.append((run, least))
            for size, axis in members:
                size[axis] = size[axis] // length * least if run.groups else min(size[axis], least)
    return found


def _elementwise(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    runs = []
    for back in range(1, len(result) + 1):
        own = {
            place: len(shape) - back
            for place, shape in enumerate(shapes)
            if shape is not None and len(shape) >= back and shape[-back] > 1
        }
        if own:
            runs.append(Run(own, len(result) - back))
    return runs


def _rows(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    """linear, layer_norm over the last axis: each row by itself."""
    linear = operator_name(node) == "linear"
    taken = 1 if linear else len(argument(node, "normalized_shape"))
    runs = [Run({0: axis}, axis) for axis in range(len(result) - taken)]
    return [*runs, Run(_outputs(shapes), len(result) - 1, CHANNELS)] if linear else runs


CHANNELS = 32  # of a weight's outputs no fewer


def _outputs(shapes: Sequence[Shape | None]) -> dict[int, int]:
    """The outputs of a weight and a bias."""
    return {place: 0 for place, shape in enumerate(shapes) if place > 0 and shape is not None}


def _across(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    dim = argument(node, "dim") % len(result)
    return [Run({0: axis}, axis) for axis in range(len(result)) if axis != dim]


def _places(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    """batch_norm: each place by itself, unless it asks for the batch's own statistics."""
    return [] if argument(node, "training") is True else [Run({0: axis}, axis) for axis in (0, *range(2, len(result)))]


def _windows(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], result: Shape) -> list[Run]:
    first = len(result) - len(kernel)
    return [
        Run({0: first + index}, first + index, dilation[index] * (size - 1) + 1 + 2 * stride[index])
        for index, size in enumerate(kernel)
    ]


def _convolution(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    """A smaller image, of a kernel and two steps at least; fewer outputs, or fewer groups of several channels."""
    kernel = (shapes[1] or ())[2:]
    stride, dilation = (_each(argument(node, name), len(kernel)) for name in ("stride", "dilation"))
    groups = argument(node, "groups")
    runs, axis = _windows(kernel, stride, dilation, result), len(result) - len(kernel) - 1
    if groups == 1:
        return [*runs, Run(_outputs(shapes), axis, CHANNELS)]
    return (
        [*runs, Run({0: axis, **_outputs(shapes)}, axis, groups=groups)] if groups < (shapes[0] or ())[axis] else runs
    )


def _each(value: Argument, rank: int) -> list[int]:
    """A size for each axis, of one number or several."""
    return ((list(value) if isinstance(value, (list, tuple)) else [value]) * rank)[:rank]


def _pooling(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    rank = int(next(letter for letter in reversed(operator_name(node)) if letter.isdigit()))
    kernel = argument(node, "kernel_size")
    kernel, stride = _each(kernel, rank), _each(argument(node, "stride") or kernel, rank)
    dilation = _each(argument(node, "dilation"), rank) if operator_name(node).startswith("max") else [1] * rank
    return _windows(kernel, stride, dilation, result)


def _averaged(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    """Adaptive pooling: each sample and channel by itself."""
    rank = int(next(letter for letter in reversed(operator_name(node)) if letter.isdigit()))
    return [Run({0: axis}, axis) for axis in range(len(result) - rank)]


def _contraction(letters: Sequence[Sequence[str]], out: Sequence[str], shapes: Sequence[Shape | None]) -> list[Run]:
    """Letters of the result, each with its axis in the operands that have it in full."""
    runs = []
    for axis, letter in enumerate(out):
        own = {place: names.index(letter) for place, names in enumerate(letters) if letter in names}
        own = {place: index for place, index in own.items() if (shapes[place] or ())[index] > 1}
        if own:
            runs.append(Run(own, axis))
    return runs


def _einsum(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    letters, out = einsum_letters(str(node.args[0]), [len(shape or ()) for shape in shapes])
    return [] if any(len(set(own)) < len(own) for own in letters) else _contraction(letters, out, shapes)


def _matmul(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    left, right = (len(shape or ()) for shape in shapes)
    if min(left, right) < 2:
        return []
    lead = [f"lead{back}" for back in range(len(result) - 2, 0, -1)]
    letters = [
        [*lead[len(lead) - (rank - 2) :], *own]
        for rank, own in ((left, ("rows", "inner")), (right, ("inner", "columns")))
    ]
    return _contraction(letters, [*lead, "rows", "columns"], shapes)


def _attention(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    """Each query, head and sample by itself, where there is no mask."""
    alone = argument(node, "is_causal") is False and not argument(node, "enable_gqa")
    if not alone or len(shapes) != 3 or len({len(shape or ()) for shape in shapes}) != 1:
        return []
    lead = [f"lead{index}" for index in range(len(result) - 2)]
    letters = [[*lead, "rows", "inner"], [*lead, "keys", "inner"], [*lead, "keys", "columns"]]
    return _contraction(letters, [*lead, "rows", "columns"], shapes)


def _permuted(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    rank, order = len(result), list(range(len(result)))
    if operator_name(node) == "permute":
        order = [axis % rank for axis in argument(node, "dims")]
    else:
        name = "axis" if operator_name(node) == "swapaxes" else "dim"
        one, other = (argument(node, f"{name}{index}") % rank for index in (0, 1))
        order[one], order[other] = other, one
    return [Run({0: axis}, place) for place, axis in enumerate(order)]


def _beside(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    """What moves numbers along one axis (slice, cat, split, ...) does so at each place of the others."""
    dim = argument(node, "dim") % len(result)
    tensors = {index: shape for index, shape in enumerate(shapes) if shape is not None and len(shape) == len(result)}
    if operator_name(node) == "index_select":
        tensors = {0: result}
    return [Run(dict.fromkeys(tensors, axis), axis) for axis in range(len(result)) if axis != dim]


def _viewed(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    """Leading and trailing axes that a view leaves as they are."""
    source = shapes[0] or ()
    shared = min(len(source), len(result))
    front = next((axis for axis in range(shared) if source[axis] != result[axis]), shared)
    back = next((axis for axis in range(shared - front) if source[-1 - axis] != result[-1 - axis]), shared - front)
    return [
        *(Run({0: axis}, axis, sized=True) for axis in range(front)),
        *(Run({0: len(source) - 1 - axis}, len(result) - 1 - axis, sized=True) for axis in range(back)),
    ]


def _expanded(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    source = shapes[0] or ()
    lead = len(result) - len(source)
    return [Run({0: axis}, axis + lead, sized=True) for axis, size in enumerate(source) if size > 1]


AXES: dict[str, Callable[[fx.Node, Sequence[Shape | None], Shape], list[Run]]] = {
    **dict.fromkeys(("linear", "layer_norm", "rms_norm"), _rows),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax"), _across),
    "batch_norm": _places,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"), _pooling),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _averaged),
    "einsum": _einsum,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims"), _permuted),
    **dict.fromkeys(
        ("slice", "narrow", "cat", "concat", "split", "split_with_sizes", "chunk", "index_select"), _beside
    ),
    **dict.fromkeys(("slice_scatter",), _beside),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _viewed),
    **dict.fromkeys(("expand", "broadcast_to"), _expanded),
}


# --------------------------------------------------------------------------------------------------------------- cuts


@dataclass
class Cuts:
    """Where the sources of a node and its result are cut, in the large graph and in the small one.

    sizes: the large and the small one's axis -> size, among the arguments.
    groups: how many are left of a convolution's, None for all.
    """

    large: list[Cut]
    small: list[Cut]
    result: Cut
    sizes: tuple[dict[int, int], dict[int, int]]
    groups: int | None = None


class Probe:
    """Where a node is cut for a comparison of the coupled graph with one of which only survivors are left."""

    def __init__(self, survivors: Survivors):
        self.coupling, self.survivors = survivors.coupling, survivors

    def cuts(self, node: fx.Node, new: fx.Node) -> Cuts:
        """A few positions in the middle of the axes that the operator treats alike; new: the node of the small graph.

        Nothing is cut where the nodes read different things, and no run of axes of which different positions survive.
        """
        sources, others = sources_of(node), sources_of(new)
        cuts = Cuts([[] for _ in sources], [[] for _ in others], [], ({}, {}))
        values = [self.coupling.values[source] for source in sources]
        same = [source.name for source in sources] == [source.name for source in others]
        if not same or any(isinstance(value, list) for value in values):
            return cuts
        result = values_in(self.coupling.values[node])[0].shape
        shapes = [value.shape if isinstance(value, Value) else None for value in values]
        survivors: dict[Run, Tensor | None] = {}
        for run in alike(node, shapes, result):
            even, index = self._even_groups(run, node) if run.groups else self._common(run, node)
            if even:
                survivors[run] = index
        for run, length in lengths(list(survivors), shapes, result, MOST):
            if run.groups:
                self._cut_groups(cuts, run, length, node)
            else:
                size = min((shapes[place] or ())[axis] for place, axis in run.sources.items())
                _cut(cuts, run, (size - length) // 2, length, survivors[run])
        return cuts

    def _cut_groups(self, cuts: Cuts, run: Run, length: int, node: fx.Node) -> None:
        """Some groups in the middle, of which equally many channels survive."""
        cuts.groups, start = length, (run.groups - length) // 2

        def part(channels: int) -> tuple[int, int]:
            return start * channels // run.groups, length * channels // run.groups

        for place, axis in run.sources.items():
            source = sources_of(node)[place]
            size, index = self.coupling.values[source].shape[axis], self.survivors.kept(source)[axis]
            cuts.large[place].append((axis, *part(size)))
            cuts.small[place].append((axis, *part(size if index is None else len(index))))
        cuts.result.append((run.result, *part(self.coupling.values[node].shape[run.result])))

    def _common(self, run: Run, node: fx.Node) -> tuple[bool, Tensor | None]:
        """(do the same positions survive along all of a run's axes?, which they are, None for all)."""
        sources = sources_of(node)
        found = [kept[run.result] for kept in self.survivors.parts(node)]
        found += [self.survivors.kept(sources[place])[axis] for place, axis in run.sources.items()]
        first, *others = found
        if first is None:
            return all(index is None for index in others), None
        return all(index is not None and torch.equal(index, first) for index in others), first

    def _even_groups(self, run: Run, node: fx.Node) -> tuple[bool, None]:
        """Does every group keep as many outputs, along all axes of these, and the same of its inputs?"""
        source, groups = sources_of(node)[0], run.groups
        read = self.survivors.kept(source)[run.sources[0]]
        if read is not None:
            size = self.coupling.values[source].shape[run.sources[0]] // groups
            first = read[: len(read) // groups]
            if len(read) % groups or not torch.equal(read, (first + size * torch.arange(groups)[:, None]).flatten()):
                return False, None
        outputs = Run({place: axis for place, axis in run.sources.items() if place}, run.result)
        even, made = self._common(outputs, node)
        if even and made is not None:
            size = self.coupling.values[node].shape[run.result] // groups
            even = len(torch.bincount(made // size, minlength=groups).unique()) == 1
        return even, None


def _cut(cuts: Cuts, run: Run, start: int, length: int, index: Tensor | None) -> None:
    """``length`` positions from ``start`` on along the axes of a run; index: those that survive, None for all."""
    first, count = survivors_in(index, start, length)
    if not count:
        return
    for place, axis in run.sources.items():
        cuts.large[place].append((axis, start, length))
        cuts.small[place].append((axis, first, count))
    cuts.result.append((run.result, start, length))
    if run.sized:
        cuts.sizes[0][run.result], cuts.sizes[1][run.result] = length, count
