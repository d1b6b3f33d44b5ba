"""What a file says of itself, and the program beside it, which answers as the evaluation does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rarefy import __version__, evaluate, export, load, mask, quantize, save
from rarefy.artifact.folder import read_manifest
from rarefy.deployment import description
from rarefy.graph.capture import capture
from rarefy.tasks.classification import Classification

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

MODES = {
    "colour": lambda one: one,
    "grey": lambda one: one.convert("L"),
    "palette": lambda one: one.convert("P"),
    "transparent": lambda one: one.convert("RGBA"),
    "deep": lambda one: Image.fromarray(np.asarray(one)[..., 0].astype(np.uint16) * 200),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of pictures of all sizes and kinds, each brighter in another colour."""
    root = tmp_path_factory.mktemp("pictures")
    numbers = np.random.default_rng(0)
    for place, name in enumerate(("cat", "dog", "eel")):
        (root / name).mkdir()
        for index, change in enumerate(MODES.values()):
            pixels = numbers.integers(0, 120, (*numbers.integers(20, 60, 2), 3), dtype=np.uint8)
            pixels[..., place] += 100
            change(Image.fromarray(pixels)).save(root / name / f"{index}.png")
    return root


def network(channels: int = 3) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers).eval()


def predicted(folder: Path, *files: Path) -> list[list[tuple[str, float]]]:
    """What ``predict.py`` says of each: the classes and their scores, best first."""
    done = subprocess.run(
        [sys.executable, folder / "predict.py", *files], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = [line.partition(": ")[2].split(", ") for line in done.stdout.splitlines()]
    return [[(one.rpartition(" ")[0], float(one.rpartition(" ")[2])) for one in line] for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        {"size": 24},
        {"size": 17, "crop": 1.0, "interpolation": "bicubic", "mean": 0.5, "std": 0.25},
        {"size": 24, "channels": 1, "interpolation": "nearest", "crop": 0.9},
    ],
    ids=["usual", "bicubic", "grey"],
)
def test_the_program_beside_a_file_answers_as_the_evaluation(
    options: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    task = Classification(val=f"imagefolder:{pictures}", **options)
    model = network(options.get("channels", 3))
    export(model, tmp_path / "model.onnx", task=task)
    files = sorted(pictures.glob("*/*.png"))
    found = predicted(tmp_path, *files)
    (images, labels), *more = task.data.batches("val", len(files))
    assert not more
    scores = model(images)
    for theirs, ours in zip(found, scores, strict=True):
        told = dict(theirs)
        assert [told[name] for name in ("cat", "dog", "eel")] == pytest.approx(ours.tolist(), abs=1e-4)
        assert theirs[0][0] == ("cat", "dog", "eel")[int(ours.argmax())]
    right = sum(theirs[0][0] == ("cat", "dog", "eel")[label] for theirs, label in zip(found, labels, strict=True))
    assert right / len(files) == pytest.approx(evaluate(model, task, progress=False).value)


def test_pictures_of_one_small_size_are_taken_as_they_are(tmp_path: Path) -> None:
    """As ``preparation.py`` has it: neither enlarged nor cropped."""
    numbers = np.random.default_rng(0)
    for index in range(6):
        (tmp_path / "data" / f"{index % 3}").mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{index % 3}" / f"{index}.png")
    task = Classification(val=f"imagefolder:{tmp_path / 'data'}", channels=1)
    assert task.data.input_shape == (1, 12, 12)
    model = network(1)
    export(model, tmp_path / "model.onnx", task=task)
    ((images, _),) = task.data.batches("val", 6)
    for theirs, ours in zip(
        predicted(tmp_path, *sorted((tmp_path / "data").glob("*/*.png"))), model(images), strict=True
    ):
        assert [score for _, score in sorted(theirs)] == pytest.approx(ours.tolist(), abs=1e-4)


def test_a_picture_of_the_arrays_size_is_taken_as_it_is(tmp_path: Path) -> None:
    """Arrays are not cropped, and neither is what the program is given then."""
    images = np.random.default_rng(0).integers(0, 256, (12, 9, 9, 1), dtype=np.uint8)
    task = Classification(val=(images.transpose(0, 3, 1, 2), np.arange(12) % 3))
    files = []
    for index, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{index}.png")
        files.append(tmp_path / f"{index}.png")
    model = network(1)
    small = quantize(model, Classification(train=task.train or task.val, val=task.val), progress=False)
    export(small, tmp_path / "model.onnx")
    (inputs, _), *_ = task.data.batches("val", 12)
    for theirs, ours in zip(predicted(tmp_path, *files), small(inputs), strict=True):
        assert [score for _, score in sorted(theirs)] == pytest.approx(ours.tolist(), abs=1e-4)


class Binary(nn.Module):
    """One number for two classes, beside another output."""

    def __init__(self, ending: nn.Module) -> None:
        super().__init__()
        self.ending, self.head = ending, nn.Linear(3, 1)
        self.head.weight.data, self.head.bias.data = torch.tensor([[-3.0, 3.0, 0.0]]), torch.tensor([0.1])

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        features = image.mean((2, 3))
        return {"features": features, "score": self.ending(self.head(features))}


@pytest.mark.parametrize("ending", [nn.Identity(), nn.Sigmoid()], ids=["logit", "sigmoid"])
def test_the_program_reads_the_output_that_the_task_reads(ending: nn.Module, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).symlink_to(pictures / name)
    task = Classification(val=f"imagefolder:{tmp_path / 'data'}", size=24, output="score")
    graph = capture(Binary(ending).eval(), torch.zeros(2, 3, 24, 24))
    export(graph, tmp_path / "model.onnx", task=task)
    files = sorted((tmp_path / "data").glob("*/*.png"))
    found = [one[0][0] for one in predicted(tmp_path, *files)]
    assert set(found) == {"cat", "dog"}
    right = sum(name == file.parent.name for name, file in zip(found, files, strict=True)) / len(files)
    assert right == pytest.approx(evaluate(graph, task, progress=False).value)


def metadata(path: Path) -> dict[str, Any]:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return json.loads(session.get_modelmeta().custom_metadata_map["rarefy"])


def test_a_file_says_what_it_is_for_through_steps_and_a_saved_folder(pictures: Path, tmp_path: Path) -> None:
    task = Classification(train=f"imagefolder:{pictures}", val=f"imagefolder:{pictures}", size=24)
    small = load(save(mask(network(), sparsity=0.5, task=task), tmp_path / "small"))
    (tmp_path / "predict.py").write_text("print('mine')")
    export(small, tmp_path / "model.onnx")
    about = metadata(tmp_path / "model.onnx")
    assert about == {
        "rarefy": __version__,
        "task": "classification",
        "class_names": ["cat", "dog", "eel"],
        "inputs": [{"name": "input", "shape": [3, 24, 24], "dtype": "float32"}],
        "outputs": ["output"],
        "answer": "output",
        "answer_ends_in": "logits",
        "preprocessing": {
            "channels": "RGB", "size": [24, 24], "crop": 0.875, "interpolation": "bilinear", "range": [0, 1],
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        },
    }  # fmt: skip
    assert (tmp_path / "predict.py").read_text() == "print('mine')"  # which is not ours to replace
    export(small, tmp_path / "small" / "model.onnx")  # the folder's files are listed, with their hashes, both of them
    assert {"model.onnx", "predict.py"} <= read_manifest(tmp_path / "small")["files"].keys()
    load(tmp_path / "small")


def test_a_model_that_nobody_said_how_to_feed_has_no_program(tmp_path: Path) -> None:
    graph = capture(network(), torch.zeros(2, 3, 9, 9))
    export(graph, tmp_path / "model.onnx")
    about = metadata(tmp_path / "model.onnx")
    assert (
        about.keys() == {"rarefy", "inputs", "outputs", "answer", "answer_ends_in"}
        and not (tmp_path / "predict.py").exists()
    )
    told = description.remember_source(graph, {"mean": (0.5,) * 3, "std": 0.25, "crop": 0.9, "size": 9})
    assert told.meta["task"]["preprocessing"]["crop"] == 0.9
    export(graph, tmp_path / "model.onnx")
    first = (tmp_path / "predict.py").read_text()
    assert metadata(tmp_path / "model.onnx")["preprocessing"]["std"] == [0.25]
    export(graph, tmp_path / "other.onnx")  # ours is replaced
    assert (tmp_path / "predict.py").read_text() == first.replace('"model.onnx"', '"other.onnx"')


def test_openvinos_own_format_says_the_same(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    graph = capture(network(), torch.zeros(2, 3, 9, 9))
    export(graph, tmp_path / "model.xml")
    model = openvino.Core().read_model(tmp_path / "model.xml")
    assert json.loads(model.get_rt_info("rarefy").astype(str)) == description.of(graph)
    assert not (tmp_path / "predict.py").exists()  # which would need OpenVINO
