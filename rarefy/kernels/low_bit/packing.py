"""Numbers to codes of 8, 4, 3 or 2 bits, packed without gaps into 64-bit words, in one pass; and back.

    nearest      q = clip( round(x / s) + z )        half to even
    stochastic   q = clip( floor(x / s + u) + z )    u = (r + 1/2) / 65536, r the number's own 16 random bits

in float32. Code i fills bits [i b, (i + 1) b) of a little-endian stream, as ``artifact/coding/packing`` stores it; the
last word is filled with zeros. Signed codes keep their b lowest bits.

The random bits are Philox4x32-7 (Salmon et al., SC 2011, who found no test of BigCrush that seven rounds fail): number
i has half i % 2 (the lower first) of word (i % 8) // 2 of the block whose counter is i // 8 and whose key is the seed.
So they hang on the seed and on the number's place, never on how the work is cut; their mean is 1/2 to the last bit, so
that rounding is unbiased.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.kernels.library import define

WIDTHS = (2, 3, 4, 8)
_MASK = 0xFFFFFFFF
_MULTIPLIERS, _STEPS, ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 7
_PIECE = 2**20  # numbers rounded at once: their random bits take 20 times the bytes on the way


def random_bits(count: int, seed: int, device: torch.device | str = "cpu", first: int = 0) -> Tensor:
    """int64 (count,) from 0 to 65535: of the numbers at places ``first``, a multiple of 8, and on."""
    block = torch.arange(first // 8, first // 8 + -(-count // 8), dtype=torch.int64, device=device)
    words = [block & _MASK, block >> 32, torch.zeros_like(block), torch.zeros_like(block)]
    keys = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = (_product(words[2 * i], _MULTIPLIERS[i]) for i in range(2))
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(key + step) & _MASK for key, step in zip(keys, _STEPS, strict=True)]
    halves = [part for word in words for part in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, 1).flatten()[:count]


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers, without a sum beyond 63 bits."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor
    whole_high = high + (low >> 16)
    return whole_high >> 16, ((whole_high & 0xFFFF) << 16) | (low & 0xFFFF)


def round_stochastic(x: Tensor, seed: int) -> Tensor:
    """floor(x + u), float32 of the shape of ``x``: up with the probability of what is behind the point."""
    flat = x.float().reshape(-1)
    rounded = torch.empty_like(flat)
    for first in range(0, len(flat), _PIECE):
        part = flat[first : first + _PIECE]
        noise = random_bits(len(part), seed, x.device, first).to(torch.float32).add_(0.5).div_(65536)
        torch.floor(noise.add_(part), out=rounded[first : first + _PIECE])
    return rounded.view(x.shape)


def words_of(count: int, bits: int) -> int:
    """64-bit words that ``count`` codes take."""
    return -(-count * bits // 64)


def quantize_pack(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int, bits: int, seed: int | None
) -> Tensor:
    """x: floats, of any shape, row-major. scale, zero_point: () or (n,) of ``axis``. seed: None rounds to nearest.

    Returns int64 (words,). Raises ValueError for bits that there are none of, and codes that are wider.
    """
    check(bits, qmin, qmax)
    scaled = x.float() / _along(scale.float(), x, axis)
    codes = torch.round(scaled) if seed is None else round_stochastic(scaled, seed)
    zero = _along(zero_point, x, axis).to(torch.int64)
    codes = (codes.clamp_(-(2**20), 2**20).to(torch.int64) + zero).clamp_(qmin, qmax)
    return pack(codes, bits)


def check(bits: int, qmin: int, qmax: int) -> None:
    """Raises ValueError."""
    if bits not in WIDTHS or qmax - qmin >= 2**bits or not -(2 ** (bits - 1)) <= qmin <= qmax < 2**bits:
        raise ValueError(f"codes from {qmin} to {qmax} in {bits} bits; choose 2, 3, 4 or 8 bits, and codes that fit")


def pack(codes: Tensor, bits: int) -> Tensor:
    """int64 (words,) of whole numbers of any shape; of each the lowest ``bits``."""
    flat = torch.nn.functional.pad(codes.reshape(-1).to(torch.int64) & (2**bits - 1), (0, -codes.numel() % 64))
    lanes = flat.view(-1, 8) << (torch.arange(8, device=flat.device) * bits)  # 8 codes are whole bytes
    whole = lanes[:, 0]
    for lane in range(1, 8):
        whole = whole | lanes[:, lane]
    parts = (whole[:, None] >> (torch.arange(bits, device=flat.device) * 8)) & 0xFF
    stream = parts.to(torch.uint8).flatten().view(torch.int64)
    return stream[: words_of(codes.numel(), bits)].clone()


def unpack(words: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """The codes, int64 (count,)."""
    parts = words.contiguous().view(torch.uint8)
    parts = torch.nn.functional.pad(parts, (0, -len(parts) % bits)).view(-1, bits).to(torch.int64)
    whole = parts[:, 0]
    for place in range(1, bits):
        whole = whole | (parts[:, place] << (8 * place))
    codes = ((whole[:, None] >> (torch.arange(8, device=words.device) * bits)) & (2**bits - 1)).flatten()[:count]
    return torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes) if signed else codes


def unpack_dequantize(
    words: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, shape: list[int], bits: int, signed: bool
) -> Tensor:
    """s (q - z), of ``shape`` and in the type of ``scale``."""
    codes = unpack(words, bits, torch.Size(shape).numel(), signed).view(shape)
    zero = _along(zero_point, codes, axis).to(torch.int64)
    return ((codes - zero).float() * _along(scale.float(), codes, axis)).to(scale.dtype)


def _along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if axis is None or not parameter.dim():
        return parameter
    return parameter.view([-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())])


def _round_on_cuda(x: Tensor, seed: int) -> Tensor:
    from rarefy.kernels.cuda import packing

    return packing.round_stochastic(x, seed)


def _pack_on_cuda(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int, bits: int, seed: int | None
) -> Tensor:
    from rarefy.kernels.cuda import packing

    check(bits, qmin, qmax)
    return packing.quantize_pack(x, scale, zero_point, axis, qmin, qmax, bits, seed)


def _unpack_on_cuda(
    words: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, shape: list[int], bits: int, signed: bool
) -> Tensor:
    from rarefy.kernels.cuda import packing

    return packing.unpack_dequantize(words, scale, zero_point, axis, shape, bits, signed)


ROUND_STOCHASTIC = define(
    "round_stochastic(Tensor x, int seed) -> Tensor",
    round_stochastic,
    lambda x, seed: x.new_empty(x.shape, dtype=torch.float32),
    _round_on_cuda,
)
QUANTIZE_PACK = define(
    "quantize_pack(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax, int bits, "
    "int? seed) -> Tensor",
    quantize_pack,
    lambda x, scale, zero_point, axis, qmin, qmax, bits, seed: x.new_empty(
        (words_of(x.numel(), bits),), dtype=torch.int64
    ),
    _pack_on_cuda,
)
UNPACK_DEQUANTIZE = define(
    "unpack_dequantize(Tensor words, Tensor scale, Tensor zero_point, int? axis, SymInt[] shape, int bits, bool signed)"
    " -> Tensor",
    unpack_dequantize,
    lambda words, scale, zero_point, axis, shape, bits, signed: scale.new_empty(shape),
    _unpack_on_cuda,
)
