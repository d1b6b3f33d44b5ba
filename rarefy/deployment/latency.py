from __future__ import annotations

import dataclasses
import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy import plugins
from rarefy.errors import InputError

SAMPLE_SECONDS = 2e-3
SECONDS = 4.0  # of all rounds together, where nobody says how many
ROUNDS = (30, 400)
DISTURBED = 1.3  # times as long as the fastest round took
CALM = 10  # rounds that count in any case

Session = Callable[[Tensor], Any]


def timed(
    files: Mapping[str, str | os.PathLike[str]],
    example: Tensor,
    *,
    runtime: Any = "onnxruntime",
    repeats: int | None = None,
    warmup: int = 20,
) -> dict[str, dict[str, Any]]:
    """Latency of exported files that take turns: ``{name: {"latency_ms": {...}, "speedup": {...}}}`` as in ``measure``.

    example: (batch, ...), what each run is given. runtime: with its threads set (``with_threads``).
    """
    found = latency(
        {name: runtime.open(Path(file)) for name, file in files.items()}, example, repeats=repeats, warmup=warmup
    )
    stated = {
        "batch": len(example),
        "threads": runtime.threads,
        "runtime": plugins.describe(runtime).partition(":")[0],
        "repeats": next(iter(found.values()))["repeats"],
    }
    return {name: {"latency_ms": {**one["ms"], **stated}, "speedup": one["speedup"]} for name, one in found.items()}


def latency(
    models: Mapping[str, Session], inputs: Tensor | Sequence[Tensor], *, repeats: int | None = None, warmup: int = 20
) -> dict[str, dict[str, Any]]:
    """Milliseconds of one call, of models that take turns; the docstring above says how.

    models: callables, the first being what others are compared with. inputs: what each is called with, one tensor or several. repeats: rounds,
    None: see ``measure``. warmup: calls of each before anything counts.

    ``{name: {"ms": {"median", "low", "high"}, "speedup": {name: {"median", "low", "high"}}, "repeats"}}``: low and high are the quartiles of the rounds that count;
    speedup is against each of the models.
    """
    if not models or (repeats is not None and repeats < 1) or warmup < 0:
        raise InputError(
            f"latency of {len(models)} models with repeats={repeats}, warmup={warmup}: give at least 1, 1 and 0"
        )
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    names = list(models)
    inner = {name: _runs_of_a_sample(models[name], given, warmup) for name in names}
    if repeats is None:
        one = sum(_seconds(models[name], given, inner[name]) * inner[name] for name in names)
        repeats = min(ROUNDS[1], max(ROUNDS[0], round(SECONDS / one)))
    samples = {name: np.empty(repeats) for name in names}
    with _undisturbed():
        for turn in range(repeats):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                samples[name][turn] = _seconds(models[name], given, inner[name])
    total = np.sum([samples[name] * inner[name] for name in names], axis=0)
    calm = total <= max(DISTURBED * total.min(), np.sort(total)[:CALM][-1])
    samples = {name: found[calm] for name, found in samples.items()}
    return {
        name: {
            "ms": _quartiles(1000 * samples[name]),
            "speedup": {other: _quartiles(samples[other] / samples[name]) for other in names},
            "repeats": int(calm.sum()),
        }
        for name in names
    }


def with_threads(runtime: Any, threads: int | None = None) -> Any:
    """The runtime, its threads a number: the caller's, else the runtime's own, else 1."""
    chosen = plugins.resolve("runtimes", runtime)
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads}: give at least 1")
    return dataclasses.replace(chosen, threads=threads or chosen.threads or 1)


def _runs_of_a_sample(model: Session, given: Sequence[Tensor], warmup: int) -> int:
    _seconds(model, given, max(1, warmup))
    once = min(_seconds(model, given, 1) for _ in range(10))
    return max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))


def _seconds(model: Session, given: Sequence[Tensor], runs: int) -> float:
    """Mean seconds of one of ``runs`` calls."""
    begun = time.perf_counter()
    for _ in range(runs):
        model(*given)
    return (time.perf_counter() - begun) / runs


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection and no autograd in what is timed."""
    collected = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        if collected:
            gc.enable()


def _quartiles(values: np.ndarray[Any, Any]) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "low": float(low), "high": float(high)}
