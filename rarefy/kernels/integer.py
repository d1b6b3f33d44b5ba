"""Convolution and linear layer on codes: the sums are integers, and one factor turns them into numbers.

    y[o] = s_x s_w[o] ( sum_i (x_i - z) w_oi  +  b_o )        x: codes; w: codes; b: 32-bit codes on the grid s_x s_w

which is what an integer kernel computes. The sum is taken by a float convolution of whole numbers. Below 2^24 that is exact in
float32, and as the factors are at most 8 bits wide it stays exact where a GPU multiplies in TF32 or bf16 and adds in float32; a convolution of
the scaled numbers is not, and its roundings, different on every device, flip one code in ten thousand.

Given up: sums beyond 2^24 are rounded (600 products of extreme codes of one sign).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_library = torch.library.Library("rarefy", "FRAGMENT")
_library.define(
    "conv2d(Tensor x, Tensor weight, Tensor bias, Tensor x_scale, Tensor x_zero_point, Tensor weight_scale, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor"
)
_library.define("linear(Tensor x, Tensor weight, Tensor bias, Tensor x_scale, Tensor x_zero_point, Tensor weight_scale) -> Tensor")


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight_scale: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """x: codes (n, c, h, w). weight: codes (o, c / groups, kh, kw). bias: int32 (o,). weight_scale: (o,). Returns numbers (n, o, h', w')."""
    dtype = x_scale.dtype
    sums = F.conv2d(x.to(dtype) - x_zero_point.to(dtype), weight.to(dtype), None, stride, padding, dilation, groups)
    return sums.add_(bias.to(dtype).view(-1, 1, 1)).mul_((x_scale * weight_scale).view(-1, 1, 1))


def linear(x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor, x_zero_point: Tensor, weight_scale: Tensor) -> Tensor:
    """x: codes (..., i). weight: codes (o, i). bias: int32 (o,). weight_scale: (o,). Returns numbers (..., o)."""
    dtype = x_scale.dtype
    sums = F.linear(x.to(dtype) - x_zero_point.to(dtype), weight.to(dtype))
    return sums.add_(bias.to(dtype)).mul_(x_scale * weight_scale)


_library.impl("conv2d", conv2d, "CompositeExplicitAutograd")
_library.impl("linear", linear, "CompositeExplicitAutograd")
torch.library.register_fake("rarefy::conv2d", conv2d)
torch.library.register_fake("rarefy::linear", linear)

OPERATORS = (torch.ops.rarefy.conv2d.default, torch.ops.rarefy.linear.default)
