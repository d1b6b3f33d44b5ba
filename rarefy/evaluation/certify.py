"""certify(): do the simulation in PyTorch, the exported file, and every runtime that reads it give the same answers?

Layer by layer, and on the metric. The certificate is JSON, and names the file by its hash:

    file, sha256, written_for             what is deployed
    samples                               inputs of the comparison
    runtimes     {name: {version, agreement, largest_difference, ulp, first_diverging_layer, layers, passed}}
                                          (``rarefy.deployment.parity``)
    metric       {"simulation" or name: {value, interval, samples}}
                                          where a task was given, on its validation images
    first_diverging_layer                 in the first runtime that has one
    passed                                in each runtime, and no metric further from the simulation's than ``METRIC``
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import fx

from rarefy import plugins
from rarefy.deployment.runtime import Inputs, Parity, Runtime, several
from rarefy.errors import InputError
from rarefy.evaluation.evaluate import Model, evaluate
from rarefy.evaluation.evaluation import Evaluation
from rarefy.graph.nodes import example_inputs
from rarefy.tasks.task import Task, fitted, settled

METRIC = 0.005  # of all samples: what the least agreement allows; of a metric that is no share, of its value


def certify(
    graph: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    runtime: Runtime | str = "onnxruntime",
    also: Sequence[Runtime | str] = (),
    inputs: Inputs | None = None,
    task: Task | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The certificate of ``path``, which ``runtime`` exported ``graph`` to.

    also: further runtimes that read the file. inputs: (N, ...) each, to compare on; None: random numbers.
    task: adds the metric, on at most ``limit`` validation images.
    Raises InputError for a runtime of other files, FormatError for a file that a runtime can't read.
    """
    writer: Runtime = plugins.resolve("runtimes", runtime)
    readers = readers_of(writer, also)
    given = several(example_inputs(graph, batch=8) if inputs is None else inputs)
    compared = {name: _compared(writer, graph, path, given, reader) for name, reader in readers.items()}
    diverging = (one["first_diverging_layer"] for one in compared.values())
    certificate = {
        "file": Path(path).name,
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "written_for": plugins.describe(writer),
        "samples": len(given[0]),
        "runtimes": compared,
        "first_diverging_layer": next((layer for layer in diverging if layer is not None), None),
        "passed": all(one["passed"] for one in compared.values()),
    }
    if task is None:
        return certificate
    models: dict[str, Model] = {"simulation": graph, **{name: reader.open(path) for name, reader in readers.items()}}
    known = fitted(settled(task, graph), graph)  # of a file nobody says what it ends in
    judged = {name: evaluate(model, known, limit=limit, progress=progress) for name, model in models.items()}
    metric = {
        name: {"value": one.value, "interval": list(one.interval), "samples": one.samples}
        for name, one in judged.items()
    }
    return {**certificate, "metric": metric, "passed": certificate["passed"] and _same(judged)}


def readers_of(runtime: Runtime | str, also: Sequence[Runtime | str]) -> dict[str, Runtime]:
    """The runtimes of a certificate by name, the file's writer first. Raises InputError for one of other files."""
    writer: Runtime = plugins.resolve("runtimes", runtime)
    chosen: list[Runtime] = [writer, *(plugins.resolve("runtimes", one) for one in also)]
    readers = {plugins.describe(one): one for one in chosen}
    for name, reader in readers.items():
        if reader.suffix != writer.suffix:
            raise InputError(
                f"{name}: reads {reader.suffix} files, and {plugins.describe(writer)} writes {writer.suffix}; "
                "leave it out of also"
            )
    return readers


def _compared(
    writer: Runtime, graph: fx.GraphModule, path: str | os.PathLike[str], inputs: Inputs, reader: Runtime
) -> Parity:
    parity: Parity = {**writer.compare(graph, path, inputs, on=reader)}
    with suppress(importlib.metadata.PackageNotFoundError):
        parity["version"] = importlib.metadata.version(reader.package)
    return parity


def _same(judged: Mapping[str, Evaluation]) -> bool:
    exact = judged["simulation"]
    allowed = METRIC if exact.unit == "%" else METRIC * abs(exact.value)
    return all(abs(one.value - exact.value) <= allowed for one in judged.values())
