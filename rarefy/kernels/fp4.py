"""4-bit floats in blocks that share a scale, as an operator of the graph (decoded, then multiplied in float).

    x = e2m1(q) s_block s      e2m1: 0 .5 1 1.5 2 3 4 6, code bit 3 the sign

MXFP4 (OCP Microscaling 1.0): s_block = 2^(e - 127), e the 8-bit exponent (e8m0) floor(log2(largest of the block)) - 2 +
127, s = 1. What lies between 6 and 8 times s_block is clipped to 6, as the specification has it. NVFP4: s_block an e4m3
float, largest of the block / 6 in units of s = largest of the tensor / (6 448), a float32. Rounding: to nearest, ties
to the even code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.kernels.library import operator
from rarefy.kernels.quantize import repeated

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = _VALUES[-1]
_BIAS = 127


def encoded(scaled: Tensor) -> Tensor:
    """Codes 0 to 15 (uint8) of numbers in units of their scale."""
    values = torch.tensor(_VALUES, dtype=torch.float32, device=scaled.device)
    middles = (values[1:] + values[:-1]) / 2
    size = scaled.abs().float()
    code = torch.bucketize(size, middles, right=False)  # a tie goes to the lower code here ...
    tie = (code < 7) & (size == middles[code.clamp_max(6)]) & (code % 2 == 1)  # ... and on to the even one
    return (code + tie + 8 * torch.signbit(scaled)).to(torch.uint8)


def decoded(codes: Tensor) -> Tensor:
    """float32 numbers, in units of their scale."""
    values = torch.tensor((*_VALUES, *(-value for value in _VALUES)), dtype=torch.float32, device=codes.device)
    return values[codes.long()]


def mx_scale(largest: Tensor) -> Tensor:
    """e8m0 codes (uint8) for blocks whose largest absolute values are given."""
    exponent = torch.floor(torch.log2(largest.double().clamp_min(2.0**-_BIAS))) - 2
    return (exponent + _BIAS).clamp_(0, 254).to(torch.uint8)


def nv_scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 block scales, and the tensor's float32 scale ()."""
    whole = (largest.max() / (LARGEST * torch.finfo(torch.float8_e4m3fn).max)).float().clamp_min(1e-30)
    block = (largest / LARGEST / whole).clamp(2.0**-9, torch.finfo(torch.float8_e4m3fn).max)  # no block's scale is 0
    return block.to(torch.float8_e4m3fn), whole


def block_scale(scale: Tensor) -> Tensor:
    """Block scales as float32: of e8m0 codes (uint8) powers of two, of e4m3 floats themselves."""
    return torch.exp2(scale.float() - _BIAS) if scale.dtype == torch.uint8 else scale.float()


def dequantize_fp4(q: Tensor, scale: Tensor, tensor_scale: Tensor, group: int) -> Tensor:
    """q: codes (out, in, ...).

    scale: (out, ceil(in / group), 1, ...). tensor_scale: (). The numbers, in the type of ``tensor_scale``.
    """
    step = repeated(block_scale(scale) * tensor_scale.float(), q, 1, group)
    return (decoded(q) * step).to(tensor_scale.dtype)


def _shape(q: Tensor, scale: Tensor, tensor_scale: Tensor, group: int) -> Tensor:
    return q.new_empty(q.shape, dtype=tensor_scale.dtype)


OPERATORS = (operator("Tensor q, Tensor scale, Tensor tensor_scale, int group", dequantize_fp4, _shape),)
