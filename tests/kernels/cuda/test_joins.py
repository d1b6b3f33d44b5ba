"""The CUDA kernels of sums, products and pooling against the operators in torch: equal codes."""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE, kernels
from torch import Tensor
from torch.nn import functional as F

from rarefy.kernels.elementwise import add, mul
from rarefy.kernels.pooling import mean

pytestmark = pytest.mark.filterwarnings("ignore")


def codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(torch.uint8)


def signed(x: Tensor) -> Tensor:
    moved = (x.to(torch.int16) - 128).to(torch.int8)
    return (moved.permute(0, 2, 3, 1).contiguous() if x.dim() == 4 else moved).to(DEVICE)


def back(x: Tensor) -> Tensor:
    return (x.cpu().permute(0, 3, 1, 2).to(torch.int16) + 128).to(torch.uint8)


GRIDS = [
    torch.tensor(0.02),
    torch.tensor(117, dtype=torch.uint8),
    torch.tensor(0.031),
    torch.tensor(9, dtype=torch.uint8),
]
OUT = [torch.tensor(0.04), torch.tensor(128, dtype=torch.uint8)]


@pytest.mark.parametrize("gate", [(3, 19, 4, 5), (3, 19, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("multiply", [False, True])
def test_join_is_the_operator(gate: tuple[int, ...], multiply: bool) -> None:
    a, b, (a_scale, a_zero, b_scale, b_zero), (scale, zero) = codes(3, 19, 4, 5), codes(*gate), GRIDS, OUT
    operator = mul if multiply else add
    wanted = operator(a, a_scale, a_zero, b, b_scale, b_zero, scale, zero, 3, 250, torch.uint8)
    factors = (float(a_scale * b_scale / scale), 0.0) if multiply else (float(a_scale / scale), float(b_scale / scale))
    offset = float(zero) if multiply else float(zero) - factors[0] * int(a_zero) - factors[1] * int(b_zero)
    zeros = (int(a_zero) - 128, int(b_zero) - 128) if multiply else (-128, -128)
    found = kernels("join").join(signed(a), signed(b), multiply, zeros, factors, offset, (3, 250), 128)
    difference = (back(found).to(torch.int32) - wanted.to(torch.int32)).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 0.002
    assert len(wanted.unique()) > 30


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "ceil"),
    [
        ((3, 3), (2, 2), (1, 1), (1, 1), False),
        ((2, 3), (1, 2), (0, 1), (2, 1), False),
        ((3, 3), (2, 2), (0, 0), (1, 1), True),
    ],
)  # fmt: skip
def test_the_largest_of_a_window(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], ceil: bool
) -> None:
    x = codes(2, 21, 10, 7)
    wanted = F.max_pool2d(x.float(), kernel, stride, padding, dilation, ceil)
    size = tuple(wanted.shape[2:])
    found = kernels("pooling").max_pool(signed(x), kernel, stride, padding, dilation, size)
    assert torch.equal(back(found), wanted.to(torch.uint8))


@pytest.mark.parametrize("size", [(7, 7), (1, 3), (11, 5)])
def test_the_mean_of_a_plane(size: tuple[int, int]) -> None:
    x = codes(2, 70, *size)
    (x_scale, x_zero, *_), (scale, zero) = GRIDS, [torch.tensor(0.003), torch.tensor(100, dtype=torch.uint8)]
    wanted = mean(x, x_scale, x_zero, scale, zero, 0, 255, torch.uint8)
    factor = float(x_scale / (scale * size[0] * size[1]))
    found = kernels("pooling").mean(signed(x), int(x_zero) - 128, factor, int(zero) - 128, (-128, 127))
    assert torch.equal(back(found), wanted)
