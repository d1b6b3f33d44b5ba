"""What a saved folder says of itself, measured again: which of it holds.

    content, hashes   of the files, compared always
    size, parameters, MACs     of the model, counted
    accuracy          on the data given: holds where what is claimed lies within the 95 % interval found here, or
                      within one made wider for a claim on fewer images (at most twice as wide). The interval that the
                      folder claims is not asked: a wide one would excuse any number.
    parity            of the folder's file with the model, on images of the data
    latency           of that file, here: told beside the claim, and judged only by who knows both machines

The claims are those of report.json, which must be of this model (``rarefy.evaluation.recorded``). What it says of the
original (a drop, a speed-up) takes the original to judge, and is told as not judged.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import fx

from rarefy.artifact import snapshot
from rarefy.artifact.snapshot import Snapshot
from rarefy.deployment import served
from rarefy.deployment.latency import timed
from rarefy.deployment.runtime import Runtime
from rarefy.errors import FormatError
from rarefy.evaluation import measure, recorded
from rarefy.evaluation.evaluate import evaluate
from rarefy.graph.macs import count_macs
from rarefy.graph.nodes import example_inputs
from rarefy.system.strict_json import Json
from rarefy.tasks.task import Task

LEAST_AGREEMENT = 0.005  # below the claimed one by which parity still counts as the same
MOST_WIDER = 2  # times the interval found here within which a claim on fewer images holds


class Claim(NamedTuple):
    """holds: None where nothing was measured, or nobody can say. note: how it was compared."""

    name: str
    claimed: object
    found: object
    holds: bool | None
    note: str = ""


def check(held: Snapshot, graph: fx.GraphModule, task: Task | None, runtime: Runtime, limit: int | None) -> list[Claim]:
    """Each claim of the folder, compared.

    graph: of the folder. task: with the data to judge on; None: accuracy and parity are not measured. runtime: that
    runs the folder's file. limit: so many images only. Raises FormatError for a report that is none.
    """
    facts = recorded.of_folder(held) or {}
    after = _table(facts.get("after"))
    claims = [*_files(held), *_counted(held, graph, after)]
    claims += _accuracy(graph, task, _table(after.get("evaluation")), limit)
    if facts.get("before") is not None:
        way_out = "takes the original: `rarefy report FOLDER --data ... --reference ORIGINAL`"
        claims.append(Claim("beside the original", "drop, speed-up", None, None, way_out))
    name = f"model{runtime.suffix}"
    if name in held:
        with tempfile.TemporaryDirectory(prefix="rarefy-") as place:
            file = Path(place) / name
            held.copy(name, file)
            served.check(file, graph, runtime, str(held.path / name))
            claims.append(_parity(graph, file, task, runtime, _table(facts.get("parity"))))
            claims.append(_latency(graph, file, runtime, _table(after.get("latency_ms"))))
    return claims


def _files(held: Snapshot) -> list[Claim]:
    """A file that is not as it is listed raises FormatError, and nothing of the folder holds then."""
    held.check()
    listed = held.manifest["files"]
    content = snapshot.content_of_files(listed)
    told = held.manifest.get("content")
    return [Claim("hashes", f"{len(listed)} files", "the same", True), Claim("content", told, content, told == content)]


def _counted(held: Snapshot, graph: fx.GraphModule, after: Mapping[str, Json]) -> list[Claim]:
    found = {
        "size_bytes": held.manifest["files"][snapshot.WEIGHTS]["size"],
        "parameters": measure.count_parameters(graph),
        "macs": count_macs(graph),
    }
    return [Claim(name, after[name], value, after[name] == value) for name, value in found.items() if name in after]


def _accuracy(graph: fx.GraphModule, task: Task | None, told: Mapping[str, Json], limit: int | None) -> list[Claim]:
    value = told.get("value")
    if task is None or task.data.val is None:
        return [Claim("accuracy", value, None, None, "no data was given: pass --data")] if value is not None else []
    found = evaluate(graph, task, limit=limit)
    name, now = found.label, [found.value, *found.interval]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return [Claim(name, value, now[0], None, f"no number is claimed; {found.samples} images here")]
    claimed = told.get("samples")
    samples: int = claimed if isinstance(claimed, int) and claimed > 0 else found.samples
    wide = min(MOST_WIDER, math.sqrt(max(1.0, found.samples / samples)))
    low, high = (now[0] + wide * (end - now[0]) for end in now[1:])
    note = f"{found.samples} images, 95 % interval {now[1]:.4f} to {now[2]:.4f}"
    note += f"; claimed on {samples} images" if samples != found.samples else ""
    return [Claim(name, value, now[0], low <= value <= high, note)]


def _parity(graph: fx.GraphModule, file: Path, task: Task | None, runtime: Runtime, told: Mapping[str, Json]) -> Claim:
    inputs: Any = next(iter(task.data.inputs("val", 64, 64, seed=0))) if task is not None else example_inputs(graph, 8)
    found = runtime.compare(graph, file, inputs)
    claimed = told.get("agreement")
    least = claimed - LEAST_AGREEMENT if isinstance(claimed, (int, float)) else 0.0
    holds = found["passed"] is not False and found["agreement"] >= least
    return Claim("parity", claimed, found["agreement"], holds, f"{file.name}, {found['samples']} inputs")


def _latency(graph: fx.GraphModule, file: Path, runtime: Runtime, told: Mapping[str, Json]) -> Claim:
    times = timed({"now": file}, example_inputs(graph, batch=1, seed=0), runtime=runtime)
    found = times["now"]["latency_ms"]
    spread = f"quartiles {found['low']:.3g} to {found['high']:.3g} ms"
    return Claim("latency_ms", told.get("median"), found["median"], None, f"on this machine, {spread}")


def _table(value: Json) -> Mapping[str, Json]:
    if value is not None and not isinstance(value, Mapping):
        raise FormatError(f"report.json: {str(value)[:40]!r} is no table; pass --data to `rarefy report` instead")
    return value or {}
