"""The command line on an ONNX file: every verb takes one where it takes ``timm:NAME``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_files import write
from torch import Tensor, nn

import rarefy
from rarefy.cli import main


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.last = nn.Conv2d(16, 16, 3, stride=2)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.last(self.features(image)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As torch writes it from one image, so that the file is for a batch of one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("file") / "digits.onnx"
    example = torch.randn(1, 1, 8, 8)
    torch.onnx.export(
        Digits().eval(), (example,), str(path), input_names=["image"], output_names=["scores"], verbose=False,
        external_data=False, do_constant_folding=False,
    )  # fmt: skip
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    returned = main.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert returned == code, err
    return err if code else out


def test_prune_quantize_and_export_need_no_shape(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "prune", f"onnx:{file}", "--keep", "0.5", "-o", tmp_path / "pruned")
    pruned = rarefy.load(tmp_path / "pruned")
    whole = {name for name, _ in Digits().named_parameters()}  # torch's exporter folds batch norm
    assert {name for name, _ in pruned.named_parameters()} == {name for name in whole if "features.1" not in name}
    assert sum(one.numel() for one in pruned.parameters()) < sum(one.numel() for one in Digits().parameters())
    run(capsys, "quantize", file, "--data", "sklearn:digits", "--images", 32, "-o", tmp_path / "small")
    run(capsys, "export", tmp_path / "small", "-o", tmp_path / "small.onnx")
    graph = onnx.load(tmp_path / "small.onnx").graph
    assert [one.name for one in graph.input] == ["image"] and [one.name for one in graph.output] == ["scores"]


def test_training_and_judging(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        capsys, "distill", f"onnx:{file}", "--student", "width:keep=0.5", "--data", "sklearn:digits", "--epochs", 1,
        "-o", tmp_path / "student",
    )  # fmt: skip
    told: Any = json.loads(run(capsys, "evaluate", f"onnx:{file}", "--data", "sklearn:digits", "--json"))
    assert "top1" in json.dumps(told)


def test_what_a_file_fixes_is_told(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "prune", f"onnx:{file}", "--classes", 3, "--keep", "0.5", "-o", tmp_path / "x", code=2)
    assert "leave out --classes" in told and len(told.strip().splitlines()) == 1
    told = run(capsys, "prune", f"onnx:{file}", "--input", "3,8,8", "--keep", "0.5", "-o", tmp_path / "x", code=2)
    assert "does not take an input of 3x8x8" in told


def test_a_file_that_does_not_run_is_told_in_one_line(tmp_path: Path) -> None:
    """In a process of its own: torch writes what fails to the terminal, past what pytest catches."""
    nodes = [onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="stem")]
    file = write(tmp_path / "bad.onnx", nodes, {"x": ["n", 3, 8, 8]}, ["y"], {"w": np.zeros((4, 5, 3, 3), np.float32)})
    done = subprocess.run(
        [sys.executable, "-m", "rarefy", "prune", str(file), "--keep", "0.5", "-o", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "stem (Conv): does not run" in done.stderr
