"""Which distillation loss helps how much: ResNet-56 (real weights, 93.39 %) teaches ResNet-20 from scratch on CIFAR-10,
one schedule for all.

    python bench/distillation_losses.py --device cuda [--jobs 4] [--check]      the table, on a GPU
    python bench/distillation_losses.py --epochs 1 --train-images 5000 --test-images 1000 --seeds 0 --losses none kl
    a trial on a CPU

A cell is a loss and a seed; the seed is that of the initial weights, of the order and of the augmentation, so cells of
one seed are paired. ``none`` learns from labels alone; every other cell adds its loss to the same cross-entropy. The
last state counts, on all 10,000 test images, which nothing in training looks at.

Finished cells lie in ``--work`` and are not run again; one that was killed goes on where it was. ``--jobs`` cells run
at a time, each in a process of its own: one compiles while another computes. ``--check`` exits 1 where the best loss
    gains less than 0.7 points, or fewer than two seeds were asked for; 2 where there is no data.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import real_data
from bench.cells import in_processes
from rarefy import capture, evaluate
from rarefy.cli.terminal import show_table
from rarefy.distillation.distill import distill, train
from rarefy.errors import DataError, RarefyError
from rarefy.tasks.classification import Classification

EXAMPLE = torch.zeros(2, 3, 32, 32)
LEAST_GAIN = 0.7  # points
# Weights of the losses on features bring them to the size of the cross-entropy; those on logits have their papers'
# inside.
LOSSES = (
    "none",
    "kl",
    "lskd",
    "dkd",
    "dist",
    "mlkd",
    "skd",
    "mse:on=logits",
    "50*mse",
    "10*wkd",
    "10*at",
    "rkd",
    "reviewkd",
    "lskd + 50*mse",
)


class Cell(NamedTuple):
    loss: str
    seed: int


class Setting(NamedTuple):
    """What all cells share. Its fields but the last three are what a result depends on."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    mixup: float
    loss_warmup: float
    train_images: int
    test_images: int
    student: int
    teacher: int
    precision: str
    compile: str
    device: str
    work: str

    def folder(self, cell: Cell) -> Path:
        told = json.dumps([cell, self[:-3]], sort_keys=True)
        return (
            Path(self.work) / f"{cell.loss.split(':')[0].replace('*', 'x').replace(' ', '')}-{cell.seed}-"
            f"{hashlib.sha256(told.encode()).hexdigest()[:8]}"
        )


# ------------------------------------------------------------------------------------------------------------- one cell


def run(cell: Cell, setting: Setting) -> dict[str, Any]:
    """Train and judge. Its result is a file, so that it is not run again."""
    folder = setting.folder(cell)
    done = folder / "result.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    task, began = task_of(setting), time.perf_counter()
    torch.manual_seed(cell.seed)
    student = capture(real_data.CifarResNet(setting.student).eval(), EXAMPLE)
    common: dict[str, Any] = {
        "epochs": setting.epochs,
        "batch_size": setting.batch_size,
        "lr": setting.lr,
        "weight_decay": setting.weight_decay,
        "mixup": setting.mixup,
        "loss_warmup": setting.loss_warmup if cell.loss != "none" else 0.0,
        "precision": setting.precision,
        "validate_every": 0,
        "seed": cell.seed,
        "device": setting.device,
        "checkpoint": folder,
        "progress": False,
    }
    learn = functools.partial(train, student, task) if cell.loss == "none" else functools.partial(
        distill, student, teacher_of(setting.teacher), task, loss=cell.loss
    )  # fmt: skip
    compiled: str | None = None
    try:
        trained = learn(**common, compile=setting.compile)
    except RuntimeError as error:  # what a compiler or a CUDA graph can't do
        if setting.compile == "no" or isinstance(error, RarefyError):
            raise
        compiled = f"not compiled: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        trained = learn(**{**common, "checkpoint": folder / "eager"}, compile="no")
    finally:
        torch.compiler.reset()
    facts = trained.meta["history"][-1]["facts"]
    found = {
        "loss": cell.loss,
        "seed": cell.seed,
        **evaluate(trained, task, batch_size=1000, device=setting.device).to_json(),
        "images_per_second": facts["timing"]["images_per_second"],
        "data_share": facts["timing"]["data_share"],
        "training_seconds": facts["timing"]["seconds"],
        "seconds": time.perf_counter() - began,
        "training_loss": facts["curve"][-1]["loss"],
        "remark": compiled,
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = done.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    os.replace(temporary, done)
    return found


@functools.cache
def teacher_of(depth: int) -> fx.GraphModule:
    return capture(real_data.resnet_cifar(depth), EXAMPLE)


@functools.cache
def task_of(setting: Setting) -> Classification:
    arrays = load_file(unpacked(setting.work))
    parts = {
        "train": (arrays["train"][: setting.train_images], arrays["train_labels"][: setting.train_images]),
        "val": (arrays["val"][: setting.test_images], arrays["val_labels"][: setting.test_images]),
    }
    return Classification(train=parts["train"], val=parts["val"], augment="crop=4,flip")


def unpacked(work: str) -> Path:
    """CIFAR-10 decoded once, for all processes. Raises DataError."""
    file = Path(work) / "cifar10.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {}
        for split in ("train", "val"):
            images, labels = real_data.cifar10(split)
            arrays |= {split: torch.from_numpy(images), f"{split}_labels": torch.from_numpy(labels)}
        temporary = file.with_suffix(f".{os.getpid()}")
        save_file(arrays, temporary)
        os.replace(temporary, file)
    return file


def attempted(cell: Cell, setting: Setting) -> dict[str, Any]:
    """A cell that fails takes no other with it."""
    try:
        return run(cell, setting)
    except Exception as error:
        return {
            "loss": cell.loss,
            "seed": cell.seed,
            "failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}",
        }


# ------------------------------------------------------------------------------------------------------------ the table


def results(cells: list[Cell], setting: Setting, jobs: int) -> Iterator[dict[str, Any]]:
    return in_processes(functools.partial(attempted, setting=setting), cells, jobs)


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a loss, best first: mean top-1, and the mean gain over ``none`` on the same seeds, in points."""
    by_loss: dict[str, dict[int, dict[str, Any]]] = {}
    for one in found:
        if "failed" not in one:
            by_loss.setdefault(one["loss"], {})[one["seed"]] = one
    plain = by_loss.get("none", {})
    rows = []
    for loss, seeds in by_loss.items():
        gains = [100 * (one["value"] - plain[seed]["value"]) for seed, one in seeds.items() if seed in plain]
        rows.append(
            {
                "loss": loss,
                "top1": {seed: one["value"] for seed, one in sorted(seeds.items())},
                "mean": statistics.mean(one["value"] for one in seeds.values()),
                "gain": statistics.mean(gains) if gains else None,
                "gains": gains,
                "images_per_second": statistics.median(one["images_per_second"] for one in seeds.values()),
                "training_seconds": sum(one["training_seconds"] for one in seeds.values()),
                "remarks": sorted({one["remark"] for one in seeds.values() if one["remark"]}),
            }
        )
    return sorted(rows, key=lambda row: -row["mean"])


def shown(rows: list[dict[str, Any]], setting: Setting) -> None:
    table = [
        (row["loss"], f"{100 * row['mean']:.2f}", ", ".join(f"{100 * value:.2f}" for value in row["top1"].values()),
         "" if row["gain"] is None else f"{row['gain']:+.2f}", f"{row['images_per_second']:,.0f}")
        for row in rows
    ]  # fmt: skip
    title = (
        f"ResNet-{setting.teacher} teaches ResNet-{setting.student}, CIFAR-10, {setting.epochs} epochs of "
        f"{setting.train_images:,} images, {setting.test_images:,} test images"
    )
    show_table(title, ["loss", "top-1, %", "by seed", "over none, points", "images/s"], table)


def told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--device", choices=("cpu", "cuda"), default="cpu")
    option("--losses", nargs="+", default=list(LOSSES), metavar="TEXT", help="none, kl, 'lskd + 50*mse', ...")
    option("--seeds", type=int, nargs="+", default=[0, 1])
    option("--epochs", type=int, default=20)
    option("--batch-size", type=int, default=512)
    option("--lr", type=float, default=0.2)
    option("--weight-decay", type=float, default=5e-4)
    option("--mixup", type=float, default=0.0)
    option(
        "--loss-warmup", type=float, default=0.0, metavar="SHARE", help="of the steps, in which the loss's weight rises"
    )
    option("--student", type=int, choices=real_data.DEPTHS, default=20, help="its depth")
    option("--teacher", type=int, choices=real_data.DEPTHS, default=56, help="its depth")
    option("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    option("--compile", choices=("no", "default", "reduce-overhead"), help="default: reduce-overhead on a GPU, else no")
    option("--train-images", type=int, default=50_000)
    option("--test-images", type=int, default=10_000)
    option("--jobs", type=int, default=1, metavar="N", help="so many cells at a time")
    option("--work", type=Path, default=Path("out/distillation_losses"), metavar="FOLDER")
    option("--out", type=Path, metavar="FILE", help="write the JSON there too")
    option("--check", action="store_true")
    given = parser.parse_args()
    if given.compile is None:
        given.compile = "reduce-overhead" if given.device == "cuda" else "no"
    return given


def main() -> int:
    given, began = arguments(), time.perf_counter()
    setting = Setting(
        **{name: getattr(given, name) for name in Setting._fields if name != "work"}, work=str(given.work)
    )
    try:
        unpacked(setting.work)
        real_data.resnet_cifar(setting.teacher)
    except DataError as error:
        told(f"skipped: {error}")
        return 2 if given.check else 0
    cells = [Cell(loss, seed) for seed in given.seeds for loss in given.losses]
    found = []
    for one in results(cells, setting, given.jobs):
        found.append(one)
        said = one.get("failed") or f"{one['value']:.2%}, {one['images_per_second']:,.0f} images/s" + (
            f" ({one['remark']})" if one["remark"] else ""
        )
        told(
            f"{len(found)}/{len(cells)} after {time.perf_counter() - began:.0f} s: {one['loss']}, seed {one['seed']}: "
            f"{said}"
        )
    rows = summary(found)
    shown(rows, setting)
    gains = {row["loss"]: row["gain"] for row in rows if row["gain"] is not None and row["loss"] != "none"}
    best = max(gains, key=lambda loss: gains[loss]) if gains else None
    line = json.dumps(
        {
            "bench": "distillation_losses",
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
            "setting": setting._asdict(),
            "seeds": given.seeds,
            "best": best,
            "best_gain": None if best is None else gains[best],
            "no_help": sorted(loss for loss, gain in gains.items() if gain <= 0),
            "rows": rows,
            "failed": [one for one in found if "failed" in one],
            "seconds": time.perf_counter() - began,
        }
    )
    print(line)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(line + "\n")
    short = []
    if best is None or gains[best] < LEAST_GAIN:
        short.append(
            f"the best loss ({best}) gains {gains[best] if best else 0:.2f} points over none, {LEAST_GAIN} are wanted"
        )
    if len(given.seeds) < 2:
        short.append("one seed; at least 2 are wanted")
    short += [f"{one['loss']}, seed {one['seed']} failed: {one['failed']}" for one in found if "failed" in one]
    for one in short:
        told(f"falls short: {one}")
    return 1 if given.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
