"""How fast int8 is, ours beside ONNX Runtime's own quantiser and NNCF's, on ONNX Runtime and OpenVINO, random weights.

    python bench/quantization_speed.py [MODEL ...] [--batches 1,8] [--threads 1,2] [--gate] [--folder DIR] [--check]

For each batch size and number of threads all files take turns in one run (``rarefy.deployment.latency.latency``); a
ratio is that within a round, its interval that of the median (95 %). ONNX Runtime's quantiser: uint8 activations by
min-max, int8 weights a channel. NNCF and torchao run in .venv-peers (``make bench-setup``) and are left out where it is
missing; torchao's time is taken beside its float model in a process of its own, since it needs Inductor. Calibration:
32 images of RAREFY_DATA, or noise. With --folder, files that are there already are not made again, so that a run may be
split.

``--check`` exits 1 where a goal is missed, or the interval is too wide to say:

* OpenVINO: at most 1.03 of NNCF's time, at the same precision of what stays float (f32, bf16);
* ONNX Runtime: at most 0.8 of the float file's time for MobileNetV3-Large and ViT-Tiny, at most 1.03 of its own
    quantiser's for the others;
* never slower than the best float of the runtime, bf16 included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import peers
from bench.efficientnet_lite0 import WIDEST, interval, onnxruntime_quantized
from bench.speed_models import MODELS, TRANSFORMERS, build
from rarefy import capture, plugins, quantize
from rarefy.artifact import folder
from rarefy.cli.terminal import show_table
from rarefy.deployment import latency
from rarefy.errors import DataError, MissingDependency

IMAGES, SIZE = 32, 224
LEFT_AT_FLOAT = ("mobilenet_v3_large", "vit_tiny")  # by ONNX Runtime's own quantiser
# column -> (file, runtime)
COLUMNS = {
    "ORT float": ("float.onnx", "onnxruntime"),
    "ORT int8": ("ort.onnx", "onnxruntime"),
    "ORT rarefy": ("rarefy_onnxruntime.onnx", "onnxruntime"),
    "OV f32": ("float.onnx", "openvino"),
    "OV bf16": ("float.onnx", "openvino:precision=bf16"),
    "OV NNCF": ("nncf.xml", "openvino"),
    "OV NNCF bf16": ("nncf.xml", "openvino:precision=bf16"),
    "OV rarefy": ("rarefy_openvino.onnx", "openvino"),
    "OV rarefy bf16": ("rarefy_openvino.onnx", "openvino:precision=bf16"),
}


def images() -> Tensor:
    """(IMAGES, 3, SIZE, SIZE), normalised: of the data folder, else noise."""
    try:
        from bench import real_data
        from bench.efficientnet_lite0 import task_of

        real_data.imagenet_calib()
        return torch.cat(list(task_of(None, None).inputs("train", IMAGES, 16, seed=0)))
    except (DataError, MissingDependency) as error:
        print(f"noise in place of images: {error}", file=sys.stderr)
        return torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def prepared(name: str, home: Path, stored: Tensor) -> list[str]:
    """Every file that a column needs; what could not be made, and why."""
    home.mkdir(parents=True, exist_ok=True)
    batches = list(stored.split(8))
    missing = []
    if not (home / "graph").exists():
        folder.save(capture(build(name), torch.zeros(2, 3, SIZE, SIZE)), home / "graph")
    graph = folder.load(home / "graph")
    for runtime in ("onnxruntime", "openvino"):
        target = home / f"rarefy_{runtime}.onnx"
        if not target.exists():
            chosen = plugins.resolve("runtimes", runtime)
            chosen.export(quantize(graph, batches=batches, images=IMAGES, runtime=chosen), target)
    if not (home / "float.onnx").exists():
        plugins.resolve("runtimes", "onnxruntime").export(graph, home / "float.onnx")
    if not (home / "ort.onnx").exists():
        onnxruntime_quantized(home / "float.onnx", home / "ort.onnx", batches)
    if not (home / "nncf.xml").exists():
        python = peers.python()
        if python is None:
            missing.append("NNCF: no .venv-peers; run make bench-setup")
        else:
            np.save(home / "images.npy", stored.numpy())
            flags = ["--transformer"] if name in TRANSFORMERS else []
            made = subprocess.run(
                [python, peers.__file__, "nncf", home / "float.onnx", home / "images.npy", home / "nncf.xml", *flags],
                check=False,
                capture_output=True,
                text=True,
            )
            if made.returncode:
                missing.append(f"NNCF: {(made.stderr.strip().splitlines() or ['no reason told'])[-1][:120]}")
    return missing


def timed(home: Path, inputs: Tensor, threads: int, rounds: int | None) -> dict[str, Any]:
    """``{"rounds", "ms": {column: quartiles}, "ratio": {column: {other: {"median", "interval"}}}}``: time of a column
    over that of the other."""
    sessions = {
        column: latency.with_threads(runtime, threads).open(home / file)
        for column, (file, runtime) in COLUMNS.items()
        if (home / file).exists()
    }
    found = latency.latency(sessions, inputs, repeats=rounds, warmup=3)
    counted = next(iter(found.values()))["repeats"]
    ratios = {
        column: {
            other: {
                "median": found[other]["speedup"][column]["median"],
                "interval": interval(found[other]["speedup"][column], counted),
            }
            for other in found
        }
        for column in found
    }
    return {"rounds": counted, "ms": {column: one["ms"] for column, one in found.items()}, "ratio": ratios}


def gated(home: Path, stored: Tensor, threads: int) -> list[dict[str, Any]]:
    """What ``gate="latency"`` times for a batch of one and keeps, with what stays float in f32 and in bf16."""
    found = []
    for runtime in (latency.with_threads(text, threads) for text in ("openvino", "openvino:precision=bf16")):
        small = quantize(
            folder.load(home / "graph"),
            batches=list(stored.split(8)),
            images=IMAGES,
            runtime=runtime,
            gate="latency",
            progress=False,
        )
        facts = small.meta["history"][-1]["facts"]
        found.append(
            {
                "runtime": plugins.describe(runtime),
                "why": facts["gate"]["why"],
                "ms": {one["what"]: one["latency_ms"] for one in facts["timing"]["gate"]},
            }
        )
    return found


def torchao(name: str, home: Path, batch: int, threads: int) -> dict[str, Any]:
    python = peers.python()
    if python is None:
        return {"skipped": "no .venv-peers; run make bench-setup"}
    arguments = [python, peers.__file__, "torchao", name, home / "images.npy", str(batch), str(threads), "4"]
    try:
        made = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return {"skipped": "took more than 900 s"}
    if made.returncode:
        return {"skipped": (made.stderr.strip().splitlines() or ["no reason told"])[-1][:160]}
    facts: dict[str, Any] = json.loads(made.stdout.strip().splitlines()[-1])
    return facts


def shortfalls(row: dict[str, Any]) -> list[str]:
    ratios, ms = row["ratio"], {column: one["median"] for column, one in row["ms"].items()}
    own_goal = ("ORT float", 0.8) if row["model"] in LEFT_AT_FLOAT else ("ORT int8", 1.03)
    best_ours, best_float = (
        min(names, key=ms.__getitem__) for names in (("OV rarefy", "OV rarefy bf16"), ("OV f32", "OV bf16"))
    )
    goals = [
        ("ORT rarefy", *own_goal),
        ("ORT rarefy", "ORT float", 1.0),
        (best_ours, best_float, 1.0),
        ("OV rarefy", "OV NNCF", 1.03),
        ("OV rarefy bf16", "OV NNCF bf16", 1.03),
    ]
    short = []
    for ours, theirs, most in goals:
        if theirs not in ratios:
            continue
        ratio, (low, high) = ratios[ours][theirs]["median"], ratios[ours][theirs]["interval"]
        where = f"{row['model']}, batch {row['batch']}, threads {row['threads']}: {ours} / {theirs}"
        if low > most:
            short.append(f"{where} is {ratio:.3f} ({low:.3f} to {high:.3f}); at most {most:g}")
        elif high > most and high - low > WIDEST:
            short.append(f"{where}: {low:.3f} to {high:.3f} is no answer; the machine is busy")
    return short


def shown(rows: list[dict[str, Any]]) -> None:
    columns = [column for column in COLUMNS if any(column in row["ms"] for row in rows)]
    table = []
    for row in rows:
        best = min(row["ms"][column]["median"] for column in ("ORT float", "OV f32"))
        ratios = [f"{row['ms'][column]['median'] / best:.2f}" if column in row["ms"] else "-" for column in columns]
        found = row.get("torchao", {})
        ratios.append(f"{found['ms']['int8'] / best:.2f}" if "ms" in found else "-")
        table.append([f"{row['model']}, {row['batch']}, {row['threads']}", f"{best:.2f}", *ratios])
    show_table(
        "time, as a share of the fastest float32's",
        ["model, batch, threads", "float32, ms", *columns, "torchao"],
        table,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; none: all")
    option("--batches", default="1,8")
    option("--threads", default="1,2")
    option("--rounds", type=int, help="of timing; by default 4 s, 30 to 400")
    option("--folder", type=Path, help="keep the files there, and take those that are there")
    option("--no-torchao", action="store_true", help="it compiles for a minute a setting")
    option("--gate", action="store_true", help='what quantize(gate="latency") keeps on OpenVINO besides')
    option("--prepare", action="store_true", help="make the files only")
    option("--out", type=Path, metavar="FILE", help="write the JSON there too")
    option("--check", action="store_true", help="exit 1 where the goals are missed")
    given = parser.parse_args()
    rows, skipped = [], []
    kept: list[dict[str, Any]] = []
    stored = images()
    with tempfile.TemporaryDirectory(prefix="rarefy-bench-") as temporary:
        for name in given.models or MODELS:
            home = (given.folder or Path(temporary)) / name
            skipped += [f"{name}: {one}" for one in prepared(name, home, stored)]
            for batch in map(int, given.batches.split(",")) if not given.prepare else ():
                for threads in map(int, given.threads.split(",")):
                    row = {
                        "model": name,
                        "batch": batch,
                        "threads": threads,
                        **timed(home, stored[:batch], threads, given.rounds),
                    }
                    if not given.no_torchao:
                        row["torchao"] = torchao(name, home, batch, threads)
                        skipped += [
                            f"{name}: torchao: {row['torchao'][key]}" for key in row["torchao"] if key == "skipped"
                        ]
                    rows.append(row)
            for threads in map(int, given.threads.split(",")) if given.gate else ():
                kept += [{"model": name, **one} for one in gated(home, stored, threads)]
    if given.prepare:
        return 0
    shown(rows)
    if kept:
        lines = [
            [one["model"], one["runtime"], one["why"], "\n".join(f"{ms:.2f} {what}" for what, ms in one["ms"].items())]
            for one in kept
        ]
        show_table("What the gate keeps", ["model", "runtime", "verdict", "ms, in turns"], lines)
    found = {"bench": "quantization_speed", "torch": torch.__version__, "rows": rows, "gate": kept, "skipped": skipped}
    found["short"] = [one for row in rows for one in shortfalls(row)]
    line = json.dumps(found)
    print(line)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(line + "\n")
    for one in skipped:
        print(f"skipped: {one}", file=sys.stderr)
    for one in found["short"]:
        print(f"falls short: {one}", file=sys.stderr)
    return 1 if given.check and found["short"] else 0


if __name__ == "__main__":
    sys.exit(main())
