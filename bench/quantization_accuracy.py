"""Default int8 on EfficientNet-Lite0, -Lite1 and -Lite2, real weights: ``rarefy.quantize`` as it comes, against float,
ONNX Runtime's static quantiser and NNCF.

    python bench/quantization_accuracy.py [--only 0 1 2] [--check]

128 unlabelled calibration images, the same ones for all; 650 other, labelled ones for accuracy. Each network and
quantiser runs in a process of its own, so that its CPU seconds and its peak memory are its own; ours counts the whole
process, Python and libraries included. Accuracy, agreement and signal-to-noise are those of the files in ONNX Runtime
(NNCF's too, which quantises the same float file). NNCF runs in .venv-peers (``make bench-setup``).

``--check`` exits 1 where a goal is missed (2 where there is no data): over the networks, at most 0.3 points mean drop;
for each, at least 99 % agreement with float, 22 dB of the logits (24 is the aim), at most 30 CPU seconds and 1,500 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import peers, real_data
from bench.efficientnet_lite0 import onnxruntime_quantized, peak_mb, sqnr
from rarefy import capture, evaluate
from rarefy.cli.terminal import show_table
from rarefy.errors import DataError, MissingDependency
from rarefy.tasks.classification import Classification

IMAGES, BATCH = 128, 8
MOST_LOST, LEAST_AGREEMENT, LEAST_DB, MOST_SECONDS, MOST_MB = 0.003, 0.99, 22.0, 30.0, 1500.0
OURS, ORT, NNCF = "rarefy", "onnxruntime", "nncf"

NNCF_PROGRAM = """
import sys, time, json, numpy, onnx, nncf
source, target, images = sys.argv[1:]
model, batches = onnx.load(source), list(numpy.load(images)[:, None])
name = model.graph.input[0].name
begun = time.process_time()
made = nncf.quantize(model, nncf.Dataset(batches, lambda batch: {name: batch}), subset_size=len(batches))
spent = time.process_time() - begun
onnx.save(made, target)
peak = next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps({"cpu_s": spent, "peak_mb": peak, "version": nncf.__version__}))
"""


def task_of(number: int) -> Classification:
    size = real_data.LITE_SIZES[number]
    return Classification(
        train=real_data.imagenet_calib(),
        val=real_data.imagenet_val(),
        size=size,
        class_count=1000,
        mean=real_data.LITE_MEAN,
        std=real_data.LITE_STD,
        crop=min(1.0, size / 227),
    )


def quantized(number: int, how: str, folder: Path, seed: int) -> dict[str, Any]:
    """One quantiser on one network, in this process: writes ``float.onnx`` (ours) and ``HOW.onnx``."""
    from rarefy import quantize
    from rarefy.runtimes.onnxruntime import OnnxRuntime

    task, size = task_of(number), real_data.LITE_SIZES[number]
    batches = list(task.inputs("train", IMAGES, BATCH, seed=seed))
    runtime = OnnxRuntime(threads=1)
    if how == OURS:
        original = capture(real_data.efficientnet_lite(number), torch.zeros(2, 3, size, size))
        begun = time.process_time()
        small = quantize(original, batches=batches, images=IMAGES, progress=False, seed=seed)
        spent, peak = time.process_time() - begun, peak_mb()
        runtime.export(original, folder / "float.onnx")
        runtime.export(small, folder / f"{how}.onnx")
        np.save(folder / "images.npy", torch.cat(batches).numpy())
        return {"cpu_s": spent, "peak_mb": peak}
    begun = time.process_time()
    onnxruntime_quantized(folder / "float.onnx", folder / f"{how}.onnx", batches)
    return {"cpu_s": time.process_time() - begun, "peak_mb": peak_mb()}


def in_a_process(command: list[str]) -> dict[str, Any]:
    """The last line of what the command prints, as JSON; ``skipped`` where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measured(number: int, given: argparse.Namespace) -> dict[str, Any]:
    from rarefy.runtimes.onnxruntime import OnnxRuntime

    runtime, task = OnnxRuntime(threads=1), task_of(number)
    with tempfile.TemporaryDirectory(prefix="rarefy-bench-") as name:
        folder = Path(name)
        found: dict[str, Any] = {}
        for how in (OURS, ORT):
            arguments = ["--child", how, "--only", str(number), "--folder", name, "--seed", str(given.seed)]
            found[how] = in_a_process([sys.executable, __file__, *arguments])
        if (python := peers.python()) is None:
            found[NNCF] = {"skipped": "no .venv-peers; run make bench-setup"}
        else:
            files = [str(folder / part) for part in ("float.onnx", f"{NNCF}.onnx", "images.npy")]
            found[NNCF] = in_a_process([python, "-c", NNCF_PROGRAM, *files])
        if "skipped" in found[OURS]:
            raise RuntimeError(f"Lite{number}: {found[OURS]['skipped']}")
        exact = runtime.open(folder / "float.onnx")
        sessions = {how: runtime.open(folder / f"{how}.onnx") for how in found if "skipped" not in found[how]}
        logits: dict[str, list[torch.Tensor]] = {how: [] for how in ("float", *sessions)}
        for inputs, _ in task.batches("val", 50, limit=given.limit):
            for how, session in (("float", exact), *sessions.items()):
                logits[how].append(torch.as_tensor(session(inputs)))
        for how, session in sessions.items():
            found[how] |= {
                "top1": evaluate(session, task, reference=exact, limit=given.limit).to_json(),
                "sqnr_db": sqnr(torch.cat(logits["float"]), torch.cat(logits[how])),
            }
    return {"network": f"EfficientNet-Lite{number}", "quantisers": found}


def shortfalls(rows: list[dict[str, Any]]) -> list[str]:
    short = []
    lost = sum(row["quantisers"][OURS]["top1"]["drop"]["value"] for row in rows) / len(rows)
    if lost > MOST_LOST:
        short.append(f"{100 * lost:.2f} points lost on average; at most {100 * MOST_LOST:g}")
    for row in rows:
        ours, name = row["quantisers"][OURS], row["network"]
        if not ours["top1"]["agreement"] >= LEAST_AGREEMENT:
            short.append(
                f"{name}: the same answer as float on {ours['top1']['agreement']:.2%}; at least {LEAST_AGREEMENT:.0%}"
            )
        if not ours["sqnr_db"] >= LEAST_DB:
            short.append(f"{name}: {ours['sqnr_db']:.2f} dB; at least {LEAST_DB:g}")
        if ours["cpu_s"] > MOST_SECONDS:
            short.append(f"{name}: {ours['cpu_s']:.1f} CPU seconds; at most {MOST_SECONDS:g}")
        if (ours["peak_mb"] or 0) > MOST_MB:
            short.append(f"{name}: {ours['peak_mb']:.0f} MB; at most {MOST_MB:g}")
    return short


def shown(rows: list[dict[str, Any]]) -> None:
    table = []
    for row in rows:
        for how, one in row["quantisers"].items():
            if "skipped" in one:
                table.append([row["network"], how, f"skipped: {one['skipped']}", "", "", "", "", ""])
                continue
            top1, drop = one["top1"], one["top1"]["drop"]
            low, high = drop["interval"]
            table.append(
                [
                    row["network"],
                    how,
                    f"{100 * top1['value']:.2f} ({top1['samples']})",
                    f"{100 * drop['value']:.2f} ({100 * low:.2f} to {100 * high:.2f})",
                    f"{top1['agreement']:.2%}",
                    f"{one['sqnr_db']:.2f}",
                    f"{one['cpu_s']:.1f}",
                    f"{one['peak_mb'] or 0:.0f}",
                ]
            )
    columns = ["", "quantiser", "top-1, % (images)", "drop, points", "same as float", "dB", "CPU s", "peak MB"]
    show_table("Default int8, files in ONNX Runtime", columns, table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--only", type=int, nargs="+", default=[0, 1, 2], choices=(0, 1, 2), metavar="NUMBER", help="these networks")
    option("--limit", type=int, help="so many labelled images only, for a trial")
    option("--seed", type=int, default=0)
    option("--check", action="store_true", help="exit 1 where the goals are missed")
    option("--child", choices=(OURS, ORT), help=argparse.SUPPRESS)
    option("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)  # CPU seconds then don't hang on how many wait
    if given.child:
        print(json.dumps(quantized(given.only[0], given.child, given.folder, given.seed)))
        return 0
    try:
        (
            real_data.imagenet_val(),
            real_data.imagenet_calib(),
            [real_data.efficientnet_lite(number) for number in given.only],
        )
    except (DataError, MissingDependency) as error:
        print(f"skipped: {error}", file=sys.stderr)
        return 2 if given.check else 0
    rows = [measured(number, given) for number in given.only]
    short = shortfalls(rows)
    shown(rows)
    print(
        json.dumps(
            {
                "bench": "quantization_accuracy",
                "torch": torch.__version__,
                "images": IMAGES,
                "rows": rows,
                "short": short,
            }
        )
    )
    for one in short:
        print(f"falls short: {one}", file=sys.stderr)
    return 1 if given.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
