"""export_all(): the file of each runtime, made, compared and timed in a process of its own, in one table.

A runtime is somebody else's library: one may end the process with a signal, another never come back or take all memory.
Each therefore gets a saved copy of the model, a process, a time limit, and an end before memory has one; what becomes
of it is one row, and the others' files are not touched by it. A library that is not installed, and a model that a
runtime can't run, are rows that say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, fx

from rarefy import plugins
from rarefy.artifact import folder as folder_
from rarefy.deployment import latency
from rarefy.deployment.export import export, fed, given_to
from rarefy.deployment.runtime import Runtime
from rarefy.errors import InputError, MissingDependency, RarefyError
from rarefy.system import memory

SECONDS = 600.0  # for one runtime
LOOK = 0.2  # seconds between looks at the memory that is free
SPARED = 16  # the part of it that is left to others
ROUNDS = 30  # of the latency
REPORT = "report.json"


COLUMNS = ("runtime", "bytes", "same answers", "codes apart", "ms", "state")


class Row(TypedDict, total=False):
    """What became of one runtime.

    state: "written", "skipped" (not installed, or not for this model), "failed" (it ended or hung), or "differs" (the
        file is there, and answers otherwise). note: why, in a sentence.
    parity: without its layers. latency_ms: median of one run, batch 1, one thread; None where it was not run.
    """

    runtime: str
    state: str
    file: str | None
    size_bytes: int | None
    parity: dict[str, object] | None
    latency_ms: float | None
    note: str


def export_all(
    graph: fx.GraphModule,
    target: str | os.PathLike[str],
    *,
    also: Sequence[str] = (),
    inputs: Sequence[Tensor] | None = None,
    compare: bool = True,
    boxes: bool = True,
    seconds: float = SECONDS,
    only: Sequence[str] | None = None,
) -> list[Row]:
    """Write ``graph`` for every runtime into the folder ``target``, which is made where it is missing.

    also: further runtimes, as texts (``mylab.runtimes:Mine``). inputs: what is compared on; None: random numbers.
    compare, boxes: as in ``export``. seconds: that one runtime may take, its libraries' start included. only: these
    runtimes alone.

    Raises InputError for a graph that can't be saved, a target that is a file, and a runtime that there is not.
    """
    place = Path(target)
    if place.exists() and not place.is_dir():
        raise InputError(f"{place}: is a file; name a folder for the files of all runtimes")
    names = [*(plugins.available("runtimes") if only is None else only), *also]
    chosen = {name: plugins.resolve("runtimes", name) for name in names}
    # last what runs here: predict.py beside is for the last file of its kind
    chosen = dict(sorted(chosen.items(), key=lambda one: one[1].capabilities.runs))
    with tempfile.TemporaryDirectory(prefix="rarefy-") as scratch:
        saved = folder_.save(graph, Path(scratch) / "model", store="fastest")
        given = None if inputs is None else Path(scratch) / "inputs"
        if given is not None and inputs is not None:
            given.mkdir()
            for index, one in enumerate(inputs):
                _keep(one, given / f"{index}.npy")
        place.mkdir(parents=True, exist_ok=True)
        rows = []
        for name, runtime in chosen.items():
            asked = {
                "model": str(saved), "inputs": given and str(given), "runtime": name, "compare": compare,
                "boxes": boxes, "file": str(_file_of(place, name, runtime)),
                "report": str(Path(scratch) / REPORT),
            }  # fmt: skip
            rows.append(_in_its_process(name, asked, seconds))
    if not any(row["state"] in ("written", "differs") for row in rows):
        told = "; ".join(f"{row['runtime']}: {row['note']}" for row in rows)
        raise InputError(f"{place}: no runtime could write the model ({told})")
    return rows


def shown(row: Row) -> tuple[str, ...]:
    """The row as a table has it."""
    parity, size, ms = row["parity"], row["size_bytes"], row["latency_ms"]
    state = f"{row['state']}: {row['note']}" if row["note"] else row["state"]
    return (
        row["runtime"],
        "" if size is None else f"{size:,}",
        "" if not parity else f"{parity['agreement']:.1%}",
        "" if not parity else str(parity["ulp"]),
        "" if ms is None else f"{ms:.3g}",
        state,
    )


def _file_of(place: Path, name: str, runtime: Runtime) -> Path:
    stem = "".join(letter if letter.isalnum() else "_" for letter in name)
    return place / f"{stem}{(*runtime.capabilities.suffixes, runtime.suffix)[0]}"


def _keep(tensor: Tensor, path: Path) -> None:
    np.save(path, tensor.detach().cpu().numpy(), allow_pickle=False)


def _in_its_process(name: str, asked: dict[str, Any], seconds: float) -> Row:
    """The row of a runtime; whatever its process does, this one goes on."""
    report = Path(asked["report"])
    report.unlink(missing_ok=True)
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    program = "from rarefy.deployment.everywhere import main; main()"
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(asked)],
            env=known,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            code, why = _ended(process, seconds)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            process.wait()
        said.seek(0)
        words = said.read()[-4000:].decode(errors="replace").strip()
    with contextlib.suppress(OSError, ValueError):
        row: Row = json.loads(report.read_text(encoding="utf-8"))
        if code == 0 or row["state"] != "begun":
            return row
    return _lost(name, Path(asked["file"]), code, why, words)


def _ended(process: subprocess.Popen[bytes], seconds: float) -> tuple[int | None, str]:
    """The exit status; None, and why, for a process that has to be ended: time is over, or memory nearly.

    The system's own way out of that may take another process.
    """
    left, end = (memory.available() or 0) // SPARED, time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(LOOK, max(end - time.monotonic(), 0.0))), ""
        free = memory.available()
        if free is not None and free < left:
            return None, "took nearly all memory that was free and was ended; leave it out, or give the machine more"
    return None, f"took more than {seconds:g} s and was ended; give it more time, or leave it out"


def _lost(name: str, file: Path, code: int | None, why: str, words: str) -> Row:
    if code is not None and code < 0:
        why = f"its process was killed by {signal.Signals(-code).name}; its library has a fault with this model"
    elif code is not None:
        why = f"its process ended with {code} ({words.splitlines()[-1][:200] if words else 'and said nothing'})"
    found: Row = {"runtime": name, "state": "failed", "file": None, "size_bytes": None, "parity": None}
    if file.exists():  # put in place whole before that
        found |= {"file": str(file), "size_bytes": file.stat().st_size}
    return {**found, "latency_ms": None, "note": why}


def main() -> None:
    """In the process of its own: what is asked for stands in the only argument, as JSON; the row goes to a file."""
    asked = json.loads(sys.argv[-1])
    row: Row = {"runtime": asked["runtime"], "state": "begun", "file": None, "size_bytes": None, "parity": None}
    row |= {"latency_ms": None, "note": ""}
    report = Path(asked["report"])
    try:
        _fill(row, asked)
    except MissingDependency as error:
        row |= {"state": "skipped", "note": str(error)}
    except RarefyError as error:
        row |= {"state": "skipped", "note": str(error)}
    partial = report.with_suffix(".new")
    partial.write_text(json.dumps(row), encoding="utf-8")
    partial.replace(report)


def _fill(row: Row, asked: dict[str, Any]) -> None:
    runtime = latency.with_threads(asked["runtime"], 1)
    graph, target = folder_.load(asked["model"]), Path(asked["file"])
    inputs = None
    if asked["inputs"]:
        files = sorted(Path(asked["inputs"]).glob("*.npy"), key=lambda one: int(one.stem))
        inputs = [torch.from_numpy(np.load(one, allow_pickle=False)) for one in files]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parity = export(graph, target, runtime=runtime, inputs=inputs, compare=asked["compare"], boxes=asked["boxes"])
    row |= {"state": "written", "file": str(target), "size_bytes": _size(target)}
    if parity:
        row["parity"] = {key: value for key, value in parity.items() if key != "layers"}
        if not parity["passed"]:
            layer = parity["first_diverging_layer"]
            row |= {"state": "differs", "note": "" if layer is None else f"{layer} is the first layer that differs"}
    if asked["compare"] and runtime.capabilities.runs:
        _, example = fed(graph, given_to(graph, inputs), asked["boxes"])
        one = tuple(part[:1] for part in example)
        measured = latency.timed({"file": target}, one, runtime=runtime, repeats=ROUNDS, warmup=3)
        row["latency_ms"] = measured["file"]["latency_ms"]["median"]
    elif asked["compare"]:
        row["note"] = str(getattr(runtime, "why_not", ""))


def _size(file: Path) -> int:
    weights = file.with_suffix(".bin")  # of OpenVINO's own format
    return file.stat().st_size + (weights.stat().st_size if file.suffix == ".xml" and weights.exists() else 0)
