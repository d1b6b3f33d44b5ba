"""ResNet-56 on CIFAR-10, from real weights (93.39 %) to an int8 file: pruned, distilled from itself, quantised,
exported, timed.

    python bench/resnet56_cifar10.py [--check]                  short training on a CPU
    python bench/resnet56_cifar10.py --device cuda [--check]    long training on a GPU
    python bench/resnet56_cifar10.py --device cuda --stop-after-training --save out/student     ... there, and then on
    the machine that matters:
    python bench/resnet56_cifar10.py --load out/student [--check --goals cuda]

Top-1 is that of the int8 ONNX file in ONNX Runtime on all 10,000 test images, which nothing in training or calibration
looks at: the last state is kept, not the best.
Speed is float original against int8 result in ONNX Runtime, batch 1, taking turns in one run. Size is
``weights.safetensors`` of the one and of the other.

``--check`` exits 1 where a seed falls short of its goals (below; the speed is that with 1 thread; ``--top1`` and
``--fewer-macs`` set others, and are then compared with the mean over the seeds), 2 where there is no data. Without
``--check``, missing data is a skip.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import real_data
from rarefy import capture, evaluate, load, prune, save
from rarefy.cli.terminal import show_table, size_text
from rarefy.distillation.distill import distill
from rarefy.errors import DataError
from rarefy.graph.macs import count_macs, count_parameters
from rarefy.tasks.classification import Classification

DATA = "bench.real_data:cifar10"
CALIBRATION_IMAGES = 128
PARITY_IMAGES = 256
THREADS = (1, 2)
MINUTES = 30


class Mode(NamedTuple):
    """Defaults of a device, and its goals: least top-1 of the int8 file, and how many times fewer MACs, faster, smaller
    than the float original."""

    macs: float
    steps: int
    lr: float
    precision: str
    compile: str
    batch_size: int
    top1: float
    fewer_macs: float
    faster: float | None
    smaller: float | None
    minutes: float | None


EPOCH = 50_000 // 128
# What the additions join, 16, 32 and 64 channels wide: whole, the option-A shortcuts stay exact and integer kernels
# keep full tiles.
STREAM = ("conv1", "layer*.conv2")
MODES = {
    "cpu": Mode(0.476, 2 * EPOCH, 0.03, "bf16", "no", 128, 0.915, 2.0, 3.0, 7.0, MINUTES),
    "cuda": Mode(0.476, 106 * EPOCH, 0.1, "auto", "reduce-overhead", 128, 0.934, 2.1, None, None, None),
}


def trained(original: fx.GraphModule, task: Classification, given: argparse.Namespace, seed: int) -> fx.GraphModule:
    """The float student: pruned, then taught by the original (and by the others of its family that were asked for)."""
    others = [capture(real_data.resnet_cifar(depth), torch.zeros(2, 3, 32, 32)) for depth in given.also_taught_by]
    start = load(given.prune_from / f"seed{seed}") if given.prune_from else original
    share = given.macs * count_macs(original) / count_macs(start)
    small = prune(
        start,
        macs=share,
        criterion=given.criterion,
        ranking=given.ranking,
        round_to=given.round_to,
        ignore=given.ignore,
        task=task,
        seed=seed,
    )
    told(
        f"pruned to {count_macs(small) / count_macs(original):.1%} of the MACs, "
        f"{count_parameters(small) / count_parameters(original):.1%} of the parameters"
    )
    checkpoint = given.work / f"seed{seed}" if given.work else None
    return distill(
        small,
        [original, *others] if others else original,
        task,
        loss=given.loss,
        hard_weight=given.hard_weight,
        device=given.device,
        checkpoint=checkpoint,
        steps=given.steps,
        lr=given.lr,
        optimizer="sgd",
        batch_size=given.batch_size,
        weight_decay=given.weight_decay,
        ema=given.ema,
        mixup=given.mixup,
        cutmix=given.cutmix,
        precision=given.precision,
        compile=given.compile,
        validate_every=given.validate_every,
        keep="last",
        seed=seed,
    )


def judged(
    original: fx.GraphModule, student: fx.GraphModule, task: Classification, given: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Quantised, exported, and measured against the original: everything a row of the table says."""
    from rarefy import quantize
    from rarefy.deployment.latency import latency
    from rarefy.evaluation.measure import weight_bytes
    from rarefy.runtimes.onnxruntime import OnnxRuntime

    small = quantize(student, task, images=CALIBRATION_IMAGES, calibration=given.calibration, seed=seed)
    with tempfile.TemporaryDirectory(prefix="rarefy-bench-") as folder:
        files = {"float": Path(folder) / "float.onnx", "int8": Path(folder) / "int8.onnx"}
        runtime = OnnxRuntime(threads=max(THREADS))
        runtime.export(original, files["float"])
        runtime.export(small, files["int8"])
        parity = runtime.compare(
            small, files["int8"], next(iter(task.inputs("val", PARITY_IMAGES, PARITY_IMAGES, seed=seed)))
        )
        sessions = {name: runtime.open(file) for name, file in files.items()}
        found = evaluate(sessions["int8"], task, reference=sessions["float"], batch_size=200, limit=given.limit)
        one = next(iter(task.batches("val", 1)))[0]
        times = {
            threads: latency(
                {name: OnnxRuntime(threads=threads).open(file) for name, file in files.items()},
                one,
                repeats=given.repeats,
            )
            for threads in THREADS
        }
        file_bytes = {name: file.stat().st_size for name, file in files.items()}
    student_found = evaluate(student, task, batch_size=500, limit=given.limit, device=given.device)
    bytes_of = {"float": weight_bytes(original), "int8": weight_bytes(small)}
    last = {record["step"]: record for record in student.meta["history"]}
    pruned, training = last["prune"]["facts"], last["distill"]
    return {
        "seed": seed,
        "int8": found.to_json(),
        "student": student_found.to_json(),
        "fewer_macs": count_macs(original) / count_macs(student),
        "macs": count_macs(student),
        "fewer_parameters": count_parameters(original) / count_parameters(student),
        "channels": pruned["channels"],
        "training": {**training["options"], "timing": training["facts"]["timing"], "curve": training["facts"]["curve"]},
        "latency": {str(threads): measured for threads, measured in times.items()},
        "size_bytes": bytes_of,
        "onnx_bytes": file_bytes,
        "smaller": bytes_of["float"] / bytes_of["int8"],
        "parity": {key: value for key, value in parity.items() if key != "layers"},
    }


def shortfalls(run: dict[str, Any], goals: Mode, minutes: float) -> list[str]:
    """What a run misses, in words."""
    wanted: list[tuple[str, float, float | None]] = [
        ("top-1 of the int8 file, in %", 100 * run["int8"]["value"], 100 * goals.top1),
        ("times fewer MACs", run["fewer_macs"], goals.fewer_macs),
        ("times faster, 1 thread", run["latency"]["1"]["int8"]["speedup"]["float"]["median"], goals.faster),
        ("times smaller", run["smaller"], goals.smaller),
    ]
    short = [
        f"{name}: {value:.4g} is below {least:g}"
        for name, value, least in wanted
        if least is not None and not value >= least
    ]
    if goals.minutes is not None and minutes > goals.minutes:
        short.append(f"minutes: {minutes:.1f} is above {goals.minutes:g}")
    return short


def shown(runs: list[dict[str, Any]], original: dict[str, Any]) -> None:
    def spread(value: dict[str, float]) -> str:
        return f"{value['median']:.3g} ({value['low']:.3g} to {value['high']:.3g})"

    first = runs[0]
    rows = [
        ("top-1, %", accuracy(original), *(accuracy(run["int8"]) for run in runs)),
        ("  before quantization", "", *(accuracy(run["student"]) for run in runs)),
        ("drop, points (95 %)", "", *(paired(run["int8"]["drop"]) for run in runs)),
        ("same answer as the original", "", *(f"{run['int8']['agreement']:.2%}" for run in runs)),
        (
            "MACs",
            f"{first['macs'] * first['fewer_macs']:.4g}",
            *(f"{run['macs']:.4g}, {run['fewer_macs']:.2f}x fewer" for run in runs),
        ),
        (
            "weights",
            size_text(first["size_bytes"]["float"]),
            *(f"{size_text(run['size_bytes']['int8'])}, {run['smaller']:.2f}x smaller" for run in runs),
        ),
        ("ONNX file", size_text(first["onnx_bytes"]["float"]), *(size_text(run["onnx_bytes"]["int8"]) for run in runs)),
    ]
    for threads in map(str, THREADS):
        columns = [run["latency"][threads] for run in runs]
        rows.append(
            (
                f"ms an image, threads {threads}",
                spread(columns[0]["float"]["ms"]),
                *(spread(one["int8"]["ms"]) for one in columns),
            )
        )
        rows.append(
            (f"  times faster, threads {threads}", "", *(spread(one["int8"]["speedup"]["float"]) for one in columns))
        )
    rows += [
        (
            "simulation and file, same top-1",
            "",
            *(f"{run['parity']['agreement']:.2%} of {run['parity']['samples']}" for run in runs),
        ),
        ("training, s", "", *(f"{run['training']['timing']['seconds']:.0f}" for run in runs)),
    ]
    show_table(
        "ResNet-56, CIFAR-10; latency: median and quartiles",
        ["", "float original", *(f"int8, seed {run['seed']}" for run in runs)],
        rows,
    )


def accuracy(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['value']:.2f} ({100 * low:.2f} to {100 * high:.2f}; {found['samples']})"


def paired(drop: dict[str, Any]) -> str:
    low, high = drop["interval"]
    return f"{100 * drop['value']:.2f} ({100 * low:.2f} to {100 * high:.2f})"


def told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option: Callable[..., Any] = parser.add_argument
    option("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    option("--goals", choices=tuple(MODES), help="what --check compares with; default: those of the device")
    option("--macs", type=float, help="share of the MACs that may stay")
    option(
        "--prune-from",
        type=Path,
        metavar="FOLDER",
        help="prune the students that --save left there further, seed by seed; --macs stays a share of the original's",
    )
    option("--round-to", type=int, default=8, help="channels are a multiple of it")
    option("--criterion", default="magnitude", help="magnitude, taylor, taylor:batches=50, ...")
    option("--ranking", default="local", help="global, local or isomorphic")
    option("--ignore", action="append", metavar="GLOB", help="leave these layers whole; default: the residual stream")
    option("--loss", default="lskd", help="lskd, kl, 'lskd + 50*mse:on=stages', ...")
    option(
        "--also-taught-by",
        type=int,
        nargs="+",
        default=[],
        metavar="DEPTH",
        help="the CIFAR ResNets of these depths too: 20, 32, 44",
    )
    option("--hard-weight", type=float, default=1.0, help="of the labels; 0: the teacher alone")
    option("--augment", default="crop=4,flip", help="crop=4,flip,erase=16, ...")
    option(
        "--top1",
        type=float,
        help="least mean top-1 over the seeds, of what --judge names, in place of the mode's goal for each seed",
    )
    option("--judge", choices=("int8", "student"), default="int8", help="what --top1 is compared with")
    option("--fewer-macs", type=float, help="goal, in place of the mode's")
    option("--epochs", type=float, help="of 390 steps of 128 images; fractions too")
    option("--batch-size", type=int)
    option("--lr", type=float)
    option("--weight-decay", type=float, default=5e-4)
    option("--ema", type=float, default=0.0)
    option("--mixup", type=float, default=0.0)
    option("--cutmix", type=float, default=0.0)
    option("--precision", choices=("auto", "fp32", "bf16"))
    option("--compile", choices=("no", "default", "reduce-overhead"))
    option("--calibration", default="mse")
    option(
        "--tune-convolutions",
        action="store_true",
        help="let cuDNN time its kernels and take the fastest: the same work, not the same bits",
    )
    option(
        "--validate-every",
        type=int,
        default=0,
        metavar="EPOCHS",
        help="look at the test images while training (only looks)",
    )
    option("--seeds", type=int, nargs="+", default=[0])
    option("--repeats", type=int, help="rounds of timing")
    option("--limit", type=int, help="so many test images only, for a trial")
    option("--work", type=Path, metavar="FOLDER", help="checkpoints: a run that was killed goes on where it was")
    option("--save", type=Path, metavar="FOLDER", help="keep the float students there")
    option("--load", type=Path, metavar="FOLDER", help="take the float students from there, in place of training")
    option("--stop-after-training", action="store_true", help="only train (and --save)")
    option("--out", type=Path, metavar="FILE", help="write the JSON there too")
    option("--check", action="store_true", help="exit 1 where the goals are missed")
    given = parser.parse_args()
    mode = MODES[given.device]
    given.goals = given.goals or given.device
    given.steps = mode.steps if given.epochs is None else max(1, math.ceil(given.epochs * EPOCH))
    given.ignore = list(STREAM) if given.ignore is None else given.ignore
    for name in ("macs", "lr", "precision", "compile", "batch_size"):
        if getattr(given, name) is None:
            setattr(given, name, getattr(mode, name))
    if given.stop_after_training and not given.save:
        parser.error("--stop-after-training leaves nothing without --save")
    return given


def main() -> int:
    given, began = arguments(), time.perf_counter()
    torch.backends.cudnn.benchmark = given.tune_convolutions
    task = Classification(train=DATA, val=DATA, augment=given.augment)
    try:
        original = capture(real_data.resnet56(), torch.zeros(2, 3, 32, 32))
        task.length("val"), task.length("train")
    except DataError as error:
        told(f"skipped: {error}")
        return 2 if given.check else 0
    reference = evaluate(original, task, batch_size=500, limit=given.limit, device=given.device).to_json()
    told(f"original: top-1 {accuracy(reference)}")
    runs, seconds = [], time.perf_counter() - began
    for seed in given.seeds:
        began = time.perf_counter()
        student = load(given.load / f"seed{seed}") if given.load else trained(original, task, given, seed)
        if given.save:
            save(student, given.save / f"seed{seed}", manifest={"model": "ResNet-56, CIFAR-10", "seed": seed})
        if given.stop_after_training:
            told(
                f"seed {seed}: top-1 "
                f"{accuracy(evaluate(student, task, batch_size=500, limit=given.limit, device=given.device).to_json())}"
            )
            continue
        run = judged(original, student, task, given, seed)
        run["minutes"] = (seconds + time.perf_counter() - began) / 60
        goals = MODES[given.goals]
        goals = goals._replace(
            top1=goals.top1 if given.top1 is None else 0.0, fewer_macs=given.fewer_macs or goals.fewer_macs
        )
        run["short"] = shortfalls(run, goals, run["minutes"])
        told(f"seed {seed}: int8 {accuracy(run['int8'])}, {run['minutes']:.1f} minutes")
        runs.append(run)
    if given.stop_after_training:
        return 0
    shown(runs, reference)
    mean = statistics.mean(run[given.judge]["value"] for run in runs)
    line = json.dumps(
        {
            "bench": "resnet56_cifar10",
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
            "goals": given.goals,
            "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()},
            "original": reference,
            "top1": [run["int8"]["value"] for run in runs],
            "top1_mean": mean,
            "runs": runs,
        }
    )
    print(line)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(line + "\n")
    for run in runs:
        for one in run["short"]:
            told(f"seed {run['seed']} falls short: {one}")
    missed = given.top1 is not None and mean < given.top1
    if given.top1 is not None:
        told(
            f"mean top-1 of {given.judge} over {len(runs)} seeds: "
            f"{100 * mean:.2f}{f', below {100 * given.top1:.2f}' if missed else ''}"
        )
    return 1 if given.check and (missed or any(run["short"] for run in runs)) else 0


if __name__ == "__main__":
    sys.exit(main())
