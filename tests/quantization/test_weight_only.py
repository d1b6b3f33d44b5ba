"""Weights as codes, activations in float: near the float answers, saved without gaps, loaded back exactly, written for
ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
from networks import Linears, TanhNet

from rarefy import plugins
from rarefy.artifact.folder import load, save
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.quantization.quantize import quantize


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return capture(TanhNet().eval(), torch.randn(2, 3, 9, 9))


# relative error of the weights that the format's step allows: a uniform grid of b bits over +-4 sigma leaves
# (4 / 2^(b-1))^2 / 12
MOST = {
    "int8": 1e-4, "int4": 0.03, "int4:group=8": 0.02, "uint4:group=8": 0.02, "int3": 0.12, "int2": 0.5, "uint3": 0.12,
    "fp8:e4m3": 2e-3, "fp8:e5m2": 6e-3, "mxfp4": 0.03, "nvfp4": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("weights", MOST)
def test_formats_keep_the_weights_and_come_back_from_disk(weights: str, graph, tmp_path) -> None:
    small = quantize(graph, weights=weights, activations="float", progress=False)
    facts = small.meta["history"][-1]["facts"]["layers"]
    assert [fact["name"] for fact in facts] == ["a", "b", "c", "head"]
    assert max(fact["error"] for fact in facts) < MOST[weights]
    back = load(save(small, tmp_path / "small"))
    x = torch.randn(4, 3, 9, 9)
    assert torch.equal(back(x), small(x)) and back.meta["bits"] == small.meta["bits"]
    codes = [value for name, value in back.named_buffers() if name.endswith("_codes")]
    assert len(codes) == 4 and all(value.element_size() == 1 for value in codes)


@pytest.mark.parametrize("weights", ["int8", "int4", "int3:group=8"])
def test_the_file_computes_it(weights: str, graph, tmp_path) -> None:
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    small = quantize(
        graph, weights=weights, activations="float", ignore=["a"] if "group" in weights else (), progress=False
    )
    x = torch.randn(4, 3, 9, 9)
    file = runtime.export(small, tmp_path / "small.onnx")
    assert torch.allclose(runtime.open(file)(x), small(x), atol=1e-5)


@pytest.mark.parametrize("weights", ["int4", "uint4", "int2", "int4:group=16", "uint4:group=32", "uint3:group=32"])
def test_linear_layers_are_multiplied_by_codes_of_4_bits(weights: str, tmp_path) -> None:
    """No kernel but MatMulNBits has weights, and the file has half a byte for each, where int8 has a whole one."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, 72)
    small = quantize(capture(Linears().eval(), x), weights=weights, activations="float", progress=False)
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    file = runtime.export(small, tmp_path / "small.onnx")
    onnx = pytest.importorskip("onnx")
    model = onnx.load(file)
    onnx.checker.check_model(model)
    assert model.opset_import[0].version == 21
    codes = [tensor for tensor in model.graph.initializer if tensor.name.endswith("_codes_in_4_bits")]
    assert [2 * len(tensor.raw_data) for tensor in codes] == [72 * 64, 64 * 48, 48 * 10]
    assert torch.allclose(runtime.open(file)(x), small(x), atol=1e-5)
    made = runtime.integer_islands(file)["all"]
    assert "MatMulNBits" in made and not {"MatMul", "Gemm", "FusedMatMul"}.intersection(made)


@pytest.mark.parametrize("weights", ["int4:group=20", "uint4:group=20", "int8:group=16"])
def test_groups_without_a_kernel_compute_the_same(weights: str, tmp_path) -> None:
    """Groups of 20 do not divide 72 inputs, and no runtime has a block of 20: numbers decoded, opset as of any file."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, 72)
    small = quantize(capture(Linears().eval(), x), weights=weights, activations="float", progress=False)
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    file = runtime.export(small, tmp_path / "small.onnx")
    assert pytest.importorskip("onnx").load(file).opset_import[0].version == 20
    assert torch.allclose(runtime.open(file)(x), small(x), atol=1e-5)


def test_wrong_requests(graph) -> None:
    for message, options in {
        "looks at weights alone": {"rounding": "gptq"},
        "no weight is left": {"ignore": ["*"]},
        "mixed": {"weights": "mixed:bits=4"},
    }.items():
        with pytest.raises(InputError, match=message):
            quantize(graph, activations="float", progress=False, **options)
    with pytest.raises(InputError, match="already"):
        quantize(quantize(graph, activations="float", progress=False), activations="float")
