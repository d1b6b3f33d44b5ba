"""alike(): the axes along which an operator treats every position in the same way, so that a few of them stand for all.

A linear layer maps each token by itself, so its rows may be cut to a few; a convolution is the same function on a smaller image. A row of ``AXES`` names, for one
operator, runs of axes that are cut together: of which arguments, and of the result. An operator without a row is not cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from rarefy.graph.macs import einsum_letters
from rarefy.graph.nodes import operator_name
from rarefy.pruning.groups.rules import is_elementwise

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Run:
    """Axes cut together: ``sources`` place among the node's arguments -> axis; ``result`` axis; ``least``: no shorter than that.

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
    shape: Any = node.args[1]
    linear = operator_name(node) == "linear"
    runs = [Run({0: axis}, axis) for axis in range(len(result) - (1 if linear else len(shape)))]
    return [*runs, Run(_made(shapes), len(result) - 1, CHANNELS)] if linear else runs


CHANNELS = 32  # of a weight's outputs no fewer


def _made(shapes: Sequence[Shape | None]) -> dict[int, int]:
    """The outputs of a weight and a bias."""
    return {place: 0 for place, shape in enumerate(shapes) if place > 0 and shape is not None}


def _across(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
    return [Run({0: axis}, axis) for axis in range(len(result)) if axis != dim % len(result)]


def _places(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    """batch_norm: each place by itself, unless it asks for the batch's own statistics."""
    return [] if node.args[5] is True else [Run({0: axis}, axis) for axis in (0, *range(2, len(result)))]


def _windows(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], result: Shape) -> list[Run]:
    first = len(result) - len(kernel)
    return [
        Run({0: first + index}, first + index, dilation[index] * (size - 1) + 1 + 2 * stride[index])
        for index, size in enumerate(kernel)
    ]


def _convolution(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    """A smaller image, of a kernel and two steps at least; fewer outputs, or fewer groups of several channels."""
    kernel = (shapes[1] or ())[2:]
    stride, _, dilation = (_each(node, place, name, default, len(kernel)) for place, name, default in _CONVOLUTION)
    groups: Any = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    runs, axis = _windows(kernel, stride, dilation, result), len(result) - len(kernel) - 1
    if groups == 1:
        return [*runs, Run(_made(shapes), axis, CHANNELS)]
    return [*runs, Run({0: axis, **_made(shapes)}, axis, groups=groups)] if groups < (shapes[0] or ())[axis] else runs


_CONVOLUTION = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))


def _each(node: fx.Node, place: int, name: str, default: Any, rank: int) -> list[int]:
    value: Any = node.args[place] if place < len(node.args) else node.kwargs.get(name, default)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return (values * rank)[:rank] if values and not isinstance(values[0], str) else [default] * rank


def _pooling(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    rank = int(next(letter for letter in reversed(operator_name(node)) if letter.isdigit()))
    kernel = _each(node, 1, "kernel_size", 1, rank)
    stride = _each(node, 2, "stride", [], rank) if len(node.args) > 2 and node.args[2] else kernel
    dilation = _each(node, 4, "dilation", 1, rank) if operator_name(node).startswith("max") else [1] * rank
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
    plain = (
        len(shapes) == 3
        and len(node.args) <= 5
        and not node.kwargs.get("enable_gqa")
        and len({len(shape or ()) for shape in shapes}) == 1
    )
    causal = (node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)) is not False
    if not plain or causal:
        return []
    lead = [f"lead{index}" for index in range(len(result) - 2)]
    letters = [[*lead, "rows", "inner"], [*lead, "keys", "inner"], [*lead, "keys", "columns"]]
    return _contraction(letters, [*lead, "rows", "columns"], shapes)


def _permuted(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    rank, given = len(result), list[Any](node.args[1:])
    order: list[Any] = list(range(rank))
    if operator_name(node) == "permute":
        order = [axis % rank for axis in given[0]]
    else:
        one, other = (axis % rank for axis in given)
        order[one], order[other] = other, one
    return [Run({0: axis}, place) for place, axis in enumerate(order)]


def _beside(node: fx.Node, shapes: Sequence[Shape | None], result: Shape) -> list[Run]:
    """What moves numbers along one axis (slice, cat, split, ...) does so at each place of the others."""
    place = 2 if operator_name(node).endswith("_scatter") or operator_name(node).startswith(("split", "chunk")) else 1
    dim: Any = node.args[place] if place < len(node.args) else node.kwargs.get("dim", 0)
    tensors = {index: shape for index, shape in enumerate(shapes) if shape is not None and len(shape) == len(result)}
    if operator_name(node) == "index_select":
        tensors = {0: result}
    return [Run(dict.fromkeys(tensors, axis), axis) for axis in range(len(result)) if axis != dim % len(result)]


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
