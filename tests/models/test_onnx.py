"""An ONNX file is a model: real files give ONNX Runtime's answers for any batch, and their names are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper
from onnx_files import answers, write

import rarefy
from rarefy.errors import CaptureError, FormatError, InputError
from rarefy.models.load import graph_of, load


def node(kind: str, inputs: str, outputs: str, name: str = "", **attributes: object) -> object:
    return helper.make_node(kind, inputs.split(), outputs.split(), name=name, **attributes)


@pytest.mark.parametrize("name, outputs", [("yolox_nano", 1), ("nanodet_m_320", 6)])
def test_detectors_answer_as_onnx_runtime_does_for_any_batch(name: str, outputs: int, real_data: Path) -> None:
    file = real_data / "detectors" / f"{name}.onnx"
    source = load(f"onnx:{file}")
    assert source.shape in ((3, 416, 416), (3, 320, 320))
    graph = graph_of(source)
    pictures = torch.rand(2, *source.shape) * 255
    with torch.no_grad():
        found = graph(pictures)
    found = [found] if outputs == 1 else list(found)
    assert len(found) == outputs
    for index in range(2):
        for mine, wanted in zip(found, answers(file, pictures[index : index + 1].numpy()), strict=True):
            assert np.abs(mine[index : index + 1].numpy() - wanted).max() <= 1e-4 * max(1, np.abs(wanted).max())


def detector(path: Path, batch: int | str = 1) -> Path:
    """Two layers with telling names, one without, and the Reshapes of a head that was exported with one image."""
    rng = np.random.default_rng(0)
    return write(
        path,
        [
            node("Conv", "images stem.conv.weight", "a", "Conv_0", pads=[1, 1, 1, 1]),
            node(
                "BatchNormalization",
                "a stem.bn.weight stem.bn.bias stem.bn.mean stem.bn.var",
                "b",
                "BatchNormalization_1",
            ),
            node("Relu", "b", "c"),
            node("Conv", "c onnx::Conv_12 onnx::Conv_13", "d", "/head/head.0/conv/Conv"),
            node("Reshape", "d split", "e"),
            node("Transpose", "e", "f", perm=[0, 1, 3, 2]),
            node("Reshape", "f flat", "g"),
            node("Concat", "token g", "h", axis=1),
            node("MatMul", "h onnx::MatMul_9", "i", "/fc/MatMul"),
            node("Add", "fc.bias i", "boxes", "/fc/Add"),
        ],
        {"images": [batch, 3, 8, 8]},
        ["boxes"],
        {
            "stem.conv.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
            "stem.bn.weight": rng.uniform(0.5, 1, 4).astype(np.float32),
            "stem.bn.bias": rng.normal(size=4).astype(np.float32),
            "stem.bn.mean": rng.normal(size=4).astype(np.float32),
            "stem.bn.var": rng.uniform(0.5, 1, 4).astype(np.float32),
            "onnx::Conv_12": rng.normal(size=(6, 4, 1, 1)).astype(np.float32),
            "onnx::Conv_13": rng.normal(size=6).astype(np.float32),
            "split": np.array([1, 2, 3, 64]),
            "flat": np.array([1, -1, 6]),
            "token": rng.normal(size=(1, 1, 6)).astype(np.float32),
            "onnx::MatMul_9": rng.normal(size=(6, 5)).astype(np.float32),
            "fc.bias": rng.normal(size=5).astype(np.float32),
        },
    )


def test_a_batch_of_one_becomes_free_and_names_are_kept(tmp_path: Path) -> None:
    file = detector(tmp_path / "model.onnx")
    graph = graph_of(load(str(file)))
    pictures = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        found = graph(pictures)
    assert found.shape == (5, 65, 5)
    for index in range(5):
        (wanted,) = answers(file, pictures[index : index + 1].numpy())
        torch.testing.assert_close(found[index : index + 1], torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)
    assert {name for name, _ in graph.named_parameters()} == {
        "stem.conv.weight", "stem.bn.weight", "stem.bn.bias", "head.0.conv.weight", "head.0.conv.bias", "fc.weight",
        "fc.bias", "token",
    }  # fmt: skip
    kinds = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert {"aten.conv2d.default", "aten.batch_norm.default", "aten.linear.default"} <= set(kinds)
    assert "aten.matmul.default" not in kinds


def test_the_steps_work_on_it(tmp_path: Path) -> None:
    graph = graph_of(load(f"onnx:{detector(tmp_path / 'model.onnx')}"))
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    small = rarefy.quantize(graph, batches=batches, progress=False)
    with torch.no_grad():
        exact, rounded = graph(batches[0]), small(batches[0])
    assert 10 * torch.log10(exact.square().sum() / (exact - rounded).square().sum()) > 15
    graph.train()
    graph(batches[0]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in graph.parameters())
    assert graph.stem.bn.mean.abs().sum() != load(str(tmp_path / "model.onnx")).model.stem.bn.mean.abs().sum()


def test_a_file_that_mixes_its_images_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "m.onnx", [node("Softmax", "x", "y", axis=0)], {"x": ["n", 4]}, ["y"])
    with pytest.raises(CaptureError, match="each image of a batch on its own.*dynamic_shapes"):
        load(str(file))


@pytest.mark.parametrize(
    "kind, domain, match",
    [
        ("NonMaxSuppression", "", "operator NonMaxSuppression yields as much as the values say; cut the file"),
        ("If", "", "operator If chooses by values"),
        ("DequantizeLinear", "", "rarefy starts from float models"),
        ("FusedConv", "com.microsoft", "operator com.microsoft.FusedConv has no row"),
        ("Nothing", "", "here: operator Nothing has no row in the table"),
    ],
)
def test_operators_without_a_row_are_refused_by_name(kind: str, domain: str, match: str, tmp_path: Path) -> None:
    nodes = [node("Relu", "x", "a"), helper.make_node(kind, ["a"], ["y"], name="here", domain=domain)]
    file = write(tmp_path / "m.onnx", nodes, {"x": [1, 4]}, ["y"])
    with pytest.raises(InputError, match=match):
        load(str(file))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07" * 50, None])
def test_what_is_no_onnx_file_is_told(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(detector(tmp_path / "whole.onnx").read_bytes()[:900] if content is None else content)
    with pytest.raises(FormatError, match=r"m\.onnx"):
        load(f"onnx:{file}")
    with pytest.raises(InputError, match="no such file"):
        load(f"onnx:{tmp_path}/other.onnx")
