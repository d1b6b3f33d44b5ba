"""Rows of the operators on axes and sizes: reshaping, transposing, repeating, joining, and tensors of sizes alone."""

from __future__ import annotations

from functools import partial

from torch import fx

from rarefy.deployment.onnx.writer import Arguments, Row, Untranslated, Writer, listed


def _reshape(w: Writer, node: fx.Node, g: Arguments) -> str:
    name = w.value(g["self"])
    if w.same_shape(g["self"], node):
        return name
    return w.reshaped(name, w.shape(node), g.get("size") or g.get("shape") or ())


def _permute(w: Writer, node: fx.Node, g: Arguments) -> str:
    rank = w.rank(g["self"])
    return w.transposed(w.value(g["self"]), [dim % rank for dim in g["dims"]])


_SWAPPED = (("dim0", "axis0", -1), ("dim1", "axis1", -2))


def _swap(w: Writer, node: fx.Node, g: Arguments) -> str:
    rank = w.rank(g["self"])
    order = list(range(rank))
    one, two = ((g[key] if key in g else g.get(other, last)) % rank for key, other, last in _SWAPPED)
    order[one], order[two] = order[two], order[one]
    return w.transposed(w.value(g["self"]), order)


def _move(w: Writer, node: fx.Node, g: Arguments) -> str:
    rank = w.rank(g["self"])
    sources, targets = ([dim % rank for dim in listed(g[key], 1)] for key in ("source", "destination"))
    rest = iter(dim for dim in range(rank) if dim not in sources)
    order = [sources[targets.index(dim)] if dim in targets else next(rest) for dim in range(rank)]
    return w.transposed(w.value(g["self"]), order)


def _expand(w: Writer, node: fx.Node, g: Arguments) -> str:
    shape, source = w.shape(node), g["self"]
    if w.same_shape(source, node):
        return w.value(source)
    sizes = list(g["size"]) if "size" in g else [None] * len(shape)
    parts: list[str] = []
    for axis, size in enumerate(shape):
        place = axis - len(shape) + w.rank(source)
        if place >= 0 and w.known[source].shape[place] != 1:
            parts.append(w.constant([1]))  # broadcasts
        elif size is not None:
            parts.append(w.constant([size]))
        elif isinstance(sizes[axis], fx.Node):
            parts.append(w.vector([sizes[axis]]))
        elif "other" in g:
            parts.append(w.size_of(g["other"], axis))
        else:
            raise Untranslated(f"{node.name}: a size that moves with the batch")
    plain = [w.initializers[part] for part in parts if part in w.initializers]
    if len(plain) == len(parts):
        return w.op("Expand", [w.value(source), w.constant([int(size) for size in plain])])
    return w.op("Expand", [w.value(source), w.op("Concat", parts, axis=0)])


def _repeat(w: Writer, node: fx.Node, g: Arguments) -> str:
    times = list(g["repeats"] if "repeats" in g else g["dims"])
    name = w.value(g["self"])
    missing = len(times) - w.rank(g["self"])
    if missing > 0:
        name = w.op("Unsqueeze", [name, w.constant(list(range(missing)))])
    return w.op("Tile", [name, w.vector([1] * max(-missing, 0) + times)])


def _repeat_each(w: Writer, node: fx.Node, g: Arguments) -> str:
    if g["dim"] is None:
        raise Untranslated(f"{node.name}: repeat_interleave of everything")
    return w.interleaved(w.value(g["self"]), w.shape(g["self"]), g["dim"] % w.rank(g["self"]), g["repeats"])


def _squeeze(w: Writer, node: fx.Node, g: Arguments) -> str:
    rank, sizes = w.rank(g["self"]), list(w.known[g["self"]].shape)
    dims = range(rank) if g.get("dim") is None else [dim % rank for dim in listed(g["dim"], 1)]
    gone = [dim for dim in dims if sizes[dim] == 1]
    return w.op("Squeeze", [w.value(g["self"]), w.constant(gone)]) if gone else w.value(g["self"])


def _concatenate(w: Writer, node: fx.Node, g: Arguments) -> str:
    parts = [part for part in g["tensors"] if tuple(w.known[part].shape) != (0,)]
    return w.op("Concat", [w.value(part, w.dtype(node)) for part in parts], axis=g["dim"] % w.rank(node))


def _stack(w: Writer, node: fx.Node, g: Arguments) -> str:
    axis = g["dim"] % w.rank(node)
    return w.op("Concat", [w.op("Unsqueeze", [w.value(part), w.constant([axis])]) for part in g["tensors"]], axis=axis)


def _pixel_unshuffle(w: Writer, node: fx.Node, g: Arguments) -> str:
    factor, (batch, channels, *_) = g["downscale_factor"], w.shape(g["self"])
    height, width = w.plane(g["self"])
    apart = w.reshaped(w.value(g["self"]), [batch, channels, height // factor, factor, width // factor, factor])
    return w.reshaped(w.transposed(apart, [0, 1, 3, 5, 2, 4]), w.shape(node))


def _channel_shuffle(w: Writer, node: fx.Node, g: Arguments) -> str:
    batch, _, *plane = w.shape(g["self"])
    apart = w.reshaped(w.value(g["self"]), [batch, g["groups"], w.fixed(g["self"], 1) // g["groups"], *plane])
    return w.reshaped(w.transposed(apart, [0, 2, 1, *range(3, 3 + len(plane))]), w.shape(node))


def _filled(w: Writer, node: fx.Node, g: Arguments, value: float | None) -> str:
    """A tensor of one number; its sizes are the argument's, or those of the tensor it is to be like."""
    scalar = w.value(g.get("fill_value", g.get("value", value)), w.dtype(node))
    if "size" in g:
        return w.op("Expand", [scalar, w.vector(g["size"])])
    sizes = [w.size_of(g["self"], axis) for axis in range(w.rank(node))]
    return w.op("Expand", [scalar, w.op("Concat", sizes, axis=0)])


def _range(w: Writer, node: fx.Node, g: Arguments) -> str:
    places = (g.get("start", 0), g.get("end", 0), g.get("step", 1))
    return w.op("Range", [w.value(place, w.dtype(node)) for place in places])


def _size(w: Writer, node: fx.Node, g: Arguments) -> str:
    axis = g["dim"] % w.rank(g["self"])
    return w.op("Shape", [w.value(g["self"])], start=axis, end=axis + 1)


ROWS: dict[str, Row] = {
    "view reshape _unsafe_view reshape_as view_as flatten.using_ints unflatten.int": _reshape,
    "permute": _permute,
    "transpose.int swapaxes swapdims t mT": _swap,
    "numpy_T": lambda w, node, g: w.transposed(w.value(g["self"]), range(w.rank(g["self"]))[::-1]),
    "movedim.int movedim.intlist moveaxis.int": _move,
    "expand expand_as": _expand,
    "repeat tile": _repeat,
    "repeat_interleave.self_int": _repeat_each,
    "squeeze.dim squeeze.dims squeeze": _squeeze,
    "unsqueeze": lambda w, node, g: w.op("Unsqueeze", [w.value(g["self"]), w.constant([g["dim"] % w.rank(node)])]),
    "cat concat": _concatenate,
    "stack": _stack,
    "pixel_shuffle": lambda w, node, g: w.op(
        "DepthToSpace", [w.value(g["self"])], blocksize=g["upscale_factor"], mode="CRD"
    ),
    "pixel_unshuffle": _pixel_unshuffle,
    "channel_shuffle": _channel_shuffle,
    "zeros zeros_like new_zeros": partial(_filled, value=0),
    "ones ones_like new_ones": partial(_filled, value=1),
    "full full_like new_full fill.Scalar fill.Tensor": partial(_filled, value=None),
    "arange arange.start arange.start_step": _range,
    "sym_size.int": _size,
}
