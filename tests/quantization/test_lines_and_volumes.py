"""Conv1d and Conv3d in int8: integer operators, the same codes on the runtimes, integer kernels there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import Lines, Volumes
from torch import fx, nn

import rarefy
from rarefy.distillation.qat import to_trainable
from rarefy.graph.nodes import attribute, operator_name

CASES = {"lines": (Lines, (4, 20), "conv1d"), "volumes": (Volumes, (2, 6, 8, 7), "conv3d")}


def quantised(
    kind: type[nn.Module], shape: tuple[int, ...], runtime: str = "onnxruntime"
) -> tuple[fx.GraphModule, fx.GraphModule]:
    torch.manual_seed(0)
    graph = rarefy.capture(kind().eval(), torch.randn(2, *shape))
    batches = [torch.randn(8, *shape) for _ in range(4)]
    return graph, rarefy.quantize(graph, batches=batches, progress=False, runtime=runtime)


@pytest.mark.parametrize(("kind", "shape", "name"), CASES.values(), ids=CASES)
def test_convolutions_are_integer_operators(
    kind: type[nn.Module], shape: tuple[int, ...], name: str, tmp_path: Path
) -> None:
    """First, in groups, dilated, with padding in words, and behind a pooling that moves codes."""
    graph, small = quantised(kind, shape)
    layers = [node for node in small.graph.nodes if operator_name(node) in (name, f"{name}_codes")]
    assert len(layers) == 4 and all(str(node.target).startswith("rarefy.") for node in layers)
    assert all(attribute(small, node.args[1]).dtype == torch.int8 for node in layers)
    x = torch.randn(16, *shape)
    exact, found = graph(x), small(x)
    assert (exact - found).square().mean() < 10**-2.5 * exact.square().mean()
    rarefy.save(small, tmp_path / "small")
    assert torch.equal(rarefy.load(tmp_path / "small")(x), found)
    assert rarefy.graph.macs.count_macs(small) == rarefy.graph.macs.count_macs(graph)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("kind", "shape", "name"), CASES.values(), ids=CASES)
def test_runtimes_answer_the_same_from_integer_kernels(
    runtime: str, kind: type[nn.Module], shape: tuple[int, ...], name: str, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    _, small = quantised(kind, shape, runtime)
    x = torch.randn(16, *shape)
    parity = rarefy.export(small, tmp_path / "small.onnx", runtime=runtime, inputs=x)
    assert parity["passed"]
    if runtime == "openvino":
        islands = rarefy.runtimes.openvino.OpenVINO().integer_islands(tmp_path / "small.onnx", x)
        assert islands["integer"].get("Convolution") == 4 and "Convolution" not in islands["float"]
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), options, providers=["CPUExecutionProvider"])
        import onnx

        kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
        assert kinds.count("QLinearConv") == 4 and "Conv" not in kinds


@pytest.mark.parametrize(("kind", "shape", "name"), CASES.values(), ids=CASES)
def test_codes_train(kind: type[nn.Module], shape: tuple[int, ...], name: str) -> None:
    _, small = quantised(kind, shape)
    learner = to_trainable(small).train()
    learner(torch.randn(8, *shape)).square().mean().backward()
    weights = [
        name for name, parameter in learner.named_parameters() if parameter.grad is not None and parameter.dim() > 2
    ]
    assert len(weights) == 4


def test_a_layer_is_rounded_by_every_rule_that_sees_its_inputs() -> None:
    graph = rarefy.capture(Volumes().eval(), torch.randn(2, 2, 6, 8, 7))
    batches = [torch.randn(8, 2, 6, 8, 7) for _ in range(2)]
    for rounding in ("nearest", "gptq"):
        small = rarefy.quantize(graph, batches=batches, progress=False, rounding=rounding)
        x = torch.randn(4, 2, 6, 8, 7)
        assert (graph(x) - small(x)).square().mean() < 0.01 * graph(x).square().mean()
