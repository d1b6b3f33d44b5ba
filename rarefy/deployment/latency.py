"""Latency: of models and files that take turns, and of the kernels of one run; and when such a measurement is trusted.

Sessions that take turns meet the same clock speed and the same neighbours, so that a ratio within a round is a fair
one. A sample is as many calls as fill two milliseconds; a round is one sample of each, and the turn begins with another
each time. What counts is the median over the rounds that no other process disturbed, with its quartiles. Where fewer
than a third were left in peace, all is measured once more; where that is no better, the result says so (``disturbed``).
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy import plugins
from rarefy.deployment.runtime import Inputs, Runtime, several
from rarefy.errors import InputError

SAMPLE_SECONDS = 2e-3
SECONDS = 4.0  # of all rounds together, where nobody says how many
ROUNDS = (30, 400)
RUNS = (15, 300)  # of a profile
UNSETTLED = 3  # runs at the start of a profile that don't count

# When a measurement is trusted: a round that another process disturbed does not count, a ratio whose quartiles lie far
# apart says nothing, and a gain has to be more than what is left of the noise.
DISTURBED, CALM = 1.3, 10  # times as long as the fastest round took; rounds that count in any case
DISTURBED_RUN, CALM_RUNS = 1.1, 5  # the same, of the runs of a profile
TRUSTED = 1 / 3  # share of the rounds that has to count
SPREAD = 1.3  # between the quartiles of a ratio, from which on it tells nothing
NOISE = 1.01  # what two files that take turns differ by in any case
CLEARLY = 1.1  # a gain that a step may be kept for

Call = Callable[..., object]
Floats = NDArray[np.float64]
T = TypeVar("T")


class Quartiles(TypedDict):
    """Median and quartiles of the rounds that count."""

    median: float
    low: float
    high: float


class RunTime(Quartiles):
    """Milliseconds of a run of a file, and what was run. repeats: rounds that count, of ``rounds``."""

    batch: int
    threads: int
    runtime: str
    repeats: int
    rounds: int
    disturbed: bool


class Timed(TypedDict):
    """Of one of several files that took turns; speedup: against each of them."""

    latency_ms: RunTime
    speedup: dict[str, Quartiles]


class Latency(TypedDict):
    """Of one of several models that took turns.

    ms: of a call. speedup: against each. repeats: rounds that count, of ``rounds``. disturbed: these are too few.
    """

    ms: Quartiles
    speedup: dict[str, Quartiles]
    repeats: int
    rounds: int
    disturbed: bool


def is_calm(ratio: Quartiles) -> bool:
    """The quartiles lie near enough for the median to tell something."""
    return ratio["high"] <= SPREAD * ratio["low"]


def is_faster(ratio: Quartiles) -> bool:
    """A speedup by more than noise."""
    return ratio["median"] > NOISE and ratio["low"] > 1


def are_apart(one: Quartiles, other: Quartiles) -> bool:
    """Two measurements of one ratio differ by more than the quartiles of either explain."""
    return abs(one["median"] - other["median"]) > max(ratio["high"] - ratio["low"] for ratio in (one, other))


def doubt(measured: RunTime) -> str:
    """What to say of a measurement that was disturbed; "" of any other."""
    if not measured.get("disturbed"):
        return ""
    return (
        f"other processes used the processor: only {measured['repeats']} of {measured['rounds']} rounds could be "
        "trusted, twice; measure again on a quiet machine"
    )


def undisturbed(totals: Floats, disturbed: float, least: int) -> NDArray[np.bool_]:
    """(rounds,) times -> (rounds,) bool: which of them count.

    Those that took at most ``disturbed`` times as long as the fastest, and the ``least`` fastest in any case.
    """
    longest = max(disturbed * float(totals.min()), float(np.sort(totals)[:least][-1]))
    return np.less_equal(totals, longest)


def repeated(run: Callable[[], T], seconds: float) -> list[T]:
    """What ``run`` returns each time it is called, for ``seconds`` (15 to 300 times): the runs of a profile."""
    begun = time.perf_counter()
    results: list[T] = []
    while len(results) < RUNS[0] or (time.perf_counter() - begun < seconds and len(results) < RUNS[1]):
        results.append(run())
    return results


def quiet_medians(us: Sequence[Sequence[float]]) -> list[float]:
    """(runs, kernels) times -> (kernels,) medians over the runs that no other process disturbed."""
    runs = np.asarray(us, dtype=np.float64)[UNSETTLED:]
    quiet = runs[undisturbed(runs.sum(1), DISTURBED_RUN, CALM_RUNS)]
    return [float(median) for median in np.median(quiet, 0)]


def timed(
    files: Mapping[str, str | os.PathLike[str]],
    example: Inputs,
    *,
    runtime: Runtime,
    repeats: int | None = None,
    warmup: int = 20,
) -> dict[str, Timed]:
    """Latency of exported files that take turns.

    files: by name. example: (batch, ...) each, what each run is given. runtime: with its threads set
    (``with_threads``).
    repeats, warmup: as in ``latency``.
    """
    sessions = {name: runtime.open(Path(file)) for name, file in files.items()}
    measured: dict[str, Timed] = {}
    for name, one in latency(sessions, example, repeats=repeats, warmup=warmup).items():
        run_time: RunTime = {
            **one["ms"],
            "batch": len(several(example)[0]),
            "threads": runtime.threads,
            "runtime": plugins.name_of(runtime),
            "repeats": one["repeats"],
            "rounds": one["rounds"],
            "disturbed": one["disturbed"],
        }
        measured[name] = {"latency_ms": run_time, "speedup": one["speedup"]}
    return measured


def latency(
    models: Mapping[str, Call], inputs: Inputs, *, repeats: int | None = None, warmup: int = 20
) -> dict[str, Latency]:
    """Milliseconds of one call, of models that take turns.

    models: callables by name.
    inputs: what each is called with, one tensor or several.
    repeats: rounds; None: what four seconds have room for, 30 to 400.
    warmup: calls of each before anything counts.

    Raises InputError for no models, no rounds or a negative warmup.
    """
    if not models or (repeats is not None and repeats < 1) or warmup < 0:
        raise InputError(
            f"latency of {len(models)} models with repeats={repeats}, warmup={warmup}: give at least 1, 1 and 0"
        )
    given = several(inputs)
    calls = list(models.values())
    runs = [_runs_of_a_sample(call, given, warmup) for call in calls]
    if repeats is None:
        one = sum(_seconds(call, given, count) * count for call, count in zip(calls, runs, strict=True))
        repeats = min(ROUNDS[1], max(ROUNDS[0], round(SECONDS / one)))
    samples = _trusted(calls, given, runs, repeats)
    if samples.shape[1] < TRUSTED * repeats:
        samples = max(samples, _trusted(calls, given, runs, repeats), key=lambda one: one.shape[1])
    return {
        name: {
            "ms": _quartiles(1000 * seconds),
            "speedup": {other: _quartiles(theirs / seconds) for other, theirs in zip(models, samples, strict=True)},
            "repeats": len(seconds),
            "rounds": repeats,
            "disturbed": len(seconds) < TRUSTED * repeats,
        }
        for name, seconds in zip(models, samples, strict=True)
    }


def _trusted(calls: Sequence[Call], given: Sequence[Tensor], runs: Sequence[int], repeats: int) -> Floats:
    """(models, rounds that count): mean seconds of a call, of ``repeats`` rounds. runs: calls of a sample."""
    samples = np.empty((len(calls), repeats))
    with _alone():
        for turn in range(repeats):
            for place in range(turn, turn + len(calls)):
                which = place % len(calls)
                samples[which, turn] = _seconds(calls[which], given, runs[which])
    totals = (samples * np.array(runs)[:, None]).sum(0)
    kept: Floats = samples[:, undisturbed(totals, DISTURBED, CALM)]
    return kept


def with_threads(runtime: Runtime | str, threads: int | None = None) -> Runtime:
    """The runtime, its threads a number: the caller's, else the runtime's own, else 1."""
    chosen = plugins.resolve("runtimes", runtime)
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads}: give at least 1")
    if chosen.capabilities.has_threads:
        chosen = dataclasses.replace(chosen, threads=threads or chosen.threads or 1)
    counted: Runtime = chosen
    return counted


def _runs_of_a_sample(model: Call, given: Sequence[Tensor], warmup: int) -> int:
    _seconds(model, given, max(1, warmup))
    once = min(_seconds(model, given, 1) for _ in range(10))
    return max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))


def _seconds(model: Call, given: Sequence[Tensor], runs: int) -> float:
    """Mean seconds of one of ``runs`` calls."""
    begun = time.perf_counter()
    for _ in range(runs):
        model(*given)
    return (time.perf_counter() - begun) / runs


@contextmanager
def _alone() -> Iterator[None]:
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


def _quartiles(values: Floats) -> Quartiles:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "low": float(low), "high": float(high)}
