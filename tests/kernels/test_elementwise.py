"""Sums, products and averages of codes against ONNX Runtime's kernels, sums and products on every pair of codes: equal
to the last code."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import rarefy.kernels  # noqa: F401
from rarefy.kernels.elementwise import add, add_in_fixed_point, mul
from rarefy.kernels.pooling import avg_pool2d, mean
from rarefy.kernels.quantize import dequantize, quantize

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def kernel(operator: str, a: torch.Tensor, b: torch.Tensor, grids: list[torch.Tensor]) -> torch.Tensor:
    names = ["a", "sa", "za", "b", "sb", "zb", "s", "z"]
    return ran(operator, names, {"a": a, "b": b}, dict(zip(names[1:3] + names[4:], grids, strict=True)))


def pooled(operator: str, x: torch.Tensor, grids: list[torch.Tensor], **options: Any) -> torch.Tensor:
    names = ["x", "sx", "zx", "s", "z"]
    return ran(operator, names, {"x": x}, dict(zip(names[1:], grids, strict=True)), **options)


def ran(
    operator: str, names: list[str], given: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], **options: Any
) -> torch.Tensor:
    helper = onnx.helper
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, codes.shape) for name, codes in given.items()]
    constants = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in stored.items()]
    node = helper.make_node(operator, names, ["c"], domain="com.microsoft", **options)
    output = helper.make_tensor_value_info("c", onnx.TensorProto.UINT8, None)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "join", inputs, [output], constants), opset_imports=opsets, ir_version=10
    )
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: codes.numpy() for name, codes in given.items()})[0])


CODES = torch.arange(256, dtype=torch.uint8)
OPERANDS = {
    "all pairs": (CODES[:, None].expand(256, 256).contiguous(), CODES[None].expand(256, 256).contiguous()),
    "one number second": (CODES[None], torch.tensor([201], dtype=torch.uint8)),
    "one number first": (torch.tensor([77], dtype=torch.uint8), CODES[None]),
    "one a channel": (CODES[:, None], CODES[None].expand(256, 256).contiguous()),
}


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize(("name", "join"), [("QLinearAdd", add), ("QLinearMul", mul)])
def test_every_pair_of_codes_is_joined_as_by_onnxruntime(name: str, join, operands: str) -> None:
    rng = np.random.default_rng(0)
    a, b = OPERANDS[operands]
    wrong = moved = 0
    for trial in range(12):
        scales = [torch.tensor(value, dtype=torch.float32) for value in rng.uniform(0.01, 0.05, 3)]
        zeros = [torch.tensor(value * (trial % 3 > 0), dtype=torch.uint8) for value in rng.integers(0, 256, 3)]
        if trial % 3 == 0:  # the gate of a hard sigmoid: halves everywhere
            scales[1:] = [torch.tensor(3 / 255), torch.tensor(6 / 255)]
        grids = [part for pair in zip(scales, zeros, strict=True) for part in pair]
        exact = kernel(name, a, b, grids)
        wrong += int((join(a, *grids[:2], b, *grids[2:4], *grids[4:], 0, 255, torch.uint8) != exact).sum())
        numbers = [dequantize(codes, *grid, None) for codes, grid in ((a, grids[:2]), (b, grids[2:4]))]
        numbers = numbers[0] + numbers[1] if name == "QLinearAdd" else numbers[0] * numbers[1]
        moved += int((quantize(numbers, *grids[4:], None, 0, 255, torch.uint8) != exact).sum())
    assert wrong == 0
    if name == "QLinearAdd" and operands == "all pairs":
        assert moved > 0  # what the operator on codes is for


def grids_of(finer: float, zero: int) -> list[torch.Tensor]:
    """Scale and zero point of what is read, and of the result, whose step is so many times as large."""
    step = torch.tensor(0.0213)
    return [step, torch.tensor(13, dtype=torch.uint8), step * finer, torch.tensor(zero, dtype=torch.uint8)]


@pytest.mark.parametrize("side", [3, 4, 7, 16])
def test_a_plane_of_codes_is_averaged_as_by_onnxruntime(side: int) -> None:
    torch.manual_seed(side)
    x = torch.randint(0, 256, (16, 64, side, side), dtype=torch.uint8)
    moved = 0
    for finer, zero in ((0.7, 20), (0.5, 33), (1.0, 0)):
        grids = grids_of(finer, zero)
        exact = pooled("QLinearGlobalAveragePool", x, grids)
        assert torch.equal(mean(x, *grids, 0, 255, torch.uint8), exact)
        numbers = dequantize(x, *grids[:2], None).mean((-2, -1), keepdim=True)
        moved += int((quantize(numbers, *grids[2:], None, 0, 255, torch.uint8) != exact).sum())
    assert moved > 0 or side in (3, 7)  # an odd number of numbers has no halves


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("side", "kernel_size", "stride", "padding"), [(8, 2, 2, 0), (9, 3, 2, 1), (14, 7, 7, 0), (7, 3, 1, 1)]
)
def test_windows_of_codes_are_averaged_as_by_onnxruntime(
    side: int, kernel_size: int, stride: int, padding: int, include: bool
) -> None:
    torch.manual_seed(side)
    x = torch.randint(0, 256, (8, 32, side, side), dtype=torch.uint8)
    for finer, zero in ((0.7, 20), (0.5, 33), (1.0, 0)):
        grids = grids_of(finer, zero)
        places = [[kernel_size] * 2, [stride] * 2, [padding] * 2]
        options = {
            "kernel_shape": places[0],
            "strides": places[1],
            "pads": places[2] * 2,
            "count_include_pad": int(include),
        }
        exact = pooled("QLinearAveragePool", x, grids, **options)
        assert torch.equal(avg_pool2d(x, *grids[:2], *places, include, *grids[2:], 0, 255, torch.uint8), exact)


def test_a_sum_in_fixed_point_is_rounded_up_from_halves() -> None:
    """As XNNPACK has it: (A (a - z_a) + B (b - z_b) + 2^(n-1)) >> n, its factors whole numbers of 21 bits."""
    rng = np.random.default_rng(3)
    a, b = OPERANDS["all pairs"]
    for _ in range(20):
        steps = [np.float32(one) for one in np.exp(rng.uniform(-6, 1, 3))]
        zeros = [int(one) for one in rng.integers(0, 256, 3)]
        grids = [torch.tensor(one) for pair in zip(steps, zeros, strict=True) for one in pair]
        found = add_in_fixed_point(a, *grids[:2], b, *grids[2:4], *grids[4:], 0, 255, torch.uint8)
        ratios = [float(steps[0] / steps[2]), float(steps[1] / steps[2])]
        bits = 20 - math.floor(math.log2(max(ratios)))
        factors = [round(one * 2**bits) for one in ratios]
        assert 2**20 <= max(factors) <= 2**21
        for _ in range(50):
            i, j = (int(one) for one in rng.integers(0, 256, 2))
            whole = factors[0] * (i - zeros[0]) + factors[1] * (j - zeros[1])
            nearest = math.floor(Fraction(whole, 2**bits) + Fraction(1, 2)) + zeros[2]
            assert int(found[i, j]) == min(max(nearest, 0), 255)
    one, none = torch.tensor(1.0), torch.tensor(0)
    odd = add_in_fixed_point(a, one, none, b, one, none, torch.tensor(2.0), none, 0, 255, torch.uint8)
    assert odd[0, 1] == 1 and odd[0, 3] == 2 and odd[2, 3] == 3  # to even, it would be 0, 2 and 2
