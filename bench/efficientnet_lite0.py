"""EfficientNet-Lite0 on ImageNet, real weights: ``rarefy.quantize`` alone, against the float model and against ONNX
Runtime's own static quantiser.

    python bench/efficientnet_lite0.py [--check]

Calibration: 128 unlabelled images for both quantisers, the same ones. ONNX Runtime's: ``quant_pre_process``, then
``quantize_static`` with QDQ, uint8 activations by min-max, int8 weights, one scale a channel. Accuracy is that of the
files in ONNX Runtime on the 650 labelled images, drops paired. All three files take turns in one timed run for each
batch size and number of threads.

``--check`` exits 1 where a goal is missed (2 where there is no data):

* at most 0.5 points lost against the float file, on the same images;
* simulation in PyTorch and ONNX file give the same top-1 on at least 99.5 % of them;
* at least as fast as ONNX Runtime's own file: the ratio of times, ours over theirs, within each round of the timing;
  the interval of the median of these (95 %) must not lie above 1, nor be wider than 0.2.

Normalisation: the weights were trained on (pixel - 127) / 128; the original's accuracy with ImageNet's mean and std,
    often used with them, is printed too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import real_data
from rarefy import capture, evaluate
from rarefy.cli.terminal import show_table, size_text
from rarefy.errors import DataError, MissingDependency
from rarefy.graph.macs import count_macs, count_parameters
from rarefy.tasks.classification import Classification

IMAGES, BATCH = 128, 16
SETTINGS = ((1, 1), (1, 2), (8, 1), (8, 2))  # batch, threads
MOST_LOST, LEAST_AGREEMENT = 0.005, 0.995
WIDEST = 0.2  # an interval of a ratio of times that is wider decides nothing
FLOAT, OURS, THEIRS = "float", "rarefy", "onnxruntime"


def task_of(mean: Any, std: Any) -> Classification:
    return Classification(
        train=real_data.imagenet_calib(),
        val=real_data.imagenet_val(),
        size=224,
        class_count=1000,
        mean=mean,
        std=std,
        crop=224 / 227,
    )


def onnxruntime_quantized(source: Path, target: Path, batches: list[Tensor]) -> None:
    """What ONNX Runtime's static quantiser makes of the float file."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.left: Iterator[dict[str, np.ndarray]] = ({name: batch.numpy()} for batch in batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    import onnx

    prepared = target.with_name("prepared.onnx")
    logging.getLogger().setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quant_pre_process(str(source), str(prepared))
        quantization.quantize_static(
            str(prepared),
            str(target),
            Reader(onnx.load(prepared).graph.input[0].name),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )


def sqnr(exact: Tensor, noisy: Tensor) -> float:
    """Signal to quantization noise of the logits, in dB."""
    return float(
        10
        * torch.log10(
            exact.double().square().sum() / (exact.double() - noisy.double()).square().sum().clamp_min(1e-300)
        )
    )


class Spent:
    """CPU and wall seconds of a block, and the most memory of the process so far, in MB."""

    def __enter__(self) -> Spent:
        self.begun = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]


def peak_mb() -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) / 1000 for line in status.read_text().splitlines() if line.startswith("VmHWM:"))


def interval(ratio: dict[str, float], rounds: int) -> list[float]:
    """95 % interval of a median from its quartiles: median -+ 1.57 (high - low) / sqrt(n) (McGill, Tukey and Larsen
    1978)."""
    half = 1.57 * (ratio["high"] - ratio["low"]) / math.sqrt(rounds)
    return [ratio["median"] - half, ratio["median"] + half]


def timings(files: dict[str, Path], inputs: Tensor, rounds: int | None) -> list[dict[str, Any]]:
    """Three files in turn for each setting. ``against_NAME``: our time over theirs, within a round."""
    from rarefy.deployment.latency import latency
    from rarefy.runtimes.onnxruntime import OnnxRuntime

    rows = []
    for batch, threads in SETTINGS:
        runtime = OnnxRuntime(threads=threads)
        found = latency({name: runtime.open(path) for name, path in files.items()}, inputs[:batch], repeats=rounds)
        counted = found[OURS]["repeats"]
        row: dict[str, Any] = {
            "batch": batch,
            "threads": threads,
            "rounds": counted,
            "ms": {name: one["ms"] for name, one in found.items()},
        }
        for name in (THEIRS, FLOAT):
            ratio = found[name]["speedup"][OURS]  # how many times faster they are than ours
            row[f"against_{name}"] = {"median": ratio["median"], "interval": interval(ratio, counted)}
        rows.append(row)
    return rows


def measured(given: argparse.Namespace) -> dict[str, Any]:
    from rarefy import quantize
    from rarefy.evaluation.measure import weight_bytes
    from rarefy.runtimes.onnxruntime import OnnxRuntime

    task = task_of(real_data.LITE_MEAN, real_data.LITE_STD)
    original: fx.GraphModule = capture(real_data.efficientnet_lite0(), torch.zeros(2, 3, 224, 224))
    batches = list(task.inputs("train", IMAGES, BATCH, seed=given.seed))
    before = peak_mb()
    with Spent() as ours:
        small = quantize(
            original,
            batches=batches,
            images=IMAGES,
            calibration=given.calibration,
            rounding=given.rounding,
            seed=given.seed,
        )
    peak = peak_mb()
    with tempfile.TemporaryDirectory(prefix="rarefy-bench-") as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in (FLOAT, OURS, THEIRS)}
        runtime = OnnxRuntime(threads=2)
        runtime.export(original, files[FLOAT])
        runtime.export(small, files[OURS])
        with Spent() as theirs:
            onnxruntime_quantized(files[FLOAT], files[THEIRS], batches)
        sessions = {name: runtime.open(path) for name, path in files.items()}
        found = {
            name: evaluate(sessions[name], task, reference=sessions[FLOAT], limit=given.limit).to_json()
            for name in (OURS, THEIRS)
        }
        simulated = evaluate(small, task, reference=sessions[OURS], limit=given.limit)
        logits: dict[str, list[Tensor]] = {name: [] for name in sessions}
        for inputs, _ in task.batches("val", 50, limit=given.limit):
            for name, session in sessions.items():
                logits[name].append(session(inputs))
        exact = torch.cat(logits[FLOAT])
        example = next(iter(task.inputs("val", 8, 8, seed=given.seed)))
        parity = runtime.compare(small, files[OURS], example)
        islands = runtime.integer_islands(files[OURS])
        rows = timings(files, example, given.rounds)
        onnx_bytes = {name: path.stat().st_size for name, path in files.items()}
        imagenet = evaluate(sessions[FLOAT], task_of(None, None), limit=given.limit)
    return {
        "bench": "efficientnet_lite0",
        "torch": torch.__version__,
        "images": IMAGES,
        "macs": count_macs(original),
        "parameters": count_parameters(original),
        "top1": {
            **{name: found[name] for name in found},
            FLOAT: found[OURS]["reference"],
            "float, ImageNet's mean and std": imagenet.to_json(),
        },
        "sqnr_db": {name: sqnr(exact, torch.cat(logits[name])) for name in (OURS, THEIRS)},
        "agreement_of_simulation_and_file": simulated.agreement,
        "parity": {key: value for key, value in parity.items() if key != "layers"},
        "float_islands": islands["float_islands"],
        "latency": rows,
        "size_bytes": {FLOAT: weight_bytes(original), OURS: weight_bytes(small)},
        "onnx_bytes": onnx_bytes,
        "quantize": {"wall_s": ours.wall, "cpu_s": ours.cpu, "peak_mb": peak, "peak_mb_before": before},
        "onnxruntime_quantize": {"wall_s": theirs.wall, "cpu_s": theirs.cpu},
    }


def shortfalls(found: dict[str, Any]) -> list[str]:
    short = []
    lost = found["top1"][OURS]["drop"]["value"]
    if lost > MOST_LOST:
        short.append(f"{100 * lost:.2f} points lost; at most {100 * MOST_LOST:g}")
    if not found["agreement_of_simulation_and_file"] >= LEAST_AGREEMENT:
        short.append(
            f"simulation and file agree on {found['agreement_of_simulation_and_file']:.2%}; at least "
            f"{LEAST_AGREEMENT:.1%}"
        )
    for row in found["latency"]:
        ratio = row[f"against_{THEIRS}"]
        low, high = ratio["interval"]
        if high - low > WIDEST:
            short.append(
                f"batch {row['batch']}, threads {row['threads']}: {low:.3f} to {high:.3f} of ONNX Runtime's time is "
                "no answer; the machine is busy"
            )
        elif low > 1:
            short.append(
                f"batch {row['batch']}, threads {row['threads']}: {ratio['median']:.3f} of ONNX Runtime's time "
                f"({low:.3f} to {high:.3f}); at most 1"
            )
    return short  # fmt: skip


def shown(found: dict[str, Any]) -> None:
    def percent(one: dict[str, Any]) -> str:
        low, high = one["interval"]
        return f"{100 * one['value']:.2f} ({100 * low:.2f} to {100 * high:.2f}; {one['samples']})"

    def points(drop: dict[str, Any]) -> str:
        low, high = drop["interval"]
        return (
            f"{100 * drop['value']:.2f} ({100 * low:.2f} to {100 * high:.2f}; {drop['lost']} lost, "
            f"{drop['gained']} gained)"
        )

    top1 = found["top1"]
    rows: list[list[str]] = [
        ["top-1, %", *(percent(top1[name]) for name in (FLOAT, OURS, THEIRS))],
        ["  with ImageNet's mean and std", percent(top1["float, ImageNet's mean and std"]), "", ""],
        ["drop, points", "", *(points(top1[name]["drop"]) for name in (OURS, THEIRS))],
        ["same answer as float", "", *(f"{top1[name]['agreement']:.2%}" for name in (OURS, THEIRS))],
        ["SQNR of the logits, dB", "", *(f"{found['sqnr_db'][name]:.2f}" for name in (OURS, THEIRS))],
        ["simulation and file, same top-1", "", f"{found['agreement_of_simulation_and_file']:.2%}", ""],
        ["float islands in the file", "", str(len(found["float_islands"])), ""],
        ["ONNX file", *(size_text(found["onnx_bytes"][name]) for name in (FLOAT, OURS, THEIRS))],
        ["weights, as saved", size_text(found["size_bytes"][FLOAT]), size_text(found["size_bytes"][OURS]), ""],
        ["quantising, CPU s", "", f"{found['quantize']['cpu_s']:.1f}", f"{found['onnxruntime_quantize']['cpu_s']:.1f}"],
        ["peak memory, MB", "", f"{found['quantize']['peak_mb'] or 0:.0f}", ""],
    ]
    for row in found["latency"]:
        rows.append(
            [
                f"ms, batch {row['batch']}, threads {row['threads']}",
                *(f"{row['ms'][name]['median']:.2f}" for name in (FLOAT, OURS, THEIRS)),
            ]
        )
        for name, said in ((THEIRS, "ONNX Runtime's"), (FLOAT, "float")):
            ratio = row[f"against_{name}"]
            low, high = ratio["interval"]
            rows.append([f"  ours / {said}", "", f"{ratio['median']:.3f} ({low:.3f} to {high:.3f})", ""])
    show_table("EfficientNet-Lite0, 650 ImageNet images", ["", "float", "rarefy int8", "ONNX Runtime int8"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--calibration", default="mse")
    option("--rounding", default="narrow")
    option("--seed", type=int, default=0)
    option("--rounds", type=int, help="of timing")
    option("--limit", type=int, help="so many labelled images only, for a trial")
    option("--out", type=Path, metavar="FILE", help="write the JSON there too")
    option("--check", action="store_true", help="exit 1 where the goals are missed")
    given = parser.parse_args()
    try:
        real_data.imagenet_val(), real_data.imagenet_calib(), real_data.efficientnet_lite0()
    except (DataError, MissingDependency) as error:
        print(f"skipped: {error}", file=sys.stderr)
        return 2 if given.check else 0
    found = measured(given)
    found["short"] = shortfalls(found)
    shown(found)
    line = json.dumps(found)
    print(line)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(line + "\n")
    for one in found["short"]:
        print(f"falls short: {one}", file=sys.stderr)
    return 1 if given.check and found["short"] else 0


if __name__ == "__main__":
    sys.exit(main())
