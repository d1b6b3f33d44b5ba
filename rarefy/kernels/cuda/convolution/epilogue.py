"""What a kernel does with its sums before it writes them: bias, scale, residual, activation, and the next codes.

    y = (sum + b) f                 b: int32, f: float32 of each output channel
    y = y + (r - z_r) s_r           a residual's codes
    y = act(y) p                    p: float32 of each output channel, of channels brought to one range
    q = clip( round(y / s) + z )    half to even, as ``rarefy.kernels.quantize``

For codes without residual or activation f is s_x s_w / s and y is not divided, as ``rarefy.kernels.int_linear`` has it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = ("none", "relu", "silu", "hardswish", "gelu", "sigmoid", "hardsigmoid", "tanh")


class Result(NamedTuple):
    """How sums become codes, or numbers.

    bias: (outputs,) int32, what the zero point of the input adds up to taken off. factor: (outputs,) float32.
    activation: one of ``ACTIVATIONS``. codes: int8 codes on a grid, else float32 numbers. scale: of the grid, 1.0 where
    the factor has it in. zero, qmin, qmax: of the grid. residual_scale, residual_zero: of the residual, if there is
    one. post: (outputs,) float32.
    """

    bias: Tensor
    factor: Tensor
    activation: str = "none"
    codes: bool = True
    scale: float = 1.0
    zero: int = 0
    qmin: int = -128
    qmax: int = 127
    residual_scale: float = 1.0
    residual_zero: int = 0
    post: Tensor | None = None

    def __str__(self) -> str:
        """What of it makes another kernel."""
        kind = "codes" if self.codes else "numbers"
        return f"{self.activation},{kind},{self.qmin}..{self.qmax},{int(self.zero != 0)},{int(self.post is not None)}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.codes else torch.float32


@triton.jit
def rounded(y, zero, qmin, qmax):
    """Codes of ``y`` (multiples of the scale): half to even by float32's own rounding, once it is clipped."""
    y = tl.minimum(tl.maximum(y, (qmin - zero).to(tl.float32)), (qmax - zero).to(tl.float32))
    near = y + 12582912.0  # 1.5 2^23: neighbours are whole numbers there
    return (near - 12582912.0).to(tl.int32) + zero


@triton.jit
def activated(y, ACT: tl.constexpr):
    if ACT == 1:
        y = tl.maximum(y, 0.0)
    if ACT == 2:
        y = y / (1.0 + tl.exp(-y))
    if ACT == 3:
        y = y * tl.minimum(tl.maximum(y + 3.0, 0.0), 6.0) / 6.0
    if ACT == 4:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACT == 5:
        y = 1.0 / (1.0 + tl.exp(-y))
    if ACT == 6:
        y = tl.minimum(tl.maximum(y + 3.0, 0.0), 6.0) / 6.0
    if ACT == 7:
        y = 2.0 / (1.0 + tl.exp(-2.0 * y)) - 1.0
    return y


@triton.jit
def finished(
    sums,
    bias,
    factor,
    residual,
    post,
    out,
    places,
    channels,
    known,
    mask,
    residual_scale,
    residual_zero,
    step,
    zero,
    qmin,
    qmax,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CODES: tl.constexpr,
    POST: tl.constexpr,
):
    """Write a tile. sums: (m, n) int32. places: (m, n) where they go in ``out``, and where the residual's codes lie.

    channels: (n,), of which ``known`` are there; counted without a gap, so that codes are written 16 at a time.
    """
    total = sums + tl.load(bias + channels, mask=known, other=0)[None, :]
    y = total.to(tl.float32) * tl.load(factor + channels, mask=known, other=0.0)[None, :]
    if RESIDUAL:
        codes = tl.load(residual + places, mask=mask, other=0).to(tl.int32)
        y = y + (codes - residual_zero).to(tl.float32) * residual_scale
    y = activated(y, ACT)
    if POST:
        y = y * tl.load(post + channels, mask=known, other=0.0)[None, :]
    if CODES:
        tl.store(out + places, rounded(y * step, zero, qmin, qmax).to(tl.int8), mask=mask)
    else:
        tl.store(out + places, y, mask=mask)


def settings(result: Result, residual: Tensor | None) -> dict[str, object]:
    """The arguments of a kernel that are the same for all of them, by name."""
    return {
        "residual": residual,
        "post": result.post,
        "residual_scale": float(result.residual_scale),
        "residual_zero": result.residual_zero,
        "step": 1.0 / result.scale,
        "zero": result.zero,
        "qmin": result.qmin,
        "qmax": result.qmax,
        "ACT": ACTIVATIONS.index(result.activation),
        "RESIDUAL": residual is not None,
        "CODES": result.codes,
        "POST": result.post is not None,
    }
