"""Joint against sequential at equal steps: ResNet-20 and ResNet-56 on CIFAR-10, 2x and 4x fewer MACs, 8-bit and 4-bit
weights (activations in 8 bits).

    python bench/joint.py                                     a short one on a CPU, ResNet-20: minutes
    python bench/joint.py --device cuda --models resnet20 resnet56 --work out/joint

    joint        ``prune --schedule joint``: one training, whose last fifth is in codes
    fading       the same, and in the first fifth the channels that are to go fade; these steps run on the whole network
    sequential   prune; distil the float student for half of the steps; quantise; train its codes for the other half
    ptq          prune; distil for all of the steps; quantise without training

All see the same number of steps of the same batches, taught by the original with the same loss; steps in codes take
longer than those in float, and the table says how long all of it took. Top-1 is that of the quantised graph on all test
images, at which nothing in training looks. A cell that was finished (``--work``) is not run again, and one that was
killed goes on.

``--check`` exits 1 where joint is more than a point below sequential on average.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import real_data
from rarefy import capture, distill, evaluate, prune, quantize
from rarefy.cli.terminal import show_table
from rarefy.distillation.qat import CLIP, FREEZE
from rarefy.errors import DataError
from rarefy.graph.macs import count_macs
from rarefy.tasks.classification import Classification

DATA = "bench.real_data:cifar10"
WAYS = ("joint", "fading", "sequential", "ptq")
IMAGES = 128


def made(
    way: str,
    original: fx.GraphModule,
    task: Classification,
    share: float,
    weights: str,
    seed: int,
    given: argparse.Namespace,
) -> fx.GraphModule:
    place = given.work / "training" / f"{given.model}-{share:g}-{weights}-{way}-{seed}" if given.work else None
    common: dict[str, Any] = {"device": given.device, "checkpoint": place, "progress": False, "seed": seed}
    pruning: dict[str, Any] = {"macs": share, "round_to": 1, "task": task, "seed": seed}
    if way in ("joint", "fading"):
        shrink = 0.2 if way == "fading" else 0.0
        schedule = (
            f"joint:shrink={shrink},steps={given.steps},batch_size={given.batch_size},lr={given.lr},"
            f"code_lr={given.code_lr},weights={weights},images={IMAGES}"
        )
        return prune(
            original, schedule=schedule, **pruning, **{key: common[key] for key in ("device", "checkpoint", "progress")}
        )
    small = prune(original, **pruning)
    steps = given.steps if way == "ptq" else given.steps // 2
    training: dict[str, Any] = {"batch_size": given.batch_size, "validate_every": 0}
    taught = distill(
        small,
        original,
        task,
        steps=steps,
        lr=given.lr,
        **training,
        **{**common, "checkpoint": place and place / "float"},
    )
    coded = quantize(taught, task, images=IMAGES, weights=weights, seed=seed, progress=False)
    if way == "ptq":
        return coded
    rest = given.steps - steps
    codes: dict[str, Any] = {"steps": rest, "lr": given.code_lr, "clip": CLIP, "freeze": FREEZE, "live_norm": "yes"}
    return distill(coded, original, task, **codes, **training, **{**common, "checkpoint": place and place / "codes"})


def cell(
    way: str,
    original: fx.GraphModule,
    task: Classification,
    share: float,
    weights: str,
    seed: int,
    given: argparse.Namespace,
) -> dict[str, Any]:
    """One figure of the table, from the folder if it lies there."""
    about = {
        "model": given.model,
        "macs": share,
        "weights": weights,
        "way": way,
        "seed": seed,
        "steps": given.steps,
        "batch_size": given.batch_size,
        "lr": given.lr,
        "code_lr": given.code_lr,
        "limit": given.limit,
    }
    file = given.work / f"{given.model}-{share:g}-{weights}-{way}-{seed}.json" if given.work else None
    if file is not None and file.exists() and (known := json.loads(file.read_text()))["about"] == about:
        return dict(known)
    began = time.perf_counter()
    small = made(way, original, task, share, weights, seed, given)
    seconds = time.perf_counter() - began
    found = evaluate(small, task, batch_size=500, limit=given.limit, device=given.device).to_json()
    result = {
        "about": about,
        "top1": found["value"],
        "interval": found["interval"],
        "samples": found["samples"],
        "seconds": seconds,
        "reached": count_macs(small) / count_macs(original),
    }
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(result))
        partial.rename(file)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=("resnet20", "resnet56"), default=["resnet20"])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--weights", nargs="+", default=["int8", "int4"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of each cell; default 300 on a CPU, 4,000 on a GPU")
    parser.add_argument("--batch-size", type=int, help="default 64 on a CPU, 256 on a GPU")
    parser.add_argument("--lr", type=float, default=0.05, help="of the float training")
    parser.add_argument("--code-lr", type=float, default=0.03, help="of training codes")
    parser.add_argument("--limit", type=int, help="so many test images only")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="finished cells and checkpoints")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    small = torch.device(given.device).type == "cpu"
    given.steps = given.steps or (300 if small else 4000)
    given.batch_size = given.batch_size or (64 if small else 256)
    task = Classification(train=DATA, val=DATA, augment="crop=4,flip")
    cells: list[dict[str, Any]] = []
    for model in given.models:
        given.model = model
        try:
            original = capture(getattr(real_data, model)(), torch.zeros(2, 3, 32, 32))
            task.length("val")
        except DataError as error:
            print(f"skipped: {error}", file=sys.stderr)
            return 2 if given.check else 0
        for share in given.macs:
            for weights in given.weights:
                for way in given.ways:
                    for seed in given.seeds:
                        one = cell(way, original, task, share, weights, seed, given)
                        print(
                            f"{given.model} {share:g} {weights} {way} seed {seed}: {one['top1']:.2%}, "
                            f"{one['seconds']:.0f} s",
                            file=sys.stderr,
                            flush=True,
                        )
                        cells.append(one)

    def of(**wanted: Any) -> list[dict[str, Any]]:
        return [one for one in cells if all(one["about"][key] == value for key, value in wanted.items())]

    rows, gaps = [], []
    for model in given.models:
        for share in given.macs:
            for weights in given.weights:
                found = {way: of(model=model, macs=share, weights=weights, way=way) for way in given.ways}
                mean = {way: 100 * statistics.mean(one["top1"] for one in found[way]) for way in given.ways}
                rows.append(
                    (
                        model,
                        f"{share:g}",
                        weights,
                        *(
                            f"{mean[way]:.2f} ({statistics.mean(one['seconds'] for one in found[way]):.0f} s)"
                            for way in given.ways
                        ),
                    )
                )
                if {"joint", "sequential"} <= mean.keys():
                    gaps.append(mean["joint"] - mean["sequential"])
    show_table(
        f"top-1, %, {given.steps} steps of {given.batch_size}, {len(given.seeds)} seed(s)",
        ("model", "MACs", "weights", *given.ways),
        rows,
    )
    difference = statistics.mean(gaps) if gaps else None
    print(
        json.dumps(
            {
                "bench": "joint",
                "torch": torch.__version__,
                "device": given.device,
                "joint_minus_sequential": difference,
                "cells": cells,
            }
        )
    )
    if difference is not None and difference < -1:
        print(f"falls short: joint is {-difference:.2f} points below sequential on average", file=sys.stderr)
        return 1 if given.check else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
