"""Original and result side by side: the exported files, on the same images and in the same rounds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor

from rarefy import plugins
from rarefy.compression.candidate import Candidate
from rarefy.compression.gates import ORIGINAL
from rarefy.compression.run import BATCH, Run
from rarefy.deployment import latency
from rarefy.evaluation import measure
from rarefy.evaluation.certify import certify
from rarefy.evaluation.changed import changed
from rarefy.evaluation.evaluate import Model, evaluate
from rarefy.evaluation.throughput import throughput
from rarefy.graph.macs import count_macs
from rarefy.reports.drawing import Pictured
from rarefy.reports.facts import Evaluation, Latency, Parity, Side, Spread
from rarefy.tasks.task import fitted

CORRUPTED_IMAGES = 1000  # of more than that the first: robustness takes many passes
PARITY_IMAGES = 256


class Comparison(NamedTuple):
    """before, after: the original and the result. parity: of the result's file with the model in PyTorch. pictures:
    the judged ones that changed most.

    doubts: what is to be said of the measurement.
    """

    before: Side
    after: Side
    parity: Parity
    doubts: list[str]
    pictures: list[Pictured]


def compare(run: Run, original: Candidate, result: Candidate) -> Comparison:
    """Both measured anew, in one run."""
    files = {ORIGINAL: original.folder / run.model_file, "result": result.folder / run.model_file}
    sessions = {name: run.runtime.open(file) for name, file in files.items()}
    evaluations = _evaluations(run, *sessions.values())
    example = run.images(1)
    times, doubts = _timed(run, files, example, result)
    parity = _certified(run, result, files["result"])
    before, after = (
        _side(run, candidate, files[name], example, times[name], evaluation)
        for name, candidate, evaluation in zip(files, (original, result), evaluations, strict=True)
    )
    pictures = changed(sessions, fitted(run.task, original.graph)) if result.index else []
    return Comparison(before, after, parity, doubts, pictures)


def _timed(
    run: Run, files: Mapping[str, Path], example: Tensor, result: Candidate
) -> tuple[dict[str, latency.Timed], list[str]]:
    """Both in turns, and what is to be said of it. Once more, where the gate has seen something else entirely."""
    gate = result.record["speedup"].get(ORIGINAL) if result.index else None
    times = latency.timed(files, example, runtime=run.runtime)
    if gate is not None and latency.are_apart(gate, times["result"]["speedup"][ORIGINAL]):
        times = latency.timed(files, example, runtime=run.runtime)
    final = times["result"]
    doubts = [latency.doubt(final["latency_ms"])]
    if gate is not None and latency.are_apart(gate, final["speedup"][ORIGINAL]):
        now = final["speedup"][ORIGINAL]
        doubts.append(
            f"the speed-up was {_spread(gate)} when the step was judged, and {_spread(now)} in the end, "
            "measured twice: one of them was disturbed; measure again on a quiet machine"
        )
    return times, [text for text in doubts if text]


def _spread(ratio: latency.Quartiles) -> str:
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _evaluations(run: Run, original: Model, result: Model) -> tuple[Evaluation, Evaluation]:
    """Of the original and the result, on all validation images; robustness on at most ``CORRUPTED_IMAGES`` of them."""
    options: dict[str, Any] = {"reference": original, "batch_size": BATCH, "seed": run.seed, "progress": run.progress}
    whole = run.task.data.length("val") <= CORRUPTED_IMAGES
    judged = evaluate(result, run.task, corruptions=run.corruptions if whole else (), **options).to_json()
    reference = judged.pop("reference")
    if not whole and run.corruptions:
        sampled = evaluate(result, run.task, corruptions=run.corruptions, limit=CORRUPTED_IMAGES, **options).to_json()
        judged["robustness"], reference["robustness"] = sampled["robustness"], sampled["reference"]["robustness"]
    return cast(Evaluation, reference), cast(Evaluation, judged)


def _side(
    run: Run, candidate: Candidate, file: Path, example: Tensor, times: latency.Timed, evaluation: Evaluation
) -> Side:
    return Side(
        parameters=measure.count_parameters(candidate.graph),
        macs=count_macs(candidate.graph),
        size_bytes=candidate.measurement.size,
        memory_bytes=measure.memory_bytes(candidate.graph),
        read_bytes=measure.file_bytes(file),
        peak_memory_bytes=measure.peak_memory(file, example, runtime=run.runtime),
        throughput=throughput(file, example, run.runtime),
        latency_ms=cast(Latency, times["latency_ms"]),
        speedup=cast(dict[str, Spread], times["speedup"]),
        evaluation=evaluation,
    )


def _certified(run: Run, result: Candidate, file: Path) -> Parity:
    """Parity in the run's runtime, and in each other one that is installed and reads its files."""
    name = plugins.describe(run.runtime)
    others = [other for other in plugins.available("runtimes") if other != name.partition(":")[0]]
    readers = [
        reader
        for reader in map(latency.with_threads, others)
        if reader.suffix == run.runtime.suffix and reader.capabilities.runs and find_spec(reader.package)
    ]
    certificate = certify(
        result.graph, file, runtime=run.runtime, also=readers, inputs=run.images(PARITY_IMAGES), progress=run.progress
    )
    runtimes = dict(certificate["runtimes"])
    parity = runtimes.pop(name)
    return cast(Parity, {**parity, "sha256": certificate["sha256"], "also": runtimes})
