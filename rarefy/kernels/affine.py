"""Uniform affine quantization as two operators of the graph.

    quantize    q = clip(round(x / s) + z, qmin, qmax)      round: half to even, as ONNX's QuantizeLinear
    dequantize  x = s (q - z)

``s`` (float32) and ``z`` (the type of ``q``) are of shape () for the whole tensor, or (n,) for the n positions of ``axis``, or
(..., n_groups, ...) for groups of equal size along ``axis``: the axis is then as long in ``s`` as there are groups.

The gradient is the straight-through estimator: ``quantize`` followed by ``dequantize`` lets the gradient pass where x was not
clipped. It goes through the float ``x`` only, since codes carry none: use ``fake_quantize`` to train.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("rarefy", "FRAGMENT")
_library.define("quantize(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax, ScalarType dtype) -> Tensor")
_library.define("dequantize(Tensor q, Tensor scale, Tensor zero_point, int? axis) -> Tensor")


def along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """``parameter`` shaped so that it broadcasts against ``x``."""
    if axis is None or parameter.dim() == 0:
        return parameter
    if parameter.dim() == 1:
        return parameter.view([-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())])
    axis = axis % x.dim()
    if parameter.shape[axis] != x.shape[axis]:
        parameter = parameter.repeat_interleave(x.shape[axis] // parameter.shape[axis], axis)
    return parameter


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    """Codes of ``x``, in ``dtype``."""
    scaled = torch.round(x / along(scale, x, axis)) + along(zero_point, x, axis).to(x.dtype)
    return scaled.clamp_(qmin, qmax).to(dtype)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """The numbers the codes stand for, in the type of ``scale``."""
    return (q.to(scale.dtype) - along(zero_point, q, axis).to(scale.dtype)) * along(scale, q, axis)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int) -> Tensor:
    """``dequantize(quantize(x))``, differentiable in ``x`` (straight through, zero where clipped) and in ``scale`` (LSQ, 1902.08153)."""
    s, z = along(scale, x, axis), along(zero_point, x, axis).to(x.dtype)
    scaled = (x / s + z).clamp(qmin, qmax)
    return (scaled + (torch.round(scaled) - scaled).detach() - z) * s


_library.impl("quantize", quantize, "CompositeExplicitAutograd")
_library.impl("dequantize", dequantize, "CompositeExplicitAutograd")


def _quantize_shape(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _dequantize_shape(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    return q.new_empty(q.shape, dtype=scale.dtype)


torch.library.register_fake("rarefy::quantize", _quantize_shape)
torch.library.register_fake("rarefy::dequantize", _dequantize_shape)

OPERATORS = (torch.ops.rarefy.quantize.default, torch.ops.rarefy.dequantize.default)
