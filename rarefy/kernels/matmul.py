"""Product of two activations on codes: the sums are integers, and one factor turns them into numbers.

    y = s_a s_b (a - z_a) (b - z_b)                           a, b: codes

Exact as in ``integer.py``: sums of whole numbers below 2^24, which is 1,024 products of extreme codes on signed grids.
"""

from __future__ import annotations

from torch import Tensor

from rarefy.kernels.library import operator


def matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, a_zero_point: Tensor, b_scale: Tensor, b_zero_point: Tensor
) -> Tensor:
    """a: codes (..., n, i). b: codes (..., i, m). Scales and zero points: of shape (). Returns numbers (..., n, m)."""
    dtype = a_scale.dtype
    return ((a.to(dtype) - a_zero_point.to(dtype)) @ (b.to(dtype) - b_zero_point.to(dtype))).mul_(a_scale * b_scale)


_OPERANDS = "Tensor a, Tensor b, Tensor a_scale, Tensor a_zero_point, Tensor b_scale, Tensor b_zero_point"
OPERATORS = (operator(_OPERANDS, matmul),)
