"""Averages of codes, rounded as ONNX Runtime's kernels round them.

    mean         q = clip( round((sum_n x - n z_x) (s_x / (s n))) + z )      over the plane: QLinearGlobalAveragePool
    avg_pool2d   q = clip( round(mean(s_x (x - z_x)) / s + z) )              over windows: QLinearAveragePool

in float32 after the sum, half to even. Averages of few numbers fall halfway between two codes often: with 16 of them,
on a grid twice as fine, the average of the decoded numbers, divided by s, flips 1.7 % of the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.kernels.library import GRID, operator
from rarefy.kernels.quantize import dequantize


def mean(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """x: codes (..., h, w). Scales and zero points: of shape (). Returns codes (..., 1, 1) in ``dtype``."""
    kind, count = scale.dtype, x.shape[-1] * x.shape[-2]
    sums = x.sum((-2, -1), keepdim=True, dtype=torch.int64) - count * x_zero_point.to(torch.int64)
    return (
        torch.round(sums.to(kind) * (x_scale / (scale * count))).add_(zero_point.to(kind)).clamp_(qmin, qmax).to(dtype)
    )


def avg_pool2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    count_include_pad: bool,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """x: codes (n, c, h, w). Scales and zero points: of shape (). Returns codes (n, c, h', w') in ``dtype``."""
    numbers = F.avg_pool2d(
        dequantize(x, x_scale, x_zero_point, None), kernel, stride, padding, False, count_include_pad
    )
    return numbers.div_(scale).add_(zero_point.to(numbers.dtype)).round_().clamp_(qmin, qmax).to(dtype)


_CODES = "Tensor x, Tensor x_scale, Tensor x_zero_point"
_WINDOWS = "SymInt[] kernel, SymInt[] stride, SymInt[] padding, bool count_include_pad"
OPERATORS = (operator(f"{_CODES}, {GRID}", mean), operator(f"{_CODES}, {_WINDOWS}, {GRID}", avg_pool2d))
