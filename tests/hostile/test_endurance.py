"""Killed at any moment, read while it is written, run ten times at once: what existed loads, what comes is the same.

``make endurance`` runs these, with the other long tests of safety; a short one of each stands in ``make test``.
Processes are forked, so that a life costs no import.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bounds import ended
from networks import of_one_value, value_of

from rarefy import demo
from rarefy.artifact import folder as folder_
from rarefy.cli import main
from rarefy.compression.budget import Budget
from rarefy.compression.compress import compress
from rarefy.graph.capture import capture
from rarefy.system import files
from rarefy.tasks import Classification

if not hasattr(os, "fork"):
    pytest.skip("no processes are forked here", allow_module_level=True)

MODEL_FILES = ("graph.json", "weights.safetensors", "model.onnx")
STUCK = 1800  # seconds by the clock, of a process that another test may share the machine with
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def forked(work: Callable[[], object], said: Path) -> int:
    """The process that does this, with its words in a file; it exits with 0, or 1 for an exception."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(said, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest's catch no child
        torch.set_num_threads(1)
        found = work()
        code = found if isinstance(found, int) else 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def code_of(child: int) -> int:
    """-9 where it was killed."""
    return ended(child, STUCK)[0]


# ---------------------------------------------------------------------------------------------------------------- save


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_moment_leaves_a_whole_version(
    kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [of_one_value(1.0), of_one_value(2.0, 80)]
    begin = time.monotonic()
    for model in models:
        folder = folder_.save(model, tmp_path / "model", files={"notes.txt": b"x"})
    both = time.monotonic() - begin
    heard, told = os.pipe()

    def saving() -> None:
        while True:
            for model in models:
                folder_.save(model, folder, files={"notes.txt": b"x" * 1000})
                os.write(told, b".")

    draw, seen = random.Random(0), []
    for kill in range(kills):
        child = forked(saving, tmp_path / "said")
        assert select.select([heard], [], [], 120)[0], (tmp_path / "said").read_text()
        os.read(heard, 2**16)  # it has begun
        time.sleep(draw.uniform(0.0, 2 * both))
        os.kill(child, signal.SIGKILL)
        assert code_of(child) == -signal.SIGKILL, (tmp_path / "said").read_text()
        seen.append(value_of(folder_.load(folder)))
        assert seen[-1] in (1.0, 2.0), kill
    os.close(heard)
    os.close(told)
    left = sum(one.name.endswith(".part") for one in tmp_path.iterdir())
    monkeypatch.setattr(files, "JUST_NOW", 0.0)
    folder_.save(models[0], folder)
    assert {one.name for one in tmp_path.iterdir()} <= {"model", "said"}  # what the killed left is swept
    met = [seen.count(value) for value in (1.0, 2.0)]
    assert kills < 100 or (all(met) and left), "killed at moments that tell nothing"
    print(
        f"{kills} kills of save: the folder loads after each, versions {met[0]} and {met[1]}, {left} parts were swept"
    )


# ------------------------------------------------------------------------------------------------- readers and a writer


@pytest.mark.parametrize("loads", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_two_readers_and_a_writer(loads: int, tmp_path: Path) -> None:
    models = [of_one_value(1.0), of_one_value(2.0, 80)]
    folder = folder_.save(models[0], tmp_path / "model")

    def writing() -> None:
        while True:
            for model in models:
                folder_.save(model, folder)

    def reading() -> None:
        for _ in range(loads):
            assert value_of(folder_.load(folder)) in (1.0, 2.0)

    writer = forked(writing, tmp_path / "writer")
    readers = [forked(reading, tmp_path / f"reader{place}") for place in range(2)]
    codes = [code_of(one) for one in readers]
    os.kill(writer, signal.SIGKILL)
    assert code_of(writer) == -signal.SIGKILL, (tmp_path / "writer").read_text()
    said = [(tmp_path / f"reader{place}").read_text()[-500:] for place in range(2)]
    assert codes == [0, 0], said
    print(f"two readers of {loads} loads each and a writer: each load gave one of the two versions")


# ------------------------------------------------------------------------------------------------------------- compress


def compressed(workdir: Path, output: Path) -> None:
    """So wide that each step clearly pays, whatever a busy machine's clock says."""
    task = Classification(train="sklearn:digits", val="sklearn:digits", augment="none")
    torch.manual_seed(0)
    net = capture(demo.model(width=64), torch.zeros(2, 1, 8, 8))
    steps = [
        {"do": "prune", "macs": 0.6, "round_to": 16},
        {"do": "distill", "epochs": 1, "batch_size": 64, "lr": 0.02, "hard_weight": 1.0},
        {"do": "quantize", "images": 32},
    ]
    result = compress(
        net, task, budget=Budget(size=10**6), steps=steps, workdir=workdir, seed=3, corruptions=[], progress=False
    )
    result.save(output)


def hashes(output: Path) -> dict[str, str]:
    return {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in MODEL_FILES}


@pytest.mark.slow
def test_a_compress_killed_fifty_times_ends_with_the_same_bytes(tmp_path: Path) -> None:
    begin = time.monotonic()
    child = forked(lambda: compressed(tmp_path / "a.work", tmp_path / "a"), tmp_path / "said")
    assert code_of(child) == 0, (tmp_path / "said").read_text()[-2000:]
    whole, undisturbed = time.monotonic() - begin, hashes(tmp_path / "a")
    draw, kills, runs = random.Random(0), 0, 0
    while kills < 50 or runs == 0:
        workdir, output = tmp_path / f"{runs}.work", tmp_path / str(runs)
        child = forked(functools.partial(compressed, workdir, output), tmp_path / "said")
        end = time.monotonic() + draw.uniform(0.0, draw.choice((0.3, 1.1))) * whole  # early, and in the last steps
        code, _ = ended(child, STUCK if kills >= 50 else end - time.monotonic())
        assert code in (0, -signal.SIGKILL), (tmp_path / "said").read_text()[-2000:]
        kills += code != 0
        if output.exists():
            folder_.load(output)  # also one that was saved in the moment of the kill
        if code == 0:
            assert hashes(output) == undisturbed, f"run {runs} after {kills} kills"
            runs += 1
    print(f"{kills} kills of compress in {runs} runs: each ended with the bytes of the undisturbed one")


@pytest.mark.slow
def test_ten_at_once_are_the_same_and_in_one_folder_one_works(tmp_path: Path) -> None:
    apart = []
    for place in map(str, range(10)):
        work = functools.partial(compressed, tmp_path / f"{place}.work", tmp_path / place)
        apart.append(forked(work, tmp_path / f"{place}.said"))
    codes = [code_of(one) for one in apart]
    assert codes == [0] * 10, [(tmp_path / f"{place}.said").read_text()[-300:] for place in range(10)]
    assert len({tuple(hashes(tmp_path / str(place)).items()) for place in range(10)}) == 1

    given = ["compress", "rarefy.demo:model", "--data", "sklearn:digits", "-o", str(tmp_path / "one")]
    given += ["--step", "prune macs=0.3", "--step", "distill epochs=1"]
    together = [forked(lambda: main.run(given), tmp_path / f"{place}.told") for place in range(10)]
    codes = [code_of(one) for one in together]
    told = [(tmp_path / f"{place}.told").read_text() for place in range(10)]
    folder_.load(tmp_path / "one")
    assert sorted(codes) == [0] + [2] * 9, (codes, told)
    for code, text in zip(codes, told):
        lines = [line for line in text.splitlines() if line.startswith("rarefy: ")]
        assert code == 0 or (len(lines) == 1 and "another run works there (process" in lines[0]), text
    print("ten runs of compress at once: the same bytes; in one folder one worked, nine were told who does")
