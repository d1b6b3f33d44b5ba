"""Pruning to a measured latency: which widths make the network ``speedup`` times as fast on the runtime, at the least damage.

    samples ─▶ table (fit) ─▶ path (greedy) ─▶ a file, measured beside the original ─┐
                 ▲                                                                   │  until it is as fast as asked
                 └───────────────────────────────── its kernels' times, a new goal ──┘

**Table.** MACs are no time: kernels work in tiles, are bound by memory where they are thin, and layout changes, softmax and additions cost,
too. So the runtime is asked. The network is exported whole and at a few widths, each family of channels at another fraction every time (a Latin
hypercube), and the runtime's profile gives the time of each kernel, as fused and with the caches as it finds them there. Which axis of a kernel
follows which axis of the network is read off the sizes over the samples, rounded up to the layout's block where the runtime does so: no operator is known by
name. Kernels alike (operator, fixed sizes) share their samples; their time is fitted as ``a + b i + c o + d i o + ...`` of their widths, coefficients
not negative, by relative error. A network's time is thus one quadratic form of its widths.

**Damage.** A layer of n outputs that loses the share r of their importance is damaged by ``n r^2``: the errors of a layer's lost channels add up, so its last
channels are worth more than its first, and no layer becomes a bottleneck because its channels are dear. A family that several layers make
(a residual stream) is damaged in each of them.

**Path.** From the whole network, the step of a family that does least damage for a microsecond saved is taken, its saving evaluated exactly with all other
widths as they are, until nothing can go. Steps of several tiles are tried too, so that a block boundary is crossed where a single tile saves nothing. The
goal is a point on that path.

**Correction.** What is promised is a measurement: the network at that point is exported and timed against the original (``measuring.latency``, taking turns), its
kernels join the table, and the goal is moved by what was missed, for a few rounds, and a few more where the best is still a good deal faster than asked. A measurement whose quartiles lie far apart (a busy machine) moves nothing, and
if none is better the pruning is refused.

The idea of a knapsack of importance under a latency table is HALP's (arXiv 2110.10811). Given up: the same file from the same seed, since clocks
differ; and what the table cannot see, which the rounds correct. Samples are kept in the user's cache, by runtime, version, processor, threads,
batch, network and widths; a cache that is damaged is measured anew.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from rarefy import plugins
from rarefy.deployment import latency
from rarefy.deployment.latency import Quartiles, is_calm
from rarefy.deployment.runtime import Kernel
from rarefy.errors import InputError
from rarefy.graph.nodes import example_inputs
from rarefy.pruning.latency_table import (
    JUMPS,
    TURNS,
    Array,
    Space,
    Table,
    _cache_file,
    _cached,
    _design,
    _keep,
    _kernels,
    _total,
    fit,
)
from rarefy.system.progress import track

ROUNDS = 5
SPARE = 3  # further rounds, where the best so far is faster than it need be
AIM = 1.02  # of what is asked: a measurement has an error, and what is asked is a least
ACCEPTED = (1.0, 1.05)  # times what is asked: no further round
LEAST, MOST = 0.95, 1.15  # below that the goal is missed; above, channels went for nothing


def damage(values: Array, widths: Array) -> Array:
    """``n r^2`` where the first ``widths`` of a family stay; values: (n,) importance, the best first."""
    values = np.maximum(values, 0.0)
    values = values if values.sum() > 0 else np.ones_like(values)
    held = np.append(0.0, np.cumsum(values))
    lost: Array = len(values) * (1 - held[widths] / held[-1]) ** 2
    lost[widths == len(values)] = 0.0
    return lost


# ------------------------------------------------------------------------------------------------------------------ path


@dataclass(frozen=True, eq=False)
class Descent:
    """options: (points, families), from the whole network down.  us: (points,) the table's time."""

    options: Array
    us: Array

    def within(self, limit: float) -> int | None:
        """The first point that takes at most ``limit`` microseconds."""
        good = np.flatnonzero(self.us <= limit)
        return int(good[0]) if len(good) else None


def descend(space: Space, table: Table) -> Descent:
    """Step by step the least damage for a microsecond saved, until no step saves time."""
    option = space.whole
    parts = [part[:, table.axes] for part in space.parts]
    local = Table(np.arange(len(table.axes)), table.blocks, table.form, table.error, table.modelled)
    held = space.axes(option)[table.axes]
    now = float(local(held[None])[0])
    options, times = [option.copy()], [now]
    while True:
        moves = [(family, at - jump) for family, at in enumerate(option) for jump in JUMPS if at >= jump]
        if not moves:
            break
        saved = now - local(
            held + np.stack([parts[family][to] - parts[family][option[family]] for family, to in moves])
        )
        lost = np.array([space.damage[family][to] - space.damage[family][option[family]] for family, to in moves])
        worth = np.where(saved > 1e-9 * now, (lost + 1e-12) / np.maximum(saved, 1e-9 * now), np.inf)
        best = int(worth.argmin())
        if not math.isfinite(worth[best]):
            break
        family, to = moves[best]
        held = held + parts[family][to] - parts[family][option[family]]
        option[family] = to
        now -= float(saved[best])
        options.append(option.copy())
        times.append(now)
    return Descent(np.array(options), np.array(times))


# ---------------------------------------------------------------------------------------------------------------- search


@dataclass(frozen=True, eq=False)
class Round:
    """option: (families,).  predicted: times as fast as the original, before it was measured;  measured: {"median", "low", "high"}, the same."""

    option: Array
    predicted: float
    measured: Quartiles
    latency_ms: dict[str, float]
    table_error: float

    @property
    def speedup(self) -> float:
        return self.measured["median"]


def search(
    space: Space,
    build: Callable[[Array], fx.GraphModule],
    speedup: float,
    *,
    runtime: Any = "onnxruntime",
    threads: int | None = None,
    batch: int = 1,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> tuple[Array, dict[str, Any]]:
    """The widths (families,) at which the network is ``speedup`` times as fast, measured, and what was measured.

    build: widths (families,) -> the network.  threads, batch: of what is timed.  cache: folder of measured samples, None: the user's.
    Raises InputError where the goal is out of reach, with what was reached.
    """
    chosen = latency.with_threads(runtime, threads)
    name = plugins.describe(chosen).partition(":")[0]
    settings = {"runtime": name, "threads": chosen.threads, "batch": batch}
    original = build(space.kept(space.whole))
    example = example_inputs(original, batch=batch, seed=seed)[0]
    options = _design(space, seed)
    file = _cache_file(cache, original, [space.kept(option).tolist() for option in options], settings, chosen.package)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="rarefy-") as temporary:
        files = {
            "original": chosen.export(original, Path(temporary) / f"original{chosen.suffix}"),
            "pruned": Path(temporary) / f"pruned{chosen.suffix}",
        }

        whole_run = _kernels(chosen, files["original"], example, name)

        def tried(option: Array, repeats: int | None = None) -> tuple[list[Kernel], dict[str, Any]]:
            """Its kernels, their sum in the proportion that the two networks have when they take turns: a machine's speed drifts between profiles."""
            kernels = _kernels(chosen, chosen.export(build(space.kept(option)), files["pruned"]), example, name)
            times = latency.timed(files, example, runtime=chosen, repeats=repeats, warmup=5)
            ratio = times["pruned"]["speedup"]["original"]
            share = _total(whole_run) / ratio["median"] / _total(kernels) if is_calm(ratio) else 1.0
            return [kernel._replace(us=share * kernel.us) for kernel in kernels], times

        samples = _cached(file)
        from_cache = samples is not None
        if samples is None:
            smaller = track(options[1:], len(options) - 1, f"latency table on {settings['runtime']}")
            samples = [whole_run, *(tried(option, TURNS)[0] for option in smaller)]
            _keep(file, samples)
        whole_run = samples[0]
        turns = track(range(ROUNDS + SPARE), ROUNDS, f"prune to {speedup:g}x")
        for turn in turns:
            near = rounds[-1:] if turn < ROUNDS else [_best(rounds, speedup)]
            if turn >= ROUNDS and not (is_calm(near[0].measured) and near[0].speedup > MOST * speedup):
                break
            table = fit(samples, np.stack([space.axes(option) for option in options]))
            whole, *before = table(
                np.stack([space.axes(option) for option in (space.whole, *(one.option for one in near))])
            )
            # What that round missed, the table misses for its neighbours too.
            reference = before[0] * near[0].speedup if near and is_calm(near[0].measured) else whole
            path = descend(space, table)
            point = path.within(reference / (AIM * speedup))
            option = path.options[-1 if point is None else point]
            if any((option == one.option).all() for one in rounds):
                break
            predicted = reference / float(table(space.axes(option)[None])[0])
            kernels, times = tried(option)
            samples, options = [*samples, kernels], [*options, option]
            milliseconds = {name: one["latency_ms"]["median"] for name, one in times.items()}
            rounds.append(Round(option, predicted, times["pruned"]["speedup"]["original"], milliseconds, table.error))
            turns.update(f"{rounds[-1].speedup:.2f}x")
            if is_calm(rounds[-1].measured) and ACCEPTED[0] * speedup <= rounds[-1].speedup <= ACCEPTED[1] * speedup:
                break
    best, calm = _best(rounds, speedup), [one for one in rounds if is_calm(one.measured)]
    if not calm:
        spread = rounds[-1].measured
        raise InputError(
            f"speedup={speedup:g}: no measurement could be trusted, half of the last one's lay outside {spread['low']:.2f}x to {spread['high']:.2f}x; "
            f"other processes use the processor, run it again when it is free, or prune to macs="
        )
    if best.speedup < LEAST * speedup:
        raise InputError(
            f"speedup={speedup:g} is out of reach on {settings['runtime']} (threads={chosen.threads}, batch={batch}): the smallest network tried runs "
            f"{max(one.speedup for one in calm):.2f}x as fast; ask for less, or lower floor or round_to"
        )
    facts = {
        **settings,
        "asked": speedup,
        "predicted": best.predicted,
        "measured": best.measured,
        "latency_ms": best.latency_ms,
        "rounds": [
            {"predicted": one.predicted, "measured": one.speedup, "table_error": one.table_error} for one in rounds
        ],
        "table": {"samples": len(samples) - len(rounds), "kernels": len(samples[0]), "from_cache": from_cache},
    }
    return space.kept(best.option), facts


def _best(rounds: Sequence[Round], speedup: float) -> Round:
    """Of those that can be trusted, and then of those fast enough, the nearest to the goal."""
    return min(
        rounds,
        key=lambda one: (
            not is_calm(one.measured),
            one.speedup < LEAST * speedup,
            abs(math.log(one.speedup / (AIM * speedup))),
        ),
    )
