"""What pruning costs ResNet-56 on CIFAR-10 (real weights, 93.39 %), and what repair without training gives back.

    python bench/pruning_accuracy.py [--check]                                              A
    python bench/pruning_accuracy.py --criteria [--resume] [--for SECONDS] [--device cuda]   B

A: 30 % of the MACs removed: original, pruned, repaired, on all 10,000 test images. B: every criterion with every
ranking at 2x fewer MACs, after the same short training.

``--check`` exits 1 where repair gives back less than two thirds of what pruning lost; 2 where there is no data. Without
it, missing data is a skip.

B trains each pruned network on the same images, in an order by seed, from labels alone; a seed is also that of the
images a criterion looks at. Top-1 is on a stratified prefix of the test images. Torch-Pruning, where it is installed
(``make bench-setup``), prunes with each of its own criteria and rankings, then the same graph, training and test. It
cannot follow the zero-padded shortcut of this network, so it is told to leave the residual stream whole;
``--same-layers`` holds rarefy to that too. Short training on few images tells criteria apart, and is not what a network
can reach: for that see resnet56_cifar10.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import peers, real_data
from bench.cells import Cells, add_options
from rarefy import capture, evaluate, plugins, prune
from rarefy.cli.terminal import show_table
from rarefy.distillation.distill import train
from rarefy.errors import DataError, InputError
from rarefy.graph.macs import count_macs
from rarefy.pruning.options import RANKINGS
from rarefy.pruning.repair import repair
from rarefy.tasks.classification import Classification

DATA = "bench.real_data:cifar10"
EXAMPLE = torch.zeros(2, 3, 32, 32)
LEAST_RECOVERED = 2 / 3
FORMS = {
    "taylor": ["taylor", "taylor:form=fisher"],
    "hessian": ["hessian", "hessian:group=true"],
    "activation": ["activation", "activation:statistic=variance"],
}
PEER = "Torch-Pruning"
STREAM = ["conv1", "layer?.*.conv2"]  # the layers that write the residual stream


def task_of(train_images: int, test_images: int) -> Classification:
    """The first so many images of each; a multiple of 10 is stratified."""
    (images, labels), (test, answers) = real_data.cifar10("train"), real_data.cifar10("val")
    return Classification(
        train=(images[:train_images], labels[:train_images]),
        val=(test[:test_images], answers[:test_images]),
        augment="crop=4,flip",
    )


# ---------------------------------------------------------------------------------------------------------- A: repair


def repaired(given: argparse.Namespace) -> dict[str, Any]:
    """Top-1 of the original, pruned and repaired network, and the share of the loss that repair gives back."""
    task = task_of(50_000, given.test_images)
    original = capture(real_data.resnet56(), EXAMPLE)
    small = prune(
        original, macs=given.macs, criterion=given.criterion, ranking=given.ranking, task=task, seed=given.seeds[0]
    )
    began = time.perf_counter()
    whole = repair(small, original, task, images=given.images, seed=given.seeds[0])
    seconds = time.perf_counter() - began
    norms = repair(small, original, task, images=given.images, reconstruct=False, seed=given.seeds[0])
    networks = {"original": original, "pruned": small, "batch norm only": norms, "repaired": whole}
    found = {name: evaluate(network, task, batch_size=500).to_json() for name, network in networks.items()}
    lost = found["original"]["value"] - found["pruned"]["value"]
    shares = {
        name: (one["value"] - found["pruned"]["value"]) / lost if lost > 0 else 1.0 for name, one in found.items()
    }
    rows = [
        (name, *(f"{100 * number:.2f}" for number in (one["value"], *one["interval"])),
         f"{count_macs(networks[name]) / count_macs(original):.1%}",
         f"{shares[name]:.1%}" if name not in ("original", "pruned") else "")
        for name, one in found.items()
    ]  # fmt: skip
    title = (
        f"ResNet-56, CIFAR-10, {given.criterion}, {given.ranking}: {given.images} images without labels, "
        f"{seconds:.0f} s; {found['original']['samples']} test images"
    )
    show_table(title, ["", "top-1, %", "95 % from", "to", "MACs", "of the loss given back"], rows)
    return {
        "found": found,
        "macs": count_macs(small) / count_macs(original),
        "lost": lost,
        "given_back": shares["repaired"],
        "seconds": seconds,
        "layers": whole.meta["history"][-1]["facts"]["reconstructed"],
    }


# -------------------------------------------------------------------------------------------------------- B: criteria


def compared(given: argparse.Namespace) -> dict[str, Any]:
    """Top-1 over seeds for each criterion and ranking, before and after training.

    A cell is one criterion, ranking and seed.
    """
    task = task_of(given.train_images, given.test_images)
    original = capture(real_data.resnet56(), EXAMPLE).to(given.device or "cpu")
    before = evaluate(original, task, batch_size=500, progress=False).to_json()["value"]
    texts = [text for name in plugins.available("criteria") for text in FORMS.get(name, [name])]
    if given.only:
        texts = [text for text in given.only if text != PEER]
    ignore = STREAM if given.same_layers else []
    jobs: dict[tuple[str, str], Callable[[int], fx.GraphModule]] = {}
    for text in texts:
        for ranking in given.rankings:
            jobs[text, ranking] = lambda seed, text=text, ranking=ranking: prune(
                original, macs=given.macs, criterion=text, ranking=ranking, task=task, seed=seed, ignore=ignore,
                check=False, repair=given.repair,
            )  # fmt: skip
    why = ""
    library: Any = None
    if not given.only or PEER in given.only:
        try:
            library = peers.torch_pruning()
        except ImportError:
            why = "Torch-Pruning is left out: no .venv-peers; run make bench-setup"
    if library is not None:
        for name, importance in criteria_of_peer(library):
            for ranking in (one for one in given.rankings if one != "loss"):
                jobs[f"{PEER} {name}", ranking] = lambda seed, importance=importance, ranking=ranking: cut_by_peer(
                    library, importance(), ranking, given.macs, task, seed,
                )  # fmt: skip

    def made(make: Callable[[int], fx.GraphModule], seed: int) -> dict[str, Any]:
        began = time.perf_counter()
        small = make(seed).to(given.device or "cpu")
        raw = evaluate(small, task, batch_size=500, progress=False).to_json()["value"]
        options = {"epochs": given.epochs, "batch_size": 64, "lr": given.lr, "validate_every": 0, "progress": False}
        taught = train(small, task, seed=seed, device=given.device, **options)
        top = evaluate(taught, task, batch_size=500, progress=False).to_json()["value"]
        return {
            "top1": top,
            "pruned": raw,
            "macs": count_macs(small) / count_macs(original),
            "seconds": time.perf_counter() - began,
        }

    names = ("macs", "train_images", "test_images", "epochs", "lr", "same_layers", "repair", "device")
    store = Cells("pruning_accuracy", {name: getattr(given, name) for name in names}, given)
    keys = {f"{name}, {ranking}, seed {seed}": (name, ranking, seed) for seed in given.seeds for name, ranking in jobs}
    for key in store.missing(keys):
        name, ranking, seed = keys[key]
        told(f"{key}: {json.dumps(store.keep(key, made(jobs[name, ranking], seed)))}")
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for key, (name, ranking, seed) in keys.items():
        one = store.found(key)
        if one is not None:
            cell = cells.setdefault(
                (name, ranking), {"name": name, "ranking": ranking, "seeds": [], "top1": [], "pruned": [], "macs": []}
            )
            cell["seeds"].append(seed)
            for fact in ("top1", "pruned", "macs"):
                cell[fact].append(one[fact])
    whole = [cell for cell in cells.values() if len(cell["seeds"]) == len(given.seeds)]
    ranked = sorted(whole, key=lambda cell: statistics.mean(cell["top1"]), reverse=True)
    peer = next((cell for cell in ranked if cell["name"].startswith(PEER)), None)
    best = next((cell for cell in ranked if not cell["name"].startswith(PEER)), None)
    rows = [
        (name, *(told_of(cells[name, ranking]) if (name, ranking) in cells else "" for ranking in given.rankings))
        for name in dict.fromkeys(name for name, _ in cells)
    ]
    title = (
        f"ResNet-56, CIFAR-10, {1 / given.macs:.2g}x fewer MACs; top-1 in % after {given.epochs} epochs of "
        f"{given.train_images} images "
        f"(as pruned), {len(given.seeds)} seeds, {given.test_images} test images; the original has {100 * before:.2f}"
    )
    show_table(title, ["criterion", *given.rankings], rows)
    for line in filter(None, (why, f"{store.left} cells are not made yet: --resume goes on" if store.left else "")):
        told(line)
    return {
        "original": before,
        "best": best,
        "peer": peer,
        "skipped": why or None,
        "left": store.left,
        "cells": list(cells.values()),
    }


def told_of(cell: dict[str, Any]) -> str:
    tops = [100 * value for value in cell["top1"]]
    spread = f" +-{statistics.stdev(tops):.1f} of {len(tops)}" if len(tops) > 1 else ""
    return f"{statistics.mean(tops):.1f}{spread} ({100 * statistics.mean(cell['pruned']):.1f})"


def criteria_of_peer(library: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Torch-Pruning's criteria, by their names there."""
    for name in ("GroupMagnitudeImportance", "GroupTaylorImportance", "BNScaleImportance", "FPGMImportance"):
        yield name.removesuffix("Importance"), getattr(library.importance, name)


def cut_by_peer(
    library: Any, importance: Any, ranking: str, macs: float, task: Classification, seed: int
) -> fx.GraphModule:
    """The network as Torch-Pruning cuts it: the least ratio whose MACs, counted by rarefy's own counter, are within the
    target."""
    model: Any = real_data.resnet56()
    inputs, targets = next(task.batches("train", 640, shuffle_seed=seed))
    task.loss(model(inputs), targets).backward()  # Taylor's gradients
    whole = count_macs(capture(model, EXAMPLE))

    def cut(ratio: float) -> nn.Module:
        copied: Any = copy.deepcopy(model)
        for mine, other in zip(copied.parameters(), model.parameters(), strict=True):
            mine.grad = None if other.grad is None else other.grad.clone()
        stream = [
            copied.conv1,
            *(block.conv2 for stage in (copied.layer1, copied.layer2, copied.layer3) for block in stage),
        ]
        pruner = library.pruner.BasePruner(
            copied, EXAMPLE[:1], importance=importance,
            global_pruning=ranking != "local", isomorphic=ranking == "isomorphic",
            pruning_ratio=ratio, max_pruning_ratio=0.9, ignored_layers=[copied.linear, *stream],
        )  # fmt: skip
        pruner.step()
        return copied.eval()

    low, high = 0.0, 0.9
    best = cut(high)
    for _ in range(8):
        middle = (low + high) / 2
        tried = cut(middle)
        if (
            library.utils.count_ops_and_params(tried, EXAMPLE[:1])[0]
            <= macs * library.utils.count_ops_and_params(model, EXAMPLE[:1])[0]
        ):
            best, high = tried, middle
        else:
            low = middle
    graph = capture(best, EXAMPLE)
    if count_macs(graph) > 1.01 * macs * whole:
        raise InputError(f"Torch-Pruning left {count_macs(graph) / whole:.1%} of the MACs, {macs:.0%} were asked")
    return graph


# ----------------------------------------------------------------------------------------------------------- the rest


def told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option: Callable[..., Any] = parser.add_argument
    option("--criteria", action="store_true", help="B, the table of criteria, in place of A")
    option("--macs", type=float, help="share of the MACs that may stay; 0.7 for A, 0.5 for B")
    option("--criterion", default="magnitude", help="of A")
    option("--ranking", default="global", choices=RANKINGS, help="of A")
    option("--images", type=int, default=512, help="that repair looks at (A)")
    option("--test-images", type=int, help="a multiple of 10 is stratified; 10,000 for A, 1,000 for B")
    option("--train-images", type=int, default=640, help="of B")
    option("--epochs", type=int, default=1, help="of B")
    option("--lr", type=float, default=0.02, help="of B")
    option("--seeds", type=int, nargs="+", help="default: 0 1 2 for B")
    option("--same-layers", action="store_true", help="prune only what Torch-Pruning can (B)")
    option("--only", nargs="+", metavar="CHOICE", help=f"these criteria in place of all; {PEER}: all of its own (B)")
    option("--rankings", nargs="+", default=list(RANKINGS), choices=RANKINGS, help="of B")
    option("--device", help="for B")
    option("--repair", action="store_true", help="repair what rarefy prunes before it is trained (B)")
    option("--quick", action="store_true", help="B with one seed and half of the test images")
    option("--out", type=Path, metavar="FILE", help="write the JSON there too")
    option("--check", action="store_true", help="exit 1 where repair gives back less than two thirds (A)")
    add_options(parser)
    given = parser.parse_args()
    if given.check and given.criteria:
        parser.error("--check is of repair, not of --criteria")
    given.macs = given.macs or (0.5 if given.criteria else 0.7)
    given.seeds = given.seeds or ([0, 1, 2] if given.criteria and not given.quick else [0])
    given.test_images = given.test_images or ((500 if given.quick else 1000) if given.criteria else 10_000)
    return given


def main() -> int:
    given = arguments()
    began = time.perf_counter()
    try:
        real_data.resnet56(), real_data.cifar10("val")
    except DataError as error:
        told(f"skipped: {error}")
        return 2 if given.check else 0
    found = compared(given) if given.criteria else repaired(given)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    line = json.dumps(
        {
            "bench": "pruning_accuracy",
            "torch": torch.__version__,
            "minutes": (time.perf_counter() - began) / 60,
            "options": options,
            **found,
        }
    )
    print(line)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(line + "\n")
    if given.check and found["given_back"] < LEAST_RECOVERED:
        told(
            f"falls short: repair gives back {found['given_back']:.1%} of what pruning lost, below "
            f"{LEAST_RECOVERED:.1%}"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
