"""Several processes train as one does, and where one of them ends, the run does: with one line, and from its
checkpoint.

Batch norm included, whose statistics are those of the whole batch. Gloo on a CPU.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys, time
import torch
from torch import nn
from safetensors.torch import save_file
torch.set_num_threads(1)
from test_distill import Digits, top1
from rarefy.distillation.distill import distill
from rarefy.cli.terminal import guarded

def net(width):
    torch.manual_seed(width)
    first = (nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU(), nn.Flatten(2), nn.LayerNorm(64))
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(64 * width, 10))

def program(arguments):
    output, state, pause = arguments
    def watch(*_):
        time.sleep(float(pause))
    result = distill(
        net(4), net(6), Digits(watch=watch), loss="lskd + 2*at", steps=20, batch_size=40, lr=0.05, ema=0.9,
        mixup=0.3, clip=5.0, seed=3, validate_every=5,
        checkpoint=state or None, checkpoint_seconds=0, device="cpu", progress=False,
    )
    if os.environ.get("RANK", "0") == "0":
        save_file({name: one.detach() for name, one in [*result.named_parameters(), *result.named_buffers()]}, output)
    val = result.meta["history"][-1]["facts"]["curve"][-1]["val"]  # of all images, whoever looked at them
    assert abs(val - top1(result)) < 1e-6, (val, top1(result))
    assert result.meta["history"][-1]["facts"]["processes"] == int(os.environ.get("WORLD_SIZE", "1"))

sys.exit(guarded(program, sys.argv[1:]))
"""
EXITS = """
import sys
import torch
from rarefy.demo import Net
from rarefy.distillation.distill import train
from test_distill import Digits

train(Net(), Digits(), steps=1, batch_size=8, lr=0.01, validate_every=0, device="cpu", progress=False)
for _ in range(200):  # the group's threads are still at work when the program ends
    torch.distributed.all_reduce(torch.ones(1000), async_op=True)
"""


def start(
    folder: Path, name: str, processes: int, state: str = "", pause: float = 0.0, program: str = PROGRAM
) -> subprocess.Popen[str]:
    script = folder / "program.py"
    script.write_text(program)
    command = [sys.executable, str(script)]
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            str(script),
        ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }
    return subprocess.Popen(
        [*command, str(folder / name), state, str(pause)],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def weights(folder: Path, name: str, processes: int, state: str = "") -> dict[str, torch.Tensor]:
    process = start(folder, name, processes, state)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return load_file(folder / name)


def workers(parent: int) -> list[int]:
    """Children of that process, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            if int(status[1]) == parent and "program.py" in command:
                found.append(int(entry.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc to find the workers")
def test_two_processes_are_one_with_the_whole_batch_and_survive_a_kill(tmp_path: Path) -> None:
    """20 steps. The two add the gradients of halves of a batch: float32 sums in another order, 1e-7 a step, which
    the steps between carry on to below 1e-5.
    """
    one = weights(tmp_path, "one", 1)
    two = weights(tmp_path, "two", 2)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)

    state = tmp_path / "state"
    process = start(tmp_path, "killed", 2, str(state), pause=0.05)
    deadline = time.monotonic() + 120
    while not (state / "state.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    found = workers(process.pid)
    assert len(found) == 2 and process.poll() is None
    os.kill(found[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and not (tmp_path / "killed").exists()
    ours = [line for line in errors.splitlines() if line.startswith("rarefy:")]
    assert len(ours) == 1 and re.search(
        r"another one ended.*start it again the same way, and it goes on from .*state", ours[0]
    ), errors
    resumed = weights(tmp_path, "killed", 2, str(state))
    for name, value in two.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


def test_a_program_ends_cleanly_though_the_group_is_at_work(tmp_path: Path) -> None:
    """Without an end to the group first, two of three such programs abort: "terminate called without an active
    exception".
    """
    process = start(tmp_path, "unused", 2, program=EXITS)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
