"""ResNet-20 on CIFAR-10, from real weights (91.73 %): what masks cost without training, and what schedules give for the
same training.

    python bench/schedules_cifar10.py [--images 5120] [--epochs 6] [--test 2000] [--check]

Masks: top-1 and size of ``weights.safetensors``, dense, at 50 %, 2:4 and 4:8, by magnitude and by Wanda (arXiv
2306.11695), nothing trained afterwards; and 2:4 trained for one epoch. Schedules: pruned to half of the MACs, and as
many epochs of distillation from the original in all, whether before, between or behind the prunings. Few
images and epochs: the order of the schedules is that of a short budget. Drops are paired, on the same test images.

``--check`` exits 1 where a mask has another number of zeros than asked, is not smaller on disk by what its zeros save,
or loses a zero in training; or where a schedule misses its target. It exits 2 where there is no data. Without
``--check``, missing data is a skip.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import real_data
from rarefy import capture, evaluate, mask, prune
from rarefy.cli.terminal import show_table
from rarefy.distillation.distill import distill
from rarefy.errors import DataError
from rarefy.evaluation.measure import weight_bytes
from rarefy.graph.macs import count_macs
from rarefy.tasks.classification import Classification

MACS = 0.5
BATCH, LR = 128, 0.02


def row(
    name: str, graph: fx.GraphModule, original: fx.GraphModule, task: Classification, test: int, **more: Any
) -> dict[str, Any]:
    found = evaluate(graph, task, reference=original, batch_size=200, limit=test, progress=False)
    drop = found.drop or {"value": 0.0, "interval": [0.0, 0.0]}
    return {"name": name, "top1": found.value, "drop": drop["value"], "drop_interval": drop["interval"], **more}


def zeros(graph: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {name: graph.get_parameter(name).detach() == 0 for name in graph.meta["sparse"]}


def masks(original: fx.GraphModule, task: Classification, test: int) -> tuple[list[dict[str, Any]], list[str]]:
    dense = weight_bytes(original)
    rows, short = [row("dense", original, original, task, test, bytes=dense, sparsity=0.0)], []
    for sparsity in ("0.5", "2:4", "4:8"):
        for criterion in ("magnitude", "wanda"):
            name = f"{sparsity} {criterion}"
            sparse = mask(original, sparsity=sparsity, criterion=criterion, task=task)
            facts = sparse.meta["history"][-1]["facts"]
            gone = facts["weights"] - facts["nonzero"]
            size = weight_bytes(sparse)
            rows.append(row(name, sparse, original, task, test, bytes=size, sparsity=facts["sparsity"]))
            if abs(facts["sparsity"] - 0.5) > 0.005:
                short.append(f"{name}: {facts['sparsity']:.4f} of the weights are zero, asked for 0.5")
            saved = 4 * gone - facts["weights"] / 8  # four bytes a zero, but for the bit of each weight
            if dense - size < 0.98 * saved:
                short.append(f"{name}: {dense - size} bytes smaller, its zeros save {saved:.0f}")
    trained = distill(sparse, original, task, epochs=1, batch_size=BATCH, lr=LR, validate_every=0)
    rows.append(
        row(
            f"{name}, one epoch", trained, original, task, test, bytes=weight_bytes(trained), sparsity=facts["sparsity"]
        )
    )
    if any(not torch.equal(now, zeros(sparse)[name]) for name, now in zeros(trained).items()):
        short.append("training moved a zero")
    return rows, short


def schedules(
    original: fx.GraphModule, task: Classification, test: int, epochs: int
) -> tuple[list[dict[str, Any]], list[str]]:
    half = max(epochs // 2, 1)
    options = f"batch_size={BATCH},lr={LR}"
    settings = {
        "oneshot": epochs,
        f"iterative:rounds={half + 1},epochs=1,{options}": epochs - half,
        f"group_sparse:epochs={half},reg=0.002,loss=lskd,{options}": epochs - half,
    }
    rows, short = [], []
    for schedule, left in settings.items():
        begun = time.monotonic()
        small = prune(original, macs=MACS, schedule=schedule, task=task)
        before = row(schedule, small, original, task, test)
        small = distill(small, original, task, epochs=left, batch_size=BATCH, lr=LR, validate_every=0)
        share = count_macs(small) / count_macs(original)
        rows.append(
            row(
                schedule,
                small,
                original,
                task,
                test,
                before=before["top1"],
                macs=share,
                seconds=time.monotonic() - begun,
            )
        )
        if share > MACS:
            short.append(f"{schedule}: {share:.3f} of the MACs are left, asked for {MACS}")
    return rows, short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=5120)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    try:
        images, labels = real_data.cifar10("train")
        model = real_data.resnet20()
    except DataError as error:
        print(f"skipped: {error}")
        return 2 if given.check else 0
    constants = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    task = Classification(
        train=(images[: given.images], labels[: given.images]),
        val="bench.real_data:cifar10",
        augment="crop=4,flip",
        **constants,
    )
    original = capture(model, torch.zeros(2, 3, 32, 32))
    masked, short = masks(original, task, given.test)
    show_table(
        f"masks, {given.test} test images",
        ("mask", "top-1", "points lost (95 %)", "zeros", "kB on disk"),
        [
            (one["name"], f"{one['top1']:.2%}", _points(one), f"{one['sparsity']:.2%}", f"{one['bytes'] / 1000:.0f}")
            for one in masked
        ],
    )
    pruned, missed = schedules(original, task, given.test, given.epochs)
    show_table(
        f"schedules, {MACS:g} of the MACs, {given.epochs} epochs of {given.images} images in all",
        ("schedule", "top-1 once pruned", "top-1 in the end", "points lost (95 %)", "MACs", "seconds"),
        [
            (
                one["name"],
                f"{one['before']:.2%}",
                f"{one['top1']:.2%}",
                _points(one),
                f"{one['macs']:.3f}",
                f"{one['seconds']:.0f}",
            )
            for one in pruned
        ],
    )
    short += missed
    print(json.dumps({"masks": masked, "schedules": pruned, "short": short}))
    for line in short:
        print(f"falls short: {line}", file=sys.stderr)
    return 1 if given.check and short else 0


def _points(one: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in one["drop_interval"])
    return f"{100 * one['drop']:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
