"""Is another version of the code as fast? CPU seconds and peak memory of two trees, taking turns, each run a process of
its own.

    python bench/not_slower.py BEFORE AFTER [--check]                two checkouts, run by this Python and its packages
    python bench/not_slower.py BEFORE AFTER --only import --only prune --repeats 0.4

What is run: ``rarefy --help``; ``import rarefy``, and of all its names; ``rarefy list``; ``rarefy demo``; ``quantize``
of EfficientNet-Lite0 (timm's, random weights, 64 random images of 224 pixels in batches of 16); ``prune`` of
torchvision's ResNet-50 to half of its MACs, with the self-check; ``compress`` of the demo's network (pruned, distilled,
quantised); a training of that network on scikit-learn's digits. Where a figure is "of the verb", imports and building
the network are not in it. Seconds are of the processor, user and system, which neighbours on the machine disturb less
than the clock; memory is the most that was resident (``wait4``). Which tree goes first alternates; both are compiled to
bytecode before, and the short runs begin with an uncounted one of each. What counts is the median of the ratios within
a turn, after over before (images a second: before over after), so that above 1 is worse; its interval is median -+ 1.57
(high - low) / sqrt(n) of the quartiles (McGill, Tukey and Larsen 1978).

``--check`` exits 1 where a ratio is above 1.03, or a run failed. Run it on a machine that has nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST = 1.03
THREADS = "1"
ALL_NAMES = "import rarefy\nfor name in rarefy.__all__: getattr(rarefy, name)\nimport rarefy.tasks"

# A program says what it found as one line of JSON, the last it prints; `spent` is of the processor.
_HEAD = """
import importlib, json, sys, time
import numpy as np, torch
import rarefy
from rarefy.tasks import Classification
train = getattr(rarefy, "train", None) or importlib.import_module("rarefy.distilling").train
from rarefy.demo import model as demo_model
torch.manual_seed(0)
def told(begun, **more):
    spent = time.process_time() - begun
    print(json.dumps({"verb_cpu_s": spent, **more}))
    return spent
def digits():
    return Classification(train="sklearn:digits", val="sklearn:digits", augment="crop=1")
"""
_QUANTIZE = """
import timm
graph = rarefy.capture(timm.create_model("tf_efficientnet_lite0", pretrained=False).eval(), torch.zeros(1, 3, 224, 224))
batches = list(torch.randn(64, 3, 224, 224).split(16))
begun = time.process_time()
rarefy.quantize(graph, batches=batches, progress=False)
told(begun)
"""
_PRUNE = """
import torchvision
graph = rarefy.capture(torchvision.models.resnet50(weights=None).eval(), torch.zeros(1, 3, 224, 224))
begun = time.process_time()
for _ in range(3):
    rarefy.prune(graph, macs=0.5)
told(begun)
"""
_COMPRESS = """
import sys
distil = {"do": "distill", "epochs": 1, "batch_size": 64, "lr": 0.05}
steps = [{"do": "prune", "macs": 0.35, "round_to": 8}, distil, {"do": "quantize"}]
graph = rarefy.capture(demo_model(), torch.zeros(2, 1, 8, 8))
begun = time.process_time()
budget = rarefy.Budget(max_drop=0.9)
rarefy.compress(graph, digits(), budget=budget, steps=steps, workdir=sys.argv[1], device="cpu", progress=False)
told(begun)
"""
_TRAIN = """
graph, task = rarefy.capture(demo_model(width=16), torch.zeros(2, 1, 8, 8)), digits()
options = {"batch_size": 64, "lr": 0.05, "validate_every": 0, "device": "cpu", "progress": False}
train(graph, task, steps=5, **options)
begun = time.process_time()
train(graph, task, steps=300, **options)
spent = time.process_time() - begun
print(json.dumps({"images_per_cpu_s": 300 * 64 / spent}))
"""


@dataclass(frozen=True)
class Run:
    """``arguments``: of Python; "{work}" is a fresh folder. ``figures``: what is compared of it. ``repeats``: turns,
    where nobody says."""

    arguments: tuple[str, ...]
    figures: tuple[str, ...] = ("cpu_s", "peak_mb")
    repeats: int = 9

    @property
    def short(self) -> bool:
        return self.repeats > 10


VERB = ("verb_cpu_s", "cpu_s", "peak_mb")
RUNS = {
    "help": Run(("-m", "rarefy", "--help"), repeats=31),
    "import": Run(("-c", "import rarefy"), repeats=31),
    "import of all names": Run(("-c", ALL_NAMES), repeats=11),
    "list": Run(("-m", "rarefy", "list"), repeats=11),
    "prune resnet50": Run(("-c", _HEAD + _PRUNE), VERB),
    "training": Run(("-c", _HEAD + _TRAIN), ("images_per_cpu_s", "cpu_s", "peak_mb")),
    "quantize efficientnet_lite0": Run(("-c", _HEAD + _QUANTIZE), VERB, 7),
    "compress demo": Run(("-c", _HEAD + _COMPRESS, "{work}/run"), VERB, 5),
    "demo": Run(("-m", "rarefy", "demo", "-o", "{work}/demo"), repeats=3),
}
BETTER_IF_MORE = ("images_per_cpu_s",)


def once(run: Run, tree: Path) -> dict[str, float]:
    """Figures of one process. Raises RuntimeError where it fails."""
    with tempfile.TemporaryDirectory(prefix="rarefy-bench-") as work:
        arguments = [argument.replace("{work}", work) for argument in run.arguments]
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), THREADS)
        environment = {
            **os.environ,
            **limits,
            "PYTHONPATH": str(tree),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONHASHSEED": "0",
        }
        with open(Path(work) / "out", "w+") as out, open(Path(work) / "err", "w+") as err:
            begun = time.perf_counter()
            process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=err, cwd=work, env=environment)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            wall = time.perf_counter() - begun
            for file in (out, err):
                file.seek(0)
            last = (out.read().strip().splitlines() or [""])[-1]
            if process.returncode not in (0, 1) or (
                process.returncode and "demo" not in arguments
            ):  # the demo's goals may be missed
                raise RuntimeError(f"exit {process.returncode}: {err.read().strip().splitlines()[-1:]}")
    found = json.loads(last) if run.figures[0] not in ("cpu_s",) else {}
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return {**found, "cpu_s": used.ru_utime + used.ru_stime, "wall_s": wall, "peak_mb": used.ru_maxrss / unit}


def imported(tree: Path) -> Path:
    """Where ``rarefy`` is from, so run."""
    program = "import rarefy, pathlib; print(pathlib.Path(rarefy.__file__).resolve().parents[1])"
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, cwd=elsewhere
        )
    return Path(done.stdout.strip())


def summary(ratios: Sequence[float]) -> dict[str, Any]:
    """Median of the ratios, quartiles, and the interval of the median."""
    low, middle, high = (
        (*statistics.quantiles(ratios, n=4, method="inclusive"),) if len(ratios) > 1 else (ratios[0],) * 3
    )
    half = 1.57 * (high - low) / math.sqrt(len(ratios))
    return {
        "median": middle,
        "low": low,
        "high": high,
        "interval": [middle - half, middle + half],
        "turns": len(ratios),
    }


def compared(name: str, run: Run, trees: tuple[Path, Path], turns: int) -> dict[str, dict[str, Any]]:
    for tree in trees if run.short else ():  # what these read is in the disk's cache then
        once(run, tree)
    found: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for turn in range(turns):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):  # so that neither is always the first
            found[side].append(once(run, trees[side]))
        one, other = found[0][-1], found[1][-1]
        said = ", ".join(f"{figure} {one[figure]:.4g} {other[figure]:.4g}" for figure in run.figures)
        print(f"{turn + 1}/{turns} {name}: {said}", file=sys.stderr, flush=True)
    facts = {}
    for figure in run.figures:
        pairs = [(one[figure], other[figure]) for one, other in zip(*found, strict=True)]
        ratios = [before / after if figure in BETTER_IF_MORE else after / before for before, after in pairs]
        before, after = (statistics.median(values) for values in zip(*pairs, strict=True))
        facts[figure] = {"before": before, "after": after, **summary(ratios)}
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="runs whose names begin so; may be repeated"
    )
    parser.add_argument(
        "--repeats", type=float, default=1.0, metavar="TIMES", help="so many times the usual number of turns"
    )
    parser.add_argument("--turns", type=int, metavar="N", help="of every run, in place of the usual number")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    trees = (given.before.resolve(), given.after.resolve())
    for tree in trees:
        if imported(tree) != tree:
            parser.error(f"{tree}: holds no package rarefy: with it in front, rarefy comes from {imported(tree)}")
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(tree / "rarefy")], check=False)
    chosen = {
        name: run for name, run in RUNS.items() if not given.only or any(name.startswith(word) for word in given.only)
    }
    if not chosen:
        parser.error(f"--only: have {', '.join(RUNS)}")
    facts: dict[str, Any] = {}
    short = []
    begun = time.perf_counter()
    for name, run in chosen.items():
        try:
            facts[name] = compared(name, run, trees, given.turns or max(1, round(run.repeats * given.repeats)))
        except (RuntimeError, ValueError) as error:
            facts[name] = {"failed": str(error)}
            short.append(f"{name}: {error}")
            print(f"{name}: failed: {error}", file=sys.stderr, flush=True)
            continue
        for figure, one in facts[name].items():
            if one["median"] > MOST:
                short.append(f"{name}: {figure} is {one['median']:.3f} of what it was, more than {MOST}")
    rows = [("what", "figure", "before", "after", "ratio", "interval", "turns")]
    for name, figures in facts.items():
        if "failed" in figures:
            rows.append((name, "failed", "", "", "", "", ""))
            continue
        for figure, one in figures.items():
            low, high = one["interval"]
            numbers = (
                f"{one['before']:.4g}",
                f"{one['after']:.4g}",
                f"{one['median']:.3f}",
                f"{low:.3f} to {high:.3f}",
            )
            rows.append((name, figure, *numbers, str(one["turns"])))
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if not number:
            print("  ".join("-" * width for width in widths))
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("torch", "onnxruntime")}
    how = {"most": MOST, "threads": int(THREADS), "seconds": round(time.perf_counter() - begun), "versions": versions}
    print(json.dumps({"bench": "not_slower", "found": facts, **how}))
    for one in short:
        print(f"falls short: {one}", file=sys.stderr)
    return 1 if given.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
