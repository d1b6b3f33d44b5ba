"""certify(): do the simulation in PyTorch, the exported file, and every runtime that reads it give the same answers, layer by layer and on the metric?

The certificate is JSON, and names the file by its hash:

    file, sha256, written_for             what is deployed
    samples                               inputs of the comparison
    runtimes     {name: {version, agreement, largest_difference, ulp, first_diverging_layer, layers, passed}}     (``rarefy.deployment.parity``)
    metric       {"simulation" or name: {value, interval, samples}}     where a task was given, on its validation images
    first_diverging_layer                 in the first runtime that has one
    passed                                in each runtime, and no metric further from the simulation's than ``METRIC``
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.evaluation.evaluate import evaluate
from rarefy.graph.nodes import example_inputs

METRIC = 0.005  # of all samples: what the least agreement allows


def certify(
    graph: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    runtime: Any = "onnxruntime",
    also: Sequence[Any] = (),
    inputs: Tensor | None = None,
    task: Any = None,
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The certificate of ``path``, which ``runtime`` exported ``graph`` to.

    also: further runtimes that read the file. inputs: (N, ...) to compare on; None: random numbers. task: adds the metric, on at most ``limit`` validation images.
    Raises InputError for a runtime of other files, FormatError for a file that a runtime can't read.
    """
    writer = plugins.resolve("runtimes", runtime)
    readers = readers_of(writer, also)
    given = example_inputs(graph, batch=8)[0] if inputs is None else inputs
    found: dict[str, Any] = {}
    for name, reader in readers.items():
        found[name] = {**writer.compare(graph, path, given, on=reader)}
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name]["version"] = importlib.metadata.version(reader.package)
    first = next(
        (one["first_diverging_layer"] for one in found.values() if one["first_diverging_layer"] is not None), None
    )
    certificate = {
        "file": Path(path).name,
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "written_for": plugins.describe(writer),
        "samples": len(given),
        "runtimes": found,
        "first_diverging_layer": first,
        "passed": all(one["passed"] for one in found.values()),
    }
    if task is not None:
        models = {"simulation": graph, **{name: reader.open(path) for name, reader in readers.items()}}
        judged = {
            name: evaluate(model, task, limit=limit, progress=progress).to_json() for name, model in models.items()
        }
        certificate["metric"] = {
            name: {key: one[key] for key in ("value", "interval", "samples")} for name, one in judged.items()
        }
        exact = judged["simulation"]["value"]
        certificate["passed"] = certificate["passed"] and all(
            abs(one["value"] - exact) <= METRIC for one in judged.values()
        )
    return certificate


def readers_of(runtime: Any, also: Sequence[Any]) -> dict[str, Any]:
    """The runtimes of a certificate by name, the one that wrote the file first. Raises InputError for one of other files."""
    writer = plugins.resolve("runtimes", runtime)
    readers = {plugins.describe(one): one for one in (writer, *(plugins.resolve("runtimes", one) for one in also))}
    for name, reader in readers.items():
        if reader.suffix != writer.suffix:
            raise InputError(
                f"{name}: reads {reader.suffix} files, and {plugins.describe(writer)} writes {writer.suffix}; leave it out of also"
            )
    return readers
