"""How long coupling and pruning take, and how much memory, beside Torch-Pruning's time for the same model in the same
run.

    python bench/pruning_speed.py [MODEL ...] [--all] [--check] [--threads 2] [--jobs N] [--resume] [--for SECONDS]
    [--peer-seconds SECONDS]

Half of the channels of every family leave, by magnitude. "couple+prune" is from a captured graph to the smaller one:
labels, scores, choice, cut. Left out of it and told beside it: the capture (``torch.export``) and the self-check, which
Torch-Pruning has not. Torch-Pruning's time is that of building its dependency graph (a forward and a backward pass) and
of one pruning step, at its defaults. The best of three runs each, for models under 3 s; the network that a run made is
gone before the next.

Each model is captured in one process, saved, and loaded and pruned in another, so that export is left out of the memory
too: "GB before" are torch, this library and the weights, "GB" and "GB with check" the most held while pruning. "GB
captured" is what the first process held once the user's model was gone: who prunes in the same process has as much more
as that is above "GB before". ``--jobs`` models at a time, each on ``--threads`` cores of its own if there are so many,
the largest first; a row is kept below out/. ``--peer-seconds``: Torch-Pruning gets no more (0: left out). ``--check``:
ResNet-50 in 1.5 s, ViT-B/16, Swin-T and DenseNet-201 in 5 s, any other in 15 s, each in 15 s and 4 GB with the check,
and a median ratio of at most 1.5.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import peers
from bench.cells import Cells, add_options
from bench.zoo import torchvision_model, usable
from rarefy import capture, load, prune, save
from rarefy.cli.terminal import show_table

LIMITS = {"resnet50": 1.5, "vit_b_16": 5.0, "swin_t": 5.0, "densenet201": 5.0}
LIMIT, GIGABYTES, RATIO = 15.0, 4.0, 1.5
SECONDS = 300  # of a process, at most


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
    torch_pruning = peers.torch_pruning()
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


def captured(name: str, threads: int, folder: str) -> dict[str, Any]:
    """The graph of the model, saved to ``folder``."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, candidates = torchvision_model(name)
    inputs = usable(model.eval(), [one for one in candidates if one[0].shape[-1] >= 224] or candidates)
    began = time.perf_counter()
    graph = capture(model, inputs)
    facts: dict[str, Any] = {"input": list(inputs[0].shape[1:]), "capture_s": time.perf_counter() - began}
    facts["parameters"] = sum(parameter.numel() for parameter in graph.parameters())
    del model
    gc.collect()
    facts["captured_gigabytes"] = memory("VmRSS")
    save(graph, folder)
    return facts


def measured(threads: int, folder: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    graph = load(folder)
    gc.collect()
    facts = {"before_gigabytes": memory("VmRSS")}
    Path("/proc/self/clear_refs").write_text("5")  # the most memory is counted from here
    facts["seconds"] = best(lambda: prune(graph, keep=0.5, ranking="local", check=False), gc.collect)
    facts["gigabytes"] = memory("VmHWM")
    gc.collect()
    facts["with_check_s"] = best(lambda: prune(graph, keep=0.5, ranking="local"), gc.collect)
    facts["with_check_gigabytes"] = memory("VmHWM")
    return facts


def peer(name: str, threads: int, seconds: float) -> dict[str, Any]:
    """Torch-Pruning's time, and ours as a share of it."""
    torch.set_num_threads(threads)
    model, candidates = torchvision_model(name)
    inputs = usable(model.eval(), [one for one in candidates if one[0].shape[-1] >= 224] or candidates)
    try:
        taken = theirs(name, inputs)
    except ImportError:
        return {"torch_pruning": "no .venv-peers; run make bench-setup"}
    except Exception as error:
        return {"torch_pruning": f"fails: {said(error)}"}
    return {"torch_pruning_s": taken, "ratio": seconds / taken}


def said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def cell(facts: dict[str, Any], key: str) -> str:
    return f"{facts[key]:.2f}" if key in facts else facts.get("torch_pruning", "") if key == "torch_pruning_s" else ""


def send(pipe: Any, cores: Sequence[int], job: Callable[..., dict[str, Any]], *given: Any) -> None:
    warnings.simplefilter("ignore")
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        pipe.send(job(*given))
    except Exception as error:
        pipe.send({"error": said(error)})


def alone(seconds: float, cores: Sequence[int], job: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What ``job`` finds, in a process of its own, on these cores (none: on any)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(sender, cores, job, *given), daemon=True)
    process.start()
    sender.close()
    try:
        told: dict[str, Any] = {"error": f"not done in {seconds:.0f} s"}
        return receiver.recv() if receiver.poll(seconds) else told  # type: ignore[no-any-return]
    except EOFError:
        return {"error": "its process died"}
    finally:
        process.kill()
        process.join()


def apart(jobs: int, threads: int) -> list[list[int]]:
    """Cores for each of several jobs, so that none waits for another's; of no job, if there are too few."""
    cores = sorted(os.sched_getaffinity(0)) if jobs > 1 and sys.platform.startswith("linux") else []
    if len(cores) < jobs * threads:
        return [[]] * jobs
    return [cores[job * threads : (job + 1) * threads] for job in range(jobs)]


def row(name: str, threads: int, peer_seconds: float, place: Path, cores: Sequence[int]) -> dict[str, Any]:
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        facts = alone(SECONDS, cores, captured, name, threads, f"{folder}/graph")
        facts |= alone(SECONDS, cores, measured, threads, f"{folder}/graph") if "error" not in facts else {}
    if "error" in facts or not peer_seconds:
        return facts
    theirs = alone(peer_seconds, cores, peer, name, threads, facts["seconds"])
    return facts | ({"torch_pruning": theirs["error"]} if "error" in theirs else theirs)


def largest_first(names: list[str]) -> list[str]:
    """By what torchvision says of them, so that no large one begins last."""
    import torchvision

    def size(name: str) -> int:
        return max((weights.meta["num_params"] for weights in torchvision.models.get_model_weights(name)), default=0)

    return sorted(names, key=size, reverse=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {', '.join(LIMITS)}")
    parser.add_argument("--all", action="store_true", help="every model of torchvision")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit 1 where it falls short")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--peer-seconds", type=float, help="for Torch-Pruning (default: 120, with --all 20)")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    add_options(parser)
    given = parser.parse_args()
    names = list(given.models) or list(LIMITS)
    if given.all:
        import torchvision

        names = list(torchvision.models.list_models())
    peer_seconds = given.peer_seconds if given.peer_seconds is not None else 20.0 if given.all else 120.0
    options = {
        "torch": torch.__version__,
        "threads": given.threads,
        "jobs": given.jobs,
        "peer_seconds": peer_seconds,
        "processes": 2,
    }
    cells = Cells("pruning_speed", options, given)

    free = apart(given.jobs, given.threads)
    if given.jobs > 1 and not free[0]:
        print(
            f"fewer than {given.jobs} x {given.threads} cores: jobs wait for each other, times are no goal's",
            file=sys.stderr,
        )

    def make(name: str) -> None:
        for missing in cells.missing([name]):  # looked at when its turn comes: the time may be over
            cores = free.pop()
            try:
                facts = cells.keep(missing, row(missing, given.threads, peer_seconds, cells.folder, cores))
            finally:
                free.append(cores)
            print(name, json.dumps(facts), file=sys.stderr, flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(make, largest_first(names) if given.jobs > 1 else names))
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
    if cells.left:
        short.append(f"{cells.left} of {len(names)} were not run")
    titles = {
        "capture_s": "capture s",
        "seconds": "couple+prune s",
        "with_check_s": "with check s",
        "captured_gigabytes": "GB captured",
        "before_gigabytes": "GB before",
        "gigabytes": "GB",
        "with_check_gigabytes": "GB with check",
        "torch_pruning_s": "Torch-Pruning s",
        "ratio": "ratio",
    }
    show_table(
        f"half of the channels, {given.threads} threads, torch {torch.__version__}",
        ["model", *titles.values()],
        [
            [name, *(cell(one, key) for key in titles)]
            if "error" not in one
            else [name, one["error"], *[""] * (len(titles) - 1)]
            for name, one in found.items()
        ],
        range(1, len(titles) + 1),
    )
    done = [one for one in found.values() if "error" not in one]
    slow = sum(one["with_check_s"] > LIMIT for one in done)
    large = sum(one["with_check_gigabytes"] > GIGABYTES for one in done)
    print(
        f"{len(found)} models: {len(done)} pruned; with the check {slow} above {LIMIT:.0f} s, {large} above "
        f"{GIGABYTES:.0f} GB"
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
