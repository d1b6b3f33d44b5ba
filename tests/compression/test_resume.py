"""compress() killed in each step goes on, and ends with the bytes of an undisturbed run; so does a second run with the
same seed.

Compared are the files that hold the model: graph.json, weights.safetensors and model.onnx. The manifest and the report
hold what clocks said. The network is so wide that each step clearly pays: at a gate's threshold the clock of a loaded
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

import pytest

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

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")


def start(workdir: Path, output: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[2])
    known = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(workdir), str(output)], env=known, stderr=subprocess.PIPE, text=True
    )


def complete(workdir: Path, output: Path) -> dict[str, str]:
    process = start(workdir, output)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in MODEL_FILES}


def killed(workdir: Path, output: Path, when: Callable[[], bool] | str) -> None:
    """Start, and kill without warning: at a line of progress, or once ``when`` holds."""
    process = start(workdir, output)
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
