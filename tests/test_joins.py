"""Sums and products of codes against ONNX Runtime's kernels, on every pair of codes: equal to the last code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rarefy.kernels  # noqa: F401
from rarefy.kernels.affine import dequantize, quantize
from rarefy.kernels.joins import add, mul

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def kernel(operator: str, a: torch.Tensor, b: torch.Tensor, grids: list[torch.Tensor]) -> torch.Tensor:
    helper = onnx.helper
    names = ["a", "sa", "za", "b", "sb", "zb", "s", "z"]
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, codes.shape) for name, codes in (("a", a), ("b", b))]
    constants = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in zip(names[1:3] + names[4:], grids, strict=True)]
    node = helper.make_node(operator, names, ["c"], domain="com.microsoft")
    output = helper.make_tensor_value_info("c", onnx.TensorProto.UINT8, torch.broadcast_shapes(a.shape, b.shape))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "join", inputs, [output], constants), opset_imports=opsets, ir_version=10
    )  # fmt: skip
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"a": a.numpy(), "b": b.numpy()})[0])


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
