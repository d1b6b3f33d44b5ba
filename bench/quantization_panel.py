"""Default int8 on networks with real weights, of several families: ``rarefy.quantize`` as it comes, beside ONNX
Runtime's static quantiser and NNCF, in the same run.

    python bench/quantization_panel.py [--only NAME ...] [--ways ours ort nncf] [--images N] [--jobs N] [--check]
    python bench/quantization_panel.py --list

128 unlabelled calibration samples, the same ones for all; judged on others. Each network and way has a process of its
own, of one thread: CPU seconds are those of the call that quantises, peak memory that of the process up to its end.
Judged is the file that comes out, in its runtime: signal-to-noise against the float file, of each part of the answer
(boxes, scores and classes of a detector are parts, whichever tensor they come in; "dB" is the mean over the parts), how
often the class is float's, and the task's own metric. Ours is made for ONNX Runtime, the default, and for OpenVINO.
Peers, in .venv-peers (``make bench-setup``), are tried in their usual settings: ONNX Runtime with weights by channel
and by tensor, NNCF on the ONNX file and on OpenVINO's model, its preset "mixed" for networks whose activations take
both signs. Files of one runtime are compared with each other, and the best of the peers' counts.

``--folder`` keeps inputs, float answers and what the peers answered: a later run of ``--ways ours`` shows them without
doing them again (``--again`` does them again).

``--check`` exits 1 where a goal is missed (2 where nothing could be judged): on each network and runtime at least the
best peer's dB and, but for what 95 % of chance explain, its score; 2 dB more than the best peer in the median;
MobileNetV2 97.5 % agreement and 21 dB, EfficientNet-Lite 99 % and 24 dB, YOLOX-Nano AP 33.2; at most 30 CPU seconds and
1,500 MB each.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import peers
from bench.panel_networks import CALIBRATION, Network, networks
from rarefy.errors import DataError, MissingDependency, RarefyError

OURS, ORT, NNCF = "ours", "ort", "nncf"
OURS_OPENVINO = "ours-openvino"
RUNTIMES = {OURS: "onnxruntime", OURS_OPENVINO: "openvino"}
WAYS = {OURS: tuple(RUNTIMES), ORT: ("ort-channel", "ort-tensor"), NNCF: ("nncf-onnx", "nncf-openvino")}
MOST_SECONDS, MOST_MB, LEAST_LEAD_DB = 30.0, 1500.0, 2.0


# ---- in processes of their own


def prepare(network: Network, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Inputs, labels, the float file and its answers."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, split, samples in (("calibration", "train", CALIBRATION), ("judged", "val", count)):
        columns = zip(*network.inputs(split, samples), strict=True)
        for index, column in enumerate(columns):
            np.save(folder / f"{kind}_{index}.npy", np.concatenate(column))
    if network.labels is not None:
        np.save(folder / "labels.npy", network.labels(count))
    source, target = network.model(), folder / "float.onnx"
    if isinstance(source, Path):
        tidied(source, target)
    else:
        from rarefy import capture
        from rarefy.runtimes.onnxruntime import OnnxRuntime

        OnnxRuntime(threads=1).export(capture(source, example(folder)), target)
    arrays = peers.stored(folder, "judged")
    peers.answers(target, arrays, len(arrays[0]), folder / "float.npz")
    return {"judged": len(arrays[0])}


def tidied(source: Path, target: Path) -> None:
    """The file as quantisers want it: initialisers are no inputs, and opset 17, where the converter can."""
    import onnx
    from onnx import version_converter

    model = onnx.load(source)
    known = {one.name for one in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in known]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 8)
    try:
        model = version_converter.convert_version(model, 17)
        onnx.checker.check_model(model)
    except Exception as error:
        print(f"{source.name}: stays as it is: {str(error).splitlines()[0][:200]}", file=sys.stderr)
    onnx.save(model, target)


def example(folder: Path) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.array(array[:2])) for array in peers.stored(folder, "calibration"))


def batches_of(folder: Path, size: int = 8) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of the calibration samples. A file that stays mapped would count as memory of what quantises."""
    count = len(peers.stored(folder, "calibration")[0])
    for start in range(0, count, size):
        arrays = peers.stored(folder, "calibration")
        yield tuple(torch.from_numpy(np.array(array[start : start + size])) for array in arrays)


def ours(network: Network, folder: Path, count: int, seed: int, variant: str = OURS) -> dict[str, Any]:
    """The file of ``rarefy.quantize``, and its answers; those of the simulation where no file can be written."""
    from rarefy import capture, plugins, quantize
    from rarefy.models.load import load

    runtime = plugins.resolve("runtimes", f"{RUNTIMES[variant]}:threads=1")
    source = network.model()
    graph = capture(load(f"onnx:{source}").model if isinstance(source, Path) else source, example(folder))
    begun = time.process_time()
    small = quantize(graph, batches=batches_of(folder), images=CALIBRATION, runtime=runtime, progress=False, seed=seed)
    found: dict[str, Any] = {"cpu_s": time.process_time() - begun, "peak_mb": peers.peak_mb()}
    judged = peers.stored(folder, "judged")
    try:
        file = folder / f"{variant}{'.onnx' if variant == OURS else '.xml'}"
        runtime.export(small, file)
        peers.answers(file, judged, count, folder / f"{variant}.npz")
    except Exception as error:
        found["no_file"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        np.savez(folder / f"{variant}.npz", *simulated(small, judged, count, 8))
    return found


def simulated(graph: Any, arrays: list[Any], count: int, batch: int) -> list[np.ndarray]:
    from torch.utils import _pytree as pytree

    outputs = []
    with torch.no_grad():
        for start in range(0, count, batch):
            given = [torch.from_numpy(np.array(array[start : min(start + batch, count)])) for array in arrays]
            outputs.append([one.numpy() for one in pytree.tree_leaves(graph(*given))])
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


# ---- in this process


def in_a_process(command: list[str]) -> dict[str, Any]:
    """The last line of what the command prints, as JSON; ``failed`` where it ended otherwise."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return {"failed": (said or ["it ended without a word"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def child(what: str, network: Network, given: argparse.Namespace, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", what, "--only", network.name, "--folder", str(given.folder)]
    return in_a_process([*command, "--images", str(count), "--seed", str(given.seed)])


def done(network: Network, given: argparse.Namespace) -> dict[str, Any]:
    """{"ways": {way: {variant: facts}}} of one network; ``skipped`` where it is not there."""
    folder, row = given.folder / network.name, {"network": network.name}
    count = min(given.images or network.judged, network.judged)
    known = read(folder / "prepared.json")
    if given.fresh or known.get("wanted", 0) < count:
        shutil.rmtree(folder, ignore_errors=True)
        known = child("prepare", network, given, count)
        if "failed" in known:
            return row | {"skipped": known["failed"]}
        write(folder / "prepared.json", known | {"wanted": count})
    count = min(count, known["judged"])  # there may be fewer than wanted
    ways: dict[str, dict[str, Any]] = {}
    for way, variants in WAYS.items():
        for variant in variants:
            facts = read(folder / f"{variant}.json")
            usable = facts.get("judged", 0) >= count and (folder / f"{variant}.npz").exists()
            if way in given.ways and (way == OURS or given.again or not usable):
                facts = quantized(way, variant, network, given, count, folder)
                write(folder / f"{variant}.json", facts | {"judged": count})
            elif way == OURS or not usable:  # ours of older code says nothing
                continue
            if "failed" not in facts:
                facts |= judged(network, folder, variant, count)
            ways.setdefault(way, {})[variant] = facts
            told = facts.get("failed") or f"{facts['db']:.2f} dB, {facts['cpu_s']:.1f} CPU s"
            print(f"{network.name}: {variant}: {told}", file=sys.stderr, flush=True)
    return row | {"judged": count, "ways": ways}


def quantized(
    way: str, variant: str, network: Network, given: argparse.Namespace, count: int, folder: Path
) -> dict[str, Any]:
    if way == OURS:
        return child(variant, network, given, count)
    if (python := peers.python()) is None:
        return {"failed": "no .venv-peers; run make bench-setup"}
    flags = (["--mixed"] if network.preset == "mixed" else []) + (["--transformer"] if network.transformer else [])
    return in_a_process([python, peers.__file__, "panel", variant, str(folder), str(count), *flags])


def judged(network: Network, folder: Path, variant: str, count: int) -> dict[str, Any]:
    exact, noisy = arrays_of(folder / "float.npz", count), arrays_of(folder / f"{variant}.npz", count)
    parts = network.parts or (lambda outputs: {f"output{index}": one for index, one in enumerate(outputs)})
    pairs = [(name, one, other) for (name, one), other in zip(parts(exact).items(), parts(noisy).values(), strict=True)]
    decibels = {name: sqnr(one, other) for name, one, other in pairs}
    found: dict[str, Any] = {"parts_db": decibels, "db": statistics.fmean(decibels.values())}
    if network.same is not None:
        found["agreement"] = network.same(exact, noisy)
    if network.labels is not None:
        labels = np.load(folder / "labels.npy")[:count]
        found["score"], found["float_score"] = (
            100 * float((one[0].argmax(-1) == labels).mean()) for one in (noisy, exact)
        )
    elif network.score is not None:
        found["score"] = network.score(noisy)
        kept = folder / f"score-{count}.json"
        if not kept.exists():
            write(kept, {"float": network.score(exact)})
        found["float_score"] = read(kept)["float"]
    return found


def arrays_of(file: Path, count: int) -> list[np.ndarray]:
    with np.load(file, allow_pickle=False) as stored:
        return [stored[f"arr_{index}"][:count] for index in range(len(stored.files))]


def sqnr(exact: np.ndarray, noisy: np.ndarray) -> float:
    """Signal to quantization noise, in dB."""
    one, other = exact.astype(np.float64), noisy.astype(np.float64)
    return float(10 * np.log10(np.square(one).sum() / max(float(np.square(one - other).sum()), 1e-300)))


def read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.exists() else {}


def write(file: Path, facts: dict[str, Any]) -> None:
    file.write_text(json.dumps(facts))


def on(row: dict[str, Any], runtime: str, own: bool) -> dict[str, dict[str, Any]]:
    """What was found of files that this runtime serves: ours or the peers'."""
    return {
        variant: facts
        for way, variants in row.get("ways", {}).items()
        for variant, facts in variants.items()
        if "failed" not in facts and (way == OURS) == own and variant.endswith("openvino") == (runtime == "openvino")
    }


# ---- what is said


def shortfalls(rows: list[dict[str, Any]], known: dict[str, Network]) -> list[str]:
    short, leads = [], []
    for row in rows:
        if "skipped" in row:
            continue
        name, network = row["network"], known[row["network"]]
        own = row["ways"].get(OURS, {}).get(OURS, {"failed": "not done"})
        if "failed" in own:
            short.append(f"{name}: {own['failed']}")
            continue
        for fact, least in network.least.items():
            if not own[fact] >= least:
                short.append(f"{name}: {fact} {own[fact]:.2f}; at least {least:g}")
        if own["cpu_s"] > MOST_SECONDS:
            short.append(f"{name}: {own['cpu_s']:.1f} CPU seconds; at most {MOST_SECONDS:g}")
        if own["peak_mb"] > MOST_MB:
            short.append(f"{name}: {own['peak_mb']:.0f} MB; at most {MOST_MB:g}")
        for runtime in dict.fromkeys(RUNTIMES.values()):
            mine, others = on(row, runtime, own=True), on(row, runtime, own=False)
            if not mine or not others:
                continue
            leads.append(max(one["db"] for one in mine.values()) - max(one["db"] for one in others.values()))
            if leads[-1] < 0:
                each = "; ".join(f"{way} {one['db']:.2f}" for way, one in (mine | others).items())
                short.append(f"{name} on {runtime}: {-leads[-1]:.2f} dB behind: {each}")
            for facts in mine.values():
                for way, one in others.items():
                    if "score" in one and facts["score"] < one["score"] - chance(facts, row["judged"], network):
                        short.append(f"{name} on {runtime}: scores {facts['score']:.2f}; {way} {one['score']:.2f}")
    if leads and statistics.median(leads) < LEAST_LEAD_DB:
        short.append(f"{statistics.median(leads):.2f} dB better than the best peer in the median; at least 2")
    return short


def chance(facts: dict[str, Any], count: int, network: Network) -> float:
    """Points that answers on so few samples differ by without a cause: 1.96 deviations of a share of differing ones."""
    if network.labels is None:
        return 0.3
    differing = max(1 - facts["agreement"] / 100, 1 / count)
    return 100 * 1.96 * float(np.sqrt(differing / count))


def shown(rows: list[dict[str, Any]]) -> None:
    from rarefy.cli.terminal import show_table

    table = []
    for row in rows:
        if "skipped" in row:
            table.append([row["network"], "", f"skipped: {row['skipped']}", *[""] * 6])
            continue
        for way in WAYS:
            for variant, one in row["ways"].get(way, {}).items():
                if "failed" in one:
                    table.append([row["network"], variant, f"failed: {one['failed'][:100]}", *[""] * 6])
                    continue
                scores = [f"{one[key]:.2f}" if key in one else "" for key in ("float_score", "score", "agreement")]
                parts = one["parts_db"]
                each = " ".join(f"{name} {value:.1f}" for name, value in parts.items()) if len(parts) > 1 else ""
                spent = [f"{one['cpu_s']:.1f}", f"{one['peak_mb']:.0f}"]
                note = "simulated" if "no_file" in one else ""
                table.append([row["network"], variant, f"{one['db']:.2f}", *scores, *spent, f"{each} {note}".strip()])
    columns = ["", "way", "dB", "float, %", "score, %", "same, %", "CPU s", "peak MB", "parts, dB"]
    show_table("Default int8, files in their runtimes", columns, table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--only", nargs="+", metavar="NAME", help="these networks (--list tells them)")
    option("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="who quantises")
    option("--images", type=int, help="so many judged samples at most, for a trial")
    option("--jobs", type=int, default=1, help="networks at a time")
    option(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "rarefy-panel", help="what is kept between runs"
    )
    option("--again", action="store_true", help="peers are done again, too")
    option("--fresh", action="store_true", help="nothing that the folder holds is used")
    option("--seed", type=int, default=0)
    option("--list", action="store_true", help="tell the networks' names")
    option("--check", action="store_true", help="exit 1 where the goals are missed")
    option("--child", choices=("prepare", *RUNTIMES), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    given, known = arguments(), networks()
    torch.set_num_threads(1)  # CPU seconds then don't hang on how many wait
    names = given.only or list(known)
    if unknown := sorted(set(names) - set(known)):
        print(f"{', '.join(unknown)}: no such network; have {', '.join(known)}", file=sys.stderr)
        return 2
    if given.list:
        print("\n".join(known))
        return 0
    if given.child:
        network = known[names[0]]
        run = prepare if given.child == "prepare" else partial(ours, variant=given.child)
        try:
            print(json.dumps(run(network, given.folder / network.name, given.images or network.judged, given.seed)))
        except (DataError, MissingDependency, RarefyError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 3
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        rows = list(pool.map(lambda name: done(known[name], given), names))
    short = shortfalls(rows, known)
    shown(rows)
    facts = {"bench": "quantization_panel", "torch": torch.__version__, "calibration": CALIBRATION}
    print(json.dumps(facts | {"rows": rows, "short": short}))
    for one in short:
        print(f"falls short: {one}", file=sys.stderr)
    if not any("ways" in row for row in rows):
        return 2 if given.check else 0
    return 1 if given.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
