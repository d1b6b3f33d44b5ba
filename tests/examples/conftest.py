"""Exported files, pictures, and what Python says of them, which every example must say too."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from detecting import GridHead
from PIL import Image
from torch import nn

import rarefy
from rarefy.tasks.classification import Classification

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CLASSES = ("a cat", 'the "dog"', "æøå", "fish", "owl", "bee", "ant")
SIZES = {"classifier": (37, 37), "detector": (64, 96)}


@dataclass(frozen=True)
class Exported:
    """onnx: the file. pictures: PNG. said: what ``predict.py`` says of each, by its name."""

    onnx: Path
    pictures: list[Path]
    said: dict[str, list[str]]


@pytest.fixture(scope="session", params=["usual", "grey", "detector"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A classifier of colours by the usual way, one of grey by another, and a detector."""
    folder = tmp_path_factory.mktemp(request.param)
    pictures = drawn(folder / "pictures")
    torch.manual_seed(3)
    if request.param == "detector":
        model, task = detector(), None
    else:
        options = {"size": 24} if request.param == "usual" else {"size": 21, "channels": 1, "interpolation": "bicubic"}
        task = Classification(val=f"imagefolder:{folder / 'pictures'}", **options)
        model = nn.Sequential(
            nn.Conv2d(options.get("channels", 3), 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(len(CLASSES))
        )
        model(torch.zeros(1, *task.data.input_shape))

    rarefy.export(model.eval(), folder / "model.onnx", task=task)
    if importlib.util.find_spec("openvino") is not None:
        rarefy.export(model.eval(), folder / "model.xml", task=task)
    if importlib.util.find_spec("executorch") is not None and task is not None:
        rarefy.export(model.eval(), folder / "model.pte", task=task)
    done = subprocess.run(
        [sys.executable, folder / "predict.py", *pictures], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return Exported(folder / "model.onnx", pictures, lines_of(done.stdout))


def detector() -> nn.Module:
    model = GridHead().eval()
    with torch.no_grad():
        for branch in model.branches:  # some of its places are sure of themselves
            branch[1][1].weight.mul_(8)
            branch[2][1].weight.mul_(8)
    return rarefy.capture(model, (3, *SIZES["detector"]))


def drawn(folder: Path) -> list[Path]:
    """A picture a class, of all sizes: smooth, so that each has a clear answer; one is grey, one has a palette."""
    found = []
    for index, name in enumerate(CLASSES):
        numbers = np.random.default_rng(index)
        width, height = (int(one) for one in numbers.integers(20, 90, 2))
        rough = Image.fromarray(numbers.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        picture = rough.resize((width, height), Image.Resampling.BICUBIC)
        picture = picture.convert({1: "L", 2: "P", 3: "RGBA"}.get(index, "RGB"))
        (folder / name).mkdir(parents=True)
        picture.save(folder / name / f"{index}.png")
        found.append(folder / name / f"{index}.png")
    return found


def lines_of(text: str) -> dict[str, list[str]]:
    """What was said of each picture, by the picture's name."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        path, _, said = line.partition(".png: ")
        found.setdefault(f"{Path(path).name}.png", []).append(said)
    return found


NUMBER = re.compile(r"-?\d+\.\d+")


def same(said: dict[str, list[str]], wanted: dict[str, list[str]], within: float = 2e-3) -> bool:
    """The same words, and numbers as near as a runtime's arithmetic leaves them; boxes of one score in any order."""
    assert wanted and said.keys() == wanted.keys()
    for name, lines in wanted.items():
        assert len(said[name]) == len(lines), name
        left = list(said[name])
        for line in lines:
            like = next((one for one in left if alike(one, line, within)), None)
            assert like is not None, f"{name}: nothing is like {line} in {left}"
            left.remove(like)
    return True


def alike(one: str, other: str, within: float) -> bool:
    ours, theirs = ([float(found) for found in NUMBER.findall(line)] for line in (one, other))
    return NUMBER.sub("#", one) == NUMBER.sub("#", other) and ours == pytest.approx(theirs, abs=within, rel=within)
