"""Rows of the operators over a plane: pooling, resizing, sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.graph.nodes import Value
from rarefy.models.onnx.layers import padded, pads
from rarefy.models.onnx.step import Row, Step, checked, numbers

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def _window(step: Step, x: Tensor) -> tuple[list[int], list[int], list[int], list[int], bool]:
    """Kernel, stride, zeros before and after, and whether a last window may reach over the edge."""
    kernel: list[int] = list(step.get("kernel_shape", []))
    rank = len(kernel)
    if rank not in _MAX or x.dim() != rank + 2:
        raise step.refuse(f"a window of {rank} axes over a tensor of {x.dim()}")
    before, after = pads(step, x.shape[2:], kernel)
    return kernel, list(step.get("strides", [1] * rank)), before, after, bool(step.get("ceil_mode", 0))


def _max_pool(step: Step, x: Tensor) -> Tensor:
    kernel, stride, before, after, ceil = _window(step, x)
    dilation = list(step.get("dilations", [1] * len(kernel)))
    if before != after or any(2 * edge > side for edge, side in zip(before, kernel)):
        x, before = padded(x, before, after, -math.inf), [0] * len(kernel)
    pooled: Tensor = _MAX[len(kernel)](x, kernel, stride, before, dilation, ceil)
    return pooled


def _average_pool(step: Step, x: Tensor) -> Tensor:
    kernel, stride, before, after, ceil = _window(step, x)
    rank = len(kernel)
    step.only("dilations", [1] * rank)
    pool, counted = _AVERAGE[rank], bool(step.get("count_include_pad", 0))
    if before == after and all(2 * edge <= side for edge, side in zip(before, kernel)):
        even: Tensor = pool(x, kernel, stride, before, ceil, counted)
        return even
    wide = padded(x, before, after)
    pooled: Tensor = pool(wide, kernel, stride, 0, ceil)
    if counted:
        return pooled
    inside = padded(torch.ones_like(x[:1, :1]), before, after)
    return pooled / pool(inside, kernel, stride, 0, ceil)


def _global_average(step: Step, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1) if x.dim() == 4 else x.mean(list(range(2, x.dim())), keepdim=True)


def _sizes(
    step: Step, x: Tensor, scales: np.ndarray | None, sizes: np.ndarray | None
) -> tuple[list[Value], list[float] | None]:
    """Sizes of the plane, and the scales, where it is they that the file says and they give no whole pixels."""
    rank = x.dim()
    axes = [step.wrapped(axis, rank) for axis in step.get("axes", range(rank))]
    if sizes is not None and np.size(sizes):
        step.only("keep_aspect_ratio_policy", "stretch")
        wanted = dict(zip(axes, numbers(sizes)))
        given, factors = [wanted.get(axis, x.shape[axis]) for axis in range(rank)], None
        if given[1] != x.shape[1]:
            raise step.refuse("a resize of the channels")
    else:
        wanted = dict(zip(axes, numbers(scales)))
        factors = [float(wanted.get(axis, 1.0)) for axis in range(rank)]
        if factors[:2] != [1.0, 1.0]:
            raise step.refuse("a resize of batch or channels")
        if not all(0 < factor < 1e4 for factor in factors):
            raise step.refuse(f"a resize by {factors}", "the file is damaged; export it again")
        given = [
            size * int(factor) if factor.is_integer() else math.floor(size * factor)
            for size, factor in zip(x.shape, factors)
        ]
    return checked(step, [1, *given[1:]])[2:], factors[2:] if factors else None


def _resize(
    step: Step, x: Tensor, roi: Value = None, scales: np.ndarray | None = None, sizes: np.ndarray | None = None
) -> Tensor:
    if step.opset < 11:  # Upsample, and the first Resize: the second input are the scales
        scales = roi if roi is not None else step.get("scales", None)
    if scales is None and sizes is None:
        raise step.refuse("a resize without scales and sizes", "the file is damaged; export it again")
    target, factors = _sizes(step, x, scales, sizes)
    mode = step.get("mode", "nearest")
    coordinates = step.get("coordinate_transformation_mode", "asymmetric" if step.opset < 11 else "half_pixel")
    if list(target) == list(x.shape[2:]):
        return x
    if mode == "nearest":
        return _nearest(step, x, target, factors, coordinates)
    if coordinates == "pytorch_half_pixel" and 1 not in target:
        coordinates = "half_pixel"
    aligned, whole = coordinates == "align_corners", x.dim() - 2
    kind = _LINEAR.get(whole) if mode == "linear" else "bicubic" if mode == "cubic" and whole == 2 else None
    cubic = mode == "cubic" and (
        not math.isclose(step.get("cubic_coeff_a", -0.75), -0.75) or step.get("exclude_outside", 0)
    )
    smooth = bool(step.get("antialias", 0))
    if coordinates not in ("half_pixel", "align_corners") or kind is None or cubic or (smooth and kind != "bilinear"):
        raise step.refuse(
            f"Resize with mode={mode}, coordinate_transformation_mode={coordinates} over {whole} axes",
            "export it with mode nearest, or linear and half_pixel or align_corners",
        )
    if smooth and (aligned or any(out < size for out, size in zip(target, x.shape[2:]))):
        raise step.refuse("Resize with antialias to fewer pixels", "resize the pictures before the model")
    exact = factors is None or aligned or all(out == size * by for out, size, by in zip(target, x.shape[2:], factors))
    places = {"size": target} if exact else {"scale_factor": factors, "recompute_scale_factor": False}
    return F.interpolate(x, mode=kind, align_corners=aligned, antialias=smooth, **places)


def _nearest(step: Step, x: Tensor, target: Sequence[Value], factors: list[float] | None, coordinates: str) -> Tensor:
    """By PyTorch's operator where it reads the same pixels, else pixel by pixel along each axis."""
    rounding = step.get("nearest_mode", "floor" if step.opset < 11 else "round_prefer_floor")
    halves = coordinates in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round")
    repeats = halves or (coordinates, rounding) == ("asymmetric", "floor")
    if repeats and factors and all(factor.is_integer() for factor in factors):  # every pixel so many times
        return F.interpolate(x, scale_factor=factors, mode="nearest")
    if not all(isinstance(size, int) for size in (*target, *x.shape[2:])):
        raise step.refuse("a resize by parts of a pixel on sizes that are free", "fix the size of the input")
    plane = [int(size) for size in x.shape[2:]]
    scales = factors or [out / size for out, size in zip(target, plane)]
    read = [_pixels(step, *one, coordinates) for one in zip(plane, target, scales)]
    for mode, offset in (("nearest", 0.0), ("nearest-exact", 0.5)):
        if all(
            np.array_equal(pixels, np.minimum(np.floor((np.arange(out) + offset) * (size / out)), size - 1))
            for pixels, size, out in zip(read, plane, target)
        ):
            return F.interpolate(x, size=list(target), mode=mode)
    for axis, (pixels, size) in enumerate(zip(read, plane), 2):
        if not np.array_equal(pixels, np.arange(size)):
            x = x.index_select(axis, torch.from_numpy(pixels))
    return x


def _pixels(step: Step, size: int, out: int, scale: float, coordinates: str) -> np.ndarray:
    """Which pixel each one of the result is."""
    place = np.arange(out, dtype=np.float32)  # single, so that halves round as elsewhere
    half = (place + np.float32(0.5)) / np.float32(scale) - np.float32(0.5)
    formulas = {
        "half_pixel": half,
        "pytorch_half_pixel": half if out > 1 else place * 0,
        "asymmetric": place / scale,
        "align_corners": place * ((size - 1) / (out - 1)) if out > 1 else place * 0,
        "half_pixel_symmetric": size / 2 * (1 - out / (scale * size)) + half,
    }
    mode = step.get("nearest_mode", "floor" if step.opset < 11 else "round_prefer_floor")
    rounding: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda value: np.ceil(value - 0.5),
        "round_prefer_ceil": lambda value: np.floor(value + 0.5),
    }
    if coordinates not in formulas or mode not in rounding:
        raise step.refuse(f"Resize with coordinate_transformation_mode={coordinates}, nearest_mode={mode}")
    found: np.ndarray = rounding[mode](formulas[coordinates]).clip(0, size - 1).astype(np.int64)
    return found


def _grid_sample(step: Step, x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(step.get("mode", "bilinear"), step.get("mode", "bilinear"))
    return F.grid_sample(x, grid, mode, step.get("padding_mode", "zeros"), bool(step.get("align_corners", 0)))


def _depth_to_space(step: Step, x: Tensor) -> Tensor:
    block = step.get("blocksize", 1)
    if step.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(batch, channels // block**2, height * block, width * block)


def _space_to_depth(step: Step, x: Tensor) -> Tensor:
    block = step.get("blocksize", 1)
    if step.get("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(x, block)
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(batch, channels * block**2, height // block, width // block)


ROWS = {
    "MaxPool": Row(_max_pool),
    "AveragePool": Row(_average_pool),
    "GlobalAveragePool": Row(_global_average),
    "GlobalMaxPool": Row(lambda s, x: x.amax(list(range(2, x.dim())), keepdim=True)),
    "Resize": Row(_resize, settings=(1, 2, 3)),
    "Upsample": Row(_resize, settings=(1,)),
    "GridSample": Row(_grid_sample),
    "DepthToSpace": Row(_depth_to_space),
    "SpaceToDepth": Row(_space_to_depth),
}
