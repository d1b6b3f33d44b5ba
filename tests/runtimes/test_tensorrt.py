"""TensorRT's profile: the rules by name, a file that keeps them, and its answers in ONNX Runtime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.deployment.tensorrt_rules import findings
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.quantization.quantize import quantize
from rarefy.runtimes._tensorrt_sums import on_codes

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Residual(nn.Module):
    """A sum that a convolution ends in, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(ins, 8, 3, padding=1) for ins in (3, 8, 8))
        self.side, self.last, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        return self.head(F.relu(self.last(torch.cat([self.side(x), x], 1))).mean((2, 3)))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def graph(x: Tensor) -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(Residual().eval(), x)


@pytest.fixture(scope="module")
def small(graph: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    return quantize(graph, batches=[x], runtime="tensorrt", progress=False)


def test_a_model_quantised_for_it_keeps_the_rules(small: fx.GraphModule, x: Tensor, tmp_path: Path) -> None:
    runtime = plugins.resolve("runtimes", "tensorrt")
    path = runtime.export(small, tmp_path / "model.onnx")
    model = onnx.load(path)
    assert findings(model) == []
    (total,) = (node for node in model.graph.node if node.op_type == "Add")
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    assert sorted(makers[name] for name in total.input) == ["Conv", "DequantizeLinear"]
    found = runtime.compare(small, path, x)
    assert found["passed"] and found["ulp"] == 0 and len(found["layers"]) >= 5, found
    assert found["largest_difference"] < 1e-5
    with pytest.raises(InputError, match=r"trtexec --onnx=\S*model\.onnx builds"):
        runtime.open(path)


class Padded(nn.Module):
    """The shortcut of CIFAR's ResNets: every second place, channels of zeros; then a sum of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.more = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.down(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(F.relu(self.more(x) + x).mean((2, 3)))


def test_branches_of_sums_are_decoded_from_codes_behind_padding_and_behind_sums(x: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = quantize(capture(Padded().eval(), x), batches=[x], runtime="tensorrt", progress=False)
    runtime = plugins.resolve("runtimes", "tensorrt")
    path = runtime.export(small, tmp_path / "model.onnx")
    model = onnx.load(path)
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    sums = [node for node in model.graph.node if node.op_type == "Add"]
    assert [sorted(makers[name] for name in node.input) for node in sums] == [["Conv", "DequantizeLinear"]] * 2
    found = runtime.compare(small, path, x)
    assert found["passed"] and found["ulp"] == 0, found


def test_products_are_read_as_sums_of_codes(small: fx.GraphModule, x: Tensor, tmp_path: Path) -> None:
    """All of them, the biases too; and a bias that is another is seen."""
    runtime = plugins.resolve("runtimes", "tensorrt")
    path = runtime.export(small, tmp_path / "model.onnx")
    model = onnx.load(path)
    products = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert on_codes(model) == len(products) == 6
    onnx.checker.check_model(model, full_check=True)
    decoded = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    left = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(left) == 6 and not any(decoded.intersection(node.input) for node in left)
    broken = copy.deepcopy(small)
    broken.get_buffer("second.bias_codes").add_(5_000)
    assert not runtime.compare(broken, path, x)["passed"]


def test_a_model_quantised_for_another_is_refused(graph: fx.GraphModule, x: Tensor, tmp_path: Path) -> None:
    other = quantize(graph, batches=[x], progress=False)
    with pytest.raises(InputError, match=r"unsigned codes \(symmetric\).*quantise the model with --runtime tensorrt"):
        plugins.resolve("runtimes", "tensorrt").export(other, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_float_model_breaks_no_rule(graph: fx.GraphModule, tmp_path: Path) -> None:
    assert findings(onnx.load(plugins.resolve("runtimes", "tensorrt").export(graph, tmp_path / "float.onnx"))) == []


def _set(model: Any, name: str, value: Any) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))


def _unsigned(model: Any) -> None:
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    _set(model, node.input[2], onnx.numpy_helper.to_array(_stored(model, node.input[2])).astype("uint8"))


def _moved_zero(model: Any) -> None:
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    _set(model, node.input[2], onnx.numpy_helper.to_array(_stored(model, node.input[2])) + 3)


def _along_inputs(model: Any) -> None:
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "DequantizeLinear" else ():
            attribute.i = 1


def _float_branch(model: Any) -> None:
    total = next(node for node in model.graph.node if node.op_type == "Add")
    makers = {name: node for node in model.graph.node for name in node.output}
    for place, name in enumerate(total.input):
        if makers[name].op_type == "DequantizeLinear":
            total.input[place] = makers[makers[name].input[0]].input[0]


def _rounded_sum(model: Any) -> None:
    total = next(node for node in model.graph.node if node.op_type == "Add")
    makers = {name: node for node in model.graph.node for name in node.output}
    place = next(place for place, name in enumerate(total.input) if makers[name].op_type == "Conv")
    pair = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    grid = list(pair.input[1:])
    at = list(model.graph.node).index(total)
    added = [
        onnx.helper.make_node("QuantizeLinear", [total.input[place], *grid], ["more.q"], name="more.q"),
        onnx.helper.make_node("DequantizeLinear", ["more.q", *grid], ["more"], name="more"),
    ]
    total.input[place] = "more"
    for node in reversed(added):
        model.graph.node.insert(at, node)


def _two_scales(model: Any) -> None:
    pairs = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    codes = [node.output[0] for node in pairs if node.input[0] not in {one.name for one in model.graph.initializer}]
    together = next(node for node in model.graph.node if node.op_type == "Concat")
    del together.input[:]
    together.input.extend([codes[0], codes[-1]])


def _coded_bias(model: Any) -> None:
    layer = next(node for node in model.graph.node if node.op_type == "Conv")
    scale = next(node for node in model.graph.node if node.op_type == "QuantizeLinear").input[1]
    model.graph.node.insert(
        0, onnx.helper.make_node("DequantizeLinear", [layer.input[2], scale], ["bias"], name="bias")
    )
    layer.input[2] = "bias"


def _stored(model: Any, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


BROKEN = {
    "symmetric": (_unsigned, "unsigned codes"),
    "symmetric zero": (_moved_zero, "zero point 3"),
    "per-channel": (_along_inputs, "along axis 1"),
    "bias": (_coded_bias, "bias in codes"),
    "residual": (_float_branch, "not decoded from codes"),
    "fused-sum": (_rounded_sum, "rounded in between"),
    "concat": (_two_scales, "codes of 2 scales"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_is_found_broken_by_its_name(rule: str, small: fx.GraphModule, tmp_path: Path) -> None:
    model = onnx.load(plugins.resolve("runtimes", "tensorrt").export(small, tmp_path / "model.onnx"))
    broken = copy.deepcopy(model)
    spoil, words = BROKEN[rule]
    spoil(broken)
    found = findings(broken)
    assert any(one.rule == rule.split()[0] and words in one.what for one in found), found
