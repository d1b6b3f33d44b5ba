"""Rows of pooling, resizing, and of the operators that move values or reduce axes."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from torch import fx

from rarefy.deployment.tflite.layers import fits_same, padded
from rarefy.deployment.tflite.writer import Arguments, Ref, Row, Untranslated, Writer, pair
from rarefy.graph.nodes import Value


def _pool(w: Writer, node: fx.Node, g: Arguments, average: bool) -> Ref:
    x = w.channels_last(w.value(g["self"]))
    kernel, around = pair(g["kernel_size"]), pair(g["padding"] or 0)
    stride, dilation = pair(g["stride"] or g["kernel_size"]), pair(g.get("dilation", 1))
    out = w.shape(node)[2:]
    after = [(o - 1) * s + k - size - p for o, s, k, size, p in zip(out, stride, kernel, x.shape[1:3], around)]
    after = [max(one, 0) for one in after]
    sides = range(2)
    same = all(fits_same(x.shape[1 + i], kernel[i], stride[i], 1, around[i], around[i]) for i in sides)
    included = g.get("count_include_pad", True) is not False
    if dilation != [1, 1] or (average and (g["divisor_override"] is not None or (g["ceil_mode"] and any(after)))):
        raise Untranslated(f"{w.name}: pooling with dilation, a divisor of its own or ceil_mode")
    if any(around + after) and (not same or (average and included)):
        if average and not included:
            raise Untranslated(f"{w.name}: an average that leaves out what is padded")
        x, same = padded(w, x, around, after, None if average else -math.inf), False
    options = {
        "table": "Pool2DOptions", "padding": w.schema.Padding.SAME if same else w.schema.Padding.VALID,
        "strideH": stride[0], "strideW": stride[1], "filterHeight": kernel[0], "filterWidth": kernel[1],
    }  # fmt: skip
    kind = "AVERAGE_POOL_2D" if average else "MAX_POOL_2D"
    return w.move(kind, x, [], (x.shape[0], *out, x.shape[3]), True, **options)


def _adaptive(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x = w.channels_last(w.value(g["self"]))
    sizes = pair(g["output_size"])
    if sizes == [1, 1]:
        axes = w.constant(np.array([1, 2], np.int32))
        return w.compute("MEAN", [x, axes], (x.shape[0], 1, 1, x.shape[3]), True, table="ReducerOptions", keepDims=True)
    if any(size % wanted for size, wanted in zip(x.shape[1:3], sizes, strict=True)):
        raise Untranslated(f"{w.name}: an average over windows of several sizes")
    kernel = [size // wanted for size, wanted in zip(x.shape[1:3], sizes, strict=True)]
    options = {
        "table": "Pool2DOptions", "padding": w.schema.Padding.VALID, "strideH": kernel[0], "strideW": kernel[1],
        "filterHeight": kernel[0], "filterWidth": kernel[1],
    }  # fmt: skip
    return w.move("AVERAGE_POOL_2D", x, [], (x.shape[0], *sizes, x.shape[3]), True, **options)


def _reduce(w: Writer, node: fx.Node, g: Arguments, kind: str) -> Ref:
    x = w.value(g["self"])
    dims = g["dim"] if isinstance(g["dim"], (list, tuple)) else [g["dim"]]
    axes = sorted(axis % len(x.shape) for axis in (dims or range(len(x.shape))))
    plane = x.last and g["keepdim"]
    if x.last and not plane:
        x = w.plain(x)
    stored = [(0, 3, 1, 2)[axis] for axis in axes] if plane else axes
    shape = [1 if axis in stored else size for axis, size in enumerate(x.shape)]
    shape = shape if g["keepdim"] else [size for axis, size in enumerate(x.shape) if axis not in stored]
    places = w.constant(np.array(stored, np.int32))
    return w.compute(kind, [x, places], shape, plane, table="ReducerOptions", keepDims=bool(g["keepdim"]))


def _nearest(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x = w.channels_last(w.value(g.get("input", g.get("self"))))
    out = w.shape(node)[2:]
    sizes = w.constant(np.array(out, np.int32))
    shape = (x.shape[0], *out, x.shape[3])
    options = {"table": "ResizeNearestNeighborOptions", "alignCorners": False, "halfPixelCenters": False}
    return w.move("RESIZE_NEAREST_NEIGHBOR", x, [sizes], shape, True, **options)


def _bilinear(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x = w.channels_last(w.value(g.get("input", g.get("self"))))
    out = w.shape(node)[2:]
    corners = bool(g["align_corners"])
    options = {"table": "ResizeBilinearOptions", "alignCorners": corners, "halfPixelCenters": not corners}
    sizes = w.constant(np.array(out, np.int32))
    return w.compute("RESIZE_BILINEAR", [x, sizes], (x.shape[0], *out, x.shape[3]), True, **options)


def _reshape(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    return w.reshaped(w.plain(w.value(next(iter(g.values())))), w.shape(node))


def _moved(w: Writer, x: Value, order: list[int]) -> Ref:
    ref = w.value(x)
    if ref.last:  # straight from the order that it is kept in
        return w.transposed(ref, [(0, 3, 1, 2)[axis] for axis in order], False)
    return w.transposed(ref, order, False)


def _permute(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    rank = len(w.shape(g["self"]))
    return _moved(w, g["self"], [axis % rank for axis in g["dims"]])


def _swap(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    order = list(range(len(w.shape(g["self"]))))
    one, two = (g[name] % len(order) for name in ("dim0", "dim1"))
    order[one], order[two] = order[two], order[one]
    return _moved(w, g["self"], order)


def _slice(w: Writer, x: Ref, axis: int, begin: int, size: int) -> Ref:
    """So many places of an axis (of the graph) from ``begin``."""
    place = (0, 3, 1, 2)[axis] if x.last else axis
    starts, sizes = [0] * len(x.shape), list(x.shape)
    starts[place], sizes[place] = begin, size
    if tuple(sizes) == x.shape:
        return x
    more = [w.constant(np.array(one, np.int32)) for one in (starts, sizes)]
    return w.move("SLICE", x, more, sizes, x.last, table="SliceOptions")


def _sliced(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x, size = w.value(g["self"]), w.shape(g["self"])
    axis = g["dim"] % len(size)
    start = 0 if g["start"] is None else int(_number(w, g["start"]))
    start = max(start + size[axis] if start < 0 else start, 0)
    if g["step"] == 1:
        return _slice(w, x, axis, start, w.shape(node)[axis])
    place = (0, 3, 1, 2)[axis] if x.last else axis
    begin, end, step = [0] * len(size), list(x.shape), [1] * len(size)
    count = w.shape(node)[axis]
    begin[place], end[place], step[place] = start, min(start + count * g["step"], size[axis]), g["step"]
    shape = list(x.shape)
    shape[place] = count
    more = [w.constant(np.array(one, np.int32)) for one in (begin, end, step)]
    return w.move("STRIDED_SLICE", x, more, shape, x.last, table="StridedSliceOptions")


def _number(w: Writer, value: Value) -> float:
    return float(w.known[value] if isinstance(value, fx.Node) else value)


def _select(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x, size = w.plain(w.value(g["self"])), w.shape(g["self"])
    axis = g["dim"] % len(size)
    return w.reshaped(_slice(w, x, axis, int(_number(w, g["index"])) % size[axis], 1), w.shape(node))


def _parts(w: Writer, node: fx.Node, g: Arguments) -> list[Ref]:
    x = w.value(g["self"])
    axis, found, begin = g["dim"] % len(w.shape(g["self"])), [], 0
    for part in w.known[node]:
        found.append(_slice(w, x, axis, begin, int(part.shape[axis])))
        begin += int(part.shape[axis])
    return found


def _unbind(w: Writer, node: fx.Node, g: Arguments) -> list[Ref]:
    x = w.plain(w.value(g["self"]))
    axis = g["dim"] % len(x.shape)
    return [w.reshaped(_slice(w, x, axis, place, 1), part.shape) for place, part in enumerate(w.known[node])]


def _concatenate(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    from rarefy.deployment.tflite.arithmetic import stored_shape, together

    parts = together(w, *(w.value(one) for one in g["tensors"]))
    if w.wanted is not None:
        parts = [w.rounded(part, w.wanted) for part in parts]
    axis, last = g["dim"] % len(w.shape(node)), parts[0].last
    place = (0, 3, 1, 2)[axis] if last else axis
    return w.compute(
        "CONCATENATION", parts, stored_shape(w, node, last), last, table="ConcatenationOptions", axis=place
    )


def _stack(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    shape, axis = list(w.shape(node)), g["dim"] % len(w.shape(node))
    shape[axis] = 1
    parts = [w.reshaped(w.plain(w.value(one)), shape) for one in g["tensors"]]
    return w.compute("CONCATENATION", parts, w.shape(node), table="ConcatenationOptions", axis=axis)


def _expand(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x, shape = w.plain(w.value(g["self"])), w.shape(node)
    x = w.reshaped(x, (*[1] * (len(shape) - len(x.shape)), *x.shape))
    if x.place in w.data:
        return w.constant(np.broadcast_to(w.data[x.place], shape), "", x.grid)
    if x.shape == shape:
        return x
    return w.move("BROADCAST_TO", x, [w.constant(np.array(shape, np.int32))], shape, table="BroadcastToOptions")


def _pad(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    if g["mode"] != "constant" or (g["value"] or 0) != 0:
        raise Untranslated(f"{w.name}: padding with something else than zeros")
    x = w.value(g["self"])
    sizes, rank = list(g["pad"]), len(x.shape)
    around = [[0, 0] for _ in range(rank)]
    for place in range(len(sizes) // 2):
        around[rank - 1 - place] = sizes[2 * place : 2 * place + 2]
    if x.last:
        around = [around[axis] for axis in (0, 2, 3, 1)]
    if any(one < 0 for pair_ in around for one in pair_):
        raise Untranslated(f"{w.name}: padding that cuts off")
    shape = [size + sum(pair_) for size, pair_ in zip(x.shape, around, strict=True)]
    return w.move("PAD", x, [w.constant(np.array(around, np.int32))], shape, x.last, table="PadOptions")


def _shuffle(w: Writer, node: fx.Node, g: Arguments) -> Ref:
    x = w.channels_last(w.value(g["self"]))
    *plane, channels = x.shape
    apart = w.reshaped(x, (*plane, g["groups"], channels // g["groups"]))
    return w.reshaped(w.transposed(apart, (0, 1, 2, 4, 3), False), x.shape, True)


ROWS: dict[str, Row] = {
    "max_pool2d": partial(_pool, average=False),
    "avg_pool2d": partial(_pool, average=True),
    "adaptive_avg_pool2d": _adaptive,
    "mean.dim": partial(_reduce, kind="MEAN"),
    "sum.dim_IntList": partial(_reduce, kind="SUM"),
    "amax": partial(_reduce, kind="REDUCE_MAX"),
    "upsample_nearest2d.vec upsample_nearest2d": _nearest,
    "upsample_bilinear2d.vec upsample_bilinear2d": _bilinear,
    "view reshape _unsafe_view flatten.using_ints unflatten.int squeeze.dim squeeze.dims squeeze unsqueeze": _reshape,
    "permute": _permute,
    "transpose.int": _swap,
    "slice.Tensor": _sliced,
    "select.int": _select,
    "chunk split.Tensor split_with_sizes": _parts,
    "unbind.int": _unbind,
    "cat concat": _concatenate,
    "stack": _stack,
    "expand": _expand,
    "pad": _pad,
    "channel_shuffle": _shuffle,
}
