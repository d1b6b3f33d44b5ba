"""measure(): what a model costs: parameters, MACs, bytes on disk, latency on the runtime that will run it, memory.

**Latency** is compared, not listed: all models take turns in one run (``rarefy/deployment/latency.py``), and how many
times faster a model is than the first one is the median over rounds of the ratio *within* a round. ``repeats`` is the
number of rounds that no other process disturbed, and ``disturbed`` says that they are too few to be trusted, twice.

**Threads** are one unless the runtime (``"onnxruntime:threads=4"``) or the caller says otherwise; the number used is
part of the result.

**Bytes** on disk are those of ``weights.safetensors`` as ``save`` writes it; in memory those of the model's tensors
once it is loaded, each once (codes a byte each); read an inference those of the runtime's file, which holds its weights
as its kernels read them (4-bit codes two a byte, where a runtime has such) and is read through once a run.
**Parameters** are the numbers the model has learned, also where they are stored as integer codes. **MACs** are those of
``rarefy/graph/macs.py``, for one sample.

**Peak memory** is that of a fresh process: its highest resident memory while it opens the exported file and runs it
three times, less what it held just before, with all libraries loaded. It contains the runtime's buffers and the
weights, not the libraries. None where the system doesn't tell.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

import torch
from torch import fx

from rarefy import plugins
from rarefy.artifact import folder as folder_
from rarefy.artifact.operators.trial import check_affordable
from rarefy.deployment.latency import Quartiles, RunTime, timed, with_threads
from rarefy.deployment.runtime import Inputs, Runtime, several
from rarefy.errors import InputError
from rarefy.graph import macs
from rarefy.graph.macs import count_macs
from rarefy.graph.nodes import dtype_name, example_inputs
from rarefy.kernels.int_linear import CODES


class Costs(TypedDict):
    """What needs no clock. macs: of one sample. size_bytes: of the weights on disk. memory_bytes: of the tensors
    loaded."""

    parameters: int
    macs: int
    size_bytes: int
    memory_bytes: int


class Measurement(Costs):
    """speedup: against the first of the models that took turns. read_bytes: of the runtime's file, with its weights.
    peak_memory_bytes: None where it was not measured."""

    read_bytes: int

    peak_memory_bytes: int | None
    latency_ms: RunTime
    speedup: Quartiles


def measure(
    models: Mapping[str, fx.GraphModule],
    *,
    runtime: Runtime | str = "onnxruntime",
    batch: int = 1,
    threads: int | None = None,
    repeats: int | None = None,
    warmup: int = 20,
    memory: bool = True,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Cost of each model, by name; latencies from one run in which all take turns.

    models: graphs of the same inputs, by name; speedups are against the first. runtime: that runs them; threads: of one
    operator, see above.
    batch: samples a run. repeats: rounds; None: as many as 4 seconds hold, 30 to 400. warmup: runs of each before
    anything counts.
    memory: measure the peak memory too, in a process of its own.
    folder: where the exported files stay; None: they are temporary. seed: of the random inputs.

    ``{name: {"parameters", "macs", "size_bytes", "memory_bytes", "read_bytes", "peak_memory_bytes",
    "latency_ms": {"median", "low", "high", "batch",
    "threads", "runtime", "repeats", "rounds", "disturbed"}, "speedup": {"median", "low", "high"}}}``: low and high are
    quartiles.
    Raises InputError for no model, models of different inputs, or what the runtime can't run.
    """
    _check_models(models)
    for graph in models.values():
        check_affordable(graph, batch)
    chosen = with_threads(runtime, threads)
    with tempfile.TemporaryDirectory(prefix="rarefy-") as temporary:
        home = Path(folder if folder is not None else temporary)
        home.mkdir(parents=True, exist_ok=True)
        files = {name: home / f"{index}{chosen.suffix}" for index, name in enumerate(models)}
        for name, graph in models.items():
            chosen.export(graph, files[name])
        first = next(iter(models))
        example = example_inputs(models[first], batch=batch, seed=seed)
        times = timed(files, example, runtime=chosen, repeats=repeats, warmup=warmup)
        return {
            name: {
                **costs(graph),
                "read_bytes": file_bytes(files[name]),
                "peak_memory_bytes": peak_memory(files[name], example, runtime=chosen) if memory else None,
                "latency_ms": times[name]["latency_ms"],
                "speedup": times[name]["speedup"][first],
            }
            for name, graph in models.items()
        }


def _check_models(models: Mapping[str, fx.GraphModule]) -> None:
    if not isinstance(models, Mapping) or not models:
        what = "no model was given" if not models else f"a {type(models).__name__} has no name"
        raise InputError(f"measure: {what}; pass {{name: graph}}")
    shapes = {
        " and ".join(f"{one['dtype']} {list(one['shape'])}" for one in graph.meta["inputs"])
        for graph in models.values()
    }
    if len(shapes) > 1:
        raise InputError(
            f"measure: the models take different inputs, {'; and '.join(sorted(shapes))}; "
            "only models of one input can be compared"
        )


def costs(graph: fx.GraphModule) -> Costs:
    """What needs no clock: parameters, MACs of one sample, bytes of the weights on disk."""
    return {
        "parameters": count_parameters(graph),
        "macs": count_macs(graph),
        "size_bytes": weight_bytes(graph),
        "memory_bytes": memory_bytes(graph),
    }


def memory_bytes(graph: fx.GraphModule) -> int:
    """Of the model's tensors as they are loaded, each once."""
    return sum(one.nbytes for one in {*graph.parameters(), *graph.buffers()})


def file_bytes(file: Path) -> int:
    """Of one, and of what lies beside it under its name (ONNX's external data)."""
    return sum(one.stat().st_size for one in file.parent.glob(f"{file.name}*") if one.is_file())


def count_parameters(graph: fx.GraphModule) -> int:
    """Numbers the model has learned: its parameters, and weights that became integer codes."""
    return macs.count_parameters(graph) + sum(
        one.numel() for name, one in graph.named_buffers() if name.endswith(CODES)
    )


def weight_bytes(graph: fx.GraphModule) -> int:
    """Size of ``weights.safetensors``, as ``save`` writes it."""
    return folder_.content_of(graph).weight_bytes


def peak_memory(
    file: str | os.PathLike[str], example: Inputs, *, runtime: Runtime | str = "onnxruntime", timeout: float = 600.0
) -> int | None:
    """Bytes that a fresh process takes to open ``file`` and run it on inputs like ``example``.

    None where the system does not tell. Raises InputError where that process fails.
    """
    shapes = [(list(one.shape), dtype_name(one.dtype)) for one in several(example)]
    asked = [plugins.describe(runtime), os.fspath(file), json.dumps(shapes)]
    place = str(Path(__file__).resolve().parents[2])
    # Modules are found where this process finds them: left to itself, Python would begin with the working folder.
    paths = os.pathsep.join([place, *filter(None, sys.path)])
    known = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    program = "import sys; from rarefy.evaluation.measure import print_peak_memory; print_peak_memory(*sys.argv[1:])"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, *asked],
            env=known,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"{file}: was not opened and run in {timeout:g} s; the machine may be out of memory"
        ) from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit {error.returncode}"])[-1]
        raise InputError(f"{file}: could not be run in a process of its own ({last})") from error
    value: int | None = json.loads(done.stdout.strip().splitlines()[-1])
    return value


def print_peak_memory(runtime: str, file: str, example: str) -> None:
    """The process of ``peak_memory``."""
    given = []
    for shape, dtype in json.loads(example):
        kind = getattr(torch, dtype)
        given.append(torch.rand(shape, dtype=kind) if kind.is_floating_point else torch.zeros(shape, dtype=kind))
    chosen: Runtime = plugins.resolve("runtimes", runtime)
    importlib.import_module(chosen.package)  # opening would load it, and the library is no cost of the model's
    gc.collect()
    before = peak_bytes(reset=True)
    session = chosen.open(Path(file))
    for _ in range(3):
        session(*given)
    after = peak_bytes()
    print(json.dumps(None if before is None or after is None else max(0, after - before)))


def peak_bytes(reset: bool = False) -> int | None:
    """Highest resident memory of this process; with ``reset``, the highest starts anew at what is held now.

    Not ``ru_maxrss`` on Linux: it survives exec, so a child would begin with its parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        if reset:
            with suppress(OSError):  # a sandbox may forbid it: then the baseline is the highest of importing
                Path("/proc/self/clear_refs").write_text("5")
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        return 1024 * int(line.split()[1]) if line else None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
