"""Linear layers whose weights have 2, 3 or 4 bits and a scale for each 128 inputs, for activations of 16 bits.

    y[n, o] = sum_i x[n, i] s[o, i / 128] (q[o, i] - z[o, i / 128]) + b[o]          q: 0 .. 2^bits - 1

Weights lie in rows, inputs side by side in blocks of 512 (zeros fill the last), in an order that a tensor core's first
operand has in its registers. Of a block, with word j and the place p within it counted from the lowest bit:

    4 bits   64 words of 8 codes     q of input 64 σ(p) + j      σ: 0 2 4 6 1 3 5 7
    2 bits   32 words of 16 codes    q of input 32 σ(p) + j      σ: 0 2 4 .. 14 1 3 .. 15
    3 bits   the two low bits as above, of all blocks; then 16 words of 32 high bits a block:
             bit 2P + h + 16 H of word j is that of input 64 P + 32 H + 16 h + j

so that two codes 16 bits apart, which one mask takes out, are of one group, and eight shifts of a block's words are
eight slices of neighbouring inputs. What is read for few rows is the words as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.kernels.library import define

BITS = (2, 3, 4)
GROUP, BLOCK, TILE = 128, 512, 16  # inputs of a scale; inputs and rows that are stored together
FEW = 16  # rows of activations up to which a GPU multiplies by the words faster than by float16 (H200)
_LEAST_SCALE = 2.0**-14  # the smallest number of 16 bits that keeps its 11


class Packed(NamedTuple):
    """words: int32 (rows, blocks * 16 bits). scales: (rows, groups) float16, or float32 where 16 bits don't hold them.
    zeros: uint8 (rows, groups); None: 2^(bits - 1). rows and groups fill whole tiles and blocks."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    outputs: int
    inputs: int


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Packed:
    """codes: (outputs, inputs) from 0 to 2^bits - 1. scales, zeros: (outputs, ceil(inputs / 128)).

    Raises ValueError for other shapes or bits.
    """
    outputs, inputs = codes.shape
    if bits not in BITS or scales.shape != (outputs, -(-inputs // GROUP)):
        raise ValueError(f"{bits} bits, {tuple(scales.shape)} scales of {tuple(codes.shape)} codes: no form of these")
    blocks, rows = -(-inputs // BLOCK), -(-outputs // TILE) * TILE
    whole = F.pad(codes.to(torch.int64), (0, blocks * BLOCK - inputs, 0, rows - outputs)).view(rows, blocks, BLOCK)
    planes = [_plane(whole, 4)] if bits == 4 else [_plane(whole & 3, 2)]
    if bits == 3:
        high = (whole >> 2).view(rows, blocks, 8, 2, 2, 16)  # P, H, h, j
        at = torch.arange(8).view(8, 1, 1, 1) * 2 + torch.arange(2).view(2, 1) + torch.arange(2).view(2, 1, 1) * 16
        planes.append((high << at.to(high.device)).sum((2, 3, 4)).flatten(1))
    words = torch.cat(planes, 1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    around = (0, blocks * (BLOCK // GROUP) - scales.shape[1], 0, rows - outputs)
    size = scales.float().abs()
    narrow = bool(((size == 0) | ((size >= _LEAST_SCALE) & (size <= 65504))).all())
    stored = F.pad(scales.to(torch.float16 if narrow else torch.float32), around)
    filled = None if zeros is None else F.pad(zeros.to(torch.uint8), around)
    if words.is_cuda and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(words.device).synchronize()  # kernels read weights before those in front have ended
    return Packed(words.contiguous(), stored.contiguous(), filled, bits, outputs, inputs)


def _order(slices: int) -> list[int]:
    return [*range(0, slices, 2), *range(1, slices, 2)]


def _plane(codes: Tensor, bits: int) -> Tensor:
    """int64 (rows, words): of codes (rows, blocks, 512)."""
    slices = 32 // bits
    ordered = codes.view(*codes.shape[:2], slices, BLOCK // slices)[:, :, _order(slices)]
    shifts = torch.arange(slices, device=codes.device) * bits
    return (ordered << shifts.view(-1, 1)).sum(2).flatten(1)


def unpack(packed: Packed) -> Tensor:
    """The codes that ``pack`` was given, int64 (outputs, inputs)."""
    words, rows = packed.words.to(torch.int64) & 0xFFFFFFFF, packed.words.shape[0]
    blocks = words.shape[1] // (16 * packed.bits)
    low = 4 if packed.bits == 4 else 2
    slices = 32 // low
    plane, high = words[:, : blocks * 16 * low], words[:, blocks * 16 * low :]
    shifts = torch.arange(slices, device=words.device) * low
    parts = (plane.view(rows, blocks, 1, 16 * low) >> shifts.view(-1, 1)) & (2**low - 1)
    codes = parts[:, :, torch.tensor(_order(slices)).argsort().tolist()].reshape(rows, blocks * BLOCK)
    if packed.bits == 3:
        at = torch.arange(8).view(8, 1, 1, 1) * 2 + torch.arange(2).view(2, 1) + torch.arange(2).view(2, 1, 1) * 16
        top = (high.view(rows, blocks, 1, 1, 1, 16) >> at.to(words.device)) & 1
        codes = codes | (top.reshape(rows, blocks * BLOCK) << 2)
    found: Tensor = codes[: packed.outputs, : packed.inputs]
    return found


def dequantized(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weights, (outputs, inputs) in ``dtype``."""
    codes, groups = unpack(packed), -(-packed.inputs // GROUP)

    def each(one: Tensor) -> Tensor:
        return one[: packed.outputs, :groups].float().repeat_interleave(GROUP, 1)[:, : packed.inputs]

    zero = 2 ** (packed.bits - 1) if packed.zeros is None else each(packed.zeros)
    return ((codes - zero) * each(packed.scales)).to(dtype)


def low_bit_linear(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    """x: (..., inputs). Returns (..., outputs) in the type of ``x``."""
    weight = dequantized(Packed(words, scales, zeros, bits, outputs, x.shape[-1]), x.dtype)
    answer: Tensor = F.linear(x, weight, bias)
    return answer


def planned(packed: Packed, bias: Tensor | None, rows: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The layer as a program for always so many rows runs it, in ``dtype``: (..., inputs) -> (..., outputs).

    Above ``FEW`` rows the weights are decoded once and kept, which takes the memory of ``dtype``: as fast as without
    codes.
    """
    if rows > FEW:
        weight = dequantized(packed, dtype)
        return lambda x: F.linear(x, weight, bias)
    given = (packed.words, packed.scales, packed.zeros, bias, packed.bits, packed.outputs)
    return lambda x: torch.ops.rarefy.low_bit_linear(x, *given)


def _on_cuda(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    from rarefy.kernels.cuda import low_bit_linear as kernels

    return kernels.linear(x, words, scales, zeros, bias, bits, outputs)


def _shape(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


LOW_BIT_LINEAR = define(
    "low_bit_linear(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? bias, int bits, "
    "SymInt outputs) -> Tensor",
    low_bit_linear,
    _shape,
    _on_cuda,
)
