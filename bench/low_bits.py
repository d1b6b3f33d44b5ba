"""Few bits on real weights: ResNet-20 and ResNet-56 on CIFAR-10, EfficientNet-Lite0 on ImageNet images, by rounding
rule and by training.

    python bench/low_bits.py [--check] [--model resnet20] [--setting W4A4] [--method nearest] [--device cuda] [--jobs
    12] [--trial]

Settings: W4A8, W4A4, W3 and W2 (activations of 8 bits). The first layer, the last one and what they read have 8 bits,
as in the papers' tables; ``mixed`` chooses widths for an average of 4 weight bits over all layers, beside ``uniform``,
all at 4, both by each rule of ``--rounding``. ``qat`` trains the codes that the rule ``--start`` came to, with the
float model as teacher (labels unused); of EfficientNet-Lite0 on its 256 calibration images, so on a GPU alone. A
``--method`` may have options (``brecq:drop=0``).

Each cell is a file in ``--work`` and skipped when it is there, and training goes on from its checkpoint: a run that was
cut goes on. ``--jobs``: so many cells at a time, each in a process of its own, the shortest first; on a GPU NVIDIA's
MPS lets them share it. One that fails takes no other with it. ``--trial``: few images and steps, to see that every cell
runs.

Top-1 with its interval, the drop paired, agreement with the float model, and the SQNR of the answers (dB). ``--check``
exits 1 unless W4A8 by some rule without training is within 1.0 point of float, W4A4 by training within 1.5 points on
CIFAR-10, each learned rule has a higher SQNR than nearest, and mixed beats uniform by each rounding, its widths chosen
in 3 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import real_data
from bench.cells import in_processes
from bench.efficientnet_lite0 import sqnr, task_of
from rarefy import capture, distill, evaluate, load, plugins, quantize, save
from rarefy.cli.terminal import show_table
from rarefy.errors import DataError, MissingDependency
from rarefy.tasks.classification import Classification

DATA = "bench.real_data:cifar10"
MODELS = {
    "resnet20": ("conv1", "linear"),
    "resnet56": ("conv1", "linear"),
    "lite0": ("_conv_stem", "_fc"),
}  # name -> first and last layer
SETTINGS = {"W4A8": (4, 8), "W4A4": (4, 4), "W3A8": (3, 8), "W2A8": (2, 8)}
RULES = ("nearest", "adaround", "gptq", "gptaq", "descent", "brecq")
QAT, AVERAGE = "qat", "4 bits on average"
MIXES = {"uniform": "int4", "mixed": "mixed:bits=4"}
IMAGES = {"cifar": 1024, "lite0": 256}
LEAST_W4A8, LEAST_W4A4, LONGEST = 0.010, 0.015, 180
QAT_STEPS = {"cpu": 400, "cuda": 4000}
QAT_STEPS_OF_FILES = 300  # of EfficientNet-Lite0, whose images are decoded anew in each epoch
# How long cells take, roughly.
LENGTH = {
    "resnet20": 1, "resnet56": 3, "lite0": 6,
    "nearest": 1, "gptq": 2, "gptaq": 2, "descent": 3, "adaround": 4, "brecq": 12, QAT: 16,
}  # fmt: skip


class Cell(NamedTuple):
    model: str
    setting: str
    method: str

    @property
    def file(self) -> str:
        return re.sub(r"[^\w.:=,-]+", "-", "_".join(self))

    @property
    def length(self) -> int:
        return LENGTH[self.model] * LENGTH.get(re.split("[ :]", self.method)[-1 if " " in self.method else 0], 12)


def cells(given: argparse.Namespace) -> list[Cell]:
    """In the order of the table."""
    rules = [rule for rule in given.method or RULES if rule != QAT and rule not in MIXES]
    found = [Cell(model, setting, rule) for model in MODELS for setting in SETTINGS for rule in (*rules, QAT)]
    found += [Cell(model, AVERAGE, f"{mix} {rule}") for model in MODELS for rule in given.rounding for mix in MIXES]
    return [
        cell
        for cell in found
        if cell.model in (given.model or MODELS)
        and cell.setting in (given.setting or (*SETTINGS, AVERAGE))
        and (not given.method or cell.method.split(" ")[0] in given.method)
    ]


@cache
def model_and_task(name: str) -> tuple[fx.GraphModule, Classification]:
    if name == "lite0":
        return capture(real_data.efficientnet_lite0(), torch.zeros(2, 3, 224, 224)), task_of(
            real_data.LITE_MEAN, real_data.LITE_STD
        )
    task = Classification(train=DATA, val=DATA, augment="crop=4,flip")
    return capture(real_data.resnet_cifar(int(name.removeprefix("resnet"))), torch.zeros(2, 3, 32, 32)), task


def quantised(graph: fx.GraphModule, task: Classification, cell: Cell, given: argparse.Namespace) -> fx.GraphModule:
    images = given.images or IMAGES.get(cell.model, IMAGES["cifar"])
    common: dict[str, Any] = {
        "images": images,
        "batch_size": 16 if cell.model == "lite0" else 64,
        "seed": given.seed,
        "progress": False,
    }
    mix, _, rule = cell.method.rpartition(" ")
    if mix:
        return quantize(graph, task, weights=MIXES[mix], rounding=_short(rule, given), **common)
    weight_bits, activation_bits = SETTINGS[cell.setting]
    ends = MODELS[cell.model]
    weights = ";".join([f"int{weight_bits}", *(f"{layer}=int8" for layer in ends)])
    activations = ";".join([f"uint{activation_bits}", *(f"{layer}=uint8" for layer in ends)])
    return quantize(graph, task, weights=weights, activations=activations, rounding=_short(rule, given), **common)


def _short(rule: str, given: argparse.Namespace) -> str:
    return f"{rule}:steps=2" if given.trial and rule in ("adaround", "brecq") else rule


def measured(cell: Cell, given: argparse.Namespace) -> dict[str, Any]:
    graph, task = model_and_task(cell.model)
    begun = time.perf_counter()
    first = cell._replace(method=given.start) if cell.method == QAT else cell
    kept = given.work / f"{first.file}_graph"
    if not kept.exists():
        small = quantised(graph.to(given.device), task, first, given)
        small.meta["history"][-1]["facts"]["seconds_here"] = time.perf_counter() - begun
        save(small, own := kept.with_name(f"{kept.name}.{os.getpid()}"))
        with suppress(OSError):  # another process was faster
            own.rename(kept)
    small = load(kept).to(given.device)  # what is cut while it evaluates, and training, do not round again
    facts = small.meta["history"][-1]["facts"]
    seconds = facts["seconds_here"]
    of_files = cell.model == "lite0"
    if cell.method == QAT:
        steps, at_once = (
            (min(given.steps, QAT_STEPS_OF_FILES), min(given.batch_size, 32))
            if of_files
            else (given.steps, given.batch_size)
        )
        small = distill(
            small,
            graph,
            task,
            loss="kl",
            hard_weight=0.0,
            weight_decay=0.0,
            steps=steps,
            batch_size=at_once,
            lr=given.lr,
            clip=given.clip,
            device=given.device,
            precision=given.precision,
            compile=given.compile,
            validate_every=0,
            seed=given.seed,
            checkpoint=given.work / f"{cell.file}_{steps}x{at_once}",
            checkpoint_seconds=20,
            progress=False,
        )
        seconds = small.meta["history"][-1]["facts"]["timing"]["seconds"]
    found = evaluate(
        small, task, reference=graph, batch_size=50 if of_files else 200, limit=given.limit, device=given.device
    )
    exact, rough = [], []
    with torch.no_grad():
        for inputs in task.inputs("val", min(500, given.limit or 500), 50, seed=0):
            exact.append(answers(graph, inputs, given.device))
            rough.append(answers(small, inputs, given.device))
    row = {
        **cell._asdict(),
        **found.to_json(),
        "seconds": seconds,
        "sqnr_db": sqnr(torch.cat(exact), torch.cat(rough)),
        "device": given.device,
    }
    if "allocation" in facts:
        row |= {key: facts["allocation"][key] for key in ("average_bits", "bits", "used")} | {
            "choosing_s": facts["timing"]["allocation"]
        }
    return row


def answers(graph: fx.GraphModule, inputs: Tensor, device: str) -> Tensor:
    return graph.to(device)(inputs.to(device)).cpu()


def attempted(cell: Cell, given: argparse.Namespace) -> dict[str, Any]:
    """The row, which is a file from then on. A cell that fails takes no other with it."""
    if time.time() > given.until:
        return {**cell._asdict(), "left": True}
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // given.jobs))
    try:
        row = measured(cell, given)
    except (DataError, MissingDependency) as error:
        return {**cell._asdict(), "skipped": str(error)}
    except Exception:
        return {**cell._asdict(), "failed": traceback.format_exc()[-1500:]}
    finally:
        if given.device == "cuda":
            torch.cuda.empty_cache()
    partial = given.work / f"{cell.file}.part"
    partial.write_text(json.dumps(row))
    partial.replace(given.work / f"{cell.file}.json")
    return row


def made(missing: list[Cell], given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows as they come; what the goals ask of training first, then the shortest, so that a run that is cut leaves few
    cells unmade."""
    missing = sorted(missing, key=lambda cell: (cell[1:] != ("W4A4", QAT) or cell.model == "lite0", cell.length))
    return in_processes(partial(attempted, given=given), missing, given.jobs)


def write(
    file: Path | None, wanted: list[Cell], found: dict[Cell, dict[str, Any]], wrong: list[dict[str, Any]]
) -> None:
    """What there is so far, whole at any moment."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.part")
    partial.write_text(json.dumps({"rows": [found[cell] for cell in wanted if cell in found], "wrong": wrong}))
    partial.replace(file)


def shortfalls(wanted: list[Cell], by: dict[Cell, dict[str, Any]]) -> list[str]:
    """What the cells that were asked for miss; one that was not run misses all."""
    short = [f"{' '.join(cell)}: was not run" for cell in wanted if cell not in by]
    for model in dict.fromkeys(cell.model for cell in wanted):
        drops = [row["drop"]["value"] for cell, row in by.items() if cell[:2] == (model, "W4A8") and cell.method != QAT]
        if drops and min(drops) > LEAST_W4A8:
            short.append(
                f"{model}: W4A8 without training loses {100 * min(drops):.2f} points, at most {100 * LEAST_W4A8:g}"
            )
        trained = by.get(Cell(model, "W4A4", QAT))
        if model != "lite0" and trained and trained["drop"]["value"] > LEAST_W4A4:
            short.append(
                f"{model}: W4A4 by training loses {100 * trained['drop']['value']:.2f} points, at most "
                f"{100 * LEAST_W4A4:g}"
            )
    for cell, row in by.items():
        nearest = by.get(cell._replace(method="nearest"))
        if nearest and cell.method != "nearest" and not row["sqnr_db"] > nearest["sqnr_db"]:
            short.append(f"{' '.join(cell)}: {row['sqnr_db']:.2f} dB, nearest {nearest['sqnr_db']:.2f}")
        mix, _, rule = cell.method.rpartition(" ")
        uniform = by.get(cell._replace(method=f"uniform {rule}")) if mix == "mixed" else None
        if uniform and not (row["sqnr_db"] > uniform["sqnr_db"] and row["agreement"] >= uniform["agreement"]):
            short.append(f"{cell.model}: mixed does not beat uniform 4 bits by {rule}")
        if row.get("choosing_s", 0) > LONGEST:
            short.append(f"{cell.model}: widths were chosen in {row['choosing_s']:.0f} s, at most {LONGEST}")
    return short


def shown(rows: list[dict[str, Any]]) -> None:
    table = [
        [
            row["model"],
            row["setting"],
            row["method"],
            f"{100 * row['reference']['value']:.2f}",
            f"{100 * row['value']:.2f} of {row['samples']}",
            "{:.2f} ({:.2f} to {:.2f})".format(
                *(100 * value for value in (row["drop"]["value"], *row["drop"]["interval"]))
            ),
            f"{100 * row['agreement']:.2f}",
            f"{row['sqnr_db']:.2f}",
            f"{row['seconds']:.0f}" + (f", {row['choosing_s']:.0f} choosing" if row.get("choosing_s", 0) >= 1 else ""),
        ]
        for row in rows
    ]
    show_table(
        "Few bits",
        ["model", "setting", "method", "float", "top-1, %", "drop, points (95 %)", "as float, %", "dB", "s"],
        table,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--model", action="append", choices=tuple(MODELS))
    option("--setting", action="append", choices=(*SETTINGS, AVERAGE))
    option(
        "--method",
        action="append",
        metavar="TEXT",
        help=f"{', '.join(RULES)}, {QAT}, {', '.join(MIXES)}, or a rule with options",
    )
    option(
        "--images",
        type=int,
        help=f"to calibrate on; default: {IMAGES['cifar']:,} of CIFAR-10, all {IMAGES['lite0']} of ImageNet",
    )
    option("--limit", type=int, help="so many labelled images only, for a trial")
    option(
        "--rounding",
        action="append",
        metavar="RULE",
        help="of the rows uniform and mixed; default: nearest and adaround",
    )
    option("--start", default="adaround", metavar="RULE", help="that training starts from")
    option("--steps", type=int, help="of training; default: 400 on a CPU, 4,000 on a GPU")
    option("--batch-size", type=int, default=64)
    option("--lr", type=float, default=0.01)
    option("--clip", type=float, default=1.0)
    option("--precision", default="fp32")
    option("--compile", default="no", help="of training")
    option("--device", choices=("cpu", "cuda"), default="cpu")
    option("--seed", type=int, default=0)
    option("--jobs", type=int, default=1, metavar="N", help="so many cells at a time")
    option(
        "--for",
        dest="seconds_in_all",
        metavar="SECONDS",
        type=float,
        default=float("inf"),
        help="begin no cell after that",
    )
    option("--work", type=Path, default=Path("out/low_bits"), metavar="FOLDER", help="finished cells and checkpoints")
    option("--out", type=Path, metavar="FILE", help="rows as JSON, written anew with each cell that is done")
    option("--trial", action="store_true", help="every cell in little: it runs or it does not")
    option("--only-show", action="store_true", help="no cell is run; the table and --check are of those that are there")
    option("--check", action="store_true", help="exit 1 where the goals are missed")
    given = parser.parse_args()
    given.steps = 2 if given.trial else given.steps or QAT_STEPS[given.device]
    given.rounding = given.rounding or ["nearest", "adaround"]
    if given.trial:
        given.images, given.limit, given.work = 16, 50, given.work / "trial"
    for rule in (*(given.method or ()), *given.rounding, given.start):
        if rule != QAT and rule not in MIXES:
            plugins.resolve("rounding", rule)
    given.until = time.time() + given.seconds_in_all
    return given


def main() -> int:
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    wanted = cells(given)
    begun = time.perf_counter()
    found = {
        cell: json.loads(file.read_text()) for cell in wanted if (file := given.work / f"{cell.file}.json").exists()
    }
    wrong: list[dict[str, Any]] = []
    write(given.out, wanted, found, wrong)
    missing = [] if given.only_show else [cell for cell in wanted if cell not in found]
    if (
        given.device == "cpu"
        and not given.trial
        and (left := [cell for cell in missing if cell.model == "lite0" and cell.method == QAT])
    ):
        print(f"skipped {len(left)} cells, lite0 by {QAT}: training it needs a GPU", file=sys.stderr)
        missing = [cell for cell in missing if cell not in left]
    for row in made(missing, given):
        cell = Cell(row["model"], row["setting"], row["method"])
        at = f"after {time.perf_counter() - begun:.0f} s, {' '.join(cell)}: "
        if why := row.get("skipped") or row.get("failed") or ("no time was left" if "left" in row else None):
            wrong.append(row)
            print(at + why.strip(), file=sys.stderr, flush=True)
        else:
            found[cell] = row
            print(
                f"{at}top-1 {100 * row['value']:.2f}, {row['sqnr_db']:.2f} dB, {row['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        write(given.out, wanted, found, wrong)
    rows = [found[cell] for cell in wanted if cell in found]
    shown(rows)
    short = shortfalls(wanted, found)
    print(
        json.dumps(
            {
                "bench": "low_bits",
                "torch": torch.__version__,
                "device": given.device,
                "rows": rows,
                "wrong": wrong,
                "short": short,
            }
        )
    )
    for one in short:
        print(f"falls short: {one}", file=sys.stderr)
    return 1 if given.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
