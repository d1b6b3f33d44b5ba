"""Sum and product of two tensors of codes, rounded as an integer kernel rounds them.

Each operand's factor is taken relative to the result's scale.

    add   q = clip( fma(a, s_a/s, fma(b, s_b/s, z - fma(s_a/s, z_a, s_b/s z_b))) )
    mul   q = clip( (a - z_a) (b - z_b) (s_a s_b / s) + z )

in float32, to the nearest code, half to even. ``fma`` rounds once, after product and sum. These are the sequences of
ONNX Runtime's QLinearAdd and QLinearMul on x86 (2.6 million pairs of codes on 40 random grids: all equal), where the
sum of the decoded numbers flips one code in ten thousand, and many more where the grids make ties (x + 3 of a hard
sigmoid: 3 lies halfway between two codes). An operand a that is one number along the rows changes places with b.

Given up: kernels of other machines differ from this by as much as from each other. XNNPACK's, which LiteRT and
ExecuTorch run, adds in fixed point:

    add   q = clip( (a' (a - z_a) + b' (b - z_b) + 2^(n-1)) >> n) + z )     a' = round(2^n s_a/s), b' = round(2^n s_b/s)

with n such that the larger of a' and b' has 21 bits (``add_in_fixed_point``; MobileNetV2's ten sums: all codes equal).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rarefy.kernels.chunks import by_images
from rarefy.kernels.int_linear import ends_of, placed
from rarefy.kernels.library import GRID, operator
from rarefy.kernels.quantize import from_codes, to_codes

_MULTIPLIER_BITS = 20  # of XNNPACK's factors, below their highest


def add(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """a, b: codes that broadcast. Scales and zero points: of shape (). Returns the codes of the sum, in ``dtype``."""
    terms = [(a, a_zero_point, a_scale / scale), (b, b_zero_point, b_scale / scale)]
    if _is_one_a_row(a, b):
        terms.reverse()
    (last, last_zero, last_factor), (first, first_zero, first_factor) = terms
    offset = zero_point.to(scale.dtype) - _fma(last_factor, last_zero, first_factor * first_zero)

    def some(last: Tensor, first: Tensor) -> Tensor:
        return to_codes(_fma(last, last_factor, _fma(first, first_factor, offset)), 0, qmin, qmax, dtype)

    return _joined(some, last, first)


def add_in_fixed_point(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """``add`` as XNNPACK rounds it."""
    factors = torch.stack([a_scale / scale, b_scale / scale])
    bits = _MULTIPLIER_BITS - int(torch.frexp(factors.max()).exponent) + 1
    first, second = (int(one) for one in torch.round(factors.double() * 2.0**bits))
    zeros = int(a_zero_point), int(b_zero_point)
    half, offset = 1 << (bits - 1), int(zero_point)

    def some(a: Tensor, b: Tensor) -> Tensor:
        sums = (a.to(torch.int64) - zeros[0]).mul_(first).add_((b.to(torch.int64) - zeros[1]).mul_(second))
        return (sums.add_(half) >> bits).add_(offset).clamp_(qmin, qmax).to(dtype)

    return _joined(some, a, b)


def add_by_numbers(
    a: Tensor, a_scale: Tensor, a_zero_point: Tensor, b: Tensor, b_scale: Tensor, b_zero_point: Tensor, *grid: Any
) -> Tensor:
    """``add`` as OpenVINO rounds it: (a - z_a) (s_a / s_b) + (b - z_b), on a grid whose ends are divided by s_b.

    grid: as of ``between_ends``.
    """
    kind, ratio = a_scale.dtype, a_scale / b_scale
    low, high, steps = ends_of(grid)
    low, high = low / b_scale, high / b_scale
    factor = steps / (high - low)

    def some(a: Tensor, b: Tensor) -> Tensor:
        sums = from_codes(a, a_zero_point, kind).mul_(ratio).add_(from_codes(b, b_zero_point, kind))
        return placed(sums, factor, -low * factor, grid)

    return _joined(some, a, b)


def mul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """a, b: codes that broadcast.

    Scales and zero points: of shape (). Returns the codes of the product, in ``dtype``.
    """
    kind = scale.dtype
    zero, factor = zero_point.to(kind), a_scale * b_scale / scale

    def some(a: Tensor, b: Tensor) -> Tensor:
        products = from_codes(a, a_zero_point, kind).mul_(from_codes(b, b_zero_point, kind))
        return to_codes(products.mul_(factor).add_(zero), 0, qmin, qmax, dtype)

    return _joined(some, a, b)


def _joined(some: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    return by_images(some, (a, b), math.prod(a.shape[1:]))


def _fma(x: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """x factor + added, rounded once; the product of a code and a float32 is exact in float64."""
    return x.to(torch.float64, copy=True).mul_(factor.to(torch.float64)).add_(added.to(torch.float64)).to(torch.float32)


def _is_one_a_row(a: Tensor, b: Tensor) -> bool:
    """Is ``a`` the same along the last axis, where ``b`` is not?"""
    return (a.shape[-1] if a.dim() else 1) == 1 and b.dim() > 0 and b.shape[-1] != 1


def _shape(a: Tensor, a_scale: Tensor, a_zero_point: Tensor, b: Tensor, *rest: object) -> Tensor:
    dtype = rest[-1]
    assert isinstance(dtype, torch.dtype)
    return a.new_empty(torch.broadcast_shapes(a.shape, b.shape), dtype=dtype)


_OPERANDS = "Tensor a, Tensor a_scale, Tensor a_zero_point, Tensor b, Tensor b_scale, Tensor b_zero_point"
OPERATORS = tuple(operator(f"{_OPERANDS}, {GRID}", kernel, _shape) for kernel in (add, mul))
