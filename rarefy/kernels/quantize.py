"""Quantization on a scale as two operators of the graph, and the differentiable pair of both.

    quantize    q = clip(round(x / s) + z, qmin, qmax)      round: half to even, as ONNX's QuantizeLinear
    dequantize  x = s (q - z)

``s`` (float32) and ``z`` (the type of ``q``) are of shape () for the whole tensor, (n,) for the n positions of
``axis``, or, with ``group`` above 0, (..., ceil(n / group), ...) for groups of that many neighbours along ``axis``, of
which the last may be shorter (ONNX's blocks); their other axes are the tensor's or 1. Where the type of ``q`` is an
8-bit float, rounding is that to the type, and z is 0.

``fake_quantize`` is the two in one, for training: LSQ (1902.08153). With v = x / s + z and q its code,

    dy/dx = 1 where qmin <= v <= qmax, else 0 (straight through)      dy/ds = gradient * (q - v inside, q - z outside)

``gradient`` is the paper's 1 / sqrt(N qmax), N the numbers that share a scale, which makes a step move scales and
weights by like shares. It is no operator of a saved graph: a graph in training is not a file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.kernels.chunks import PIECE, runs_on_cpu
from rarefy.kernels.library import operator

_ROUNDS = 1.5 * 2**23  # of float32s this large neighbours are whole numbers, below and above


def to_codes(numbers: Tensor, zero: Tensor | int, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    """clip(round(numbers) + zero, qmin, qmax) in ``dtype``, half to even; ``numbers`` (float) are lost.

    zero: one for all, or broadcast.

    A CPU makes 8-bit integers of floats one by one, and others in its vectors. There a float32 to which 1.5 x 2^23 is
    added is rounded by that, half to even, and its lowest bits are the whole number, which 32-bit integers hand on to 8
    bits in vectors.
    """
    if not runs_on_cpu(numbers):
        return numbers.round_().add_(_as(zero, numbers)).clamp_(qmin, qmax).to(dtype)
    if numbers.dtype != torch.float32 or dtype.itemsize > 1 or (isinstance(zero, Tensor) and zero.dim()):
        return numbers.round_().add_(_as(zero, numbers)).clamp_(qmin, qmax).to(torch.int32).to(dtype)
    offset = int(zero)
    codes = numbers.clamp_(qmin - offset, qmax - offset).add_(_ROUNDS).view(torch.int32).to(dtype)
    return codes.add_(offset) if offset else codes


def from_codes(codes: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """codes - zero as numbers of their own. zero: one for all, or broadcast."""
    numbers = codes.to(dtype, copy=True)
    if not zero.dim() and runs_on_cpu(codes) and runs_on_cpu(zero) and not int(zero):
        return numbers
    return numbers.sub_(zero.to(dtype))


def _as(zero: Tensor | int, numbers: Tensor) -> Tensor | int:
    return zero.to(numbers.dtype) if isinstance(zero, Tensor) else zero


def along(parameter: Tensor, x: Tensor, axis: int | None, group: int = 0) -> Tensor:
    """``parameter`` shaped so that it broadcasts against ``x``.

    Raises ValueError for groups that are not as many as ``x`` has.
    """
    if axis is None or parameter.dim() == 0:
        return parameter
    axis = axis % x.dim()
    if group:
        return repeated(parameter, x, axis, group)
    return parameter.view([-1 if dim == axis else 1 for dim in range(x.dim())])


def repeated(parameter: Tensor, x: Tensor, axis: int, group: int) -> Tensor:
    """Each number of ``parameter`` for the ``group`` of ``x`` along the axis that it is for; the last may be shorter.

    Raises ValueError for groups that are not as many as ``x`` has.
    """
    size = x.shape[axis]
    if group < 1 or parameter.dim() != x.dim() or parameter.shape[axis] != -(-size // group):
        raise ValueError(f"{tuple(parameter.shape)} are not the scales of {tuple(x.shape)} in groups of {group}")
    return parameter.repeat_interleave(max(1, min(group, size)), axis).narrow(axis, 0, size)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    group: int = 0,
) -> Tensor:
    """Codes of ``x``, in ``dtype``."""
    if x.device.type == "cpu" and _dense(x) and scale.dim() == 0 and not dtype.is_floating_point and x.numel() > PIECE:
        return _in_pieces(x.detach(), scale, zero_point, qmin, qmax, dtype)
    scaled = x / along(scale, x, axis, group)
    if dtype.is_floating_point:
        return scaled.clamp_(qmin, qmax).to(dtype)
    return to_codes(scaled, along(zero_point, x, axis, group), qmin, qmax, dtype)


def _in_pieces(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    """The same codes through one buffer that stays in the cache: a large tensor waits for memory five times as long."""
    codes = torch.empty_like(x, dtype=dtype)
    buffer = torch.empty(PIECE, dtype=x.dtype)
    for piece, into in zip(_flat(x).split(PIECE), _flat(codes).split(PIECE), strict=True):
        numbers = torch.div(piece, scale, out=buffer[: len(piece)])
        into.copy_(to_codes(numbers, zero_point, qmin, qmax, dtype))
    return codes


def _dense(x: Tensor) -> bool:
    """Do all numbers lie side by side?"""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _flat(x: Tensor) -> Tensor:
    """(numbers,) as they lie in memory."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group: int = 0) -> Tensor:
    """The numbers the codes stand for, in the type of ``scale``."""
    step, zero = along(scale, q, axis, group), along(zero_point, q, axis, group)
    if torch.is_grad_enabled() and (q.requires_grad or scale.requires_grad):
        return (q.to(scale.dtype) - zero.to(scale.dtype)) * step
    return from_codes(q, zero, scale.dtype).mul_(step)


class _FakeQuantize(torch.autograd.Function):
    """x, scale and zero broadcast.

    Kept for the gradients: x and the scale, which is less than the graph of the formula would keep.
    """

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, gradient: float) -> Tensor:
        return torch.round(x / scale).add_(zero).clamp_(qmin, qmax).sub_(zero).mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero, ctx.qmin, ctx.qmax, ctx.gradient = inputs
        ctx.save_for_backward(x, scale, zero)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero = ctx.saved_tensors
        (given,) = gradients
        scaled = x / scale
        codes = torch.round(scaled)
        low, high = ctx.qmin - zero, ctx.qmax - zero
        inside = (scaled >= low) & (scaled <= high)
        to_x = given * inside
        to_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.minimum(torch.maximum(codes, low), high).sub_(scaled.mul_(inside))
            to_scale = slope.mul_(given).sum_to_size(scale.shape).mul_(ctx.gradient)
        return to_x, to_scale, None, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    gradient: float = 1.0,
    group: int = 0,
) -> Tensor:
    """``dequantize(quantize(x))``, differentiable in ``x`` and in ``scale``."""
    step, zero = along(scale, x, axis, group), along(zero_point, x, axis, group).to(scale.dtype)
    answer: Tensor = _FakeQuantize.apply(x.to(scale.dtype), step, zero, qmin, qmax, gradient)
    return answer


OPERATORS = (
    operator(
        "Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax, ScalarType dtype, int group=0",
        quantize,
        lambda x, scale, zero_point, axis, qmin, qmax, dtype, group=0: x.new_empty(x.shape, dtype=dtype),
    ),
    operator(
        "Tensor q, Tensor scale, Tensor zero_point, int? axis, int group=0",
        dequantize,
        lambda q, scale, zero_point, axis, group=0: q.new_empty(q.shape, dtype=scale.dtype),
    ),
)
