"""Files that verbs write beside their folder: ``--onnx``, ``--report``, and what ``export`` makes of a name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

from rarefy.cli import main

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

HERE = __name__


class Net(nn.Module):
    """For images of (3, 12, 12)."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.conv, self.mid = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.mid(self.conv(image).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    numbers = np.random.default_rng(0)
    for split in ("train", "val"):
        for place, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for index in range(8):
                pixels = numbers.integers(0, 100, (12, 12, 3), dtype=np.uint8) + np.uint8(150 * place)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    returned = main.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert returned == code, err
    return out, err


VERBS = {
    "prune": ["--keep", "0.5"],
    "mask": ["--sparsity", "0.5"],
    "quantize": [],
    "distill": ["--epochs", "1", "--batch-size", "8", "--augment", "none"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_writes_the_file_and_the_report(
    verb: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(
        capsys, verb, f"{HERE}:Net", "--data", f"imagefolder:{data}", *VERBS[verb], "-o", tmp_path / "small",
        "--onnx", tmp_path / "files" / "model.onnx", "--report", tmp_path / "files" / "report.html", "--json",
    )  # fmt: skip
    found: dict[str, Any] = json.loads(out)
    assert found["parity"]["passed"] and found["onnx"].endswith("model.onnx")
    assert sorted(one.name for one in (tmp_path / "files").iterdir()) == [
        "model.onnx", "predict.py", "report.html", "report.json"
    ]  # fmt: skip
    model = onnx.load(tmp_path / "files" / "model.onnx")
    assert [one.name for one in model.graph.input] == ["image"]
    assert json.loads(model.metadata_props[0].value)["class_names"] == ["dark", "light"]
    facts = json.loads((tmp_path / "files" / "report.json").read_text())
    assert facts["after"]["evaluation"]["samples"] == facts["before"]["evaluation"]["samples"] == 16
    assert facts["after"]["latency_ms"]["median"] > 0 and facts["before"]["parameters"] > 0
    picture = next((data / "val" / "light").iterdir())
    done = subprocess.run(
        [sys.executable, tmp_path / "files" / "predict.py", picture], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and str(picture) in done.stdout and "light" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [("--onnx", "model.txt", "ends in .onnx"), ("--report", "report.pdf", "ends in .html or .htm")],
)
def test_a_name_that_cant_be_is_told_before_the_work(
    option: str, name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "small"
    _, err = run(
        capsys, "prune", f"{HERE}:Net", "--input", "3,12,12", "--keep", 0.5, "-o", folder, option, tmp_path / name,
        code=2,
    )  # fmt: skip
    assert words in err and err.count("\n") == 1 and not folder.exists()


def test_export_writes_what_its_name_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    model = f"{HERE}:Net", "--input", "3,12,12"
    run(capsys, "export", *model, "-o", tmp_path / "x.xml")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["x.bin", "x.xml"]
    assert (tmp_path / "x.xml").read_bytes().startswith(b"<?xml")
    run(capsys, "export", *model, "-o", tmp_path / "x.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "x.onnx"))
    _, err = run(capsys, "export", *model, "-o", tmp_path / "y.xml", "--runtime", "onnxruntime", code=2)
    assert "is for openvino, and onnxruntime is asked for" in err and err.count("\n") == 1
    _, err = run(capsys, "export", *model, "-o", tmp_path / "y.bin", code=2)
    assert "ends in .onnx" in err and not (tmp_path / "y.bin").exists()


def test_a_file_that_answers_otherwise_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rarefy.runtimes.onnxruntime import OnnxRuntime

    parity = {"passed": False, "agreement": 0.5, "samples": 8, "first_diverging_layer": "mid"}
    monkeypatch.setattr(OnnxRuntime, "compare", lambda *_, **__: parity)
    model = f"{HERE}:Net", "--input", "3,12,12"
    for command in (
        ["export", *model, "-o", tmp_path / "x.onnx"],
        ["prune", *model, "--keep", 0.5, "-o", tmp_path / "small", "--onnx", tmp_path / "x.onnx"],
    ):
        _, err = run(capsys, *command, code=1)
        assert err.count("\n") == 1 and "50.0% of 8 inputs" in err and "mid is the first layer that differs" in err
        assert (tmp_path / "x.onnx").exists()
    assert (tmp_path / "small" / "manifest.json").exists()


def test_a_saved_model_is_measured_beside_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read back, a graph's description of its input has its keys in another order."""
    model = f"{HERE}:Net", "--input", "3,12,12"
    run(capsys, "prune", *model, "--keep", 0.5, "-o", tmp_path / "small")
    out, _ = run(capsys, "measure", tmp_path / "small", "--reference", f"{HERE}:Net", "--repeats", 2, "--json")
    found = json.loads(out)
    assert len(found) == 2 and found[str(tmp_path / "small")]["parameters"] < found[f"{HERE}:Net"]["parameters"]
