"""An ONNX file is a model: real files give ONNX Runtime's answers for any batch, and their names are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
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


def test_layers_are_one_where_their_weights_are(tmp_path: Path) -> None:
    """Exporters store equal tensors once: biases of zeros are not shared for that, and one layer read twice is."""
    rng = np.random.default_rng(0)
    file = write(
        tmp_path / "m.onnx",
        [
            node("Conv", "x one.weight one.bias", "a", "/one/Conv"),
            node("Conv", "a two.weight one.bias", "b", "/two/Conv"),
            node("Conv", "b two.weight one.bias", "c", "/two_1/Conv"),
            node("LayerNormalization", "c ones one.bias", "d", "/first/LayerNormalization"),
            node("LayerNormalization", "d ones one.bias", "y", "/last/LayerNormalization"),
        ],
        {"x": ["n", 4, 4, 4]},
        ["y"],
        {
            "one.weight": rng.normal(size=(4, 4, 1, 1)).astype(np.float32), "ones": np.ones(4, np.float32),
            "two.weight": rng.normal(size=(4, 4, 1, 1)).astype(np.float32), "one.bias": np.zeros(4, np.float32),
        },
    )  # fmt: skip
    graph = graph_of(load(str(file)))
    assert sorted(name for name, _ in graph.named_parameters()) == [
        "first.bias", "first.weight", "last.bias", "last.weight", "one.bias", "one.weight", "two.bias", "two.weight",
    ]  # fmt: skip


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


def text_encoder(path: Path, scalar: bool = False) -> Path:
    """Two inputs of integers, of a length that is free; what is masked counts nothing."""
    rng = np.random.default_rng(0)
    return write(
        path,
        [
            node("Gather", "embed.weight ids", "a", "/embed/Gather"), node("MatMul", "a w", "b", "/dense/MatMul"),
            node("Cast", "mask", "c", to=1), node("Unsqueeze", "c last", "d"), node("Mul", "b d", "e"),
            node("ReduceSum", "e middle", "f", keepdims=0), node("ReduceSum", "c middle", "g"),
            node("Div", "f g", "h"), node("Mul", "h factor", "pooled"),
        ],
        {"ids": ["n", "length"], "mask": ["n", "length"], **({"factor": []} if scalar else {})},
        ["pooled"],
        {
            "embed.weight": rng.normal(size=(20, 8)).astype(np.float32), "last": np.array([2]), "middle": np.array([1]),
            "w": rng.normal(size=(8, 4)).astype(np.float32), **({} if scalar else {"factor": np.float32(2)}),
        },
        kinds={"ids": onnx.TensorProto.INT64, "mask": onnx.TensorProto.INT64},
    )  # fmt: skip


def test_names_that_are_no_identifiers_are_made_ones(tmp_path: Path) -> None:
    file = write(
        tmp_path / "m.onnx",
        [node("Relu", "input.1", "out:0"), node("Neg", "out:0", "out_0"), node("Abs", "out_0", "3")],
        {"input.1": ["n", 4]}, ["out:0", "out_0", "3"],
    )  # fmt: skip
    graph = graph_of(load(str(file)))
    rarefy.save(graph, tmp_path / "saved")
    saved = rarefy.load(tmp_path / "saved")
    assert saved.meta["names"] == {"inputs": ["input_1"], "outputs": ["out_0", "out_0_", "_3"]}
    x = torch.randn(2, 4)
    assert all(torch.equal(one, two) for one, two in zip(graph(x), saved(x), strict=True))


def test_several_inputs_of_integers(tmp_path: Path) -> None:
    file = text_encoder(tmp_path / "text.onnx")
    graph = graph_of(load(str(file)))
    assert graph.meta["names"] == {"inputs": ["ids", "mask"], "outputs": ["pooled"]}
    assert [one["dtype"] for one in graph.meta["inputs"]] == ["int64", "int64"]
    assert {name for name, _ in graph.named_parameters()} == {"embed.weight", "dense.weight"}
    ids, mask = torch.randint(0, 20, (3, 16)), torch.ones(3, 16, dtype=torch.int64)
    mask[1, 5:] = 0
    with torch.no_grad():
        found = graph(ids, mask)
    torch.testing.assert_close(found, torch.from_numpy(answers(file, ids.numpy(), mask.numpy())[0]))
    with pytest.raises(FormatError, match="'factor' is a single number.*initializer"):
        load(str(text_encoder(tmp_path / "scalar.onnx", scalar=True)))


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
    with open(file, "wb") as huge:
        huge.truncate(3 * 10**9)
    with pytest.raises(FormatError, match="3.0 GB"):
        load(str(file))
    with pytest.raises(InputError, match="no such file"):
        load(f"onnx:{tmp_path}/other.onnx")


def changed(tmp_path: Path, change: Callable[[Any], None]) -> str:
    """The detector's file with something of it changed."""
    model = onnx.load(detector(tmp_path / "whole.onnx"))
    change(model)
    file = tmp_path / "changed.onnx"
    file.write_bytes(model.SerializeToString())
    return str(file)


def beside(location: str, offset: int = 0, length: int = 432) -> Callable[[Any], None]:
    """The weights of the stem lie in a file beside."""

    def change(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))

    return change


def test_weights_in_a_file_beside_are_read(tmp_path: Path) -> None:
    whole = onnx.load(detector(tmp_path / "whole.onnx"))
    (tmp_path / "weights.bin").write_bytes(b"head" + whole.graph.initializer[0].raw_data)
    pictures = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = load(str(tmp_path / "whole.onnx")).model(pictures)
        assert torch.equal(load(changed(tmp_path, beside("weights.bin", 4))).model(pictures), wanted)


@pytest.mark.parametrize(
    "location, offset, length",
    [
        ("../secret.bin", 0, 432), ("/etc/passwd", 0, 432), ("", 0, 432), ("link.bin", 0, 432), ("none.bin", 0, 432),
        ("weights.bin", 1, 432), ("weights.bin", -4, 432), ("weights.bin", 0, 10**12), ("weights.bin", 0, 4),
        (".", 0, 432),
    ],
)  # fmt: skip
def test_weights_elsewhere_are_refused(location: str, offset: int, length: int, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(432))
    (here / "weights.bin").write_bytes(bytes(432))
    (here / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(FormatError, match="stem.conv.weight"):
        load(changed(here, beside(location, offset, length)))


def grow(model: Any) -> None:
    model.graph.initializer[0].dims[:] = [10**6, 10**6, 3, 3]


def shrink(model: Any) -> None:
    model.graph.initializer[0].dims[:] = [-4, -3, 3, 3]


def rename(model: Any) -> None:
    model.graph.node[3].input[0] = "nowhere"


def turn(model: Any) -> None:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes[::-1])


def old(model: Any) -> None:
    model.opset_import[0].version = 6


def empty(model: Any) -> None:
    del model.graph.node[:]


def text(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.STRING


def sparse(model: Any) -> None:
    model.graph.sparse_initializer.add()


@pytest.mark.parametrize(
    "change, match",
    [
        (grow, "stem.conv.weight has 432 bytes where its sizes"), (shrink, "stem.conv.weight has sizes"),
        (rename, "nothing before it makes 'nowhere'"), (turn, "nothing before it makes 'i'"),
        (old, "is of opset 6, read are 7 to"),
        (empty, "no ONNX file with a graph"), (text, "input 'images' is no tensor of numbers"),
        (sparse, "sparse weights"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(change: Callable[[Any], None], match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        load(changed(tmp_path, change))
