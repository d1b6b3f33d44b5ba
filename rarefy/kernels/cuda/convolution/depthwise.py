"""Depthwise convolution on codes in Triton: each channel by itself, one kernel from codes to codes.

    sums[m, c] = sum_t x[m + t, c] w[t, c]       t: row and column of the kernel

Reads and writes decide its time (nine products a code), so a program takes whole runs of channels, which lie side by
side. PyTorch and cuDNN have no integer kernel for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.kernels.cuda.convolution.epilogue import Result, finished, settings
from rarefy.kernels.cuda.convolution.int8_conv import Places


class Tile(NamedTuple):
    """Places and channels of a program, and its warps."""

    m: int
    n: int
    warps: int


TILES = (Tile(32, 64, 4), Tile(16, 128, 4), Tile(64, 32, 4), Tile(16, 64, 2), Tile(32, 128, 8))


@triton.jit
def _depthwise(
    x,
    weight,
    bias,
    factor,
    residual,
    post,
    out,
    m_all,
    height,
    width,
    channels_all,
    rows,
    columns,
    pad_code,
    residual_scale,
    residual_zero,
    step,
    zero,
    qmin,
    qmax,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CODES: tl.constexpr,
    POST: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    blocks = tl.cdiv(channels_all, N)
    program = tl.program_id(0)
    m = (program // blocks) * M + tl.arange(0, M)
    n = (program % blocks) * N + tl.arange(0, N)
    inside, good = m < m_all, n < channels_all
    column = (m % columns) * SW - LEFT
    row = ((m // columns) % rows) * SH - TOP
    picture = (m // (columns * rows)) * height
    sums = tl.zeros((M, N), dtype=tl.int32)
    for kh in tl.static_range(KH):
        for kw in tl.static_range(KW):
            at_row, at_column = row + kh * DH, column + kw * DW
            reach = inside & (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
            place = ((picture + at_row) * width + at_column) * channels_all
            codes = tl.load(x + place[:, None] + n[None, :], mask=reach[:, None] & good[None, :], other=0)
            codes = tl.where(reach[:, None], codes.to(tl.int32), pad_code)
            w = tl.load(weight + (kh * KW + kw) * channels_all + n, mask=good, other=0).to(tl.int32)
            sums += codes * w[None, :]
    finished(
        sums, bias, factor, residual, post, out, m[:, None] * channels_all + n[None, :], n, good,
        inside[:, None] & good[None, :], residual_scale, residual_zero, step, zero, qmin, qmax, ACT, RESIDUAL, CODES,
        POST,
    )  # fmt: skip


def depthwise(
    x: Tensor,
    weight: Tensor,
    result: Result,
    places: Places,
    pad_code: int = 0,
    residual: Tensor | None = None,
    tile: Tile = TILES[0],
    out: Tensor | None = None,
) -> Tensor:
    """x: int8 codes (n, h, w, c). weight: int8 (kh, kw, c). residual: int8 (n, h', w', c).

    Returns (n, h', w', c) in ``result.dtype``.
    """
    count, height, width, channels = x.shape
    kh, kw, _ = weight.shape
    rows, columns = places.out(height, width, (kh, kw))
    if out is None:
        out = torch.empty((count, rows, columns, channels), dtype=result.dtype, device=x.device)
    m, n = count * rows * columns, min(tile.n, max(16, triton.next_power_of_2(channels)))
    _depthwise[(triton.cdiv(m, tile.m) * triton.cdiv(channels, n),)](
        x, weight, result.bias, result.factor, out=out, m_all=m, height=height, width=width, channels_all=channels,
        rows=rows, columns=columns, pad_code=pad_code, KH=kh, KW=kw, SH=places.stride[0], SW=places.stride[1],
        TOP=places.padding[0], LEFT=places.padding[2], DH=places.dilation[0], DW=places.dilation[1],
        M=tile.m, N=n, num_warps=tile.warps, **settings(result, residual),
    )  # fmt: skip
    return out
