"""Throughput: images a second of an exported file, at the batch at which it answers most of them.

A server that has enough requests answers them in batches. For each batch size the fastest of a few runs counts (a
disturbed run is slower, never faster); a batch that gains less than ``GAIN`` on a smaller one is not worth its wait. A
runtime whose files take one size alone is asked for that one.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from rarefy.deployment.runtime import Runtime, Session
from rarefy.errors import InputError
from rarefy.reports.facts import Throughput

BATCHES = (1, 4, 16, 64)
RUNS, SECONDS = 4, 0.1  # of each batch: runs at least, and when there is no further one
LONGEST = 2.0  # seconds of a run, behind which no larger batch is tried
GAIN = 1.05


def throughput(file: Path, example: Tensor, runtime: Runtime) -> Throughput:
    """The best batch. example: (1, ...), an input. runtime: with its threads set."""
    session = runtime.open(file)
    best = Throughput(batch=1, per_second=0.0, threads=runtime.threads)
    for batch in BATCHES:
        images = torch.cat([example[:1]] * batch)
        try:
            session(images)  # memory is taken, and kernels chosen, here
        except (InputError, RuntimeError, ValueError):
            break  # it takes no other batch
        seconds = _fastest(session, images)
        if batch / seconds > GAIN * best["per_second"]:
            best = Throughput(batch=batch, per_second=batch / seconds, threads=runtime.threads)
        if seconds > LONGEST:
            break
    return best


def _fastest(session: Session, images: Tensor) -> float:
    """Seconds of the fastest run."""
    times: list[float] = []
    with torch.no_grad():
        while len(times) < RUNS or sum(times) < SECONDS:
            begun = time.perf_counter()
            session(images)
            times.append(time.perf_counter() - begun)
            if sum(times) > LONGEST:
                break
    return max(min(times), 1e-9)
