"""Pooling of codes in Triton: the largest of a window, the mean of a plane as ``rarefy.kernels.pooling`` rounds it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.kernels.cuda.convolution.epilogue import rounded


@triton.jit
def _largest(
    x, out, total, height, width, channels, rows, columns, top, left, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * B + tl.arange(0, B)
    inside = place < total
    channel, m = place % channels, place // channels
    row, column = ((m // columns) % rows) * SH - top, (m % columns) * SW - left
    picture = (m // (columns * rows)) * height
    best = tl.full((B,), -128, tl.int8)
    for kh in tl.static_range(KH):
        for kw in tl.static_range(KW):
            at_row, at_column = row + kh * DH, column + kw * DW
            reach = inside & (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
            at = ((picture + at_row) * width + at_column) * channels + channel
            # not other=-128: Triton 3.6 to 3.8 fills int8 lanes beyond the first of four with -1
            best = tl.maximum(best, tl.where(reach, tl.load(x + at, mask=reach, other=0), -128))
    tl.store(out + place, best, mask=inside)


def max_pool(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
) -> Tensor:
    """x: int8 (n, h, w, c). size: rows, columns of the output. Returns int8 (n, *size, c)."""
    count, height, width, channels = x.shape
    out = torch.empty((count, *size, channels), dtype=torch.int8, device=x.device)
    block = 1024
    _largest[(triton.cdiv(out.numel(), block),)](
        x, out, out.numel(), height, width, channels, *size, *padding, KH=kernel[0], KW=kernel[1], SH=stride[0],
        SW=stride[1], DH=dilation[0], DW=dilation[1], B=block, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _mean(x, out, count, plane, channels, taken, factor, zero, qmin, qmax, M: tl.constexpr, N: tl.constexpr):
    picture = tl.program_id(0)
    n = tl.program_id(1) * N + tl.arange(0, N)
    good = n < channels
    sums = tl.zeros((N,), dtype=tl.int32)
    for first in range(0, plane, M):
        m = first + tl.arange(0, M)
        place = (picture * plane + m)[:, None] * channels + n[None, :]
        codes = tl.load(x + place, mask=(m < plane)[:, None] & good[None, :], other=0)
        sums += tl.sum(codes.to(tl.int32), 0)
    y = (sums - taken).to(tl.float32) * factor
    tl.store(out + picture * channels + n, rounded(y, zero, qmin, qmax).to(tl.int8), mask=good)


def mean(x: Tensor, x_zero: int, factor: float, zero: int, ends: tuple[int, int]) -> Tensor:
    """x: int8 (n, h, w, c). factor: s_x / (s h w). zero, ends: of the result's grid. Returns int8 (n, 1, 1, c)."""
    count, height, width, channels = x.shape
    out = torch.empty((count, 1, 1, channels), dtype=torch.int8, device=x.device)
    plane, block = height * width, 64
    _mean[(count, triton.cdiv(channels, block))](
        x, out, count, plane, channels, plane * x_zero, factor, zero, *ends, M=32, N=block, num_warps=4
    )
    return out
