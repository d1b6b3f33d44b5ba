"""compress() killed in each step goes on, and ends with the bytes of an undisturbed run; so does a second run with the
same seed.

Compared are the files that hold the model: graph.json, weights.safetensors and model.onnx. The manifest and the report
hold what clocks said. The networks are so wide that each step clearly pays: at a gate's threshold the clock of a loaded
machine would decide.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boxed
import pytest
import torch

import rarefy
from rarefy.tasks.detection import Detection
from tests.detecting import GridHead

MODEL_FILES = ("graph.json", "weights.safetensors", "model.onnx")

PROGRAM = """
import sys
import torch

torch.set_num_threads(1)
from rarefy import demo
from rarefy.compression.budget import Budget
from rarefy.compression.compress import compress
from rarefy.graph.capture import capture
from rarefy.tasks import Classification

workdir, output = sys.argv[1:]
task = Classification(train="sklearn:digits", val="sklearn:digits", augment="none")
torch.manual_seed(0)
net = capture(demo.model(width=64), torch.zeros(2, 1, 8, 8))
steps = [
    {"do": "prune", "macs": 0.6, "round_to": 16},
    {"do": "distill", "epochs": 3, "batch_size": 64, "lr": 0.02, "hard_weight": 1.0},
    {"do": "quantize", "images": 32},
]
given = dict(steps=steps, workdir=workdir, seed=3, corruptions=["brightness"])
result = compress(net, task, budget=Budget(size=10**6), **given)
result.save(output)
assert all(step["kept"] for step in result.report["steps"]), result.report["steps"]
"""

DETECTOR = """
import sys
import torch

torch.set_num_threads(1)
from rarefy.compression.budget import Budget
from rarefy.compression.compress import compress
from rarefy.graph.capture import capture
from rarefy.tasks.detection import Detection
from tests.detecting import GridHead

workdir, output, data = sys.argv[1:]
torch.manual_seed(0)
net = GridHead(width=48).eval()
steps = [
    {"do": "prune", "macs": 0.6, "round_to": 16},
    {"do": "distill", "epochs": 2, "batch_size": 4, "lr": 0.01, "hard_weight": 1.0},
    {"do": "quantize", "images": 8},
]
task = Detection(train=data, val=data, detector="yolox:classes=3,size=64/96", augment="flip,scale=0.5,mosaic")
given = dict(steps=steps, workdir=workdir, seed=3, corruptions=["brightness"])
result = compress(net, task, budget=Budget(size=10**6), **given)
result.save(output)
assert all(step["kept"] for step in result.report["steps"]), result.report["steps"]
"""

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")


def start(workdir: Path, output: Path, data: str | None = None) -> subprocess.Popen[str]:
    """data: of the detector; None: the classifier."""
    root = str(Path(__file__).resolve().parents[2])
    known = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    program = [PROGRAM, str(workdir), str(output)] if data is None else [DETECTOR, str(workdir), str(output), data]
    return subprocess.Popen([sys.executable, "-c", *program], env=known, stderr=subprocess.PIPE, text=True)


def complete(workdir: Path, output: Path, data: str | None = None) -> dict[str, str]:
    process = start(workdir, output, data)
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors and "Warning" not in errors, errors
    return {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in MODEL_FILES}


def killed(workdir: Path, output: Path, when: Callable[[], bool] | str, data: str | None = None) -> None:
    """Start, and kill without warning: at a line of progress, or once ``when`` holds."""
    process = start(workdir, output, data)
    assert process.stderr is not None
    try:
        if isinstance(when, str):
            lines = []
            for line in process.stderr:
                lines.append(line)
                if when in line:
                    break
            else:
                pytest.fail(f"no {when!r} in {lines}")
        else:
            end = time.monotonic() + 120
            while not when():
                assert process.poll() is None, f"it ended too early: {process.stderr.read()}"
                assert time.monotonic() < end
                time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()


def test_killed_in_every_step_and_twice_the_same(tmp_path: Path) -> None:
    undisturbed = complete(tmp_path / "a.work", tmp_path / "a")
    assert undisturbed == complete(tmp_path / "b.work", tmp_path / "b")

    workdir, output = tmp_path / "c.work", tmp_path / "c"
    killed(workdir, output, "step 1 of 3: prune")
    killed(workdir, output, (workdir / "2-distill.training" / "state.safetensors").exists)
    assert (workdir / "1-prune").is_dir() and not (workdir / "2-distill").exists()
    killed(workdir, output, "step 3 of 3: quantize")
    assert (workdir / "2-distill").is_dir() and not (workdir / "3-quantize").exists()
    pruned = (workdir / "1-prune" / "manifest.json").stat().st_mtime_ns
    killed(workdir, output, "final evaluation")
    assert (workdir / "3-quantize").is_dir() and not (workdir / "final.json").exists()
    assert complete(workdir, output) == undisturbed
    assert (workdir / "1-prune" / "manifest.json").stat().st_mtime_ns == pruned  # what was done was not done again


def pictures(root: Path, count: int = 32) -> str:
    return boxed.coco(root, {f"{n}.png": [(4 + n % 8, 6, 20 + n % 16, 26, n % 3)] for n in range(count)})[0]


@pytest.mark.slow
def test_a_detectors_run_killed_in_every_step_ends_the_same(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    undisturbed = complete(tmp_path / "a.work", tmp_path / "a", data)
    assert undisturbed == complete(tmp_path / "b.work", tmp_path / "b", data)

    workdir, output = tmp_path / "c.work", tmp_path / "c"
    killed(workdir, output, "step 1 of 3: prune", data)
    killed(workdir, output, (workdir / "2-distill.training" / "state.safetensors").exists, data)
    assert (workdir / "1-prune").is_dir() and not (workdir / "2-distill").exists()
    killed(workdir, output, "step 3 of 3: quantize", data)
    assert (workdir / "2-distill").is_dir() and not (workdir / "3-quantize").exists()
    killed(workdir, output, "final evaluation", data)
    assert (workdir / "3-quantize").is_dir() and not (workdir / "final.json").exists()
    assert complete(workdir, output, data) == undisturbed


class Stops:
    """Pictures with a box each; a training that asks for one too often ends as by Ctrl-C, in the midst of a batch."""

    left = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        Stops.left -= 1
        if Stops.left == 0:
            raise KeyboardInterrupt
        box = (4 + index, 6, 20 + index, 26)
        return boxed.rectangles(index, 40, 30, [(*box, index % 3)]), {
            "boxes": torch.tensor([box]), "labels": torch.tensor([index % 3])
        }  # fmt: skip


def test_a_detectors_training_that_was_cut_off_goes_on_and_learns_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = rarefy.capture(GridHead(width=4).eval(), (3, 32, 32))
    task = Detection(train=Stops(), augment="flip,scale=0.5,mosaic")
    options: dict[str, Any] = {"epochs": 3, "batch_size": 4, "lr": 0.01, "device": "cpu", "seed": 3, "progress": False}

    def distilled(folder: str) -> dict[str, torch.Tensor]:
        given = {**options, "checkpoint": tmp_path / folder, "checkpoint_seconds": 0}
        done = rarefy.distill(graph, graph, task=task, hard_weight=1.0, **given)
        return {name: value.clone() for name, value in done.state_dict().items()}

    undisturbed = distilled("a")
    Stops.left = 45  # of 24 pictures and those beside them in mosaics: in the third epoch
    with pytest.raises(KeyboardInterrupt):
        distilled("b")
    assert list((tmp_path / "b").rglob("state.safetensors"))
    Stops.left = 0
    resumed = distilled("b")
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(value, undisturbed[name]) for name, value in resumed.items())
