"""export(): whole files under their own names, for the runtime that the name belongs to, and no silent difference."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import TwoAnswers
from torch import Tensor, nn

from rarefy import capture, export, measure, quantize
from rarefy.deployment.export import runtime_of
from rarefy.errors import FormatError, InputError
from rarefy.runtimes.onnxruntime import OnnxRuntime

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def plain(dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return nn.Sequential(*layers).to(dtype).eval()


class ImageAndTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.table, self.head = nn.Conv2d(3, 8, 3), nn.Linear(4, 8), nn.Linear(16, 5)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.head(torch.cat([self.image(image).relu().mean((2, 3)), self.table(table).relu()], 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_in_another_precision_is_written_or_told_what_helps(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    with pytest.raises(InputError, match=r"half\.onnx: a model in (bfloat16|float64) .* model\.float\(\)") as caught:
        export(plain(dtype), path, inputs=torch.randn(2, 3, 8, 8, dtype=dtype))
    assert "/tmp/tmp" not in str(caught.value) and ".part" not in str(caught.value) and "core=" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert export(plain(dtype).float(), path, inputs=torch.randn(2, 3, 8, 8))["passed"]  # what was advised


def test_a_model_in_half_precision_is_written(tmp_path: Path) -> None:
    found = export(plain(torch.float16), tmp_path / "half.onnx", inputs=torch.randn(2, 3, 8, 8).half())
    assert found["passed"] and found["largest_difference"] < 1e-2


def test_a_file_that_a_runtime_cant_open_is_called_by_its_own_name(tmp_path: Path, monkeypatch: Any) -> None:
    def refused(self: OnnxRuntime, path: Path) -> None:
        raise FormatError(f"{path}: ONNX Runtime can't open it (so it says)")

    monkeypatch.setattr(OnnxRuntime, "open", refused)
    path = tmp_path / "model.onnx"
    path.write_text("before")
    with pytest.raises(FormatError) as caught:
        export(plain(), path, inputs=torch.randn(2, 3, 8, 8))
    assert str(caught.value) == f"{path}: ONNX Runtime can't open it (so it says)"
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("integer", [False, True], ids=["float", "int8"])
def test_two_inputs_are_compared_and_measured(runtime: str, integer: bool, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    inputs = torch.randn(6, 3, 8, 8), torch.randn(6, 4)
    graph = capture(ImageAndTable().eval(), inputs)
    if integer:
        graph = quantize(graph, batches=[inputs], runtime=runtime, progress=False)
    path = tmp_path / "two.onnx"
    found = export(graph, path, runtime=runtime, inputs=inputs)
    assert found["passed"] and found["samples"] == 6 and found["largest_difference"] < 0.05
    assert export(graph, path, runtime=runtime)["samples"] == 8  # on random numbers
    with pytest.raises(InputError, match=r"1 inputs are given, the model takes 2"):
        export(graph, path, runtime=runtime, inputs=inputs[:1])
    if integer:
        costs = measure({"two": graph}, runtime=runtime, repeats=2, warmup=1)["two"]
        assert costs["latency_ms"]["batch"] == 1 and costs["latency_ms"]["median"] > 0
        graph.get_buffer("head.bias_codes").add_(1_000_000)
        assert not _differing(graph, path, runtime, inputs)["passed"]


def _differing(graph: Any, path: Path, runtime: str, inputs: Any) -> dict[str, Any]:
    from rarefy import plugins

    return plugins.resolve("runtimes", runtime).compare(graph, path, inputs)


def test_an_answer_that_differs_is_not_silent(tmp_path: Path, monkeypatch: Any) -> None:
    inputs = torch.randn(8, 3, 8, 8)
    graph = capture(TwoAnswers().eval(), inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert export(graph, tmp_path / "same.onnx", inputs=inputs)["passed"]
    parity = {"passed": False, "agreement": 0.25, "samples": 8, "first_diverging_layer": "second"}
    monkeypatch.setattr(OnnxRuntime, "compare", lambda *_, **__: parity)
    with pytest.warns(
        UserWarning, match=r"other\.onnx: gives the model's answer on 25.0% of 8 inputs.*ignore='second'"
    ):
        assert export(graph, tmp_path / "other.onnx", inputs=inputs) == parity
    assert (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize(
    ("name", "asked", "found"),
    [
        ("a.onnx", None, "onnxruntime"), ("a.xml", None, "openvino"), ("a.zip", None, "inductor"),
        ("A.ONNX", None, "onnxruntime"), ("a.onnx", "openvino", "openvino"), ("a.xml", "openvino", "openvino"),
        ("model", None, "onnxruntime"), ("a.bin", "onnxruntime", "onnxruntime"),
    ],
)  # fmt: skip
def test_the_files_name_says_what_it_is_for(name: str, asked: str | None, found: str) -> None:
    assert type(runtime_of(Path(name), asked)).__name__.lower() == found


@pytest.mark.parametrize(("name", "asked"), [("a.xml", "onnxruntime"), ("a.zip", "openvino"), ("a.onnx", "inductor")])
def test_a_name_of_another_runtime_is_refused(name: str, asked: str, tmp_path: Path) -> None:
    graph = capture(plain(), torch.randn(2, 3, 8, 8))
    with pytest.raises(InputError, match=rf"file is for \w+, and {asked} is asked for; give a name that ends in \."):
        export(graph, tmp_path / name, runtime=asked)
    assert list(tmp_path.iterdir()) == []


def test_openvinos_own_format(tmp_path: Path) -> None:
    """Two files, whole and the same each time, that answer and compare as the ONNX file does."""
    openvino = pytest.importorskip("openvino")
    inputs = torch.randn(8, 3, 8, 8)
    small = quantize(
        capture(TwoAnswers().eval(), inputs), batches=[inputs], runtime="openvino:threads=1", progress=False
    )
    path = tmp_path / "model.xml"
    (tmp_path / "model.bin").write_bytes(b"before")
    found = export(small, path, inputs=inputs)
    assert found["passed"] and found["layers"] and path.read_bytes().startswith(b"<?xml")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    model = openvino.Core().read_model(path)
    assert [one.get_any_name() for one in (*model.inputs, *model.outputs)] == ["x", "output_0", "output_1"]
    first = path.read_bytes()
    export(small, path, inputs=inputs, runtime="openvino:threads=1")
    assert path.read_bytes() == first
    small.get_buffer("second.bias_codes").add_(1_000_000)
    assert not _differing(small, path, "openvino", inputs)["passed"]


@pytest.mark.parametrize("form", ["dictionary", "array", "shape", "arrays by name"])
def test_what_is_compared_on_comes_in_the_forms_of_an_example(form: str, tmp_path: Path) -> None:
    x = torch.randn(3, 3, 8, 8)
    forms = {"dictionary": {"input": x}, "array": x.numpy(), "shape": (3, 8, 8), "arrays by name": {"input": x.numpy()}}
    found = export(plain(torch.float32), tmp_path / "model.onnx", inputs=forms[form])
    assert found["passed"] and found["samples"] == (8 if form == "shape" else 3)


class Remembering(nn.Module):
    """Returns its states, which have no batch first, in a container of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.GRU(6, 8, 2, batch_first=True, bidirectional=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Remembered:
        steps, states = self.steps(x)
        return Remembered(self.head(steps), [{"states": states}])


@dataclasses.dataclass
class Remembered:
    scores: Tensor
    more: list[dict[str, Tensor]]


@pytest.mark.parametrize("count", [1, 3, 4])  # there are four states
def test_states_without_a_batch_in_a_dataclass_are_compared(count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = export(Remembering().eval(), tmp_path / "states.onnx", inputs=torch.randn(count, 5, 6))
    assert found["passed"] and found["samples"] == count and found["largest_difference"] < 1e-5
