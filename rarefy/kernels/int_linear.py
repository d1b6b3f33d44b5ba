"""Convolution and linear layer on codes: sums are integers, which one factor turns into numbers or codes.

    t[o] = sum_i (x_i - z_x) w_oi  +  b_o           x: codes; w: codes; b: 32-bit codes on the grid s_x s_w

    conv2d, linear                y[o] = t[o] (s_x s_w[o])                          numbers
    conv2d_codes, linear_codes    q[o] = clip( round(t[o] (s_x s_w[o] / s)) + z )   codes on (s, z); half to even

which is what an integer kernel computes; conv1d and conv3d likewise. The factor of the codes is taken once, in float32
and in this order, as ONNX Runtime's QLinearConv and QGemm take it: sums scaled by s_x s_w and then divided by s come
out as the next code a few times in a million (tests/kernels/test_int_linear.py).

Sums are taken by a float convolution of whole numbers. Below 2^24 that is exact in float32, and as the factors are at
most 8 bits wide it stays exact where a GPU multiplies in TF32 or bf16 and adds in float32; a convolution of the scaled
numbers is not, and its roundings, different on every device, flip one code in ten thousand. A bias may be larger than
2^24: its low bits go into the sum, its high ones are added last, so that what is rounded to float32 is the whole.

OpenVINO decodes first and rounds afterwards, on a grid that it has as its two ends, l = s (0 - z) and h = s (255 - z)
(``convolution_by_numbers``, ``linear_by_numbers``):

    t[o] = sum_i (x_i - z_x) w_oi (s_x s_w[o]) + b_o (s_x s_w[o])
    q[o] = clip( round(t[o] 255/(h - l) - 255 l/(h - l)) )

each step in float32, the last product and sum in one, which makes the next code of up to three in a hundred thousand.

Given up: sums without their bias beyond 2^24 are rounded on their way (600 products of extreme codes of one sign).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.kernels.chunks import by_images
from rarefy.kernels.library import GRID, operator
from rarefy.kernels.quantize import from_codes, to_codes

BIAS_LIMIT = 2.0**30  # of the codes of a bias, which are 32 bits wide
CODES = "_codes"  # ends the name of what holds the codes of a weight or a bias
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by the axes of places
_LOW = 2**12  # of a bias in a sum: what is above has at most 2^20 values, so that float32 holds it


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight_scale: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """x: codes (n, c, *places), of one to three axes of places, as conv1d, conv2d, conv3d have them.

    weight: codes (o, c / groups, *kernel). bias: int32 (o,). weight_scale: (o,). Returns numbers (n, o, *places').
    """
    places, factor = (stride, padding, dilation, groups), x_scale * weight_scale
    return _convolved(x, weight, bias, x_zero_point, factor, places, lambda numbers: numbers.to(factor.dtype))


def convolution_codes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight_scale: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """As ``convolution``, on the grid of ``scale`` () and ``zero_point`` ().

    Returns codes (n, o, *places') in ``dtype``.
    """
    places = (stride, padding, dilation, groups)
    rounded = partial(to_codes, zero=zero_point, qmin=qmin, qmax=qmax, dtype=dtype)
    return _convolved(x, weight, bias, x_zero_point, x_scale * weight_scale / scale, places, rounded)


def convolution_by_numbers(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight_scale: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *grid: Any,
) -> Tensor:
    """As ``convolution_codes``, as OpenVINO rounds it. grid: scale, zero point, ends and type of the codes."""
    factor = x_scale * weight_scale
    numbers = _bias(bias, factor).view(-1, *[1] * (weight.dim() - 2))
    places = (stride, padding, dilation, groups)
    rounded = partial(between_ends, grid=grid)
    return _convolved(x, weight, bias * 0, x_zero_point, factor, places, lambda sums: rounded(sums.add_(numbers)))


def linear_by_numbers(
    x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor, x_zero_point: Tensor, weight_scale: Tensor, *grid: Any
) -> Tensor:
    """As ``linear_codes``, as OpenVINO rounds it."""
    factor = x_scale * weight_scale
    numbers = _bias(bias, factor)
    rounded = partial(between_ends, grid=grid)
    return _multiplied(x, weight, bias * 0, x_zero_point, factor, lambda sums: rounded(sums.add_(numbers)))


def _bias(codes: Tensor, factor: Tensor) -> Tensor:
    """The numbers of a bias, whose codes may be wider than float32's whole numbers."""
    return (codes.double() * factor.double()).to(factor.dtype)


def between_ends(numbers: Tensor, grid: tuple[Any, ...]) -> Tensor:
    """The codes of ``numbers`` on a grid that is known by the numbers of its lowest and highest code.

    grid: scale, zero point, ends and type of the codes. Where l is 0, OpenVINO multiplies by the reciprocal of the
    step that it has as the reciprocal of 255 / (h - l).
    """
    low, high, steps = ends_of(grid)
    factor, offset = steps / (high - low), steps * -low / (high - low)
    return placed(numbers, factor if low else 1 / (1 / factor), offset, grid)


def ends_of(grid: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the lowest and the highest code of the grid's type, and how many steps they are apart."""
    scale, zero_point, _, _, dtype = grid
    limits = torch.iinfo(dtype)
    zero = zero_point.to(scale.dtype)
    steps = torch.full_like(scale, limits.max - limits.min)  # int / Tensor would be rounded twice
    return (limits.min - zero) * scale, (limits.max - zero) * scale, steps


def placed(numbers: Tensor, factor: Tensor, offset: Tensor, grid: tuple[Any, ...]) -> Tensor:
    """The codes at ``numbers`` times ``factor`` plus ``offset``, rounded once before they are whole."""
    scale, _, qmin, qmax, dtype = grid
    places = numbers.double().mul_(factor.double()).add_(offset.double() + torch.iinfo(dtype).min).to(scale.dtype)
    return to_codes(places, 0, qmin, qmax, dtype)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor, x_zero_point: Tensor, weight_scale: Tensor
) -> Tensor:
    """x: codes (..., i). weight: codes (o, i). bias: int32 (o,). weight_scale: (o,). Returns numbers (..., o)."""
    factor = x_scale * weight_scale
    return _multiplied(x, weight, bias, x_zero_point, factor, lambda numbers: numbers.to(factor.dtype))


def linear_codes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight_scale: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """As ``linear``, on the grid of ``scale`` () and ``zero_point`` (). Returns codes (..., o) in ``dtype``."""
    rounded = partial(to_codes, zero=zero_point, qmin=qmin, qmax=qmax, dtype=dtype)
    return _multiplied(x, weight, bias, x_zero_point, x_scale * weight_scale / scale, rounded)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    zero_point: Tensor,
    factor: Tensor,
    places: tuple[list[int], list[int], list[int], int],
    then: Callable[[Tensor], Tensor],
) -> Tensor:
    """``then`` of the sums times ``factor`` (outputs,), which may work in place."""
    kind = torch.promote_types(factor.dtype, torch.float32)  # 16 bits hold no sums
    (low, high), whole = _split(bias, kind), weight.to(kind)
    axes = weight.dim() - 2
    convolve, wide = CONVOLUTIONS[axes], (-1, *[1] * axes)

    def some(x: Tensor) -> Tensor:
        sums = convolve(from_codes(x, zero_point, kind), whole, low, *places)
        return then(sums.add_(high.view(wide)).mul_(factor.view(wide)))

    stride, plane = places[0], math.prod(x.shape[-axes:])
    return by_images(some, (x,), max(x.shape[-axes - 1], weight.shape[0] // math.prod(stride)) * plane)


def _multiplied(
    x: Tensor, weight: Tensor, bias: Tensor, zero_point: Tensor, factor: Tensor, then: Callable[[Tensor], Tensor]
) -> Tensor:
    kind = torch.promote_types(factor.dtype, torch.float32)  # 16 bits hold no sums
    (low, high), whole = _split(bias, kind), weight.to(kind)

    def some(x: Tensor) -> Tensor:
        return then(F.linear(from_codes(x, zero_point, kind), whole, low).add_(high).mul_(factor))

    return by_images(some, (x,), max(weight.shape) * math.prod(x.shape[1:-1]))


def _split(bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two parts of the whole numbers ``bias``, both exact in float32."""
    low = torch.remainder(bias, _LOW)
    return low.to(dtype), (bias - low).to(dtype)


_READ = "Tensor x, Tensor weight, Tensor bias, Tensor x_scale, Tensor x_zero_point, Tensor weight_scale"
_PLACES = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"


def _shape(*given: Any) -> Tensor:
    """Of ``convolution_codes``."""
    return convolution(*given[:10]).to(given[-1])


OPERATORS = (
    *(operator(f"{_READ}, {_PLACES}", convolution, name=f"conv{axes}d") for axes in CONVOLUTIONS),
    operator(_READ, linear),
    *(
        operator(f"{_READ}, {_PLACES}, {GRID}", convolution_codes, _shape, f"conv{axes}d{CODES}")
        for axes in CONVOLUTIONS
    ),
    operator(f"{_READ}, {GRID}", linear_codes, lambda *given: linear(*given[:6]).to(given[-1])),
)
