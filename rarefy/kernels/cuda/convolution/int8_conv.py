"""Convolution on codes as a product of matrices whose left one is never written (implicit GEMM), in Triton.

    sums[m, o] = sum_k x[m, k] w[o, k]      m: picture, row, column of the output; k: kernel, input

Channels last, so that k of one place lie side by side, weights too (Hopper's int8 products want both so). Any number of
channels, groups, strides, paddings (each side its own) and dilations; where padding is, the code that stands for zero.
A linear layer is a convolution of one place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.kernels.cuda.convolution.epilogue import Result, finished, settings


class Places(NamedTuple):
    """Of a convolution. padding: before and after the rows, before and after the columns."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def out(self, height: int, width: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the output."""
        top, bottom, left, right = self.padding
        rows = (height + top + bottom - self.dilation[0] * (kernel[0] - 1) - 1) // self.stride[0] + 1
        columns = (width + left + right - self.dilation[1] * (kernel[1] - 1) - 1) // self.stride[1] + 1
        return rows, columns


class Tile(NamedTuple):
    """Outputs, channels and inputs that a program works on at a time; its warps, and how far loads run ahead."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 128, 128, 4, 3),
    Tile(128, 256, 64, 8, 3),
    Tile(64, 64, 128, 4, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(16, 64, 256, 4, 3),
)


@triton.jit
def _conv(
    x, weight, bias, factor, residual, post, out, m_all, height, width, inputs, rows, columns, outputs, group_inputs,
    group_outputs, pad_code, residual_scale, residual_zero, step, zero, qmin, qmax, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PADDED: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, CODES: tl.constexpr, POST: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(group_outputs, N)
    program = tl.program_id(0)
    group = tl.program_id(1)
    m = (program // blocks) * M + tl.arange(0, M)
    n = (program % blocks) * N + tl.arange(0, N)
    inside = m < m_all
    column = (m % columns) * SW - LEFT
    row = ((m // columns) % rows) * SH - TOP
    picture = (m // (columns * rows)) * height
    w_row = weight + (group * group_outputs + n)[:, None] * (KH * KW * group_inputs)
    good = n < group_outputs
    pieces = tl.cdiv(group_inputs, K)
    sums = tl.zeros((M, N), dtype=tl.int32)
    for turn in range(0, KH * KW * pieces):
        tap = turn // pieces
        k = (turn % pieces) * K + tl.arange(0, K)
        known = k < group_inputs
        at_row = row + (tap // KW) * DH
        at_column = column + (tap % KW) * DW
        place = ((picture + at_row) * width + at_column) * inputs + group * group_inputs
        reach = inside
        if PADDED:
            reach = inside & (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
            a = tl.load(x + place[:, None] + k[None, :], mask=reach[:, None] & known[None, :], other=0)
            a = tl.where(reach[:, None], a, pad_code.to(tl.int8))
        else:
            a = tl.load(x + place[:, None] + k[None, :], mask=reach[:, None] & known[None, :], other=0)
        b = tl.load(w_row + tap * group_inputs + k[None, :], mask=good[:, None] & known[None, :], other=0)
        sums = tl.dot(a, tl.trans(b), sums, out_dtype=tl.int32)
    channels = group * group_outputs + n
    finished(
        sums, bias, factor, residual, post, out, m[:, None] * outputs + channels[None, :], channels, good,
        inside[:, None] & good[None, :], residual_scale, residual_zero, step, zero, qmin, qmax, ACT, RESIDUAL, CODES,
        POST,
    )  # fmt: skip


def conv(
    x: Tensor,
    weight: Tensor,
    result: Result,
    places: Places,
    pad_code: int = 0,
    residual: Tensor | None = None,
    tile: Tile = TILES[1],
    out: Tensor | None = None,
) -> Tensor:
    """x: int8 codes (n, h, w, c). weight: int8 (o, kh, kw, c / groups). residual: int8 (n, h', w', o).

    pad_code: of the padding. Returns (n, h', w', o) in ``result.dtype``.
    """
    count, height, width, inputs = x.shape
    outputs, kh, kw, group_inputs = weight.shape
    rows, columns = places.out(height, width, (kh, kw))
    if out is None:
        out = torch.empty((count, rows, columns, outputs), dtype=result.dtype, device=x.device)
    m, per_group = count * rows * columns, outputs // places.groups
    k = min(tile.k, max(32, triton.next_power_of_2(group_inputs)))
    n = min(tile.n, max(16, triton.next_power_of_2(per_group)))
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(per_group, n), places.groups)
    padded = any(places.padding)
    _conv[grid](
        x, weight, result.bias, result.factor, out=out, m_all=m, height=height, width=width, inputs=inputs, rows=rows,
        columns=columns, outputs=outputs, group_inputs=group_inputs, group_outputs=per_group, pad_code=pad_code,
        KH=kh, KW=kw, SH=places.stride[0], SW=places.stride[1], TOP=places.padding[0], LEFT=places.padding[2],
        DH=places.dilation[0], DW=places.dilation[1], PADDED=padded, M=tile.m, N=n, K=k,
        num_warps=tile.warps, num_stages=tile.stages, **settings(result, residual),
    )  # fmt: skip
    return out
