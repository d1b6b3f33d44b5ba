"""Rows of the operators on windows of the plane: pooling, resizing, sampling, and patches put in rows."""

from __future__ import annotations

import math
import operator
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx

from rarefy.deployment.onnx.writer import Arguments, Row, Untranslated, Writer, listed


def _windows(w: Writer, node: fx.Node, g: Arguments) -> dict[str, list[int]]:
    kernel = listed(g["kernel_size"], w.rank(g["self"]) - 2)
    stride, padding = listed(g["stride"] or kernel, len(kernel)), listed(g["padding"], len(kernel))
    if g["ceil_mode"] and not any(padding):  # what reaches over the plane is none of it
        dilation = listed(g.get("dilation", 1), len(kernel))
        sides = zip(kernel, w.shape(g["self"])[2:], dilation, strict=True)
        kernel = [size if side is None or gap > 1 else min(size, side) for size, side, gap in sides]
    return {"kernel_shape": kernel, "strides": stride, "pads": padding * 2}


def _max_pool(w: Writer, node: fx.Node, g: Arguments) -> str:
    sizes = _windows(w, node, g)
    dilation = listed(g["dilation"], w.rank(node) - 2)
    return w.op("MaxPool", [w.value(g["self"])], **sizes, dilations=dilation, ceil_mode=int(g["ceil_mode"]))


def _max_pool_with_places(w: Writer, node: fx.Node, g: Arguments) -> list[str]:
    sizes = _windows(w, node, g)
    return _with_places(w, g, **sizes, dilations=listed(g["dilation"], 2), ceil_mode=int(g["ceil_mode"]))


def _with_places(w: Writer, g: Arguments, **options: object) -> list[str]:
    """The largest and where they stand: ONNX counts places through the whole tensor, and torch in each plane."""
    largest, places = w.ops("MaxPool", [w.value(g["self"])], 2, **options)
    return [largest, w.op("Mod", [places, w.constant(math.prod(w.plane(g["self"])))])]


def _average_pool(w: Writer, node: fx.Node, g: Arguments) -> str:
    sizes, ceiling = _windows(w, node, g), g["ceil_mode"]
    padded, counted = any(sizes["pads"]), g["count_include_pad"]
    options = {**sizes, "ceil_mode": int(ceiling), "count_include_pad": int(counted) if padded else 0}
    name = w.op("AveragePool", [w.value(g["self"])], **options)
    divisor = g.get("divisor_override")
    if divisor is None:
        return name
    if ceiling or (padded and not counted):
        raise Untranslated(f"{node.name}: a divisor of its own with windows of several sizes")
    return w.op("Mul", [name, w.constant(math.prod(sizes["kernel_shape"]) / divisor, w.dtype(node))])


def _adaptive_average(w: Writer, node: fx.Node, g: Arguments) -> str:
    """A mean over the plane, windows of one size, or, where they differ, a product with their weights for each axis."""
    wanted = list(w.known[node].shape)[2:]
    sides = w.plane(g["self"])
    name = w.value(g["self"])
    if wanted == sides:
        return name
    if all(size == 1 for size in wanted):
        return w.op("GlobalAveragePool", [name])
    if all(side % size == 0 for side, size in zip(sides, wanted, strict=True)):
        kernel = [side // size for side, size in zip(sides, wanted, strict=True)]
        return w.op("AveragePool", [name], kernel_shape=kernel, strides=kernel)
    shares = [_shares(side, size, w.dtype(node)) for side, size in zip(sides, wanted, strict=True)]
    if len(sides) == 2:
        across = w.op("MatMul", [name, w.stored_anew("columns", shares[1].t())])
        return w.op("MatMul", [w.stored_anew("rows", shares[0]), across])
    for axis, share in enumerate(shares, 2):
        order = list(range(len(sides) + 2))
        order[axis], order[-1] = order[-1], order[axis]
        product = w.op("MatMul", [w.transposed(name, order), w.stored_anew(f"axis{axis}", share.t())])
        name = w.transposed(product, order)
    return name


def _shares(side: int, size: int, dtype: torch.dtype) -> Tensor:
    """(size, side): what each input position counts in each window's mean."""
    starts = torch.arange(size) * side // size
    ends = -(-(torch.arange(size) + 1) * side // size)
    places = torch.arange(side)
    inside = (places >= starts[:, None]) & (places < ends[:, None])
    return (inside / inside.sum(1, keepdim=True)).to(dtype)


def _adaptive_max(w: Writer, node: fx.Node, g: Arguments) -> list[str]:
    """Windows of one size; where they differ, the largest of each part of each axis, one axis after the other."""
    wanted = list(w.known[node][0].shape)[2:]
    sides = w.plane(g["self"])
    if all(side % size == 0 for side, size in zip(sides, wanted, strict=True)):
        kernel = [side // size for side, size in zip(sides, wanted, strict=True)]
        return _with_places(w, g, kernel_shape=kernel, strides=kernel)
    if any(user.target is operator.getitem and user.args[1] == 1 for user in node.users):
        raise Untranslated(f"{node.name}: places of adaptive pooling with windows of several sizes")
    name = w.value(g["self"])
    for axis, (side, size) in enumerate(zip(sides, wanted, strict=True), 2):
        parts = [w.sliced(name, axis, index * side // size, -(-(index + 1) * side // size)) for index in range(size)]
        largest = [w.op("ReduceMax", [part, w.constant([axis])], keepdims=1) for part in parts]
        name = w.op("Concat", largest, axis=axis)
    return [name]


def _resize(w: Writer, node: fx.Node, g: Arguments, mode: str, **options: object) -> str:
    source = g["input"] if "input" in g else g["self"]
    factors = (_factor(side, size) for side, size in zip(w.plane(source), w.plane(node), strict=True))
    aligned = "align_corners" if g.get("align_corners") else "half_pixel"
    transformation = {"coordinate_transformation_mode": aligned, **options}
    scales = w.constant([1.0, 1.0, *factors], torch.float32)
    return w.op("Resize", [w.value(source), "", scales], mode=mode, **transformation)


def _factor(side: int, size: int) -> float:
    """What ``side`` is multiplied by to give ``size`` when rounded down; a float32.

    (Between integer kernels ONNX Runtime loses sizes.)
    """
    factor = np.float32(size / side)
    return float(factor if side * float(factor) >= size else np.nextafter(factor, np.float32(np.inf)))


def _grid_sample(w: Writer, node: fx.Node, g: Arguments) -> str:
    modes = {
        "mode": ("linear", "nearest", "cubic")[g["interpolation_mode"]],
        "padding_mode": ("zeros", "border", "reflection")[g["padding_mode"]],
    }
    return w.op("GridSample", w.values(g["input"], g["grid"]), **modes, align_corners=int(g["align_corners"]))


def _patches(w: Writer, node: fx.Node, g: Arguments) -> str:
    """F.unfold: (n, c, h, w) -> (n, c kh kw, oh ow)."""
    source, name = g["self"], w.value(g["self"])
    if any(g["padding"]):
        top, left = g["padding"]
        name = w.op("Pad", [name, w.constant([0, 0, top, left] * 2), w.constant(0, w.dtype(node))])
    for axis, place in ((2, 0), (4, 1)):
        side = w.fixed(source, 2 + place) + 2 * g["padding"][place]
        kernel, dilation, stride = (g[key][place] for key in ("kernel_size", "dilation", "stride"))
        count = (side - dilation * (kernel - 1) - 1) // stride + 1
        places = torch.arange(kernel)[:, None] * dilation + torch.arange(count) * stride
        name = w.op("Gather", [name, w.constant(places.tolist())], axis=axis)
    return w.reshaped(w.transposed(name, [0, 1, 2, 4, 3, 5]), w.shape(node))


def _from_patches(w: Writer, node: fx.Node, g: Arguments) -> str:
    sizes = [w.constant([w.plain(size) for size in g[key]]) for key in ("output_size", "kernel_size")]
    options = {"strides": list(g["stride"]), "pads": list(g["padding"]) * 2, "dilations": list(g["dilation"])}
    return w.op("Col2Im", [w.value(g["self"]), *sizes], **options)


_NEAREST = partial(_resize, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
ROWS: dict[str, Row] = {
    "max_pool1d max_pool2d max_pool3d": _max_pool,
    "max_pool2d_with_indices": _max_pool_with_places,
    "avg_pool1d avg_pool2d avg_pool3d": _average_pool,
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d": _adaptive_average,
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d": _adaptive_max,
    "upsample_nearest2d.vec upsample_nearest2d upsample_nearest1d.vec": _NEAREST,
    "upsample_bilinear2d.vec upsample_bilinear2d upsample_linear1d.vec": partial(_resize, mode="linear"),
    "upsample_bicubic2d.vec upsample_bicubic2d": partial(_resize, mode="cubic", cubic_coeff_a=-0.75),
    "_upsample_bilinear2d_aa.vec _upsample_bilinear2d_aa": partial(_resize, mode="linear", antialias=1),
    "_upsample_bicubic2d_aa.vec _upsample_bicubic2d_aa": partial(
        _resize, mode="cubic", cubic_coeff_a=-0.5, antialias=1
    ),
    "grid_sampler grid_sampler_2d": _grid_sample,
    "im2col": _patches,
    "col2im": _from_patches,
}
