"""How long coupling and pruning take, and how much memory, beside Torch-Pruning's time for the same model in the same run.

    python bench/pruning_speed.py [MODEL ...] [--all] [--check] [--threads 2] [--jobs N] [--resume] [--for SECONDS]

Half of the channels of every family leave, by magnitude. "couple+prune" is from a captured graph to the smaller one: labels, scores, choice, cut. Left
out of it and told beside it: the capture (``torch.export``) and the self-check, which Torch-Pruning has not. Torch-Pruning's time is that of building its dependency graph (a forward and a backward pass) and of one pruning step, at its defaults. The best of
three runs each, for models under 3 s. Memory is the most the process held while coupling and pruning, without and with the check, weights and torch
itself included, which it held before. Each model has a process of its own, ``--jobs`` of them at a time (on a machine with cores to spare), and a row
that is kept below out/. ``--check``: ResNet-50 in 1.5 s, ViT-B/16, Swin-T and DenseNet-201 in 5 s, any other in 15 s, each in 15 s and 4 GB with the
check, and a median ratio of at most 1.5.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.cells import Cells, add_options
from bench.zoo import torchvision_model, usable
from rarefy import capture, prune
from rarefy.terminal import show_table

LIMITS = {"resnet50": 1.5, "vit_b_16": 5.0, "swin_t": 5.0, "densenet201": 5.0}
LIMIT, GIGABYTES, RATIO = 15.0, 4.0, 1.5
PEER_SECONDS = 120


def best(run: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> float:
    """Seconds: the best of three if the first takes less than 3 s."""
    taken: list[float] = []
    while not taken or (taken[0] < 3 and len(taken) < 3):
        prepare()
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def theirs(name: str, inputs: tuple[Tensor, ...]) -> float:
    import torch_pruning

    made: list[nn.Module] = []

    def run() -> None:
        model = made.pop()
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        pruner = torch_pruning.pruner.MagnitudePruner(
            model,
            tuple(one[:1] for one in inputs),
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=last,
        )
        pruner.step()

    return best(run, lambda: made.append(torchvision_model(name)[0].eval()))


def memory(field: str) -> float:
    """GB the process holds (VmRSS), or held at most (VmHWM)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status[field].split()[0]) * 1024 / 1e9


def measured(name: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, candidates = torchvision_model(name)
    inputs = usable(model.eval(), [one for one in candidates if one[0].shape[-1] >= 224] or candidates)
    began = time.perf_counter()
    graph = capture(model, inputs)
    facts: dict[str, Any] = {"input": list(inputs[0].shape[1:]), "capture_s": time.perf_counter() - began}
    facts["parameters"] = sum(parameter.numel() for parameter in graph.parameters())
    del model
    gc.collect()
    facts["before_gigabytes"] = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most memory is counted from here
    facts["seconds"] = best(lambda: prune(graph, keep=0.5, ranking="local", check=False))
    facts["gigabytes"] = memory("VmHWM")
    gc.collect()
    facts["with_check_s"] = best(lambda: prune(graph, keep=0.5, ranking="local"))
    facts["with_check_gigabytes"] = memory("VmHWM")
    return facts


def peer(name: str, seconds: float) -> dict[str, Any]:
    """Torch-Pruning's time, and ours as a share of it."""
    model, candidates = torchvision_model(name)
    inputs = usable(model.eval(), [one for one in candidates if one[0].shape[-1] >= 224] or candidates)
    try:
        taken = theirs(name, inputs)
    except ImportError:
        return {"torch_pruning": "not installed"}
    except Exception as error:
        return {"torch_pruning": f"fails: {' '.join(str(error).split())[:80] or type(error).__name__}"}
    return {"torch_pruning_s": taken, "ratio": seconds / taken}


def cell(facts: dict[str, Any], key: str) -> str:
    return f"{facts[key]:.2f}" if key in facts else facts.get("torch_pruning", "") if key == "torch_pruning_s" else ""


def send(name: str, threads: int, pipe: Any) -> None:
    """Ours, and then the peer's: what the peer does to the process takes nothing of ours away."""
    try:
        facts = measured(name, threads)
    except Exception as error:
        return pipe.send({"error": " ".join(str(error).split())[:200] or type(error).__name__})
    pipe.send(facts)
    pipe.send(peer(name, facts["seconds"]))


def apart(name: str, threads: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(name, threads, sender), daemon=True)
    process.start()
    sender.close()
    facts: dict[str, Any] = {}
    try:
        facts = receiver.recv()
        if "error" not in facts:
            facts |= receiver.recv() if receiver.poll(PEER_SECONDS) else {"torch_pruning": f"not done in {PEER_SECONDS} s"}
    except EOFError:
        facts |= {"torch_pruning": "fails: its process died"} if facts else {"error": "its process died"}
    process.kill()
    process.join()
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {', '.join(LIMITS)}")
    parser.add_argument("--all", action="store_true", help="every model of torchvision")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit 1 where it falls short")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    add_options(parser)
    given = parser.parse_args()
    names = list(given.models) or list(LIMITS)
    if given.all:
        import torchvision

        names = list(torchvision.models.list_models())
    cells = Cells("pruning_speed", {"torch": torch.__version__, "threads": given.threads, "jobs": given.jobs}, given)

    def row(name: str) -> None:
        for missing in cells.missing([name]):  # looked at when its turn comes: the time may be over
            print(name, json.dumps(cells.keep(missing, apart(missing, given.threads))), file=sys.stderr, flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(row, names))
    found: dict[str, dict[str, Any]] = {name: kept for name in names if (kept := cells.found(name)) is not None}
    short = []
    for name, one in found.items():
        if "error" in one:
            short.append(f"{name}: {one['error']}")
            continue
        if one["seconds"] > LIMITS.get(name, LIMIT):
            short.append(f"{name}: {one['seconds']:.1f} s")
        if one["with_check_s"] > LIMIT:
            short.append(f"{name}: {one['with_check_s']:.1f} s with the check")
        if one["with_check_gigabytes"] > GIGABYTES:
            short.append(f"{name}: {one['with_check_gigabytes']:.1f} GB, {one['before_gigabytes']:.1f} of it before")
    ratios = [one["ratio"] for one in found.values() if "ratio" in one]
    median = statistics.median(ratios) if ratios else None
    if median is not None and median > RATIO:
        short.append(f"median ratio {median:.2f}")
    columns = ("capture_s", "seconds", "with_check_s", "before_gigabytes", "gigabytes", "with_check_gigabytes", "torch_pruning_s", "ratio")
    show_table(
        f"half of the channels, {given.threads} threads, torch {torch.__version__}",
        ["model", "capture s", "couple+prune s", "with check s", "GB before", "GB", "GB with check", "Torch-Pruning s", "ratio"],
        [
            [name, *(cell(one, key) for key in columns)] if "error" not in one else [name, one["error"], *[""] * 7]
            for name, one in found.items()
        ],
        range(1, 9),
    )
    if cells.left:
        print(f"{cells.left} of {len(names)} not run yet: --resume goes on")
    print(
        f"median ratio to Torch-Pruning: {median:.2f} over {len(ratios)} models"
        if median is not None
        else "Torch-Pruning: skipped, none timed"
    )
    line = json.dumps(
        {
            "bench": "pruning_speed",
            "torch": torch.__version__,
            "threads": given.threads,
            "models": found,
            "median_ratio": median,
            "short": short,
        }
    )
    print(line)
    if given.out:
        given.out.write_text(line + "\n")
    for one in short:
        print(f"falls short: {one}", file=sys.stderr)
    return 1 if given.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
