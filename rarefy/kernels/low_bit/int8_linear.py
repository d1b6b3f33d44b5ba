"""Linear layers of 8-bit codes on both sides, integers or floats, with scales and bias in the same kernel.

    y[n, o] = s_x[n] s_w[o] sum_i x[n, i] w[o, i] + b[o]

Sums of int8 are exact (int32); of fp8 they are float32, as cuBLAS takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.kernels.library import define

KINDS = (torch.int8, torch.float8_e4m3fn)


def scaled_linear(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x: (n, i), weight: (o, i), both int8 or both float8_e4m3fn. Scales: float32, (n,) or (), and
    (o,).

    Returns (n, o) in ``dtype``. Raises ValueError for other types.
    """
    _check(x, weight)
    sums = (x.double() @ weight.double().T).float()
    answer = sums * (x_scale.view(-1, 1) * weight_scale)
    return (answer if bias is None else answer + bias.float()).to(dtype)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dtype != weight.dtype or x.dtype not in KINDS or x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{x.dtype} {tuple(x.shape)} times {weight.dtype} {tuple(weight.shape)}: both int8, or both fp8"
        )


def _on_cuda(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from rarefy.kernels.cuda import int8_linear

    _check(x, weight)
    return int8_linear.scaled_linear(x, weight, x_scale, weight_scale, bias, dtype)


def _shape(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


SCALED_LINEAR = define(
    "scaled_linear(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    scaled_linear,
    _shape,
    _on_cuda,
)
