"""The CUDA kernels of convolutions on odd shapes against the operators in torch: equal codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import DEVICE, kernels
from torch import Tensor
from torch.nn import functional as F

from rarefy.kernels.int_linear import convolution, convolution_codes
from rarefy.kernels.quantize import dequantize, quantize

pytestmark = pytest.mark.filterwarnings("ignore")

ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu, "tanh": torch.tanh,
               "sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}  # fmt: skip

# channels in, out, groups, kernel, stride, padding, dilation, height, width
SHAPES = {
    "1x1": (24, 40, 1, (1, 1), (1, 1), (0, 0), (1, 1), 5, 3),
    "3x3": (16, 20, 1, (3, 3), (1, 1), (1, 1), (1, 1), 6, 7),
    "strided": (40, 17, 1, (3, 3), (2, 2), (1, 1), (1, 1), 7, 5),
    "dilated": (8, 8, 1, (3, 2), (1, 2), (2, 1), (2, 1), 8, 7),
    "grouped": (36, 24, 3, (3, 3), (1, 1), (1, 1), (1, 1), 4, 5),
    "depthwise": (37, 37, 37, (3, 3), (2, 2), (1, 1), (1, 1), 7, 6),
    "depthwise 5x5": (16, 16, 16, (5, 5), (1, 1), (2, 2), (1, 1), 5, 9),
    "stem": (3, 33, 1, (3, 3), (2, 2), (1, 1), (1, 1), 9, 11),
    "stem 7x7": (3, 16, 1, (7, 7), (2, 2), (3, 3), (1, 1), 13, 8),
    "grey": (1, 8, 1, (5, 5), (1, 1), (2, 2), (1, 1), 8, 8),
}


class Case:
    """A layer with the grids of its input and result, as the graph has them and as the kernels want them."""

    def __init__(self, name: str, zero: int, out_zero: int, signed_shift: int = 128):
        generator = torch.Generator().manual_seed(len(name))
        self.inputs, self.outputs, self.groups, self.kernel, self.stride, self.padding, self.dilation, *size = SHAPES[
            name
        ]
        self.numbers = torch.randn(2, self.inputs, *size, generator=generator)
        self.x_scale, self.scale = torch.tensor(0.021), torch.tensor(0.037)
        self.x_zero, self.zero = (torch.tensor(one, dtype=torch.uint8) for one in (zero, out_zero))
        self.weight = torch.randint(
            -127, 128, (self.outputs, self.inputs // self.groups, *self.kernel), generator=generator
        ).to(torch.int8)
        self.bias = torch.randint(-5000, 5000, (self.outputs,), generator=generator, dtype=torch.int32)
        fan = self.inputs // self.groups * self.kernel[0] * self.kernel[1]
        self.weight_scale = (torch.rand(self.outputs, generator=generator) + 0.5) / (100 * fan**0.5)
        self.codes = quantize(self.numbers, self.x_scale, self.x_zero, None, 0, 255, torch.uint8)
        self.shift = signed_shift

    @property
    def read(self) -> tuple[Any, ...]:
        return (
            self.codes, self.weight, self.bias, self.x_scale, self.x_zero, self.weight_scale, list(self.stride),
            list(self.padding), list(self.dilation), self.groups,
        )  # fmt: skip

    def x(self) -> Tensor:
        return (self.codes.to(torch.int16) - self.shift).to(torch.int8).permute(0, 2, 3, 1).contiguous().to(DEVICE)

    def result(self, divided: bool, **options: Any) -> Any:
        sums = self.weight.to(torch.int32).flatten(1).sum(1) * (int(self.x_zero) - self.shift)
        factor = self.x_scale * self.weight_scale
        return kernels("epilogue").Result(
            bias=(self.bias - sums).to(torch.int32).to(DEVICE),
            factor=(factor if divided else factor / self.scale).to(DEVICE),
            scale=float(self.scale) if divided else 1.0, zero=int(self.zero) - 128, **options,
        )  # fmt: skip

    def places(self) -> Any:
        (top, left), int8_conv = self.padding, kernels("int8_conv")
        return int8_conv.Places(self.stride, (top, top, left, left), self.dilation, self.groups)

    def run(self, result: Any, residual: Tensor | None = None) -> Tensor:
        pad = int(self.x_zero) - self.shift
        if self.groups == self.inputs == self.outputs:
            weight = self.weight.permute(2, 3, 1, 0).squeeze(2).contiguous().to(DEVICE)
            return kernels("depthwise").depthwise(self.x(), weight, result, self.places(), pad, residual)
        if self.inputs <= 4:
            stem, places = kernels("stem"), self.places()
            buffer = stem.buffer_for(self.numbers.shape, self.kernel[1], places, pad, torch.device(DEVICE))
            stem.pack(self.numbers.to(DEVICE), float(self.x_scale), pad, -128, 127, places, buffer)
            size = places.out(*self.numbers.shape[2:], self.kernel)
            return stem.stem(buffer, stem.packed_weight(self.weight).to(DEVICE), result, places, size)
        weight = self.weight.permute(0, 2, 3, 1).contiguous().to(DEVICE)
        int8_conv = kernels("int8_conv")
        return int8_conv.conv(self.x(), weight, result, self.places(), pad, residual, tile=int8_conv.TILES[-2])


def compared(found: Tensor, wanted: Tensor) -> None:
    """Channels last and signed against channels first and unsigned; a code may be the next where a tie is near."""
    theirs = found.cpu().permute(0, 3, 1, 2).to(torch.int32) + 128
    difference = (theirs - wanted.to(torch.int32)).abs()
    assert theirs.shape == wanted.shape
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) <= 1e-3
    assert len(wanted.unique()) > 30


@pytest.mark.parametrize("name", SHAPES)
def test_codes_are_those_of_the_operator(name: str) -> None:
    case = Case(name, zero=128 if name == "3x3" else 121, out_zero=117)
    wanted = convolution_codes(*case.read, case.scale, case.zero, 0, 255, torch.uint8)
    found = case.run(case.result(divided=False))
    assert torch.equal(found.cpu().permute(0, 3, 1, 2).to(torch.int32) + 128, wanted.to(torch.int32))
    compared(found, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["1x1", "depthwise"])
def test_activations_are_computed_on_the_sums(name: str, activation: str) -> None:
    case = Case(name, zero=0, out_zero=60)
    case.scale = torch.tensor(0.005)
    numbers = ACTIVATIONS[activation](convolution(*case.read))
    wanted = quantize(numbers, case.scale, case.zero, None, 0, 255, torch.uint8)
    compared(case.run(case.result(divided=True, activation=activation)), wanted)


@pytest.mark.parametrize("name", ["3x3", "grouped", "depthwise"])
def test_a_residual_is_added_before_rounding(name: str) -> None:
    case = Case(name, zero=128, out_zero=0)
    numbers = convolution(*case.read)
    codes = torch.randint(0, 256, numbers.shape).to(torch.uint8)
    scale, zero = torch.tensor(0.011), torch.tensor(90, dtype=torch.uint8)
    wanted = quantize(numbers + dequantize(codes, scale, zero, None), case.scale, case.zero, None, 0, 255, torch.uint8)
    residual = (codes.to(torch.int16) - 128).to(torch.int8).permute(0, 2, 3, 1).contiguous().to(DEVICE)
    given = case.result(divided=True, residual_scale=float(scale), residual_zero=int(zero) - 128)
    compared(case.run(given, residual), wanted)


def test_numbers_and_narrow_grids() -> None:
    case = Case("1x1", zero=128, out_zero=128)
    numbers = convolution(*case.read)
    found = case.run(case.result(divided=True, codes=False)).cpu().permute(0, 3, 1, 2)
    assert torch.allclose(found, numbers, rtol=1e-6, atol=1e-6)
    wanted = quantize(numbers, case.scale, torch.tensor(0, dtype=torch.uint8), None, 0, 127, torch.uint8)
    result = case.result(divided=True)._replace(zero=0, qmin=0, qmax=127)
    assert torch.equal(case.run(result).cpu().permute(0, 3, 1, 2).to(torch.uint8), wanted)
