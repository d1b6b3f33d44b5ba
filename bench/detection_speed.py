"""How fast detectors are in int8, ours beside NNCF's, against float and bf16, in ONNX Runtime and OpenVINO.

    python bench/detection_speed.py [NAME ...] [--rounds N] [--threads T] [--no-gate] [--profile] [--folder DIR]
        [--prepare] [--check]

SSDlite320 and RetinaNet-R50 of torchvision and a network as YOLOv8n is described, with random weights and pictures of
320 pixels a side; YOLOX-Nano as it is in RAREFY_DATA, at 416. Timed are cores, from normalised inputs to the raw
outputs of the head (what follows is the same for all), one picture on one thread, all files of a network taking turns
in one run (``rarefy.deployment.latency``); ``gate`` is what ``quantize(gate="latency")`` keeps. Then whole files, from
a picture's bytes to boxes, float and ours. A ratio is that within a round, its interval that of the median (95 %).
Calibration: 16 inputs of noise, or of ``coco_val128``. NNCF runs in .venv-peers (``make bench-setup``) and is left out
where it is missing. With --folder, files that are there are not made again, so that a run may be split: --prepare makes
them only.

``--profile`` tells for each file of a core what its milliseconds are spent on, by the runtime's own kinds of kernels.

``--check`` exits 1 where the best of ours (float where the gate keeps that) takes more than 1.03 of the time of the
best of float, bf16 and NNCF in the same runtime; 2 where nothing ran.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import detectors, peers
from bench.efficientnet_lite0 import WIDEST, interval
from rarefy import plugins, quantize
from rarefy.artifact import folder
from rarefy.cli.terminal import show_table
from rarefy.deployment import latency
from rarefy.deployment.export import export
from rarefy.errors import DataError, MissingDependency, RarefyError
from rarefy.models import load
from rarefy.tasks.detection import Detection
from rarefy.tasks.detector import capture, detector_of

SIDE, INPUTS, MOST = 320, 16, 1.03
# column -> (file, runtime)
COLUMNS = {
    "ORT float": ("float.onnx", "onnxruntime"),
    "ORT rarefy": ("onnxruntime.onnx", "onnxruntime"),
    "ORT gate": ("onnxruntime_gate.onnx", "onnxruntime"),
    "OV f32": ("float.onnx", "openvino"),
    "OV bf16": ("float.onnx", "openvino:precision=bf16"),
    "OV NNCF": ("nncf.xml", "openvino"),
    "OV NNCF bf16": ("nncf.xml", "openvino:precision=bf16"),
    "OV rarefy": ("openvino.onnx", "openvino"),
    "OV rarefy bf16": ("openvino.onnx", "openvino:precision=bf16"),
    "OV gate": ("openvino_gate.onnx", "openvino"),
    "OV gate bf16": ("openvino_gate.onnx", "openvino:precision=bf16"),
}
WHOLE = {
    "ORT float": ("whole_float.onnx", "onnxruntime"),
    "ORT rarefy": ("whole_onnxruntime.onnx", "onnxruntime"),
    "OV f32": ("whole_float.onnx", "openvino"),
    "OV rarefy": ("whole_openvino.onnx", "openvino"),
}
OURS, OTHERS = ("rarefy", "rarefy bf16", "gate", "gate bf16"), ("float", "f32", "bf16", "NNCF", "NNCF bf16")


def torchvision_network(name: str, **options: Any) -> fx.GraphModule:
    import torchvision

    torch.manual_seed(0)
    make = getattr(torchvision.models.detection, name)
    model = make(weights=None, weights_backbone=None, **options).eval()
    for part, value in model.named_parameters():
        if part.endswith("bias") and not value.any():
            torch.nn.init.normal_(value, std=0.02)
    return capture(model)


def yolov8n() -> fx.GraphModule:
    from bench.yolov8n import yolov8n as build

    return capture(build(SIDE))


NETWORKS: dict[str, Callable[[], fx.GraphModule]] = {
    "ssdlite320": lambda: torchvision_network("ssdlite320_mobilenet_v3_large"),
    "retinanet-r50": lambda: torchvision_network("retinanet_resnet50_fpn", min_size=SIDE, max_size=SIDE),
    "yolox-nano": lambda: load.graph_of(load.load(f"onnx:{detectors.detector_file('yolox_nano.onnx')}")),
    "yolov8n-like": yolov8n,
}


def inputs_of(graph: fx.GraphModule) -> Tensor:
    """(INPUTS, 3, H, W) as the core is fed: pictures of COCO, else noise."""
    try:
        pictures = detectors.coco_val()[0]
        source = f"coco:{Path(pictures[0]).parent}?annotations={Path(pictures[0]).parents[1] / 'instances.json'}"
        return torch.cat(list(Detection(val=source).settled(graph).data.inputs("val", INPUTS, 8)))
    except (DataError, MissingDependency) as error:
        print(f"noise in place of pictures: {error}", file=sys.stderr)
        return torch.randn(INPUTS, *graph.meta["inputs"][0]["shape"], generator=torch.Generator().manual_seed(0))


def prepared(name: str, home: Path, gate: bool, threads: int) -> dict[str, str]:
    """Every file that a column needs; what could not be made, and why."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "graph").exists():
        folder.save(NETWORKS[name](), home / "graph")
    graph = folder.load(home / "graph")
    if not (home / "inputs.npy").exists():
        np.save(home / "inputs.npy", inputs_of(graph).numpy())
    batches = list(torch.from_numpy(np.load(home / "inputs.npy")).split(8))
    plain = plugins.resolve("runtimes", "onnxruntime")
    if not (home / "float.onnx").exists():
        plain.export(graph, home / "float.onnx")
        export(graph, home / "whole_float.onnx", runtime=plain, compare=False)
    for text in ("onnxruntime", "openvino"):
        runtime = latency.with_threads(text, threads)
        for kind in (None, "latency") if gate else (None,):
            file = home / f"{text}{'_gate' if kind else ''}.onnx"
            if file.exists():
                continue
            small = quantize(graph, batches=batches, images=INPUTS, runtime=runtime, gate=kind, progress=False)
            runtime.export(small, file)
            if kind is None:
                export(small, home / f"whole_{text}.onnx", runtime=runtime, compare=False)
    return {} if (home / "nncf.xml").exists() else by_nncf(home)


def by_nncf(home: Path) -> dict[str, str]:
    if (python := peers.python()) is None:
        return {"NNCF": "no .venv-peers; run make bench-setup"}
    command = [python, peers.__file__, "nncf", home / "float.onnx", home / "inputs.npy", home / "nncf.xml"]
    try:
        made = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1800)
    except subprocess.TimeoutExpired:
        return {"NNCF": "took more than 1800 s"}
    return {"NNCF": (made.stderr.strip().splitlines() or ["no reason told"])[-1][:120]} if made.returncode else {}


def timed(home: Path, columns: dict[str, tuple[str, str]], example: Tensor, threads: int, rounds: int | None) -> Any:
    """``{"rounds", "ms": {column: quartiles}, "ratio": {column: {other: {"median", "interval"}}}}``: time of a column
    over that of the other."""
    sessions = {
        column: latency.with_threads(runtime, threads).open(home / file)
        for column, (file, runtime) in columns.items()
        if (home / file).exists()
    }
    found = latency.latency(sessions, example, repeats=rounds, warmup=3)
    one = next(iter(found.values()))
    ratios = {
        column: {
            other: {
                "median": found[other]["speedup"][column]["median"],
                "interval": interval(found[other]["speedup"][column], one["repeats"]),
            }
            for other in found
        }
        for column in found
    }
    ms = {column: measured["ms"] for column, measured in found.items()}
    return {"rounds": one["repeats"], "disturbed": one["disturbed"], "ms": ms, "ratio": ratios}


def profiled(home: Path, example: Tensor, threads: int) -> dict[str, dict[str, float]]:
    """column -> kind of kernel -> milliseconds of a run."""
    found: dict[str, dict[str, float]] = {}
    for column, (file, text) in COLUMNS.items():
        if (home / file).exists():
            kinds = collections.Counter[str]()
            for kernel in latency.with_threads(text, threads).kernel_times(home / file, example):
                kinds[kernel.operator] += kernel.us / 1000  # type: ignore[assignment]
            found[column] = {kind: round(ms, 3) for kind, ms in kinds.most_common() if ms >= 0.005}
    return found


def shortfalls(row: dict[str, Any]) -> list[str]:
    short, ms = [], {column: one["median"] for column, one in row["core"]["ms"].items()}
    for runtime in ("ORT", "OV"):
        ours, others = (
            [f"{runtime} {kind}" for kind in kinds if f"{runtime} {kind}" in ms] for kinds in (OURS, OTHERS)
        )
        if not ours or not others:
            continue
        mine, best = min(ours, key=ms.__getitem__), min(others, key=ms.__getitem__)
        ratio = row["core"]["ratio"][mine][best]
        low, high = ratio["interval"]
        where = f"{row['network']}: {mine} / {best}"
        if low > MOST:
            short.append(f"{where} is {ratio['median']:.3f} ({low:.3f} to {high:.3f}); at most {MOST}")
        elif high > MOST and high - low > WIDEST:
            short.append(f"{where}: {low:.3f} to {high:.3f} is no answer; the machine is busy")
    return short


def shown(rows: list[dict[str, Any]]) -> None:
    for part, columns in (("core", COLUMNS), ("whole", WHOLE)):
        there = [column for column in columns if any(column in row[part]["ms"] for row in rows)]
        table = []
        for row in rows:
            ms = {column: one["median"] for column, one in row[part]["ms"].items()}
            table.append([row["network"], *(f"{ms[one]:.2f}" if one in ms else "-" for one in there)])
        what = "cores" if part == "core" else "whole files, from bytes to boxes"
        show_table(f"{what}, ms of one picture", ["network", *there], table)
    for row in rows:
        if row.get("profile"):
            kinds = sorted({kind for one in row["profile"].values() for kind in one})
            kinds.sort(key=lambda kind: -max(one.get(kind, 0) for one in row["profile"].values()))
            cells = [[kind, *(one.get(kind, "") for one in row["profile"].values())] for kind in kinds[:16]]
            show_table(f"{row['network']}: ms by kind", ["kernel", *row["profile"]], cells)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("networks", nargs="*", metavar="NAME", help=f"of {', '.join(NETWORKS)}; none: all")
    option("--rounds", type=int, help="of timing; by default 4 s, 30 to 400")
    option("--threads", type=int, default=1)
    option("--no-gate", action="store_true", help="without what the gate keeps, which is timed for a minute a network")
    option("--profile", action="store_true", help="milliseconds by kind of kernel, too")
    option("--folder", type=Path, help="keep the files there, and take those that are there")
    option("--prepare", action="store_true", help="make the files only")
    option("--check", action="store_true", help="exit 1 where the goals are missed")
    given = parser.parse_args()
    if unknown := [name for name in given.networks if name not in NETWORKS]:
        parser.error(f"no network {unknown[0]!r}; have {', '.join(NETWORKS)}")
    return given


def examined(name: str, home: Path, given: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {"network": name, "skipped": prepared(name, home, not given.no_gate, given.threads)}
    if given.prepare:
        return row
    example = torch.from_numpy(np.load(home / "inputs.npy"))[:1]
    row["core"] = timed(home, COLUMNS, example, given.threads, given.rounds)
    family = detector_of(folder.load(home / "graph"))
    assert family is not None
    picture = torch.randint(0, 256, (1, *family.feed.size, 3), generator=torch.Generator().manual_seed(0)).byte()
    row["whole"] = timed(home, WHOLE, picture, given.threads, given.rounds)
    if given.profile:
        row["profile"] = profiled(home, example, given.threads)
    return row


def main() -> int:
    given = arguments()
    torch.set_num_threads(given.threads)
    rows, skipped = [], {}
    with tempfile.TemporaryDirectory(prefix="rarefy-bench-") as temporary:
        for name in given.networks or NETWORKS:
            try:
                rows.append(examined(name, (given.folder or Path(temporary)) / name, given))
            except (DataError, MissingDependency, RarefyError, OSError, ImportError) as error:
                skipped[name] = str(error).splitlines()[0]
            print(f"{name}: {skipped.get(name, 'done')}", file=sys.stderr, flush=True)
    if given.prepare:
        return 0
    if rows:
        shown(rows)
    skipped |= {f"{row['network']}: {what}": why for row in rows for what, why in row["skipped"].items()}
    short = [line for row in rows for line in shortfalls(row)]
    print(json.dumps({"bench": "detection_speed", "rows": rows, "skipped": skipped, "short": short}))
    for what, why in skipped.items():
        print(f"skipped: {what}: {why}", file=sys.stderr)
    for line in short:
        print(f"falls short: {line}", file=sys.stderr)
    return 2 if not rows else int(bool(short) and given.check)


if __name__ == "__main__":
    sys.exit(main())
