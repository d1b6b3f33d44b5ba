"""Whole networks on the GPU at hand, by the runtime ``cuda``, beside torch.compile.

    python bench/gpu.py [--parts times accuracy pruned calibration compress] [--networks NAME ...]
        [--batches 128 8 1] [--for SECONDS] [--picture FILE] [--out FILE] [--check]

times: int8 against the float network by ``torch.compile(mode="reduce-overhead")`` in float16 and bfloat16, channels
last. Random weights, batch norm's statistics fitted to noise. All take turns; milliseconds are medians of ``--rounds``,
and a ratio is the median of those within a round. "runs in" is what the runtime chose by its own measurement; "floor"
is what int8 takes at the least: each layer that multiplies by itself, the longer of its bytes at the copy's bandwidth
and its products at ``torch._int_mm``'s speed, both measured here.
accuracy: real weights (``panel_networks``): how often the runtime's most likely class is the simulation's (of a
detector: how many of its outputs differ by at most 1 % of their variance), and what the answers are worth beside float
on the same pictures, with a paired 95 % interval. What runs, and the plan in integers where that is not what runs.
pruned: ResNet-50 with half of the MACs (channels in 16s), in float16 and in int8: how much of the product of both gains
the two together have.
calibration: seconds of ``quantize(..., device="cuda")`` on EfficientNet-Lite0, and codes that differ from the CPU's.
compress: ``rarefy.compress(..., runtime="cuda")`` of ResNet-56 on CIFAR-10, shortly trained: what was measured where.

Each result is told on stderr as it comes. ``--for`` begins nothing new after that time and says what is left.
``--check`` exits 1 where a figure is worse than the bounds below (milliseconds: on an H200 alone), something failed or
was left, 2 where all was skipped. Without a GPU it says so, and checks nothing.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rarefy import Budget, capture, compress, prune, quantize
from rarefy.cli.terminal import show_table
from rarefy.errors import DataError, MissingDependency, RarefyError, first_line
from rarefy.graph.macs import layer_macs
from rarefy.graph.nodes import on_device
from rarefy.graph.shapes import shapes
from rarefy.models import load as sources
from rarefy.runtimes.cuda import Cuda, Session
from rarefy.tasks.intervals import paired_drop

PARTS = ("times", "accuracy", "pruned", "calibration", "compress")
NETWORKS = {  # by timm's names
    "ResNet-50": "resnet50",
    "ResNet-18": "resnet18",
    "MobileNetV3-Large": "mobilenetv3_large_100",
    "EfficientNet-Lite0": "efficientnet_lite0",
    "ViT-Small": "vit_small_patch16_224",
    "RegNetY-032": "regnety_032",
}
REAL = ("efficientnet-lite0", "mobilenetv2", "resnet56", "yolox-nano")
DEVICE = "cuda"
PEERS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SIDE, IMAGES, CALIBRATION = 224, 32, 128

# What is to be shown.
H200 = "H200"
MOST_MS = {("ResNet-50", 128): 2.0}  # on an H200
MOST_OF_HALF = {("ResNet-50", 8): 0.65, ("ResNet-50", 1): 0.80, ("ViT-Small", 128): 0.75}
LARGE, MOST_AT_LARGE, NEVER_ABOVE = 128, 0.65, 1.0
NOISE = 1.01  # what two runs of one program differ by
LEAST_AGREEMENT, LEAST_OF_PRODUCT, MOST_SECONDS, MOST_OFF = 0.999, 0.8, 6.0, 1e-4

Call = Callable[[], object]


# ------------------------------------------------------------------------------------------------------------ turns


def milliseconds(call: Call, times: int) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begun.record()
    for _ in range(times):
        call()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / times


def turns(calls: Mapping[str, Call], rounds: int, seconds: float = 0.01) -> dict[str, list[float]]:
    """Milliseconds of a call in each round; in a round each is called for about so long, beginning with another."""
    names, found = list(calls), {name: list[float]() for name in calls}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times = 3 if not turn else max(2, round(seconds * 1e3 / max(found[name][0], 1e-3)))
            found[name].append(milliseconds(calls[name], times))
    return {name: some[1:] for name, some in found.items()}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def speeds() -> dict[str, float]:
    """Bytes read and written a second by a copy, int8 and float16 operations a second by the kept libraries."""
    source = torch.empty(2**28, dtype=torch.float32, device=DEVICE)
    into = torch.empty_like(source)
    a, b = (torch.ones(8192, 8192, dtype=torch.int8, device=DEVICE) for _ in range(2))
    x, y = (torch.ones(8192, 8192, dtype=torch.float16, device=DEVICE) for _ in range(2))
    calls: dict[str, Call] = {
        "copy": lambda: into.copy_(source), "int8": lambda: torch._int_mm(a, b.T), "float16": lambda: x @ y.T,
    }  # fmt: skip
    ms = {name: statistics.median(some) for name, some in turns(calls, 5).items()}
    products = 2 * 8192**3
    return {
        "copy": 8 * source.numel() / ms["copy"] * 1e3,
        **{name: products / ms[name] * 1e3 for name in ("int8", "float16")},
    }


def floor_ms(graph: fx.GraphModule, batch: int, speed: Mapping[str, float]) -> float:
    """What the layers that multiply take in int8 at the least, each by itself."""
    found, seconds = shapes(graph, 1), 0.0
    macs = layer_macs(graph, found)
    for node in graph.graph.nodes:
        if node.name in macs:
            moved = sum(
                found[one].numel() * (1 if one.op == "get_attr" else batch) for one in (*node.all_input_nodes, node)
            )
            seconds += max(moved / speed["copy"], 2 * macs[node.name] * batch / speed["int8"])
    return 1e3 * seconds


# --------------------------------------------------------------------------------------------------------- networks


def fitted(model: nn.Module, shape: Sequence[int] = (IMAGES, 3, SIDE, SIDE)) -> nn.Module:
    """Random weights whose values stay in range: batch norm's statistics of noise."""
    model = model.to(DEVICE).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(*shape, device=DEVICE))
    return model.cpu().eval()


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return fitted(importlib.import_module("timm").create_model(NETWORKS[name], pretrained=False))


def noise(count: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def in_int8(graph: fx.GraphModule) -> fx.GraphModule:
    batches = list(noise(IMAGES).split(16))
    small: fx.GraphModule = quantize(
        graph, batches=batches, images=IMAGES, runtime="cuda", device=DEVICE, progress=False
    )
    return small


def compiled(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """What a user gets today."""
    module = copy.deepcopy(model).to(DEVICE, dtype).to(memory_format=torch.channels_last)
    given = x.to(dtype).contiguous(memory_format=torch.channels_last)
    made = torch.compile(module, mode="reduce-overhead", dynamic=False)

    def call() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return made(given)

    for _ in range(3):
        call()
    return call


def planned(session: Session, x: Tensor) -> tuple[Call, dict[str, Any]]:
    """The call, and what it runs in."""
    session.on_gpu(x)
    return lambda: session.on_gpu(x), dict(list(session.ran.values())[-1])


class Saved:
    """Networks made once, in float, and in int8 as the runtime's file."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.kept: dict[str, tuple[nn.Module, fx.GraphModule, fx.GraphModule, Session]] = {}

    def __call__(self, name: str) -> tuple[nn.Module, fx.GraphModule, fx.GraphModule, Session]:
        """The module, its graph, the simulation, and the opened file."""
        if name not in self.kept:
            model = network(name)
            graph = capture(model, noise(2))
            small = in_int8(graph)
            self.kept[name] = (model, graph, small, Session(Cuda().export(small, self.home / f"{name}.cuda")))
        return self.kept[name]


# ------------------------------------------------------------------------------------------------------------ parts


def times(name: str, batch: int, saved: Saved, speed: Mapping[str, float], given: argparse.Namespace) -> dict[str, Any]:
    model, graph, small, session = saved(name)
    x = noise(batch).to(DEVICE)
    ours, ran = planned(session, x)
    few = x[:8]
    with torch.no_grad():
        wanted = on_device(small, torch.device(DEVICE))(few)
    answer = session.on_gpu(x)[0][: len(few)]
    off = float((answer.float() - wanted).abs().max() / wanted.abs().max())
    calls = {"rarefy": ours, **{peer: compiled(model, x, PEERS[peer]) for peer in given.against}}
    found = turns(calls, given.rounds)
    return {
        "network": name,
        "batch": batch,
        "ms": {one: statistics.median(some) for one, some in found.items()},
        "ratio": {peer: ratio(found["rarefy"], found[peer]) for peer in given.against},
        "ran": ran,
        "off": off,
        "floor_ms": floor_ms(graph, batch, speed),
    }


def in_batches(call: Callable[[Tensor], Sequence[Tensor] | Tensor], x: Tensor, batch: int) -> list[Tensor]:
    """All outputs; the last batch is filled up, so that one plan serves."""
    parts: list[list[Tensor]] = []
    for some in x.split(batch):
        full = torch.cat([some, some[:1].expand(batch - len(some), *some.shape[1:])])
        answers = call(full)
        rows = [answers] if isinstance(answers, Tensor) else list(answers)
        parts.append([one[: len(some)].float().cpu() for one in rows])
    return [torch.cat(one) for one in zip(*parts, strict=True)]


def agreement(found: Sequence[Tensor], wanted: Sequence[Tensor], classes: bool) -> float:
    if classes:
        return float((found[0].argmax(1) == wanted[0].argmax(1)).double().mean())
    same = torch.ones(len(found[0]), dtype=torch.bool)
    for ours, theirs in zip(found, wanted, strict=True):
        away = (ours - theirs).flatten(1).double().pow(2).mean(1)
        same &= away <= 0.01 * theirs.flatten(1).double().var(1)
    return float(same.double().mean())


def accuracy(name: str, saved: Saved, given: argparse.Namespace) -> dict[str, Any]:
    from bench import panel_networks, parity

    of = panel_networks.networks()[name]
    source = of.model()
    model = sources.load(f"onnx:{source}").model if isinstance(source, Path) else source
    pictures, count = parity.samples(of, "train", CALIBRATION), min(given.images or of.judged, of.judged)
    graph = capture(model, tuple(one[:2] for one in pictures))
    begun = time.perf_counter()
    small = quantize(
        graph, batches=list(parity.batches(pictures)), images=CALIBRATION, runtime="cuda", device=DEVICE, progress=False
    )
    seconds = time.perf_counter() - begun
    session = Session(Cuda().export(small, saved.home / f"{name}.cuda"))
    (x,), batch = parity.samples(of, "val", count), given.batch
    answers = {"rarefy": in_batches(session.on_gpu, x, batch)}
    ran = dict(list(session.ran.values())[-1])
    if ran["form"] != "int8":
        first = x[:1].expand(batch, *x.shape[1:]).contiguous().to(DEVICE)
        with torch.no_grad():
            program = session.integer([first])
            answers["int8"] = in_batches(lambda some: program(some.to(DEVICE)), x, batch)
    for what, one in (("simulation", small), ("float", graph)):
        there = on_device(one, torch.device(DEVICE))
        with torch.no_grad():
            answers[what] = in_batches(lambda some, there=there: there(some.to(DEVICE)), x, batch)
    classes = of.labels is not None
    same = {one: agreement(answers[one], answers["simulation"], classes) for one in answers if one != "simulation"}
    return {
        "network": name, "samples": len(x), "batch": batch, "ran": ran, "agreement": same, "quantize_s": seconds,
        "worth": _worth(of, answers, count),
    }  # fmt: skip


def _worth(of: Any, answers: Mapping[str, Sequence[Tensor]], count: int) -> dict[str, Any]:
    """Top-1 and its paired drop, or average precision, in percent."""
    if of.labels is None:
        try:
            return {name: {"ap": of.score([one.numpy() for one in some])} for name, some in answers.items()}
        except MissingDependency as error:
            return {name: {"skipped": first_line(error)} for name in answers}
    labels = torch.from_numpy(np.asarray(of.labels(count)))
    right = {name: some[0].argmax(1) == labels for name, some in answers.items()}
    found: dict[str, Any] = {}
    for name, ours in right.items():
        lost, gained = int((right["float"] & ~ours).sum()), int((ours & ~right["float"]).sum())
        drop, interval = paired_drop(lost, gained, len(labels))
        found[name] = {"top1": 100 * float(ours.double().mean()), "drop": 100 * drop, "lost": lost, "gained": gained,
                       "interval": [100 * end for end in interval]}  # fmt: skip
    return found


def pruned(batch: int, saved: Saved, given: argparse.Namespace) -> dict[str, Any]:
    model, graph, _, session = saved("ResNet-50")
    x = noise(batch).to(DEVICE)
    half = prune(graph, macs=0.5, round_to=16, progress=False)
    both = Session(Cuda().export(in_int8(half), saved.home / "pruned.cuda"))
    ours, ran = planned(session, x)
    small, small_ran = planned(both, x)
    calls = {
        "float16": compiled(model, x, torch.float16), "pruned": compiled(half, x, torch.float16),
        "int8": ours, "pruned, int8": small,
    }  # fmt: skip
    found = turns(calls, given.rounds)
    gains = {name: ratio(found["float16"], found[name]) for name in calls}
    return {
        "batch": batch, "ms": {name: statistics.median(some) for name, some in found.items()}, "gains": gains,
        "ran": {"int8": ran, "pruned, int8": small_ran},
        "of_product": gains["pruned, int8"] / (gains["pruned"] * gains["int8"]),
    }  # fmt: skip


def codes(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Weights' codes by name."""
    return {name: one.cpu() for name, one in graph.state_dict().items() if one.dtype in (torch.int8, torch.uint8)}


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Codes that differ, and by how much at the most; by names that one of them lacks."""
    both = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    away = torch.cat([(ours[name].int() - theirs[name].int()).abs().flatten() for name in both])
    unlike = sorted({*ours, *theirs} - set(both))
    return {"codes": away.numel(), "share": float((away > 0).double().mean()), "largest": int(away.max()),
            "unlike": unlike}  # fmt: skip


def calibration() -> dict[str, Any]:
    """Twice on the GPU: the first time its kernels are compiled."""
    what = "real weights"
    try:
        from bench import panel_networks, parity

        of = panel_networks.networks()["efficientnet-lite0"]
        graph, given = capture(of.model(), noise(2)), parity.samples(of, "train", CALIBRATION)[0]
    except (RarefyError, ImportError, OSError) as error:
        what = f"random weights and noise ({first_line(error)})"
        graph, given = capture(network("EfficientNet-Lite0"), noise(2)), noise(CALIBRATION)
    found, seconds = {}, {}
    for name, device in (("first", DEVICE), ("gpu", DEVICE), ("cpu", "cpu")):
        begun = time.perf_counter()
        small = quantize(
            graph, batches=list(given.split(16)), images=len(given), runtime="cuda", device=device, progress=False
        )
        seconds[name], found[name] = time.perf_counter() - begun, codes(small)
    return {"network": "EfficientNet-Lite0", "weights": what, "images": len(given), "seconds": seconds,
            "codes": apart(found["gpu"], found["cpu"])}  # fmt: skip


def compressed(saved: Saved) -> dict[str, Any]:
    """A short run: that gates measure on the GPU, and what is told of it. (In 16s, layers of 16 channels stay.)"""
    from bench import panel_networks, real_data

    steps = [
        {"do": "prune", "macs": 0.7, "round_to": 16}, {"do": "distill", "steps": 200, "batch_size": 256},
        {"do": "quantize"},
    ]  # fmt: skip
    begun = time.perf_counter()
    result = compress(
        real_data.resnet56(), panel_networks.cifar_task(), budget=Budget(max_drop=0.5), steps=steps, runtime="cuda",
        device=DEVICE, corruptions=(), workdir=saved.home / "compress", progress=False,
    )  # fmt: skip
    return {"network": "ResNet-56", "seconds": time.perf_counter() - begun, "met": result.met, "told": str(result)}


# ----------------------------------------------------------------------------------------------------- what is short


def most(name: str, batch: int) -> float:
    """Of float16's time."""
    if (name, batch) in MOST_OF_HALF:
        return MOST_OF_HALF[name, batch]
    return MOST_AT_LARGE if batch >= LARGE else NEVER_ABOVE


def unplanned(facts: Mapping[str, Any]) -> list[str]:
    """Where the runtime made no plan in integers, which is a fault and not a choice."""
    ran = {f"{row['network']}, batch {row['batch']}": row["ran"]
           for part in ("times", "accuracy") for row in facts.get(part, [])}  # fmt: skip
    for row in facts.get("pruned", []):
        ran |= {f"ResNet-50 {name}, batch {row['batch']}": one for name, one in row["ran"].items()}
    return [f"{name}: no plan in int8: {one['why']}" for name, one in ran.items() if "why" in one]


def shortfalls(facts: Mapping[str, Any]) -> list[str]:
    short = [f"{name}: {why}" for name, why in facts["failed"].items()] + unplanned(facts)
    short += [f"{name}: not begun, the time was over" for name in facts["left"]]
    for row in facts.get("times", []):
        name, batch, ours = row["network"], row["batch"], row["ratio"].get("float16")
        what, bound = f"{name}, batch {batch}", MOST_MS.get((name, batch))
        if bound is not None and H200 in facts["device"]:
            short += [f"{what}: {row['ms']['rarefy']:.3f} ms, at most {bound}"] * (row["ms"]["rarefy"] > bound)
        elif ours is not None and ours > most(name, batch) * (NOISE if most(name, batch) == NEVER_ABOVE else 1):
            short.append(f"{what}: {ours:.3f} of float16's time, at most {most(name, batch)}")
    for row in facts.get("accuracy", []):
        for form in ("rarefy", "int8"):
            share = row["agreement"].get(form, 1.0)
            if (form == "int8" or row["ran"]["form"] == "int8") and share < LEAST_AGREEMENT:
                short.append(f"{row['network']}, {form}: {share:.2%} as the simulation, at least {LEAST_AGREEMENT:.1%}")
    for row in facts.get("pruned", []):
        if row["of_product"] < LEAST_OF_PRODUCT:
            short.append(f"pruned and int8, batch {row['batch']}: {row['of_product']:.2f} of the product of both gains")
    for row in facts.get("calibration", []):
        if row["seconds"]["gpu"] > MOST_SECONDS:
            short.append(f"calibration: {row['seconds']['gpu']:.1f} s, at most {MOST_SECONDS}")
        told = row["codes"]
        if told["unlike"] or told["share"] > MOST_OFF or told["largest"] > 1:
            short.append(f"calibration: {told['share']:.1e} of the codes differ from the CPU's, by {told['largest']}")
    return short


# ------------------------------------------------------------------------------------------------------------- shown


def shown(facts: Mapping[str, Any], against: Sequence[str]) -> None:
    where = f"{facts['device']}, torch {facts['torch']}"
    if rows := facts.get("times"):
        table = [
            (
                row["network"], row["batch"], f"{row['ms']['rarefy']:.3f}", row["ran"]["form"],
                *(f"{row['ms'][peer]:.3f}" for peer in against), *(f"{row['ratio'][peer]:.3f}" for peer in against),
                f"{row['floor_ms']:.3f}", f"{row['off']:.1e}",
            )
            for row in rows
        ]  # fmt: skip
        columns = ["network", "batch", "rarefy, ms", "runs in", *(f"{peer}, ms" for peer in against),
                   *(f"of {peer}" for peer in against), "floor, ms", "off"]  # fmt: skip
        show_table(f"Whole networks: {where}", columns, table, numbers=(1, 2, *range(4, len(columns))))
    if rows := facts.get("accuracy"):
        table = [
            (row["network"], row["samples"], one, row["ran"]["form"] if one == "rarefy" else "",
             f"{row['agreement'].get(one, 1):.2%}", _worth_text(worth))
            for row in rows for one, worth in row["worth"].items()
        ]  # fmt: skip
        columns = ["network", "samples", "what", "runs in", "as the simulation", "top-1 or AP, %; paired drop"]
        show_table(f"Real weights: {where}", columns, table, numbers=(1, 4))
    if rows := facts.get("pruned"):
        table = [
            (row["batch"], *(f"{row['ms'][name]:.3f}" for name in row["ms"]), f"{row['of_product']:.2f}")
            for row in rows
        ]
        columns = ["batch", *(f"{name}, ms" for name in rows[0]["ms"]), "of the product"]
        show_table(f"ResNet-50 with half of its MACs: {where}", columns, table, numbers=range(len(columns)))
    for row in facts.get("calibration", []):
        told, seconds = row["codes"], row["seconds"]
        print(f"quantize(device={DEVICE!r}), EfficientNet-Lite0, {row['weights']}, {row['images']} images: "
              f"{seconds['gpu']:.1f} s (the first time {seconds['first']:.1f}; on the CPU {seconds['cpu']:.1f}); "
              f"{told['share']:.1e} of {told['codes']:,} codes differ, by {told['largest']} at the most")  # fmt: skip
    for row in facts.get("compress", []):
        print(f"compress(runtime='cuda'), ResNet-56, {row['seconds']:.0f} s:\n{row['told']}")


def _worth_text(worth: Mapping[str, Any]) -> str:
    if "skipped" in worth:
        return f"skipped: {worth['skipped']}"
    if "ap" in worth:
        return f"{worth['ap']:.2f}"
    low, high = worth["interval"]
    return f"{worth['top1']:.2f}; {worth['drop']:.2f} ({low:.2f} to {high:.2f})"


def picture(rows: Sequence[Mapping[str, Any]], path: Path, device: str) -> str:
    """Time an image against the batch; returns why there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        return "picture: matplotlib is not installed"
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plot = importlib.import_module("matplotlib.pyplot")
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plot.subplots(1, len(names), figsize=(3.2 * len(names), 3.4), squeeze=False, layout="constrained")
    for name, axis in zip(names, axes[0], strict=True):
        of = sorted((row for row in rows if row["network"] == name), key=lambda row: row["batch"])
        for one in of[0]["ms"]:
            axis.plot([row["batch"] for row in of], [row["ms"][one] for row in of], marker="o", label=one)
        axis.plot([row["batch"] for row in of], [row["floor_ms"] for row in of], "k:", label="floor")
        axis.set(title=name, xscale="log", yscale="log", xlabel="batch")
    axes[0][0].set_ylabel("ms a batch")
    axes[0][0].legend(fontsize="small")
    figure.suptitle(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plot.close(figure)
    return ""


# -------------------------------------------------------------------------------------------------------------- main


def arguments(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    option = parser.add_argument
    option("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    option("--networks", nargs="+", choices=[*NETWORKS, *REAL], default=[*NETWORKS, *REAL], metavar="NAME")
    option("--batches", type=int, nargs="+", default=[128, 8, 1])
    option("--against", nargs="+", choices=list(PEERS), default=list(PEERS))
    option("--rounds", type=int, default=9)
    option("--batch", type=int, default=50, help="of the part accuracy")
    option("--images", type=int, help="that accuracy judges; default: all there are")
    option("--for", type=float, default=float("inf"), dest="seconds", help="begin nothing new after so many seconds")
    option("--picture", type=Path, default=Path(__file__).resolve().parents[1] / "out" / "gpu.png")
    option("--out", type=Path, metavar="FILE", help="write the JSON there too, after each result")
    option("--check", action="store_true")
    return parser.parse_args(args)


def jobs(given: argparse.Namespace, saved: Saved, speed: Mapping[str, float]) -> Iterator[tuple[str, str, Call]]:
    """Part, name and what makes the result."""
    float_names = [name for name in given.networks if name in NETWORKS]
    for part in given.parts:
        if part == "times":
            for batch in given.batches:
                for name in float_names:
                    yield part, f"{name}, batch {batch}", lambda n=name, b=batch: times(n, b, saved, speed, given)
        elif part == "accuracy":
            for name in (name for name in given.networks if name in REAL):
                yield part, name, lambda n=name: accuracy(n, saved, given)
        elif part == "pruned":
            for batch in [batch for batch in given.batches if batch > 1] or given.batches:
                yield part, f"ResNet-50 pruned, batch {batch}", lambda b=batch: pruned(b, saved, given)
        elif part == "calibration":
            yield part, "EfficientNet-Lite0", calibration
        else:
            yield part, "ResNet-56", lambda: compressed(saved)


def measured(given: argparse.Namespace, facts: dict[str, Any]) -> None:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rarefy-gpu-") as folder:
        saved, facts["speed"] = Saved(Path(folder)), speeds()
        for part, name, make in jobs(given, saved, facts["speed"]):
            if time.monotonic() - begun > given.seconds:
                facts["left"].append(f"{part}: {name}")
                continue
            torch._dynamo.reset()  # it compiles one class eight times at the most, then none any more
            try:
                row = make()
                facts.setdefault(part, []).append(row)
                told = json.dumps(row, default=str)
            except (DataError, MissingDependency, ImportError) as error:  # what is not here
                told = f"skipped: {first_line(error)}"
                facts["skipped"].append(f"{part}: {name}: {first_line(error)}")
            except Exception as error:  # one network's failure is a row of its own, not the end of the others
                told = f"failed: {type(error).__name__}: {first_line(error)}"
                facts["failed"][f"{part}: {name}"] = told[8:]
            print(f"[{time.monotonic() - begun:.0f} s] {part}: {name}: {told}", file=sys.stderr, flush=True)
            if given.out:
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(facts, default=str) + "\n")
            torch.cuda.empty_cache()


def main() -> int:
    given = arguments()
    facts: dict[str, Any] = {
        "bench": "gpu", "torch": torch.__version__, "skipped": [], "failed": {}, "left": [],
    }  # fmt: skip
    if not torch.cuda.is_available():
        print("skipped: there is no NVIDIA GPU that torch can use; nothing was measured")
        print(json.dumps({**facts, "skipped": ["all: no GPU"]}))
        return 0
    missing = [one for one in ("cudnn", "triton") if importlib.util.find_spec(one) is None]
    if missing:
        print(f"skipped: {' and '.join(missing)} not installed; pip install 'rarefy[cuda]'; nothing was measured")
        print(json.dumps({**facts, "skipped": [f"all: no {' and '.join(missing)}"]}))
        return 0
    torch.backends.cudnn.allow_tf32 = False  # of the simulation
    facts["device"] = torch.cuda.get_device_name()
    measured(given, facts)
    if facts.get("times") and (why := picture(facts["times"], given.picture, facts["device"])):
        facts["skipped"].append(why)
    shown(facts, given.against)
    print("measured here: " + ", ".join(
        [f"copy {facts['speed']['copy'] / 1e12:.2f} TB/s"]
        + [f"{name} {facts['speed'][name] / 1e12:.0f} Tops" for name in ("int8", "float16")]
    ))  # fmt: skip
    for one in facts["skipped"]:
        print(f"skipped: {one}")
    facts["short"] = shortfalls(facts)
    print(json.dumps(facts, default=str))
    for one in facts["short"]:
        print(f"falls short: {one}", file=sys.stderr)
    if given.check and not any(facts.get(part) for part in PARTS):
        return 2
    return 1 if given.check and facts["short"] else 0


if __name__ == "__main__":
    sys.exit(main())
