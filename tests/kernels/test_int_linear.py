"""Layers on codes against ONNX Runtime's kernels: equal to the last code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import rarefy.kernels  # noqa: F401
from rarefy.kernels import chunks
from rarefy.kernels import quantize as quantize_
from rarefy.kernels.elementwise import add, mul
from rarefy.kernels.int_linear import CONVOLUTIONS, convolution, convolution_codes, linear, linear_codes
from rarefy.kernels.quantize import quantize

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

Parts = dict[str, torch.Tensor]


def parts(inputs: tuple[int, ...], weight: tuple[int, ...], largest_bias: int, groups: int = 1) -> Parts:
    """Random codes, and a grid of the result of which 6 standard deviations fill the range."""
    torch.manual_seed(0)
    outputs = weight[0]
    found = {
        "x": torch.randint(0, 256, inputs, dtype=torch.uint8),
        "sx": torch.tensor(0.0123),
        "zx": torch.tensor(113, dtype=torch.uint8),
        "w": torch.randint(-127, 128, weight, dtype=torch.int8),
        "sw": torch.rand(outputs) * 0.01 + 0.001,
        "zw": torch.zeros(outputs, dtype=torch.int8),
        "b": torch.randint(-largest_bias, largest_bias, (outputs,), dtype=torch.int32),
        "z": torch.tensor(120, dtype=torch.uint8),
    }
    products = (
        CONVOLUTIONS[len(weight) - 2](found["x"].double() - 113, found["w"].double(), None, groups=groups)
        if len(weight) > 2
        else None
    )
    sums = products if products is not None else F.linear(found["x"].double() - 113, found["w"].double())
    spread = (sums.std() + largest_bias / 2) * float(found["sx"] * found["sw"].mean())
    return found | {"s": (6 * spread / 255).float()}


def kernel(operator: str, found: Parts, order: list[str], **options: Any) -> torch.Tensor:
    helper = onnx.helper
    stored = {
        key: value.t().contiguous() if operator == "QGemm" and key == "w" else value for key, value in found.items()
    }
    constants = [onnx.numpy_helper.from_array(stored[name].numpy(), name) for name in order[1:]]
    node = helper.make_node(operator, order, ["y"], domain="com.microsoft" if operator == "QGemm" else "", **options)
    kind = onnx.TensorProto.UINT8
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", kind, found["x"].shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        constants,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": found["x"].numpy()})[0])


@pytest.mark.parametrize("largest_bias", [200_000, 2**28])
@pytest.mark.parametrize(
    ("inputs", "outputs", "side", "groups"), [(32, 64, 3, 1), (64, 64, 3, 64), (48, 32, 1, 1), (512, 40, 3, 1)]
)
def test_a_convolution_makes_the_codes_of_onnxruntime(
    inputs: int, outputs: int, side: int, groups: int, largest_bias: int
) -> None:
    found = parts(
        (8 if inputs == 32 else 2, inputs, 64, 64), (outputs, inputs // groups, side, side), largest_bias, groups
    )
    exact = kernel("QLinearConv", found, ["x", "sx", "zx", "w", "sw", "zw", "s", "z", "b"], group=groups)
    read = tuple(found[name] for name in ("x", "w", "b", "sx", "zx", "sw"))
    places = ([1, 1], [0, 0], [1, 1], groups)
    assert torch.equal(convolution_codes(*read, *places, found["s"], found["z"], 0, 255, torch.uint8), exact)
    assert exact.unique().numel() >= 20
    numbers = convolution(*read, *places)
    moved = (quantize(numbers, found["s"], found["z"], None, 0, 255, torch.uint8) != exact).sum()
    assert int(moved) <= 2e-5 * exact.numel()  # scaled and divided: nearly
    if (inputs, largest_bias) == (32, 200_000):
        assert int(moved) > 0  # what the operator on codes is for


@pytest.mark.parametrize(("places", "kernel_shape"), [((300,), (5,)), ((8, 12, 10), (3, 1, 2))])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_line_and_a_volume_make_the_codes_of_onnxruntime(
    places: tuple[int, ...], kernel_shape: tuple[int, ...], groups: int
) -> None:
    axes = len(places)
    found = parts((3, 8, *places), (12, 8 // groups, *kernel_shape), 20_000, groups)
    strides, padding, dilation = ([2, 1, 1][:axes], [1, 0, 1][:axes], [1, 1, 2][:axes])
    sizes = {"strides": strides, "pads": padding * 2, "dilations": dilation, "kernel_shape": list(kernel_shape)}
    exact = kernel("QLinearConv", found, ["x", "sx", "zx", "w", "sw", "zw", "s", "z", "b"], group=groups, **sizes)
    read = tuple(found[name] for name in ("x", "w", "b", "sx", "zx", "sw"))
    operator = getattr(torch.ops.rarefy, f"conv{axes}d_codes")
    grid = (found["s"], found["z"], 0, 255, torch.uint8)
    assert torch.equal(operator(*read, strides, padding, dilation, groups, *grid), exact)
    assert exact.unique().numel() >= 20


@pytest.mark.parametrize("largest_bias", [20_000, 2**28])
def test_a_linear_layer_makes_the_codes_of_onnxruntime(largest_bias: int) -> None:
    found = parts((4000, 320), (200, 320), largest_bias)
    exact = kernel("QGemm", found, ["x", "sx", "zx", "w", "sw", "zw", "b", "s", "z"])
    read = tuple(found[name] for name in ("x", "w", "b", "sx", "zx", "sw"))
    assert torch.equal(linear_codes(*read, found["s"], found["z"], 0, 255, torch.uint8), exact)
    numbers = quantize(linear(*read), found["s"], found["z"], None, 0, 255, torch.uint8)
    assert int((numbers != exact).sum()) <= 2e-5 * exact.numel()


@pytest.mark.parametrize("piece", [1, 3000])
def test_a_few_images_at_a_time_make_the_codes_of_all_at_once(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, flat = parts((7, 6, 9, 8), (10, 3, 3, 3), 20_000, groups=2), parts((7, 5, 12), (9, 12), 20_000)
    gate = torch.randint(0, 256, (7, 6, 1, 1), dtype=torch.uint8)
    grid = (found["s"], found["z"], 0, 255, torch.uint8)

    def made() -> list[torch.Tensor]:
        read, other = (tuple(of[name] for name in ("x", "w", "b", "sx", "zx", "sw")) for of in (found, flat))
        places = ([2, 1], [1, 1], [1, 1], 2)
        pair = (found["x"], found["sx"], found["zx"], gate, found["sx"] * 2, found["zx"])
        shared = (*pair[:3], gate[:1], *pair[4:])
        layers = [
            convolution(*read, *places),
            convolution_codes(*read, *places, *grid),
            linear(*other),
            linear_codes(*other, *grid),
        ]
        return layers + [join(*both, *grid) for join in (add, mul) for both in (pair, shared)]

    whole = made()
    monkeypatch.setattr(chunks, "PIECE", piece)
    assert all(torch.equal(one, two) for one, two in zip(whole, made(), strict=True))
    assert len({tuple(one.shape) for one in whole}) == 3


@pytest.mark.parametrize(
    ("dtype", "qmin", "qmax"), [(torch.uint8, 0, 255), (torch.int8, -128, 127), (torch.uint8, 0, 15)]
)
def test_codes_are_rounded_half_to_even_before_the_zero_point_is_added(
    dtype: torch.dtype, qmin: int, qmax: int
) -> None:
    torch.manual_seed(0)
    halves = torch.arange(-1200, 1200) / 4
    near = torch.cat(
        [
            halves,
            torch.nextafter(halves, halves + 1),
            torch.nextafter(halves, halves - 1),
            300 * torch.randn(10_000),
            torch.tensor([3e38, -3e38]),
        ]
    )
    numbers = near[: len(near) // 2 * 2].view(2, -1).t()  # not as they lie in memory
    for zero in (qmin, qmin + 1, (qmin + qmax) // 2, qmax):
        wanted = (torch.round(numbers.double()) + zero).clamp(qmin, qmax).to(torch.int64)
        for given in (zero, torch.tensor(zero, dtype=dtype)):
            assert torch.equal(quantize_.to_codes(numbers.clone(), given, qmin, qmax, dtype).to(torch.int64), wanted)
        assert torch.equal(quantize_.to_codes(numbers.double(), zero, qmin, qmax, dtype).to(torch.int64), wanted)
        codes = wanted.to(dtype)
        assert torch.equal(
            quantize_.from_codes(codes, torch.tensor(zero, dtype=dtype), torch.float32), (wanted - zero).float()
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_codes_are_exact_whatever_the_type_of_the_scales(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randint(0, 256, (2, 16, 6, 6)).byte(), torch.randint(-127, 128, (4, 16, 3, 3)).to(torch.int8)
    given = torch.randint(-(2**20), 2**20, (4,), dtype=torch.int32), torch.tensor(0.5), torch.tensor(7).byte()
    scale = torch.full((4,), 2.0**-12)
    places = [1, 1], [0, 0], [1, 1], 1
    whole = convolution(x, weight, *given, scale, *places)
    bias, step, zero = given
    found = convolution(x, weight, bias, step.to(dtype), zero, scale.to(dtype), *places)
    assert found.dtype == dtype and torch.equal(found, whole.to(dtype))
    flat = torch.randint(0, 256, (3, 64)).byte(), torch.randint(-127, 128, (4, 64)).to(torch.int8), bias
    found = linear(*flat, step.to(dtype), zero, scale.to(dtype))
    assert found.dtype == dtype and torch.equal(found, linear(*flat, step, zero, scale).to(dtype))
