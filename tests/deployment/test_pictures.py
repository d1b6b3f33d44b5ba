"""A detector's file takes pictures and tells what was found, as its core and its family do in torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detecting import GridHead
from PIL import Image
from torch import Tensor, fx

import rarefy
from rarefy.deployment import pictures
from rarefy.graph.layers import layer_name, weighted
from rarefy.tasks.detector import detector_of

SIZE = (64, 96)


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    model = GridHead().eval()
    with torch.no_grad():
        for branch in model.branches:  # some of its places are sure of themselves
            branch[1][1].weight.mul_(40)
            branch[2][1].weight.mul_(40)
    return rarefy.capture(model, (3, *SIZE))


@pytest.fixture(scope="module")
def shown() -> Tensor:
    return torch.randint(0, 256, (3, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def by_hand(graph: fx.GraphModule, shown: Tensor) -> Tensor:
    """YOLOX is fed BGR, 0 to 255."""
    with torch.no_grad():
        outputs = graph(shown.permute(0, 3, 1, 2).flip(1).float())
    return detector_of(graph).boxes(outputs, SIZE)


def test_pictures_become_what_the_family_finds(graph: fx.GraphModule, shown: Tensor) -> None:
    whole = pictures.with_boxes(graph, detector_of(graph))
    found, wanted = whole(shown), by_hand(graph, shown)
    count = int((wanted[..., 4] >= 0).sum(1).max())
    assert count > 10 and found.shape == (3, detector_of(graph).most, 6)
    assert pictures.same_boxes(found, wanted, 0.0).all()
    assert torch.allclose(found[:, :count, 5], wanted[:, :count, 5], atol=1e-5)
    assert whole.meta["inputs"] == [{"shape": [*SIZE, 3], "dtype": "uint8", "range": [0, 255]}]
    assert [layer_name(one) for one in whole.graph.nodes if weighted(one)] == [
        layer_name(one) for one in graph.graph.nodes if weighted(one)
    ]
    assert torch.equal(graph(torch.zeros(2, 3, *SIZE)), graph(torch.zeros(2, 3, *SIZE)))  # left as it was
    assert len(graph.graph.find_nodes(op="placeholder")) == 1 and graph.meta["inputs"][0]["dtype"] == "float32"


def test_inputs_become_the_pictures_that_they_were_made_of(graph: fx.GraphModule, shown: Tensor) -> None:
    feed = detector_of(graph).feed
    assert torch.equal(pictures.pictures_of(shown.permute(0, 3, 1, 2).flip(1).float(), feed), shown)


def test_boxes_are_the_same_by_class_place_and_score() -> None:
    one = torch.tensor([[[0.0, 0, 10, 10, 1, 0.9], [20, 20, 30, 30, 0, 0.5], [0, 0, 0, 0, -1, 0]]])
    other = one[:, [1, 0, 2]] + torch.tensor([0.1, 0, 0.1, 0, 0, 0.005])
    assert pictures.same_boxes(one, other).all()
    for column, change in ((4, 1.0), (5, -0.02), (0, 2.0)):
        moved = other.clone()
        moved[0, 0, column] += change
        assert not pictures.same_boxes(one, moved).any()
    assert not pictures.same_boxes(one, other[:, :1]).any()
    assert pictures.same_boxes(one, other[:, :1], least=0.95).all()


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
@pytest.mark.parametrize("quantised", [False, True])
def test_one_file_from_pictures_to_boxes(
    graph: fx.GraphModule, shown: Tensor, ending: str, quantised: bool, tmp_path: Path
) -> None:
    runtime = {".onnx": "onnxruntime", ".xml": "openvino"}[ending]
    pytest.importorskip(runtime)
    model = graph
    if quantised:
        inputs = shown.permute(0, 3, 1, 2).flip(1).float()
        model = rarefy.quantize(graph, batches=[inputs], runtime=runtime, progress=False)
        assert detector_of(model) == detector_of(graph)
    parity = rarefy.export(model, tmp_path / f"seen{ending}", inputs=shown.permute(0, 3, 1, 2).flip(1).float())
    assert parity["passed"] and parity["samples"] == 3 and parity["largest_difference"] < 0.01
    session = rarefy.plugins.resolve("runtimes", runtime).open(tmp_path / f"seen{ending}")
    for count in (1, 3):
        assert pictures.same_boxes(session(shown[:count]), by_hand(model, shown[:count])).all()


def test_raw_outputs_where_they_are_asked_for(graph: fx.GraphModule, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert rarefy.export(graph, tmp_path / "raw.onnx", boxes=False)["passed"]
    session = onnxruntime.InferenceSession(str(tmp_path / "raw.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, *SIZE]
    assert session.get_outputs()[0].shape[-1] == 8


def test_the_program_beside_the_file_finds_the_same(graph: fx.GraphModule, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    rarefy.export(graph, tmp_path / "seen.onnx", compare=False)
    pixels = np.random.default_rng(0).integers(0, 256, (130, 120, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    command = [sys.executable, "predict.py", "one.png", "--least", "0.2"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    from rarefy.data.boxes.placement import placed

    family = detector_of(graph)
    canvas, where = placed(torch.from_numpy(pixels).permute(2, 0, 1), family.feed)
    found = by_hand(graph, canvas.permute(1, 2, 0)[None])[0]
    found = found[found[:, 5] >= 0.2]
    assert len(printed) == len(found) > 5
    best = where.back(found[0, :4])
    corners = [float(value) for value in printed[0].rpartition(" at ")[2].split(", ")]
    assert torch.allclose(torch.tensor(corners), best, atol=2.0)
    assert json.loads(json.dumps(printed[0])).startswith(f"one.png: class {int(found[0, 4])} ")
