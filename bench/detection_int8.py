"""Detectors with weights for COCO in int8 by default settings, beside ONNX Runtime's quantiser and NNCF: AP and time.

    python bench/detection_int8.py [--only NAME ...] [--ways ours ort nncf] [--images N] [--no-times] [--folder DIR]
        [--check]

The 128 pictures of RAREFY_DATA's ``coco_val128`` in two halves, each judged with the other for calibration, so that all
count and none is judged that was seen. YOLOX-Nano and NanoDet-m come as ONNX files, FastestDet as a network of torch;
all are fed, read and judged by ``rarefy.tasks.detection``; AP is COCO's, in points, with the 95 % interval of its drop
over pictures. Files are judged in ONNX Runtime (NNCF's second variant in OpenVINO). Peers run in .venv-peers (``make
bench-setup``) and are left out where it is missing.

Times are of whole files, from a picture's bytes to boxes, of one picture on one thread; float and int8 take turns in
one run (``rarefy.deployment.latency``).

``--check`` exits 1 where a goal is missed: AP at most 1.0 (YOLOX-Nano), 0.5 (NanoDet-m) below float, FastestDet's AP50
at most 1.0; no peer better; 1.8 times as fast as float in ONNX Runtime, 2.2 times in OpenVINO. 2 where nothing ran.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import detectors, peers, real_data
from rarefy import plugins, quantize
from rarefy.cli.terminal import show_table
from rarefy.deployment import latency
from rarefy.deployment.export import export
from rarefy.errors import DataError, MissingDependency, RarefyError
from rarefy.models import load
from rarefy.tasks.detection import Detection
from rarefy.tasks.detector import capture

# network -> (figure, how far it may fall in points)
GOALS = {"yolox-nano": ("AP", 1.0), "nanodet-m": ("AP", 0.5), "fastestdet": ("AP50", 1.0)}
FILES = {"yolox-nano": "yolox_nano.onnx", "nanodet-m": "nanodet_m_320.onnx"}
FASTER = {"onnxruntime": 1.8, "openvino": 2.2}
VARIANTS = {"ort": ("ort-channel", "ort-tensor"), "nncf": ("nncf-onnx", "nncf-openvino")}


def graph_of(name: str) -> Any:
    if name == "fastestdet":
        return capture(detectors.fastestdet().eval(), (3, 352, 352))
    return load.graph_of(load.load(f"onnx:{real_data.data_folder() / 'detectors' / FILES[name]}"))


def halves(home: Path, images: int) -> list[str]:
    """Two sources: the even pictures, and the odd ones."""
    folder = real_data.data_folder() / "coco_val128"
    truth = json.loads((folder / "instances.json").read_text())
    texts = []
    for half in (0, 1):
        chosen = truth["images"][half:images:2]
        known = {one["id"] for one in chosen}
        boxes = [one for one in truth["annotations"] if one["image_id"] in known]
        file = home / f"half{half}.json"
        file.write_text(json.dumps({**truth, "images": chosen, "annotations": boxes}))
        texts.append(f"coco:{folder / 'images'}?annotations={file}")
    return texts


def judged(name: str, sources: list[str], home: Path, ways: list[str]) -> tuple[dict[str, Any], Any]:
    """variant -> its metric over all pictures; and the first half's int8 graph, for ONNX Runtime."""
    graph = graph_of(name)
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    first = None
    for half in (0, 1):
        task = Detection(train=sources[1 - half], val=sources[half]).settled(graph)
        batches = list(task.data.batches("val", 8))
        pictures = torch.cat([images for images, _ in batches])
        folder = home / name / str(half)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "judged_0.npy", pictures.numpy())
        np.save(folder / "calibration_0.npy", torch.cat(list(task.data.inputs("train", 128, 8))).numpy())
        runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
        runtime.export(graph, folder / "float.onnx")
        peers.answers(folder / "float.onnx", [pictures.numpy()], len(pictures), folder / "float.npz")
        if "ours" in ways:
            small = quantize(graph, task, progress=False)
            first = first or small
            runtime.export(small, folder / "ours.onnx")
            peers.answers(folder / "ours.onnx", [pictures.numpy()], len(pictures), folder / "ours.npz")
        for way in ways:
            for variant in VARIANTS.get(way, ()):
                failed |= by_peer(variant, folder, len(pictures))
        for variant in ("float", "ours", *(one for way in ways for one in VARIANTS.get(way, ()))):
            if (folder / f"{variant}.npz").exists() and variant not in failed:
                add(found.setdefault(variant, task.metric()), folder / f"{variant}.npz", batches)
        print(f"{name}: half {half + 1} of 2 done", file=sys.stderr, flush=True)
    return {**found, "failed": failed}, first


def by_peer(variant: str, folder: Path, count: int) -> dict[str, str]:
    """What went wrong, if anything did."""
    if (python := peers.python()) is None:
        return {variant: "no .venv-peers; run make bench-setup"}
    command = [python, peers.__file__, "panel", variant, str(folder), str(count), "--mixed"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return {variant: (lines or ["it ended without a word"])[-1][:200]} if done.returncode else {}


def add(metric: Any, file: Path, batches: list[Any]) -> None:
    start = 0
    with np.load(file, allow_pickle=False) as stored:
        parts = [torch.from_numpy(stored[one]) for one in stored.files]
    for images, targets in batches:
        metric.add([part[start : start + len(images)] for part in parts], targets)
        start += len(images)


def times(name: str, sources: list[str], home: Path, small: Any) -> dict[str, float]:
    """runtime -> how many times as fast int8 is that was made for it."""
    graph, ratios = graph_of(name), {}
    for runtime in FASTER:
        chosen = plugins.resolve("runtimes", f"{runtime}:threads=1")
        if runtime != "onnxruntime":
            task = Detection(train=sources[1], val=sources[0]).settled(graph)
            small = quantize(graph, task, runtime=chosen, progress=False)
        sessions = {}
        for kind, model in (("float", graph), ("int8", small)):
            file = home / name / f"{kind}_{runtime}.onnx"
            export(model, file, runtime=chosen, compare=False)
            sessions[kind] = chosen.open(file)
        spec = small.meta["inputs"][0]["shape"]
        picture = torch.randint(0, 256, (1, spec[1], spec[2], 3), dtype=torch.uint8)
        timed = latency.latency(sessions, picture)
        ratios[runtime] = timed["int8"]["speedup"]["float"]["median"]
    return ratios


def row_of(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    exact = metrics["float"]
    row: dict[str, Any] = {"network": name, "pictures": exact.samples, "failed": metrics["failed"], "ways": {}}
    for variant, metric in metrics.items():
        if variant == "failed":
            continue
        figures = {"ap": metric.value(), **metric.details()}
        known = {key: 100 * figures[key.lower()] for key in ("AP", "AP50", "AP75")}
        drop = metric.paired(exact)
        row["ways"][variant] = {**known, "drop": 100 * drop.value, "interval": [100 * end for end in drop.interval]}
    return row


def shortfalls(row: dict[str, Any]) -> list[str]:
    name, ways = row["network"], row["ways"]
    figure, most = GOALS[name]
    if "ours" not in ways:
        return [f"{name}: not quantised"]
    short = []
    fall = ways["float"][figure] - ways["ours"][figure]
    if fall > most:
        short.append(f"{name}: {figure} falls by {fall:.2f}; at most {most}")
    for variant, one in ways.items():
        if variant not in ("float", "ours") and one[figure] > ways["ours"][figure]:
            short.append(f"{name}: {figure} {ways['ours'][figure]:.2f}; {variant} {one[figure]:.2f}")
    for runtime, ratio in row.get("times", {}).items():
        if ratio < FASTER[runtime]:
            short.append(f"{name}: {ratio:.2f}x in {runtime}; at least {FASTER[runtime]}")
    return short


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--only", nargs="+", choices=tuple(GOALS), default=list(GOALS), metavar="NAME")
    option("--ways", nargs="+", choices=("ours", "ort", "nncf"), default=["ours", "ort", "nncf"])
    option("--images", type=int, default=128, help="so many pictures, for a trial")
    option("--no-times", action="store_true")
    option("--folder", type=Path, help="what is kept; a temporary one otherwise")
    option("--check", action="store_true", help="exit 1 where the goals are missed")
    return parser.parse_args()


def main() -> int:
    given, rows, skipped = arguments(), [], {}
    torch.set_num_threads(1)
    home = given.folder or Path(tempfile.mkdtemp(prefix="rarefy-detection-"))
    home.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        try:
            sources = halves(home, given.images)
            metrics, small = judged(name, sources, home, given.ways)
            row = row_of(name, metrics)
            if small is not None and not given.no_times:
                row["times"] = times(name, sources, home, small)
            rows.append(row)
        except (DataError, MissingDependency, RarefyError, OSError) as error:
            skipped[name] = str(error).splitlines()[0]
    table = []
    for row in rows:
        for variant, one in row["ways"].items():
            low, high = one["interval"]
            faster = row.get("times", {}) if variant == "ours" else {}
            cells = [f"{one[key]:.2f}" for key in ("AP", "AP50", "AP75")]
            drop = "" if variant == "float" else f"{one['drop']:.2f} ({low:.2f} to {high:.2f})"
            table.append(
                [row["network"], variant, *cells, drop, *(f"{faster[r]:.2f}x" if r in faster else "" for r in FASTER)]
            )
        table += [[row["network"], variant, f"failed: {why[:80]}", *[""] * 5] for variant, why in row["failed"].items()]
    table += [[name, "", f"skipped: {why[:100]}", *[""] * 5] for name, why in skipped.items()]
    show_table(
        "Detectors in int8, each half of the pictures judged with the other as calibration",
        ["", "", "AP", "AP50", "AP75", "drop of AP", *FASTER], table,
    )  # fmt: skip
    short = [line for row in rows for line in shortfalls(row)]
    for line in short:
        print(f"falls short: {line}")
    print(json.dumps({"rows": rows, "skipped": skipped, "short": short}))
    return 2 if not rows else int(bool(short) and given.check)


if __name__ == "__main__":
    raise SystemExit(main())
