"""CONTRIBUTING's table "I want to add a ...": each row tried. A copy of the package gets one file a row, and a program
uses them all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# file -> what is in it
FILES = {
    "pruning/criteria/last_channels.py": '''
"""Last channels: the order in which they come."""
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class LastChannels:
    """Keeps the last channels of each layer."""
    def scores(self, graph, coupling, task, seed):
        return torch.arange(coupling.count, dtype=torch.float64)
''',
    "distillation/losses/largest.py": '''
"""Largest: what is furthest from the teacher's logits."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Largest:
    """Mean over the batch of the largest distance of a logit."""
    on: str = "logits"
    def __call__(self, student, teacher, targets, features):
        return (student - teacher).abs().amax(1).mean()
''',
    "quantization/rounding/down.py": '''
"""Down: the floor."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Down:
    """Always down: biased, for comparison."""
    def codes(self, scaled, grid, generator):
        return grid.codes(scaled.floor().clamp(grid.qmin, grid.qmax))
''',
    "quantization/calibration/wide.py": '''
"""Wide: twice what was seen."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Wide:
    """Twice the range that was seen."""
    def activation_range(self, histogram, grid):
        return 2 * histogram.minimum, 2 * histogram.maximum
    def weight_scale(self, rows, grid):
        return 2 * rows.abs().amax(1) / grid.qmax
''',
    "runtimes/single.py": '''
"""Single: ONNX Runtime on one thread, whatever is asked."""
from dataclasses import dataclass
from rarefy.runtimes.onnxruntime import OnnxRuntime

@dataclass(frozen=True)
class Single(OnnxRuntime):
    """ONNX Runtime on one thread."""
    threads: int = 1
''',
    "data/formats/numbered.py": '''
"""``numbered:COUNT``: grey images, the label is the level."""
import numpy as np

def read(text, rest, split):
    labels = np.arange(int(rest)) % 10
    return (np.broadcast_to((20 * labels).astype("uint8")[:, None, None], (int(rest), 8, 8)).copy(), labels), False
''',
    "tasks/metrics/worst.py": '''
"""Worst: the largest error of all."""
from rarefy.tasks.metric import Difference, Metric

class Worst(Metric):
    name, label, unit, better, samples = "worst", "largest error", "", "lower", 0
    def __init__(self):
        self.errors = []
    def add(self, outputs, targets):
        self.errors += (outputs[:, 0] - targets.float()).abs().tolist()
        self.samples = len(self.errors)
    def value(self):
        return max(self.errors)
    def interval(self):
        return min(self.errors), max(self.errors)
    def paired(self, reference):
        return Difference(self.value() - reference.value(), (-1.0, 1.0))
''',
    "tasks/levels.py": '''
"""Levels: how bright is the image?"""
from dataclasses import dataclass
from functools import cached_property
import torch.nn.functional as F
from rarefy.data.images import ImageData
from rarefy.tasks.metrics.worst import Worst
from rarefy.tasks.task import Task

@dataclass(frozen=True)
class Levels(Task):
    """One number an image."""
    train: object = None
    val: object = None
    name = "levels"
    @cached_property
    def data(self):
        return ImageData(train=self.train, val=self.val, augment="none", mean=0.0, std=1.0)
    def loss(self, outputs, targets, label_smoothing=0.0):
        return F.mse_loss(outputs[:, 0], targets.float())
    def metric(self):
        return Worst()
''',
    "tasks/detectors/middle.py": '''
"""Middle: one box, in the middle."""
from dataclasses import dataclass
import torch
from rarefy.tasks.detector import Feed

@dataclass(frozen=True)
class Middle:
    """One box in the middle of each picture."""
    classes: int = 1
    feed = Feed((8, 8))
    overlap, least, most = 1.0, 0.0, 1
    @classmethod
    def of(cls, model):
        return cls() if type(model).__name__ == "Middling" else None
    def core(self, model):
        return model.inner
    def around(self, model, core):
        return type(model)(core)
    def scored(self, outputs, size):
        return torch.tensor([[[2.0, 2.0, 6.0, 6.0]]]).repeat(len(outputs), 1, 1), torch.ones(len(outputs), 1, 1)
    def boxes(self, outputs, size):
        return torch.tensor([[[2.0, 2.0, 6.0, 6.0, 0.0, 1.0]]]).repeat(len(outputs), 1, 1)
    def logits(self, outputs):
        return outputs
    def loss(self, outputs, targets, size):
        return outputs.square().mean()
''',
    "system/loggers/noted.py": '''
"""Noted: a line a point."""
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Noted:
    """A line of text a point."""
    file: str = "noted.txt"
    def open(self, run, first, about):
        return self
    def add(self, step, values):
        Path(self.file).write_text(f"{step} {sorted(values)}")
    def close(self):
        pass
''',
    "cli/hello.py": '''
"""``rarefy hello``."""
from rarefy.cli.options import app
from rarefy.cli.terminal import say

@app.command()
def hello() -> None:
    """Say hello."""
    say("hello")
''',
}

PROGRAM = """
import sys
import torch
import rarefy
from rarefy import plugins
from rarefy.cli.main import run
from rarefy.compression import recipe
from rarefy.demo import Net
from rarefy.tasks import Classification

assert rarefy.__file__.startswith(sys.argv[1]), rarefy.__file__
torch.manual_seed(0)
task = Classification(train="numbered:60", val="numbered:40", augment="none")
graph = rarefy.capture(Net(width=8), torch.zeros(2, 1, 8, 8))
small = rarefy.prune(graph, keep=0.5, criterion="last_channels")
left = small.get_parameter("stem.0.weight")
assert len(left) < 8 and torch.equal(left, graph.get_parameter("stem.0.weight")[-len(left):]), "criterion"
taught = rarefy.distill(small, graph, task, loss="largest", logs="noted", epochs=1, batch_size=20, progress=False)
assert open("noted.txt").read().startswith("3 ['data_share', 'images_per_second', 'loss'"), "logger"
assert "largest" in taught.meta["history"][-1]["options"]["loss"], "loss"
options = dict(rounding="down", calibration="wide", runtime="single", images=16, progress=False)
codes = rarefy.quantize(graph, task, **options)
assert rarefy.export(codes, "model.onnx", runtime="single")["passed"], "runtime"
described = codes.meta["history"][-1]["options"]
assert [described[name] for name in ("rounding", "calibration", "runtime")] == ["down", "wide", "single"]
levels = recipe.make_task({"train": "numbered:60", "val": "numbered:40"}, "levels")
found = rarefy.evaluate(graph, levels, progress=False)
assert (found.metric, found.samples) == ("worst", 40) and found.value > 0, found
class Middling(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, pictures):
        return [{"boxes": one} for one in self.inner(torch.stack(pictures))]
middling = Middling(torch.nn.Conv2d(3, 2, 3)).eval()
core = rarefy.capture(middling)
assert core.meta["detector"] == "middle" and rarefy.load(rarefy.save(core, "core")).meta["detector"] == "middle"
answer = rarefy.as_original(core, middling)([torch.ones(3, 8, 8)])
assert torch.equal(answer[0]["boxes"], middling([torch.ones(3, 8, 8)])[0]["boxes"]), "detector family"
for kind, name in (("criteria", "last_channels"), ("losses", "largest"), ("rounding", "down"), ("calibration", "wide"),
                   ("runtimes", "single"), ("detectors", "middle"), ("loggers", "noted")):
    assert name in plugins.available(kind)
assert run(["hello"]) == 0 and run(["list", "criteria"]) == 0
"""


def test_each_row_is_one_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="what is added is exported, too")
    shutil.copytree(ROOT / "rarefy", tmp_path / "rarefy", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        assert not (tmp_path / "rarefy" / name).exists()
        (tmp_path / "rarefy" / name).write_text(text.lstrip(), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hello" in done.stdout and "Keeps the last channels of each layer." in done.stdout.replace("\n", " ")


def test_contributing_names_each_row() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in FILES:
        assert f"`rarefy/{name.rpartition('/')[0]}/" in table, name
