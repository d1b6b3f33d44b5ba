"""Linear layers of int8 codes in Triton: sums on tensor cores, scales and bias before the only write.

Both operands lie with their inputs side by side, as Hopper's int8 wants them. 8-bit floats go to cuBLAS, which takes
scales a row and a bias itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def _int8(
    x, weight, x_scale, weight_scale, bias, out, rows, outputs, inputs, x_stride, w_stride,
    EACH: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ABOVE: tl.constexpr,
):  # fmt: skip
    """EACH: a scale for each row of x. EVEN: BK divides the inputs. ABOVE: tiles of rows that share weights."""
    down = tl.cdiv(rows, BM)
    across = tl.cdiv(outputs, BN)
    group = tl.program_id(0) // (ABOVE * across)
    height = tl.minimum(down - group * ABOVE, ABOVE)
    m = group * ABOVE + (tl.program_id(0) % (ABOVE * across)) % height
    n = (tl.program_id(0) % (ABOVE * across)) // height
    row = m * BM + tl.arange(0, BM)
    output = n * BN + tl.arange(0, BN)
    at = tl.arange(0, BK)
    here = (row < rows)[:, None]
    xs = x + row[:, None].to(tl.int64) * x_stride + at[None, :]
    ws = weight + (output % outputs)[None, :].to(tl.int64) * w_stride + at[:, None]
    total = tl.zeros((BM, BN), tl.int32)
    for k in range(0, tl.cdiv(inputs, BK)):
        if EVEN:
            a = tl.load(xs, mask=here, other=0)
            b = tl.load(ws)
        else:
            a = tl.load(xs, mask=here & (k * BK + at < inputs)[None, :], other=0)
            b = tl.load(ws, mask=(k * BK + at < inputs)[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        xs += BK
        ws += BK
    factor = tl.load(weight_scale + output, mask=output < outputs, other=0.0)[None, :]
    if EACH:
        factor = tl.load(x_scale + row, mask=row < rows, other=0.0)[:, None] * factor
    else:
        factor = tl.load(x_scale) * factor
    y = total.to(tl.float32) * factor
    if BIAS:
        y += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    into = out + row[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(into, y.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (output < outputs)[None, :])


def tile(rows: int) -> tuple[int, int, int, int, int, int]:
    """Rows, outputs and inputs of a tile, warps, stages, tiles that share weights: measured on an H200."""
    if rows <= 16:
        return 16, 16, 512, 2, 4, 1
    if rows <= 64:
        return 64, 32, 256, 4, 4, 1
    if rows <= 256:
        return 64, 64, 256, 4, 3, 8
    return 128, 256, 128, 8, 4, 8


def scaled_linear(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
    shape: tuple[int, int, int, int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """As ``rarefy.kernels.low_bit.int8_linear.scaled_linear``. shape: a tile other than ``tile``'s."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    if x.dtype != torch.int8:
        return _eight_bit_floats(x, weight, x_scale, weight_scale, bias, dtype)
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    if not out.numel():
        return out
    high, wide, deep, warps, stages, above = shape or tile(rows)
    _int8[(triton.cdiv(rows, high) * triton.cdiv(outputs, wide),)](
        x, weight, x_scale.contiguous(), weight_scale.contiguous(), x if bias is None else bias, out, rows, outputs,
        inputs, x.stride(0), weight.stride(0), EACH=x_scale.numel() > 1, BIAS=bias is not None,
        EVEN=inputs % deep == 0, BM=high, BN=wide, BK=deep, ABOVE=above, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _eight_bit_floats(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """cuBLAS wants inputs and outputs in multiples of 16, and writes bfloat16 where scales are one a row."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if inputs % 16 or outputs % 16 or not rows:
        from rarefy.kernels.low_bit.int8_linear import scaled_linear as reference

        return reference(x, weight, x_scale, weight_scale, bias, dtype)
    each = x_scale.expand(rows).reshape(-1, 1).contiguous()
    narrow = None if bias is None else bias.to(torch.bfloat16)
    return torch._scaled_mm(
        x, weight.T, each, weight_scale.view(1, -1).contiguous(), bias=narrow, out_dtype=torch.bfloat16
    ).to(dtype)
