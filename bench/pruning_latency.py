"""``prune(speedup=2)``: is the network really twice as fast on ONNX Runtime, and does it keep more than a MACs target
of the same speed?

    python bench/pruning_latency.py [--only resnet50] [--speedup 2] [--threads 1] [--check]

ResNet-50, MobileNetV3-Large (torchvision) and ViT-Tiny (timm), random weights of seed 0: no time depends on them.
Float, batch 1, 224x224. After the pruning, both files are exported again and timed again, taking turns (the figure that
counts is this one, not the one the pruning went by). The MACs target is bisected until its network is as fast within 3
%. Channels are counted as outputs of convolutions and linear layers.

``--check`` exits 1 where the measured speed-up is not within 0.95 and 1.15 times what was asked, or a MACs target of
that speed keeps as many channels.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rarefy import capture, prune
from rarefy.cli.terminal import show_table
from rarefy.deployment import latency
from rarefy.errors import InputError
from rarefy.graph.nodes import example_inputs

BAND, SAME, ROUNDS = (0.95, 1.15), 0.03, 6


def _torchvision(name: str) -> nn.Module:
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)()
    return model


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: _torchvision("resnet50"),
    "mobilenet_v3_large": lambda: _torchvision("mobilenet_v3_large"),
    "vit_tiny_patch16_224": lambda: _timm("vit_tiny_patch16_224"),
}


def kept(small: fx.GraphModule) -> float:
    """Share of the outputs of convolutions and linear layers."""
    channels = small.meta["history"][-1]["facts"]["channels"].values()
    return float(sum(after for _, after in channels) / sum(before for before, _ in channels))


class Clock:
    """Times as fast as the original, each time from a run in which both take turns."""

    def __init__(self, graph: fx.GraphModule, threads: int, folder: Path):
        self.runtime, self.folder = latency.with_threads("onnxruntime", threads), folder
        self.example = example_inputs(graph, batch=1)[0]
        self.original = self.runtime.export(graph, folder / "original.onnx")

    def __call__(self, small: fx.GraphModule) -> dict[str, float]:
        files = {"original": self.original, "pruned": self.runtime.export(small, self.folder / "small.onnx")}
        found: dict[str, float] = latency.timed(files, self.example, runtime=self.runtime)["pruned"]["speedup"][
            "original"
        ]
        return found


def by_macs(graph: fx.GraphModule, clock: Clock, speed: float, start: float) -> tuple[fx.GraphModule, float, float]:
    """The network of a MACs target that is as fast, the target, and how fast it is."""
    low, high, share = 0.0, 1.0, start
    tried: list[tuple[float, float, float, fx.GraphModule]] = []
    for _ in range(ROUNDS):
        try:
            small = prune(graph, macs=share, check=False)
        except InputError:  # below what the floor of each layer leaves
            low, share = share, (share + high) / 2
            continue
        found = clock(small)["median"]
        tried.append((abs(found / speed - 1), share, found, small))
        if abs(found / speed - 1) <= SAME:
            break
        low, high = (low, share) if found < speed else (share, high)
        guess = share * found / speed
        share = guess if low < guess < high else (low + high) / 2
    _, share, found, small = min(tried, key=lambda one: one[0])
    return small, share, found


def one(name: str, speedup: float, threads: int) -> dict[str, Any]:
    torch.manual_seed(0)
    graph = capture(MODELS[name]().eval(), torch.randn(2, 3, 224, 224))
    begun = time.perf_counter()
    small = prune(graph, speedup=speedup, runtime="onnxruntime", threads=threads)
    seconds = time.perf_counter() - begun
    facts = small.meta["history"][-1]["facts"]
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(graph, threads, Path(folder))
        measured = clock(small)
        other, share, found = by_macs(graph, clock, measured["median"], facts["reached"]["macs"])
    return {
        "model": name,
        "asked": speedup,
        "measured": measured["median"],
        "quartiles": [measured["low"], measured["high"]],
        "rounds": facts["latency"]["rounds"],
        "from_cache": facts["latency"]["table"]["from_cache"],
        "seconds": seconds,
        "kept": kept(small),
        "macs": facts["reached"]["macs"],
        "by_macs": {"target": share, "measured": found, "kept": kept(other)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Pruning to a measured latency.")
    parser.add_argument("--only", choices=[*MODELS], action="append", help="this model; may be given more than once")
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal is missed")
    asked = parser.parse_args()
    found = []
    for name in asked.only or MODELS:
        try:
            found.append(one(name, asked.speedup, asked.threads))
        except ImportError as error:
            print(f"{name}: skipped, {error.name} is not installed", file=sys.stderr)
    rows = [
        (
            row["model"], f"{row['asked']:g}x",
            f"{row['measured']:.2f}x ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})", f"{row['kept']:.1%}",
            f"{row['macs']:.1%}", f"{row['by_macs']['measured']:.2f}x", f"{row['by_macs']['kept']:.1%}",
            f"{row['by_macs']['target']:.1%}",
            f"{row['seconds']:.0f} s",
        )
        for row in found
    ]  # fmt: skip
    heads = (
        "model",
        "asked",
        "measured",
        "channels kept",
        "MACs kept",
        "MACs target: measured",
        "channels kept",
        "MACs kept",
        "took",
    )
    show_table(
        "Pruning to a measured latency, ONNX Runtime float on the CPU, batch 1", heads, rows, range(1, len(heads))
    )
    print(json.dumps({"torch": torch.__version__, "threads": asked.threads, "models": found}))
    short = [
        row["model"]
        for row in found
        if not BAND[0] <= row["measured"] / row["asked"] <= BAND[1]
        or row["kept"] <= row["by_macs"]["kept"]
        or abs(row["by_macs"]["measured"] / row["measured"] - 1) > SAME
    ]
    if short:
        print(f"falls short: {', '.join(short)}", file=sys.stderr)
    return 1 if asked.check and (short or not found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
