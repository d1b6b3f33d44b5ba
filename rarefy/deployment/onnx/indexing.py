"""Rows of the operators that take places out of a tensor, put others in, or around it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from rarefy.deployment.onnx.writer import LAST, Arguments, Row, Untranslated, Writer, listed, static
from rarefy.graph.nodes import Value


def _split(w: Writer, node: fx.Node, g: Arguments) -> list[str]:
    axis = g["dim"] % w.rank(g["self"])
    sizes = [static(one, two)[axis] for one, two in zip(w.known[node], w.moved[node], strict=True)]
    if None in sizes:
        raise Untranslated(f"{node.name}: splits an axis that moves with the batch")
    if len(sizes) == 1:
        return [w.value(g["self"])]
    return w.ops("Split", [w.value(g["self"]), w.constant(sizes)], len(sizes), axis=axis)


def _unbind(w: Writer, node: fx.Node, g: Arguments) -> list[str]:
    axis = g["dim"] % w.rank(g["self"])
    name = w.value(g["self"])
    return [w.op("Gather", [name, w.constant(index)], axis=axis) for index in range(w.fixed(g["self"], axis))]


def _slice(w: Writer, node: fx.Node, g: Arguments) -> str:
    start, end = 0 if g["start"] is None else g["start"], LAST if g["end"] is None else g["end"]
    if w.same_shape(g["self"], node):
        return w.value(g["self"])
    return w.sliced(w.value(g["self"]), g["dim"] % w.rank(g["self"]), start, end, g["step"])


def _narrow(w: Writer, node: fx.Node, g: Arguments) -> str:
    start, length = (w.plain(g[key]) for key in ("start", "length"))
    if start is None or length is None:
        raise Untranslated(f"{node.name}: a part that moves with the batch")
    return w.sliced(w.value(g["self"]), g["dim"] % w.rank(g["self"]), start, start + length)


def _select(w: Writer, node: fx.Node, g: Arguments) -> str:
    index = w.plain(g["index"])
    if index is None:
        raise Untranslated(f"{node.name}: a place that moves with the batch")
    return w.op("Gather", [w.value(g["self"]), w.constant(index)], axis=g["dim"] % w.rank(g["self"]))


def _roll(w: Writer, node: fx.Node, g: Arguments) -> str:
    name, rank = w.value(g["self"]), w.rank(g["self"])
    if not g["dims"]:
        raise Untranslated(f"{node.name}: rolls everything as one axis")
    for shift, dim in zip(listed(g["shifts"], 1), g["dims"], strict=True):
        size, axis = w.fixed(g["self"], dim), dim % rank
        if shift % size:
            cut = size - shift % size
            name = w.op("Concat", [w.sliced(name, axis, cut, LAST), w.sliced(name, axis, 0, cut)], axis=axis)
    return name


def _flip(w: Writer, node: fx.Node, g: Arguments) -> str:
    name, rank = w.value(g["self"]), w.rank(g["self"])
    for dim in g["dims"]:
        name = w.sliced(name, dim % rank, -1, -LAST, -1)
    return name


_MARGINS = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}


def _pad(w: Writer, node: fx.Node, g: Arguments) -> str:
    sizes = [w.plain(size) for size in (g["pad"] if "pad" in g else g["padding"])]
    if None in sizes:
        raise Untranslated(f"{node.name}: a margin that moves with the batch")
    if g.get("mode") == "circular":
        return _wrapped(w, g["self"], sizes)
    mode = _MARGINS[g.get("mode", "constant")]
    rank = w.rank(node)
    before, after = [0] * rank, [0] * rank
    for index in range(len(sizes) // 2):
        before[rank - 1 - index], after[rank - 1 - index] = sizes[2 * index : 2 * index + 2]
    inputs = [w.value(g["self"]), w.constant(before + after)]
    if mode == "constant":
        inputs.append(w.constant(g.get("value") or 0, w.dtype(node)))
    return w.op("Pad", inputs, mode=mode)


def _wrapped(w: Writer, source: fx.Node, sizes: Sequence[Value]) -> str:
    """Each side is continued by the other; slices, as not every runtime has that kind of padding."""
    name = w.value(source)
    for index in range(len(sizes) // 2):
        axis = w.rank(source) - 1 - index
        before, after = sizes[2 * index : 2 * index + 2]
        size = w.fixed(source, axis)
        start, end = max(-before, 0), size - max(-after, 0)
        parts = [w.sliced(name, axis, start, end) if (start, end) != (0, size) else name]
        parts = [*([w.sliced(name, axis, size - before, size)] if before > 0 else []), *parts]
        parts = [*parts, *([w.sliced(name, axis, 0, after)] if after > 0 else [])]
        name = w.op("Concat", parts, axis=axis) if len(parts) > 1 else parts[0]
    return name


def _index(w: Writer, node: fx.Node, g: Arguments) -> str:
    """x[:, i, j]: the indexed axes, which must lie side by side, are one axis that is gathered from."""
    source, indices = g["self"], g["indices"]
    used = [axis for axis, one in enumerate(indices) if one is not None]
    shape, first, last = w.shape(source), used[0], used[-1]
    if any(w.dtype(indices[axis]) not in (torch.int64, torch.int32) for axis in used) or last - first >= len(used):
        raise Untranslated(f"{node.name}: indexing by a mask, or of axes apart")
    name = w.value(source)
    if len(used) == 1:
        return w.op("Gather", [name, w.value(indices[first])], axis=first)
    sizes = [w.fixed(source, axis) for axis in used]
    place = ""
    for axis, size in zip(used, sizes, strict=True):
        one = w.value(indices[axis], torch.int64)
        one = w.op("Where", [w.op("Less", [one, w.constant(0)]), w.op("Add", [one, w.constant(size)]), one])
        place = one if not place else w.op("Add", [w.op("Mul", [place, w.constant(size)]), one])
    merged = [*shape[:first], math.prod(sizes), *shape[last + 1 :]]
    return w.op("Gather", [w.reshaped(name, merged), place], axis=first)


def _index_select(w: Writer, node: fx.Node, g: Arguments) -> str:
    return w.op("Gather", w.values(g["self"], g["index"]), axis=g["dim"] % w.rank(g["self"]))


def _one_hot(w: Writer, node: fx.Node, g: Arguments) -> str:
    if w.shape(node)[-1] is None or g["num_classes"] == -1:
        raise Untranslated(f"{node.name}: as many classes as the values say")
    return w.op("OneHot", [w.value(g["self"]), w.constant([w.fixed(node, -1)]), w.constant([0, 1])], axis=-1)


def _scatter(w: Writer, node: fx.Node, g: Arguments) -> str:
    if not isinstance(g.get("src"), fx.Node):
        raise Untranslated(f"{node.name}: scatters a number")
    return w.op("ScatterElements", w.values(g["self"], g["index"], g["src"]), axis=g["dim"])


def _slice_scatter(w: Writer, node: fx.Node, g: Arguments) -> str:
    """A part of an axis exchanged: what is before, the part, what is after."""
    base, axis = g["self"], g["dim"] % w.rank(g["self"])
    start = 0 if g["start"] is None else w.plain(g["start"])
    end = LAST if g["end"] is None else w.plain(g["end"])
    size = w.shape(base)[axis]
    if w.same_shape(base, g["src"]):
        return w.value(g["src"], w.dtype(node))
    if size is None or start is None or end is None or g["step"] != 1:
        raise Untranslated(f"{node.name}: writes to places that move with the batch, or lie apart")
    start, end, _ = slice(start, end).indices(size)
    return _exchanged(w, base, w.value(g["src"], w.dtype(node)), axis, (start, end), size)


def _select_scatter(w: Writer, node: fx.Node, g: Arguments) -> str:
    base, axis = g["self"], g["dim"] % w.rank(g["self"])
    size = w.fixed(base, axis)
    start = g["index"] % size
    part = w.op("Unsqueeze", [w.value(g["src"], w.dtype(node)), w.constant([axis])])
    return _exchanged(w, base, part, axis, (start, start + 1), size)


def _exchanged(w: Writer, base: fx.Node, part: str, axis: int, between: tuple[int, int], size: int) -> str:
    name, (start, end) = w.value(base), between
    before = [w.sliced(name, axis, 0, start)] if start > 0 else []
    after = [w.sliced(name, axis, end, size)] if end < size else []
    return w.op("Concat", [*before, part, *after], axis=axis) if before or after else part


def _windowed(w: Writer, node: fx.Node, g: Arguments) -> str:
    """x.unfold(axis, size, step): windows of an axis, their places in a new last one."""
    rank = w.rank(g["self"])
    axis = g["dimension"] % rank
    places = torch.arange(w.fixed(node, axis))[:, None] * g["step"] + torch.arange(g["size"])
    name = w.op("Gather", [w.value(g["self"]), w.constant(places.tolist())], axis=axis)
    return w.transposed(name, [dim for dim in range(rank + 1) if dim != axis + 1] + [axis + 1])


ROWS: dict[str, Row] = {
    "split.Tensor split.sizes split_with_sizes chunk tensor_split.sections": _split,
    "unbind.int": _unbind,
    "slice.Tensor": _slice,
    "narrow": _narrow,
    "select.int": _select,
    "roll": _roll,
    "flip": _flip,
    "pad constant_pad_nd": _pad,
    "reflection_pad1d reflection_pad2d": lambda w, node, g: _pad(w, node, {**g, "mode": "reflect"}),
    "replication_pad1d replication_pad2d": lambda w, node, g: _pad(w, node, {**g, "mode": "replicate"}),
    "index.Tensor": _index,
    "index_select": _index_select,
    "gather take_along_dim": lambda w, node, g: w.op(
        "GatherElements", [w.value(g["self"]), w.value(g.get("index", g.get("indices")))], axis=g["dim"]
    ),
    "embedding": lambda w, node, g: w.op("Gather", w.values(g["weight"], g["indices"]), axis=0),
    "one_hot": _one_hot,
    "scatter.src": _scatter,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    "unfold": _windowed,
    "tril": lambda w, node, g: w.op("Trilu", [w.value(g["self"]), w.constant(g["diagonal"])], upper=0),
    "triu": lambda w, node, g: w.op("Trilu", [w.value(g["self"]), w.constant(g["diagonal"])], upper=1),
    "operator.getitem": lambda w, node, g: w.lists[g["self"]][g["index"]],
}
