"""Few bits on real weights: ResNet-20 and ResNet-56 on CIFAR-10, EfficientNet-Lite0 on ImageNet images, by rounding rule and by training.

    python bench/low_bits.py [--check] [--model resnet20] [--setting W4A4] [--method nearest] [--device cuda]

Settings: W4A8, W4A4, W3 and W2 (activations of 8 bits). The first layer, the last one and what they read have 8 bits, as in the papers' tables; ``mixed`` chooses
widths for an average of 4 weight bits over all layers, beside ``uniform``, all at 4, both rounded by ``--rounding``. ``qat`` trains the codes of the ``nearest`` row with the float model as teacher (labels
unused). Each cell is kept in ``--work`` and skipped when it is there, and training goes on from its checkpoint: a run that was cut goes on.

Top-1 with its interval, the drop paired, agreement with the float model, and the SQNR of the answers (dB). ``--check`` exits 1 unless, over the cells that were run: W4A8 by
some rule without training is within 1.0 point of float, W4A4 by training within 1.5 points on CIFAR-10, each learned rule has a higher SQNR than nearest, and mixed beats uniform.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import real_data
from bench.efficientnet_lite0 import sqnr, task_of
from rarefy import capture, distill, evaluate, load, plugins, quantize, save
from rarefy.errors import DataError, MissingDependency
from rarefy.tasks import Classification
from rarefy.terminal import show_table

DATA = "bench.real_data:cifar10"
MODELS = {"resnet20": ("conv1", "linear"), "resnet56": ("conv1", "linear"), "lite0": ("_conv_stem", "_fc")}  # name -> first and last layer
SETTINGS = {"W4A8": (4, 8), "W4A4": (4, 4), "W3A8": (3, 8), "W2A8": (2, 8)}
RULES = ("nearest", "adaround", "gptq", "gptaq", "brecq")
QAT, UNIFORM, MIXED = "qat", "uniform", "mixed"
LEAST_W4A8, LEAST_W4A4 = 0.010, 0.015
QAT_STEPS = {"cpu": 400, "cuda": 4000}


def model_and_task(name: str) -> tuple[fx.GraphModule, Classification]:
    if name == "lite0":
        return capture(real_data.efficientnet_lite0(), torch.zeros(2, 3, 224, 224)), task_of(real_data.LITE_MEAN, real_data.LITE_STD)
    task = Classification(train=DATA, val=DATA, augment="crop=4,flip")
    return capture(real_data.resnet_cifar(int(name.removeprefix("resnet"))), torch.zeros(2, 3, 32, 32)), task


def cells(given: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(model, setting, method), those without training first."""
    rules = [rule for rule in RULES if rule in plugins.available("rounding")]
    found = [(model, setting, rule) for model in MODELS for setting in SETTINGS for rule in rules]
    found += [(model, "4 bits on average", method) for model in MODELS for method in (UNIFORM, MIXED)]
    found += [(model, setting, QAT) for model in MODELS for setting in SETTINGS]
    chosen = [(set(given.model or MODELS), 0), (set(given.setting or ()), 1), (set(given.method or ()), 2)]
    return [cell for cell in found if all(not wanted or cell[place] in wanted for wanted, place in chosen)]


def quantised(
    graph: fx.GraphModule, task: Classification, model: str, setting: str, method: str, given: argparse.Namespace
) -> fx.GraphModule:
    common: dict[str, Any] = {"images": given.images, "seed": given.seed, "progress": False}
    if method in (UNIFORM, MIXED):
        return quantize(graph, task, weights="int4" if method == UNIFORM else "mixed:bits=4", rounding=given.rounding, **common)
    weight_bits, activation_bits = SETTINGS[setting]
    ends = MODELS[model]
    weights = ";".join([f"int{weight_bits}", *(f"{layer}=int8" for layer in ends)])
    activations = ";".join([f"uint{activation_bits}", *(f"{layer}=uint8" for layer in ends)])
    rule = "nearest" if method == QAT else method
    return quantize(graph, task, weights=weights, activations=activations, rounding=rule, **common)


def measured(graph: fx.GraphModule, task: Classification, cell: tuple[str, str, str], given: argparse.Namespace) -> dict[str, Any]:
    model, setting, method = cell
    begun = time.perf_counter()
    kept = given.work / f"{'_'.join(cell).replace(' ', '-')}_graph"
    if not kept.exists():
        small = quantised(graph.to(given.device), task, model, setting, method, given)
        small.meta["history"][-1]["facts"]["seconds_here"] = time.perf_counter() - begun
        save(small, kept)
    small = load(kept).to(given.device)  # a run that is cut while it evaluates does not round again
    facts = small.meta["history"][-1]["facts"]
    seconds = facts["seconds_here"]
    if method == QAT:
        small = distill(
            small, graph, task, loss="kl", hard_weight=0.0, weight_decay=0.0, steps=given.steps, batch_size=given.batch_size, lr=given.lr, clip=given.clip, device=given.device,
            precision=given.precision, validate_every=0, seed=given.seed, checkpoint=given.work / "_".join(cell).replace(" ", "-"), checkpoint_seconds=20, progress=False,
        )  # fmt: skip
        seconds = small.meta["history"][-1]["facts"]["timing"]["seconds"]
    found = evaluate(small, task, reference=graph, batch_size=200, limit=given.limit, device=given.device)
    exact, rough = [], []
    with torch.no_grad():
        for inputs in task.inputs("val", min(500, given.limit or 500), 50, seed=0):
            exact.append(answers(graph, inputs, given.device))
            rough.append(answers(small, inputs, given.device))
    row = {
        "model": model,
        "setting": setting,
        "method": method,
        **found.to_json(),
        "seconds": seconds,
        "sqnr_db": sqnr(torch.cat(exact), torch.cat(rough)),
    }
    if "allocation" in facts:
        row |= {key: facts["allocation"][key] for key in ("average_bits", "bits", "used")}
    return row


def answers(graph: fx.GraphModule, inputs: Tensor, device: str) -> Tensor:
    return graph.to(device)(inputs.to(device)).cpu()


def shortfalls(rows: list[dict[str, Any]]) -> list[str]:
    by = {(row["model"], row["setting"], row["method"]): row for row in rows}
    short = []
    for model in MODELS:
        ptq = [by[model, "W4A8", rule] for rule in RULES if (model, "W4A8", rule) in by]
        if not ptq:
            short.append(f"{model}: W4A8 was not run")
        elif (least := min(row["drop"]["value"] for row in ptq)) > LEAST_W4A8:
            short.append(f"{model}: W4A8 without training loses {100 * least:.2f} points, at most {100 * LEAST_W4A8:g}")
        if model != "lite0":
            row = by.get((model, "W4A4", QAT))
            if row is None or row["drop"]["value"] > LEAST_W4A4:
                short.append(
                    f"{model}: W4A4 by training "
                    + ("was not run" if row is None else f"loses {100 * row['drop']['value']:.2f} points, at most {100 * LEAST_W4A4:g}")
                )
        for setting in SETTINGS:
            nearest = by.get((model, setting, "nearest"))
            for method in (*RULES[1:], QAT):
                row = by.get((model, setting, method))
                if nearest and row and not row["sqnr_db"] > nearest["sqnr_db"]:
                    short.append(f"{model} {setting}: {method} has {row['sqnr_db']:.2f} dB, nearest {nearest['sqnr_db']:.2f}")
        pair = [by.get((model, "4 bits on average", method)) for method in (UNIFORM, MIXED)]
        if None in pair:
            short.append(f"{model}: mixed and uniform 4 bits were not run")
        elif not (pair[1]["sqnr_db"] > pair[0]["sqnr_db"] and pair[1]["agreement"] >= pair[0]["agreement"]):  # type: ignore[index]
            short.append(f"{model}: mixed does not beat uniform 4 bits")
    return short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--model", action="append", choices=tuple(MODELS))
    option("--setting", action="append", help=", ".join((*SETTINGS, "4 bits on average")))
    option("--method", action="append", choices=(*RULES, QAT, UNIFORM, MIXED))
    option("--images", type=int, default=256, help="to calibrate on")
    option("--limit", type=int, help="so many labelled images only, for a trial")
    option("--rounding", default="adaround", choices=RULES, help="of the rows uniform and mixed")
    option("--steps", type=int, help="of training; default: 400 on a CPU, 4,000 on a GPU")
    option("--batch-size", type=int, default=64)
    option("--lr", type=float, default=0.01)
    option("--clip", type=float, default=1.0)
    option("--precision", default="auto")
    option("--device", choices=("cpu", "cuda"), default="cpu")
    option("--seed", type=int, default=0)
    option("--work", type=Path, default=Path("out/low_bits"), metavar="FOLDER", help="finished cells and checkpoints")
    option("--only-show", action="store_true", help="no cell is run; the table and --check are of those that are there")
    option("--check", action="store_true", help="exit 1 where the goals are missed")
    given = parser.parse_args()
    given.steps = given.steps or QAT_STEPS[given.device]
    given.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    loaded: dict[str, Any] = {}
    for cell in cells(given):
        file = given.work / f"{'_'.join(cell).replace(' ', '-')}.json"
        if file.exists():
            rows.append(json.loads(file.read_text()))
            continue
        if given.only_show:
            continue
        try:
            if cell[0] not in loaded:
                loaded[cell[0]] = model_and_task(cell[0])
        except (DataError, MissingDependency) as error:
            print(f"skipped {cell[0]}: {error}", file=sys.stderr)
            loaded[cell[0]] = None
        if loaded[cell[0]] is None:
            continue
        if cell[0] == "lite0" and cell[2] == QAT and given.device == "cpu":
            print("skipped lite0 qat: training it needs a GPU", file=sys.stderr)
            continue
        row = measured(*loaded[cell[0]], cell, given)
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(row))
        partial.replace(file)
        rows.append(row)
        print(
            f"{' '.join(cell)}: top-1 {100 * row['value']:.2f}, {row['sqnr_db']:.2f} dB, {row['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    table = [
        [
            row["model"], row["setting"], row["method"], f"{100 * row['reference']['value']:.2f}", f"{100 * row['value']:.2f} of {row['samples']}",
            "{:.2f} ({:.2f} to {:.2f})".format(*(100 * value for value in (row["drop"]["value"], *row["drop"]["interval"]))),
            f"{100 * row['agreement']:.2f}", f"{row['sqnr_db']:.2f}", f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    show_table("Few bits", ["model", "setting", "method", "float", "top-1, %", "drop, points (95 %)", "as float, %", "dB", "s"], table)
    short = shortfalls(rows)
    print(json.dumps({"bench": "low_bits", "torch": torch.__version__, "device": given.device, "rows": rows, "short": short}))
    for one in short:
        print(f"falls short: {one}", file=sys.stderr)
    return 1 if given.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
