"""Our kernels on the GPU at hand, beside what is there otherwise: linear layers of few bits, and what reads whole
tensors once.

    python bench/gpu_kernels.py [--check] [--batches 1 4 16 64 256] [--shapes 4096x4096 11008x4096] [--only linear]

Linear layers (outputs x inputs, a scale for each 128 inputs, float16 activations): cuBLAS in float16, torch's 4-bit
kernel (tinygemm, bfloat16), gemlite where it is installed, ``torch._int_mm``, and ours. Microseconds of a call inside
of a CUDA graph of 12 calls, each with weights of its own, so that no cache holds them; all take turns, and the median
of ``--rounds`` counts. "4 bits, planned" is what a program planned for a batch runs (``low_bit.linear.planned``): from
more rows on than the kernel is for, cuBLAS on a decoded copy that is kept, which takes float16's memory.

Whole tensors (a batch of 16 pictures of 1920 x 1080, float32, noise and drawn ones): bytes read and written a second,
over those of ``copy_`` in the same turns.

``--check`` exits 1 where a figure is worse than the bounds below, answers are off, or rounding at random is biased.
Without a GPU it says so, and checks nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rarefy.cli.terminal import show_table
from rarefy.kernels.low_bit import linear, packing

OPERATORS = torch.ops.rarefy
COPIES, GROUP = 12, 128
PICTURES = (16, 3, 1080, 1920)
# (outputs, batch) -> microseconds; on an H200
MOST_US = {(4096, 1): 4.0, (11008, 1): 8.0, (4096, 16): 8.0, (11008, 16): 14.0}
H200 = "H200"
OF_COPY = 0.85
W2_OVER_W4 = 1.2
MOST_OF_HALF = {64: 1.0, 256: 1.1}
BEYOND_CHANCE = 4.5  # deviations, one in 150,000

Call = Callable[[], object]


def random(kind: str, *given: Any, **named: Any) -> Tensor:
    """``torch.KIND`` of a generator of our own: torch's belongs to the graph that is captured."""
    made: Tensor = getattr(torch, kind)(*given, device="cuda", generator=generator(), **named)
    return made


@functools.cache
def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


class Turns:
    """Calls by name; those that fail are told, not timed."""

    def __init__(self) -> None:
        self.graphs: dict[str, tuple[Call, Sequence[Call]]] = {}  # with what holds the tensors that it reads
        self.failed: dict[str, str] = {}

    def add(self, name: str, calls: Sequence[Call]) -> None:
        """calls: one after the other, as one CUDA graph."""
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for call in calls[:2]:
                    call()
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    for call in calls:
                        call()
            self.graphs[name] = (graph.replay, calls)
        except Exception as error:  # another library's kernel, which may take no such size
            torch.cuda.synchronize()
            self.failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]

    def microseconds(self, rounds: int, seconds: float = 0.002) -> dict[str, float]:
        """Of one call: the median of ``rounds``, in each of which every one is run for about ``seconds``."""
        found: dict[str, list[float]] = {name: [] for name in self.graphs}
        for turn in range(rounds + 1):
            for name, (replay, calls) in self.graphs.items():
                count = len(calls)
                times = 3 if not turn else max(1, round(seconds * 1e6 / max(found[name][0] * count, 1)))
                begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                replay()
                begun.record()
                for _ in range(times):
                    replay()
                ended.record()
                ended.synchronize()
                found[name].append(begun.elapsed_time(ended) * 1e3 / times / count)
        return {name: statistics.median(some[1:]) for name, some in found.items()}


# ---------------------------------------------------------------------------------------------------------- layers


def layers(outputs: int, inputs: int, batch: int, given: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of each contestant, and how far ours is off."""
    x = random("randn", batch, inputs, dtype=torch.float16)
    turns = Turns()
    half = [random("randn", outputs, inputs, dtype=torch.float16) for _ in range(COPIES)]
    turns.add("float16", [lambda w=w: F.linear(x, w) for w in half])
    errors = {}
    for bits in linear.BITS:
        packed = [_packed(outputs, inputs, bits) for _ in range(COPIES)]
        found = OPERATORS.low_bit_linear(x, *packed[0][:3], None, bits, outputs).double()
        wanted = x.double() @ linear.dequantized(packed[0], torch.float64).T
        errors[bits] = float((found - wanted).norm() / wanted.norm())
        turns.add(
            f"{bits} bits", [lambda p=p: OPERATORS.low_bit_linear(x, *p[:3], None, p.bits, p.outputs) for p in packed]
        )
        if bits == 4:
            planned = [linear.planned(one, None, batch, torch.float16) for one in packed]
            turns.add("4 bits, planned", [lambda p=p: p(x) for p in planned])
    _tinygemm(turns, x, outputs)
    _gemlite(turns, x, outputs)
    _eight_bits(turns, batch, outputs, inputs)
    return {"us": turns.microseconds(given.rounds), "failed": turns.failed, "errors": errors}


def _packed(outputs: int, inputs: int, bits: int) -> linear.Packed:
    codes = random("randint", 0, 2**bits, (outputs, inputs))
    scales = random("rand", outputs, -(-inputs // GROUP)) * 0.02 + 0.01
    return linear.pack(codes, scales, None, bits)


def _tinygemm(turns: Turns, x: Tensor, outputs: int) -> None:
    inputs, calls = x.shape[1], []
    narrow = x.to(torch.bfloat16)
    try:
        for _ in range(COPIES):
            codes = random("randint", 0, 256, (outputs, inputs // 2), dtype=torch.uint8)
            weight = torch._convert_weight_to_int4pack(codes, 8)
            scales = random("rand", inputs // GROUP, outputs, 2, dtype=torch.bfloat16)
            calls.append(lambda w=weight, s=scales: torch._weight_int4pack_mm(narrow, w, GROUP, s))
        turns.add("4 bits of torch", calls)
    except Exception as error:
        turns.failed["4 bits of torch"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:120]


def _gemlite(turns: Turns, x: Tensor, outputs: int) -> None:
    if importlib.util.find_spec("gemlite") is None:
        return
    inputs = x.shape[1]
    for bits in (4, 2):
        try:
            make = importlib.import_module("gemlite.helper").A16Wn(device="cuda:0", dtype=torch.float16)
            calls = []
            for _ in range(COPIES):
                codes = random("randint", 0, 2**bits, (outputs, inputs), dtype=torch.uint8)
                scales = random("rand", outputs * inputs // GROUP, 1, dtype=torch.float16)
                layer = make.from_weights(codes, scales, torch.full_like(scales, 2 ** (bits - 1)), bits, GROUP)
                calls.append(lambda layer=layer: layer(x))
            turns.add(f"{bits} bits of gemlite", calls)
        except Exception as error:
            turns.failed[f"{bits} bits of gemlite"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]


def _eight_bits(turns: Turns, batch: int, outputs: int, inputs: int) -> None:
    x = random("randint", -127, 128, (batch, inputs), dtype=torch.int8)
    weights = [random("randint", -127, 128, (outputs, inputs), dtype=torch.int8) for _ in range(COPIES)]
    one, scale = torch.full((), 0.01, device="cuda"), random("rand", outputs)
    bias = random("randn", outputs, dtype=torch.float16)
    turns.add(
        "8 and 8 bits", [lambda w=w: OPERATORS.scaled_linear(x, w, one, scale, bias, torch.float16) for w in weights]
    )
    if batch > 16:  # what it takes
        turns.add("torch._int_mm", [lambda w=w: torch._int_mm(x, w.T) for w in weights])


def layer_gaps(found: dict[str, dict[str, Any]], device: str) -> list[str]:
    """What falls short of what the kernels are to be."""
    gaps = []
    for name, one in found.items():
        us, (size, batch) = one["us"], name.split(", batch ")
        outputs, rows = int(size.partition("x")[0]), int(batch)
        most = MOST_US.get((outputs, rows)) if H200 in device else None
        if most is not None and us["4 bits"] > most:
            gaps.append(f"{name}: 4 bits take {us['4 bits']:.2f} us, at most {most}")
        ratio = MOST_OF_HALF[max((one for one in MOST_OF_HALF if one <= rows), default=64)] if rows >= 64 else None
        if ratio is not None and us["4 bits, planned"] > ratio * us["float16"] * 1.01:  # what two runs differ by
            gaps.append(f"{name}: planned {us['4 bits, planned']:.1f} us, float16 {us['float16']:.1f}")
        if rows == 1:
            for bits, least in ((3, 1.0), (2, W2_OVER_W4)):
                if us["4 bits"] / us[f"{bits} bits"] < least:
                    gaps.append(f"{name}: {bits} bits are {us['4 bits'] / us[f'{bits} bits']:.2f} times as fast as 4")
        if "torch._int_mm" in us and us["8 and 8 bits"] > 1.02 * us["torch._int_mm"]:
            gaps.append(f"{name}: 8 bits take {us['8 and 8 bits']:.1f} us, _int_mm {us['torch._int_mm']:.1f}")
        gaps += [f"{name}: {bits} bits are off by {error:.1e}" for bits, error in one["errors"].items() if error > 1e-3]
    return gaps


# ---------------------------------------------------------------------------------------------------- whole tensors


def pictures(drawn: bool, shape: tuple[int, ...] = PICTURES) -> Tensor:
    """Noise; or slopes, flat areas and edges in 256 grey levels, as pictures have them."""
    if not drawn:
        return random("randn", shape)
    count, colours, height, width = shape
    small = random("randn", count, colours, max(2, height // 60), max(2, width // 60))
    smooth = F.interpolate(small, size=(height, width), mode="bicubic")
    edges = F.interpolate(small[:, :, ::3, ::3], size=(height, width), mode="nearest")
    levels = ((torch.where(edges > 0, smooth, edges) + 3) * 42).clamp_(0, 255).round_()
    return (levels / 255 - 0.45) / 0.225


def whole(given: argparse.Namespace) -> dict[str, Any]:
    """Bytes a second of each, over those of a copy."""
    noise, drawn = pictures(False), pictures(True)
    into, count = torch.empty_like(noise), noise.numel()
    step, zero = torch.full((), 0.1, device="cuda"), torch.zeros((), dtype=torch.int32, device="cuda")
    turns, size = Turns(), {"copy": 8 * count}
    turns.add("copy", [lambda: into.copy_(noise)])

    def add(name: str, bytes_: float, call: Call) -> None:
        size[name] = round(bytes_)
        turns.add(name, [call])

    for what, x in (("noise", noise), ("pictures", drawn)):
        add(f"statistics, {what}", 4 * count, lambda x=x: OPERATORS.observe(x, None, 0.0, 0.0, 0))
        for bins in (256, 2048):
            name = f"statistics and {bins} bins, {what}"
            add(name, 4 * count, lambda x=x, bins=bins: OPERATORS.observe(x, None, -3.0, 3.0, bins))
    add("statistics a channel, noise", 4 * count, lambda: OPERATORS.observe(noise, 1, 0.0, 0.0, 0))
    for bits in packing.WIDTHS:
        low = -(2 ** (bits - 1))
        for way, seed in (("nearest", None), ("stochastic", 7)):
            name = f"quantise and pack to {bits} bits, {way}"
            limits = (low, low + 2**bits - 1, bits, seed)
            add(name, count * (4 + bits / 8), lambda g=limits: OPERATORS.quantize_pack(noise, step, zero, None, *g))
        words = OPERATORS.quantize_pack(noise, step, zero, None, low, low + 2**bits - 1, bits, None)
        add(
            f"unpack and decode {bits} bits",
            count * (4 + bits / 8),
            lambda w=words, b=bits: OPERATORS.unpack_dequantize(w, step, zero, None, list(PICTURES), b, True),
        )
    add("mask by threshold", 5 * count, lambda: OPERATORS.threshold_mask(noise, 0.5))
    add("mask 2:4", 5 * count, lambda: OPERATORS.n_of_m_mask(noise, 2, 4))
    us = turns.microseconds(given.rounds, 0.01)
    speed = {name: size[name] / us[name] * 1e-6 for name in us}  # TB/s
    share = {name: one / speed["copy"] for name, one in speed.items()}
    return {"us": us, "tb_s": speed, "of_copy": share, "failed": turns.failed}


def bias_of_rounding(seeds: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """The largest z of mean codes at 16 places between two codes, 2^20 numbers each; and whether another kernel
    and launch make the same bits."""
    places = torch.arange(16, device="cuda") / 16 + 1 / 37
    x = places.repeat_interleave(2**20)
    beside = torch.cat([x[:1], x])[
        1:
    ]  # begins between two 16 bytes: goes through Triton, where x has a kernel of its own
    one, zero = torch.ones((), device="cuda"), torch.zeros((), dtype=torch.int32, device="cuda")
    kernel = importlib.import_module("rarefy.kernels.cuda.packing")
    worst, same = 0.0, True
    for seed in seeds:
        words = OPERATORS.quantize_pack(x, one, zero, None, -8, 7, 4, seed)
        same = same and bool(
            words.equal(kernel.quantize_pack(beside, one, zero, None, -8, 7, 4, seed, lanes=128, warps=2))
        )
        mean = packing.unpack(words, 4, x.numel(), True).view(16, -1).double().mean(1)
        deviation = (places.double() * (1 - places.double()) / 2**20).sqrt()
        worst = max(worst, float(((mean - places.double()) / deviation).abs().max()))
    return {"z": worst, "same_bits": same}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096"], metavar="OUTPUTSxINPUTS")
    parser.add_argument("--only", choices=("linear", "whole"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    facts: dict[str, Any] = {"bench": "gpu_kernels", "torch": torch.__version__, "skipped": []}
    if not torch.cuda.is_available():
        print("skipped: there is no NVIDIA GPU that torch can use; nothing was measured")
        print(json.dumps({**facts, "skipped": ["all: no GPU"]}))
        return 0
    facts["device"] = torch.cuda.get_device_name()
    gaps: list[str] = []
    for name in ("gemlite",):
        if importlib.util.find_spec(name) is None:
            facts["skipped"].append(f"{name}: not installed")
    if given.only != "whole":
        facts["linear"] = {}
        for shape in given.shapes:
            outputs, inputs = map(int, shape.split("x"))
            for batch in given.batches:
                facts["linear"][f"{shape}, batch {batch}"] = layers(outputs, inputs, batch, given)
                torch.cuda.empty_cache()
        gaps += layer_gaps(facts["linear"], facts["device"])
        _show_layers(facts)
    if given.only != "linear":
        facts["whole"], facts["rounding"] = whole(given), bias_of_rounding()
        share = facts["whole"]["of_copy"]
        gaps += [f"{name}: {one:.2f} of a copy's bandwidth" for name, one in share.items() if one < OF_COPY]
        gaps += [f"rounding at random: z = {facts['rounding']['z']:.1f}"] * (facts["rounding"]["z"] > BEYOND_CHANCE)
        gaps += ["rounding at random hangs on the launch"] * (not facts["rounding"]["same_bits"])
        _show_whole(facts)
    for one in facts["skipped"]:
        print(f"skipped: {one}")
    print(json.dumps({**facts, "short": gaps}))
    for gap in gaps:
        print(f"falls short: {gap}", file=sys.stderr)
    return 1 if given.check and gaps else 0


def _show_layers(facts: dict[str, Any]) -> None:
    names = list(dict.fromkeys(name for one in facts["linear"].values() for name in one["us"]))
    rows = [
        (size, *(f"{one['us'][name]:.2f}" if name in one["us"] else "" for name in names))
        for size, one in facts["linear"].items()
    ]
    title = f"Linear layers, microseconds a call: {facts['device']}, torch {facts['torch']}"
    show_table(title, ["outputs x inputs", *names], rows, numbers=range(1, len(names) + 1))
    for size, one in facts["linear"].items():
        for name, why in one["failed"].items():
            print(f"{size}: {name}: {why}")


def _show_whole(facts: dict[str, Any]) -> None:
    found = facts["whole"]
    rows = [
        (name, f"{us:.0f}", f"{found['tb_s'][name]:.2f}", f"{found['of_copy'][name]:.2f}")
        for name, us in found["us"].items()
    ]
    size = " x ".join(map(str, PICTURES))
    show_table(
        f"Whole tensors of {size}, {math.prod(PICTURES) * 4 / 1e6:.0f} MB: {facts['device']}",
        ["what", "us", "TB/s", "of a copy"], rows, numbers=(1, 2, 3),
    )  # fmt: skip
    print(f"rounding at random: |z| at most {facts['rounding']['z']:.2f}; any launch the same bits: "
          f"{facts['rounding']['same_bits']}")  # fmt: skip
    for name, why in found["failed"].items():
        print(f"{name}: {why}")


if __name__ == "__main__":
    sys.exit(main())
