"""Sum and product of two tensors of codes in Triton, as ``rarefy.kernels.elementwise`` has them.

    add   q = clip( fma(a, s_a/s, fma(b, s_b/s, offset)) )
    mul   q = clip( (a - z_a) (b - z_b) (s_a s_b / s) + z )

The second one may be of one place a picture (a gate of squeeze-and-excitation) or one number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.kernels.cuda.convolution.epilogue import rounded

BLOCK = 1024


@triton.jit
def _join(
    a,
    b,
    out,
    total,
    plane,
    channels,
    a_zero,
    b_zero,
    a_factor,
    b_factor,
    offset,
    qmin,
    qmax,
    shift,
    MUL: tl.constexpr,
    WIDE: tl.constexpr,
    B: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = place < total
    first = (tl.load(a + place, mask=inside, other=0).to(tl.int32) - a_zero).to(tl.float32)
    other = place
    if WIDE == 1:
        other = (place // plane) * channels + place % channels
    if WIDE == 2:
        other = place * 0
    second = (tl.load(b + other, mask=inside, other=0).to(tl.int32) - b_zero).to(tl.float32)
    y = first * second * a_factor + offset if MUL else tl.fma(first, a_factor, tl.fma(second, b_factor, offset))
    tl.store(out + place, (rounded(y, 0, qmin, qmax) - shift).to(tl.int8), mask=inside)


def join(
    a: Tensor,
    b: Tensor,
    multiply: bool,
    zeros: tuple[int, int],
    factors: tuple[float, float],
    offset: float,
    ends: tuple[int, int],
    shift: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """a: int8 codes (n, ..., c) side by side. b: of that shape, (n, 1, ..., c), or one code.

    zeros: taken off the codes before they count. factors: s_a / s and s_b / s; of a product s_a s_b / s and nothing.
    offset: what is added at last, the zero point in it. ends: qmin, qmax. shift: taken off the result. Returns int8.
    """
    if out is None:
        out = torch.empty_like(a)
    wide = 0 if b.shape == a.shape else 2 if b.numel() == 1 else 1
    plane = a.numel() // len(a) if a.dim() else 1
    _join[(triton.cdiv(a.numel(), BLOCK),)](
        a, b, out, a.numel(), plane, a.shape[-1], *zeros, *factors, offset, *ends, shift,
        MUL=multiply, WIDE=wide, B=BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out
