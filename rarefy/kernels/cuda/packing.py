"""Quantise and pack, unpack and decode, weights of linear layers too, and masks, each in one pass, in Triton.

Eight neighbouring numbers are one lane's: they are whole bytes at every width, and one block of random bits
(``rarefy.kernels.low_bit.packing``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.kernels.cuda import stochastic
from rarefy.kernels.low_bit.packing import ROUNDS, words_of

LANES = 256  # of 8 numbers, a program


@triton.jit
def _eight(x, LANES: tl.constexpr):
    """(8 LANES,) as eight of (LANES,): every eighth number from the first, the second, ..."""
    even, odd = tl.split(tl.reshape(x, (LANES, 2, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    x0, x4 = tl.split(a)
    x2, x6 = tl.split(c)
    x1, x5 = tl.split(b)
    x3, x7 = tl.split(d)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _noise(r0, r1, r2, r3, i: tl.constexpr):
    """Number i's u: its 16 bits are put into the mantissa of 1 + u, which is exact, and no conversion."""
    r = r0 if i < 2 else r1 if i < 4 else r2 if i < 6 else r3
    bits = (r << 7) if i % 2 == 0 else (r >> 9)
    return ((bits & 0x7FFF80) | 0x3F800040).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _whole(v, DOWN: tl.constexpr):
    """A small number as a whole one, half to even or DOWN: 1.5 2^23 rounds it, and its last bits are the answer."""
    large = v + 12582912.0
    whole = large.to(tl.int32, bitcast=True) - 0x4B400000
    if DOWN:
        whole -= (large - 12582912.0 > v).to(tl.int32)
    return whole


@triton.jit
def _quotient(x, scale, inverse):
    """x / scale, rounded right (Markstein 1990), of an inverse that is: half of the instructions of a division. Scales
    from 2^-100 on; what is far beyond any code stays so."""
    about = x * inverse
    better = tl.fma(tl.fma(-about, scale, x), inverse, about)
    return tl.where(tl.abs(about) < 4194304.0, better, about)


@triton.jit
def _code(x, scale, inverse, zero, noise, QMIN, QMAX, STOCHASTIC: tl.constexpr):
    if STOCHASTIC:
        v = _quotient(x, scale, inverse) + noise
    else:
        v = tl.div_rn(x, scale)
    low = (QMIN - zero).to(tl.float32)
    high = (QMAX - zero).to(tl.float32)
    return _whole(tl.minimum(tl.maximum(v, low), high), STOCHASTIC) + zero


@triton.jit
def _random(lane, seed, ROUNDS: tl.constexpr):
    low = (lane & 0xFFFFFFFF).to(tl.uint32)
    none = low * 0
    return tl.philox(seed, low, (lane >> 32).to(tl.uint32), none, none, n_rounds=ROUNDS)


@triton.jit
def _round(x, out, count, seed, ROUNDS: tl.constexpr, LANES: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    r0, r1, r2, r3 = _random(lane, seed, ROUNDS)
    for i in tl.static_range(8):
        inside = lane * 8 + i < count
        v = tl.load(x + lane * 8 + i, mask=inside, other=0.0).to(tl.float32) + _noise(r0, r1, r2, r3, i)
        tl.store(out + lane * 8 + i, tl.floor(v), mask=inside)


@triton.jit
def _parameter(scales, zeros, place, inner, channels, CHANNELS: tl.constexpr):
    if CHANNELS:
        channel = (place // inner) % channels
        scale, zero = tl.load(scales + channel), tl.load(zeros + channel).to(tl.int32)
    else:
        scale, zero = tl.load(scales), tl.load(zeros).to(tl.int32)
    return scale, zero


@triton.jit
def _quantize_pack(
    x, scales, zeros, out, count, stored, inner, channels, seed, QMIN, QMAX,
    BITS: tl.constexpr, STOCHASTIC: tl.constexpr, CHANNELS: tl.constexpr, EACH: tl.constexpr, LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """out: of 8 bits 64-bit words, of 4 32-bit ones, of 2 16-bit ones, of 3 bytes, of which
    ``stored`` in all. EACH: neighbours' scales differ."""
    first = tl.program_id(0).to(tl.int64) * LANES
    lane = first + tl.arange(0, LANES)
    at = first * 8 + tl.arange(0, 8 * LANES)
    numbers = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    eight = _eight(numbers, LANES)
    r0, r1, r2, r3 = lane, lane, lane, lane
    if STOCHASTIC:
        r0, r1, r2, r3 = _random(lane, seed, ROUNDS)
    scale, zero = _parameter(scales, zeros, lane * 8, inner, channels, CHANNELS)
    inverse = tl.div_rn(1.0, scale)
    KEEP: tl.constexpr = 2**BITS - 1
    word = tl.zeros((LANES,), tl.int64 if BITS == 8 else tl.int32)
    for i in tl.static_range(8):
        if EACH:
            scale, zero = _parameter(scales, zeros, lane * 8 + i, inner, channels, CHANNELS)
            inverse = tl.div_rn(1.0, scale)
        noise = 0.0
        if STOCHASTIC:
            noise = _noise(r0, r1, r2, r3, i)
        code = _code(eight[i], scale, inverse, zero, noise, QMIN, QMAX, STOCHASTIC) & KEEP
        word |= code.to(word.dtype) << (BITS * i)
    inside = lane * 8 < count
    last = (count - lane * 8) < 8  # of the last lane only so many numbers are there
    kept = tl.minimum(tl.maximum(count - lane * 8, 0), 7).to(tl.int32) * BITS
    word = tl.where(last, word & ((tl.full((LANES,), 1, word.dtype) << kept.to(word.dtype)) - 1), word)
    if BITS == 3:
        for i in tl.static_range(3):
            tl.store(out + lane * 3 + i, (word >> (8 * i)).to(tl.uint8), mask=lane * 3 + i < stored)
    else:
        tl.store(out + lane, word.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _unpack(
    words, scales, zeros, out, count, stored, inner, channels,
    BITS: tl.constexpr, SIGNED: tl.constexpr, CHANNELS: tl.constexpr, EACH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = lane * 8 < count
    if BITS == 3:
        word = tl.load(words + lane * 3, mask=lane * 3 < stored, other=0).to(tl.int32)
        word |= tl.load(words + lane * 3 + 1, mask=lane * 3 + 1 < stored, other=0).to(tl.int32) << 8
        word |= tl.load(words + lane * 3 + 2, mask=lane * 3 + 2 < stored, other=0).to(tl.int32) << 16
    else:
        word = tl.load(words + lane, mask=inside, other=0)
    KEEP: tl.constexpr = 2**BITS - 1
    TOP: tl.constexpr = 2 ** (BITS - 1)
    place = tl.arange(0, 8)
    codes = ((word[:, None] >> (place * BITS)[None, :]) & KEEP).to(tl.int32)
    if SIGNED:
        codes = (codes ^ TOP) - TOP
    at = lane[:, None] * 8 + place[None, :]
    if EACH:
        scale, zero = _parameter(scales, zeros, at, inner, channels, CHANNELS)
        numbers = (codes - zero).to(tl.float32) * scale
    elif CHANNELS:
        scale, zero = _parameter(scales, zeros, lane * 8, inner, channels, CHANNELS)
        numbers = (codes - zero[:, None]).to(tl.float32) * scale[:, None]
    else:
        scale, zero = _parameter(scales, zeros, lane, inner, channels, CHANNELS)
        numbers = (codes - zero).to(tl.float32) * scale
    tl.store(out + at, numbers.to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _threshold(x, out, count, threshold, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    number = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if not SIGNED:
        number = tl.abs(number)
    tl.store(out + at, number > threshold, mask=inside)


@triton.jit
def _n_of_m(
    x,
    out,
    groups,
    width,
    EVEN: tl.constexpr,
    SIGNED: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x: (rows, width), of which groups of M are looked at; the last of a row may be shorter."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, POWER)
    inside = (group < groups)[:, None] & (j < M)[None, :]
    base = group * M
    if not EVEN:
        across = tl.cdiv(width, M)
        place = (group % across) * M
        base = (group // across) * width + place
        inside &= place[:, None] + j[None, :] < width
    size = tl.load(x + base[:, None] + j[None, :], mask=inside, other=0.0).to(tl.float32)
    if not SIGNED:
        size = tl.abs(size)
    size = tl.where(inside, size, -float("inf"))
    rank = tl.zeros((BLOCK, POWER), tl.int32)
    for i in tl.static_range(M):
        one = tl.sum(tl.where(j[None, :] == i, size, 0.0), axis=1)[:, None]
        rank += ((one > size) | ((one == size) & (i < j)[None, :])).to(tl.int32)
    tl.store(out + base[:, None] + j[None, :], rank < N, mask=inside)


@triton.jit
def _codes(words, high, s: tl.constexpr, BITS: tl.constexpr):
    """Codes of slice s: of 64 inputs at 4 bits, else 32."""
    if BITS == 4:
        return (words >> (4 * (s // 2 + 4 * (s % 2)))) & 15
    low = (words >> (2 * (s // 2 + 8 * (s % 2)))) & 3
    if BITS == 3:
        place = 2 * (s // 2) + 16 * (s % 2) + (tl.arange(0, 32) // 16)[None, :]
        low |= ((high >> place) & 1) << 2
    return low


@triton.jit
def _decode(
    words, scales, zeros, out, outputs, inputs, blocks, BITS: tl.constexpr, AFFINE: tl.constexpr, BN: tl.constexpr
):
    WORDS: tl.constexpr = 64 if BITS == 4 else 32
    SLICE: tl.constexpr = 64 if BITS == 4 else 32
    SLICES: tl.constexpr = 512 // SLICE
    output = tl.program_id(0) * BN + tl.arange(0, BN)
    block = tl.program_id(1)
    weight = tl.minimum(output, outputs - 1).to(tl.int64)
    part = tl.arange(0, WORDS)
    base = words + weight[:, None] * (blocks * 16 * BITS)
    word = tl.load(base + block * WORDS + part[None, :])
    high = word
    if BITS == 3:
        high = tl.load(base + blocks * 32 + block * 16 + (part % 16)[None, :])
    kind = out.dtype.element_ty
    for s in tl.static_range(SLICES):
        k = block * 512 + s * SLICE + tl.arange(0, SLICE)
        place = weight * (blocks * 4) + block * 4 + s * SLICE // 128
        scale = tl.load(scales + place).to(tl.float32)
        code = _codes(word, high, s, BITS)
        if AFFINE:
            code = code - tl.load(zeros + place).to(tl.int32)[:, None]
        else:
            code = code - 2 ** (BITS - 1)
        number = (code.to(tl.float32) * scale[:, None]).to(kind)
        tl.store(
            out + weight[:, None] * inputs + k[None, :],
            number,
            mask=(output < outputs)[:, None] & (k < inputs)[None, :],
        )


_KINDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 3: torch.uint8}


def quantize_pack(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int, bits: int, seed: int | None,
    lanes: int = LANES, warps: int = 4,
) -> Tensor:  # fmt: skip
    """As ``rarefy.kernels.low_bit.packing.quantize_pack``. lanes, warps: of a program; they change no bit."""
    x, count = x.contiguous(), x.numel()
    words = torch.empty(words_of(count, bits), dtype=torch.int64, device=x.device)
    if not count:
        return words
    words[-1:].zero_()
    inner, channels = _channels(x.shape, scale, axis)
    if seed is not None and x.is_cuda and stochastic.fits(x, inner, channels):
        parameters = _contiguous(scale, zero_point, channels)
        stochastic.quantize_pack(x, *parameters, words, inner, channels, qmin, qmax, bits, seed)
        return words
    _quantize_pack[(triton.cdiv(count, 8 * lanes),)](
        x, *_contiguous(scale, zero_point, channels), words.view(_KINDS[bits]), count, 8 * len(words), inner, channels,
        seed or 0, qmin, qmax, BITS=bits, STOCHASTIC=seed is not None, CHANNELS=channels > 1,
        EACH=channels > 1 and inner % 8 > 0, LANES=lanes, ROUNDS=ROUNDS, num_warps=warps,
    )  # fmt: skip
    return words


def round_stochastic(x: Tensor, seed: int, lanes: int = LANES, warps: int = 4) -> Tensor:
    """As ``rarefy.kernels.low_bit.packing.round_stochastic``."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        _round[(triton.cdiv(x.numel(), 8 * lanes),)](
            x, out, x.numel(), seed, ROUNDS=ROUNDS, LANES=lanes, num_warps=warps
        )
    return out


def unpack_dequantize(
    words: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, shape: list[int], bits: int, signed: bool,
    lanes: int = LANES, warps: int = 4,
) -> Tensor:  # fmt: skip
    """As ``rarefy.kernels.low_bit.packing.unpack_dequantize``."""
    out = torch.empty(shape, dtype=scale.dtype, device=words.device)
    inner, channels = _channels(out.shape, scale, axis)
    if out.numel():
        _unpack[(triton.cdiv(out.numel(), 8 * lanes),)](
            words.contiguous().view(_KINDS[bits]), *_contiguous(scale, zero_point, channels), out, out.numel(),
            8 * len(words), inner, channels, BITS=bits, SIGNED=signed, CHANNELS=channels > 1,
            EACH=channels > 1 and inner % 8 > 0,
            LANES=lanes, num_warps=warps,
        )  # fmt: skip
    return out


def decoded(
    words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, outputs: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The weights, (outputs, inputs)."""
    blocks = scales.shape[1] // 4
    out = torch.empty(outputs, inputs, dtype=dtype, device=words.device)
    _decode[(triton.cdiv(outputs, 16), blocks)](
        words, scales, words if zeros is None else zeros, out, outputs, inputs, blocks, BITS=bits,
        AFFINE=zeros is not None, BN=16, num_warps=4,
    )  # fmt: skip
    return out


def threshold_mask(x: Tensor, threshold: float, signed: bool = False) -> Tensor:
    """As ``rarefy.kernels.low_bit.masks.threshold_mask``."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    if x.numel():
        _threshold[(triton.cdiv(x.numel(), 4096),)](
            x, out, x.numel(), threshold, SIGNED=signed, BLOCK=4096, num_warps=8
        )
    return out


def n_of_m_mask(x: Tensor, n: int, m: int, signed: bool = False) -> Tensor:
    """As ``rarefy.kernels.low_bit.masks.n_of_m_mask``."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    if x.numel():
        width = x.shape[-1]
        groups = x.numel() // width * -(-width // m)
        power = triton.next_power_of_2(m)
        block = max(1, 2048 // power)
        _n_of_m[(triton.cdiv(groups, block),)](
            x, out, groups, width, EVEN=width % m == 0, SIGNED=signed, N=n, M=m, POWER=power, BLOCK=block, num_warps=4
        )
    return out


def _channels(shape: torch.Size, scale: Tensor, axis: int | None) -> tuple[int, int]:
    """Numbers in a row that share a scale, and scales."""
    if axis is None or scale.numel() == 1:
        return 1, 1
    return shape[axis % len(shape) + 1 :].numel(), shape[axis]


def _contiguous(scale: Tensor, zero_point: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    zero = zero_point.to(scale.device, torch.int32)
    return scale.float().contiguous(), (zero.expand(channels) if channels > 1 else zero).contiguous()
