"""A network's first convolution, of up to four channels, in Triton: the picture is rounded, then multiplied.

``pack`` rounds a picture of floats to codes, four channels a place (the missing ones zero), into a buffer that has the
padding around it. A row of the kernel is then one run of bytes, padded with zero weights to a power of two:

    sums[m, o] = sum_(r, j) x[start(m) + r line + j] w[o, r, j]        r: row of the kernel; j: byte of that row

cuDNN's int8 kernels take 2 to 10 times as long as its fp16 ones for so few channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.kernels.cuda.convolution.epilogue import Result, finished, rounded, settings
from rarefy.kernels.cuda.convolution.int8_conv import Places, Tile

CHANNELS = 4  # of a place in the buffer
TILES = (Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(256, 64, 32, 8, 3), Tile(128, 32, 64, 4, 3))


def run_of(kernel_width: int) -> int:
    """Bytes of a row of the kernel in the buffer."""
    return int(triton.next_power_of_2(kernel_width * CHANNELS))


def buffer_for(shape: tuple[int, ...], kernel_width: int, places: Places, code: int, device: torch.device) -> Tensor:
    """(n, h + padding, w + padding, 4) int8 filled with ``code``; shape: of the picture, (n, c, h, w)."""
    count, _, height, width = shape
    top, bottom, left, right = places.padding
    columns = width + left + right + run_of(kernel_width) // CHANNELS - kernel_width
    columns = -(-columns // 4) * 4
    return torch.full((count, height + top + bottom, columns, CHANNELS), code, dtype=torch.int8, device=device)


def packed_weight(weight: Tensor) -> Tensor:
    """(o, c, kh, kw) codes -> (o, kh, run) int8."""
    outputs, inputs, kh, kw = weight.shape
    packed = weight.new_zeros((outputs, kh, run_of(kw) // CHANNELS, CHANNELS))
    packed[:, :, :kw, :inputs] = weight.permute(0, 2, 3, 1)
    return packed.flatten(2).contiguous()


@triton.jit
def _pack(
    x, out, all_places, height, width, channels, x_n, x_c, x_h, x_w, lines, line, top, left, step, zero, qmin, qmax,
    M: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * M + tl.arange(0, M)
    inside = m < all_places
    column, row, picture = m % width, (m // width) % height, m // (width * height)
    word = tl.zeros((M,), dtype=tl.int32)
    for c in tl.static_range(4):
        place = picture * x_n + row * x_h + column * x_w + c * x_c
        number = tl.load(x + place, mask=inside & (c < channels), other=0.0).to(tl.float32)
        code = rounded(number / step, zero, qmin, qmax)
        word = word | ((code & 255) << (8 * c))
    tl.store(out + (picture * lines + row + top) * line + column + left, word, mask=inside)


def pack(x: Tensor, scale: float, zero: int, qmin: int, qmax: int, places: Places, out: Tensor) -> Tensor:
    """Codes of ``x`` (n, c, h, w), floats laid out in any way, into ``out`` (``buffer_for``), which is returned."""
    count, channels, height, width = x.shape
    total, block = count * height * width, 512
    words = out.view(torch.int32)
    _pack[(triton.cdiv(total, block),)](
        x, words, total, height, width, channels, *x.stride(), out.shape[1], out.shape[2], places.padding[0],
        places.padding[2], scale, zero, qmin, qmax, M=block, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _stem(
    x,
    weight,
    bias,
    factor,
    residual,
    post,
    out,
    m_all,
    lines,
    line,
    rows,
    columns,
    outputs,
    residual_scale,
    residual_zero,
    step,
    zero,
    qmin,
    qmax,
    KH: tl.constexpr,
    RUN: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CODES: tl.constexpr,
    POST: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    blocks = tl.cdiv(outputs, N)
    program = tl.program_id(0)
    m = (program // blocks) * M + tl.arange(0, M)
    n = (program % blocks) * N + tl.arange(0, N)
    inside, good = m < m_all, n < outputs
    column, row = (m % columns) * SW, ((m // columns) % rows) * SH
    start = ((m // (columns * rows)) * lines + row) * line + column * 4
    sums = tl.zeros((M, N), dtype=tl.int32)
    for first in range(0, KH * RUN, K):
        k = first + tl.arange(0, K)
        known = k < KH * RUN
        place = start[:, None] + ((k // RUN) * line + k % RUN)[None, :]
        a = tl.load(x + place, mask=inside[:, None] & known[None, :], other=0)
        b = tl.load(weight + n[:, None] * (KH * RUN) + k[None, :], mask=good[:, None] & known[None, :], other=0)
        sums = tl.dot(a, tl.trans(b), sums, out_dtype=tl.int32)
    finished(
        sums, bias, factor, residual, post, out, m[:, None] * outputs + n[None, :], n, good,
        inside[:, None] & good[None, :], residual_scale, residual_zero, step, zero, qmin, qmax, ACT, RESIDUAL, CODES,
        POST,
    )  # fmt: skip


def stem(
    x: Tensor,
    weight: Tensor,
    result: Result,
    places: Places,
    size: tuple[int, int],
    tile: Tile = TILES[0],
    out: Tensor | None = None,
) -> Tensor:
    """x: codes with the padding around them (``pack``). weight: (o, kh, run) int8. size: rows, columns of the output.

    Returns (n, *size, o) in ``result.dtype``.
    """
    outputs, kh, run = weight.shape
    rows, columns = size
    if out is None:
        out = torch.empty((len(x), rows, columns, outputs), dtype=result.dtype, device=x.device)
    m = len(x) * rows * columns
    n = min(tile.n, max(16, triton.next_power_of_2(outputs)))
    _stem[(triton.cdiv(m, tile.m) * triton.cdiv(outputs, n),)](
        x, weight, result.bias, result.factor, out=out, m_all=m, lines=x.shape[1], line=x.shape[2] * CHANNELS,
        rows=rows, columns=columns, outputs=outputs, KH=kh, RUN=run, SH=places.stride[0], SW=places.stride[1],
        M=tile.m, N=n, K=tile.k, num_warps=tile.warps, num_stages=tile.stages, **settings(result, None),
    )  # fmt: skip
    return out
