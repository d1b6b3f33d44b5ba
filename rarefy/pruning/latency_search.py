"""Pruning to a measured latency: which widths make the network so many times as fast, at the least damage.

    samples ─▶ table (fit) ─▶ path (greedy) ─▶ a file, measured beside the original ─┐
                 ▲                                                                   │  until it is as fast as asked
                 └───────────────────────────────── its kernels' times, a new goal ──┘

**Table.** The time of the network as a function of its widths, from the runtime's own profiles (``latency_table.py``).

**Damage.** A layer of n outputs that loses the share r of their importance is damaged by ``n r^2``: the errors of a
layer's lost channels add up, so its last channels are worth more than its first, and no layer becomes a bottleneck
because its channels are dear. A family that several layers make (a residual stream) is damaged in each of them.

**Path.** From the whole network, the step of a family that does least damage for a microsecond saved is taken, its
saving evaluated exactly with all other widths as they are, until nothing can go. Steps of several tiles are tried too,
so that a block boundary is crossed where a single tile saves nothing. The goal is a point on that path.

**Correction.** What is promised is a measurement: the network at that point is exported and timed against the original
(``deployment/latency.py``, taking turns), its kernels join the table, and the goal is moved by what was missed, for a
few rounds, and a few more where the best is still a good deal faster than asked. A measurement whose quartiles lie far
apart (a busy machine) moves nothing, and if none is better the pruning is refused.

The idea of a knapsack of importance under a latency table is HALP's (arXiv 2110.10811). Given up: the same file from
the same seed, since clocks differ; and what the table cannot see, which the rounds correct.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from rarefy import plugins
from rarefy.deployment import latency
from rarefy.deployment.latency import Quartiles, Timed, is_calm
from rarefy.deployment.runtime import Kernel
from rarefy.errors import InputError
from rarefy.graph.nodes import example_inputs
from rarefy.pruning.latency_table import Array, Space, Table, cache_file, cached, design, fit, keep
from rarefy.pruning.options import Measured
from rarefy.pruning.ranking import Plan, Ranking
from rarefy.system.progress import track

TILE = 8  # channels, where a family's width is chosen by time: what kernels compute together, or half of it
OPTIONS = 64  # widths of a family that are tried, about
JUMPS = (1, 2, 4, 8)  # steps of a family that are tried at once
TURNS = 20  # of a sample and the whole network
ROUNDS = 5
SPARE = 3  # further rounds, where the best so far is faster than it need be
AIM = 1.02  # of what is asked: a measurement has an error, and what is asked is a least
ACCEPTED = (1.0, 1.05)  # times what is asked: no further round
LEAST, MOST = 0.95, 1.15  # below that the goal is missed; above, channels went for nothing


def for_speed(
    ranking: Ranking, build: Callable[[Tensor], fx.GraphModule], speedup: float, where: Measured, seed: int = 0
) -> tuple[Plan, dict[str, object]]:
    """The plan that is ``speedup`` times as fast, and what was measured.

    ranking: says which channels of a family go first; how many of each is chosen here.
    build: (classes,) bool -> the graph.
    """
    families = np.flatnonzero(ranking.least < ranking.sizes)
    families = families[families > 0]

    def alive(widths: Array) -> Array:
        counts = ranking.sizes.copy()
        counts[families] = widths
        return ranking.alive(counts)

    space = _space(ranking, families)
    widths, facts = search(space, lambda widths: build(torch.from_numpy(alive(widths))), speedup, where, seed=seed)
    return ranking.plan(alive(widths)), facts


def _space(ranking: Ranking, families: Array) -> Space:
    """What there is to choose of these families, in tiles."""
    widths, damages, parts = [], [], []
    for index in families:
        members = np.flatnonzero(ranking.family == index)
        members = members[np.argsort(ranking.place[members])]
        stride = ranking.round_to * max(1, round(len(members) / (OPTIONS * ranking.round_to)))
        options = np.unique(np.append(np.arange(ranking.least[index], len(members), stride), len(members)))
        widths.append(options)
        damages.append(damage(ranking.importance[members], options) * ranking.outputs[members].mean())
        parts.append(np.cumsum(ranking.costs.widths_of(members), 1)[:, options - 1].T)
    return Space(widths, damages, parts, ranking.costs.widths(~np.isin(ranking.family, families)))


def damage(values: Array, widths: Array) -> Array:
    """``n r^2`` where the first ``widths`` of a family stay; values: (n,) importance, the best first."""
    values = np.maximum(values, 0.0)
    values = values if values.sum() > 0 else np.ones_like(values)
    held = np.append(0.0, np.cumsum(values))
    lost: Array = len(values) * (1 - held[widths] / held[-1]) ** 2
    lost[widths == len(values)] = 0.0
    return lost


# --------------------------------------------------------------------------------------------------------------- path


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
        steps = np.stack([parts[family][to] - parts[family][option[family]] for family, to in moves])
        saved = now - local(held + steps)
        lost = np.array([space.damage[family][to] - space.damage[family][option[family]] for family, to in moves])
        worth = np.where(saved > 1e-9 * now, (lost + 1e-12) / np.maximum(saved, 1e-9 * now), np.inf)
        best = int(worth.argmin())
        if not math.isfinite(worth[best]):
            break
        family, to = moves[best]
        held = held + steps[best]
        option[family] = to
        now -= float(saved[best])
        options.append(option.copy())
        times.append(now)
    return Descent(np.array(options), np.array(times))


# ------------------------------------------------------------------------------------------------------------- search


@dataclass(frozen=True, eq=False)
class Round:
    """A network that was measured.

    option: (families,).
    predicted: times as fast as the original, before it was measured.  measured: the same, measured.
    latency_ms: of the original and of this.  table_error: of the table that predicted it.
    """

    option: Array
    predicted: float
    measured: Quartiles
    latency_ms: dict[str, float]
    table_error: float

    @property
    def speedup(self) -> float:
        return self.measured["median"]

    @property
    def calm(self) -> bool:
        """Can its measurement be trusted?"""
        return is_calm(self.measured)


class Bench:
    """The original's file, and beside it in ``folder`` the file of one smaller network at a time.

    build: widths (families,) -> the network.
    """

    def __init__(
        self, space: Space, build: Callable[[Array], fx.GraphModule], where: Measured, seed: int, folder: Path
    ) -> None:
        self.space, self.build = space, build
        self.runtime = latency.with_threads(where.runtime, where.threads)
        self.name = plugins.name_of(self.runtime)
        self.settings = {"runtime": self.name, "threads": self.runtime.threads, "batch": where.batch}
        self.original = build(space.kept(space.whole))
        self.example = example_inputs(self.original, batch=where.batch, seed=seed)[0]
        self.files = {name: folder / f"{name}{self.runtime.suffix}" for name in ("original", "pruned")}
        self.runtime.export(self.original, self.files["original"])

    def kernels(self, file: str) -> list[Kernel]:
        """Of a run of "original" or "pruned". Raises InputError where the runtime does not tell."""
        if not self.runtime.capabilities.has_kernel_times:
            raise InputError(
                f"{self.name}: can't tell the time of each of its kernels; prune to macs= in place of speedup="
            )
        return self.runtime.kernel_times(self.files[file], self.example)

    def tried(
        self, option: Array, whole: Sequence[Kernel], repeats: int | None = None
    ) -> tuple[list[Kernel], dict[str, Timed]]:
        """The kernels of a smaller network, and its time beside the original's; whole: kernels of the original.

        Its kernels' sum stands to the original's as the two networks do when they take turns: a machine's speed drifts
        between profiles.
        """
        self.runtime.export(self.build(self.space.kept(option)), self.files["pruned"])
        kernels = self.kernels("pruned")
        times = latency.timed(self.files, self.example, runtime=self.runtime, repeats=repeats, warmup=5)
        ratio = times["pruned"]["speedup"]["original"]
        share = _total(whole) / ratio["median"] / _total(kernels) if is_calm(ratio) else 1.0
        return [kernel._replace(us=share * kernel.us) for kernel in kernels], times

    def sampled(self, options: Sequence[Array]) -> list[list[Kernel]]:
        """The kernels at each of the options, of which the first is the whole network."""
        whole = self.kernels("original")
        smaller = track(options[1:], len(options) - 1, f"latency table on {self.name}")
        return [whole, *(self.tried(option, whole, TURNS)[0] for option in smaller)]


def search(
    space: Space,
    build: Callable[[Array], fx.GraphModule],
    speedup: float,
    where: Measured,
    *,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> tuple[Array, dict[str, object]]:
    """The widths (families,) at which the network is ``speedup`` times as fast, measured, and what was measured.

    build: widths (families,) -> the network.  cache: folder of measured samples, None: the user's.
    Raises InputError where the goal is out of reach, with what was reached.
    """
    with tempfile.TemporaryDirectory(prefix="rarefy-") as temporary:
        bench = Bench(space, build, where, seed, Path(temporary))
        options = design(space, seed)
        widths = [space.kept(option).tolist() for option in options]
        file = cache_file(cache, bench.original, widths, bench.settings, bench.runtime.package)
        samples = cached(file)
        from_cache = samples is not None
        if samples is None:
            samples = bench.sampled(options)
            keep(file, samples)
        rounds = _rounds(bench, samples, options, speedup)
    best = _accepted(rounds, speedup, bench)
    facts = {
        **bench.settings,
        "asked": speedup,
        "predicted": best.predicted,
        "measured": best.measured,
        "latency_ms": best.latency_ms,
        "rounds": [
            {"predicted": one.predicted, "measured": one.speedup, "table_error": one.table_error} for one in rounds
        ],
        "table": {"samples": len(samples), "kernels": len(samples[0]), "from_cache": from_cache},
    }
    return space.kept(best.option), facts


def _rounds(bench: Bench, samples: Sequence[list[Kernel]], options: Sequence[Array], speedup: float) -> list[Round]:
    """Networks nearer and nearer to the goal; samples, options: what the table begins with."""
    space, samples, options = bench.space, list(samples), list(options)
    rounds: list[Round] = []
    turns = track(range(ROUNDS + SPARE), ROUNDS, f"prune to {speedup:g}x")
    for turn in turns:
        near = _best(rounds, speedup) if turn >= ROUNDS else rounds[-1] if rounds else None
        if turn >= ROUNDS and near is not None and not (near.calm and near.speedup > MOST * speedup):
            break
        table = fit(samples, np.stack([space.axes(option) for option in options]))
        option, predicted = _aimed(space, table, near, speedup)
        if any((option == one.option).all() for one in rounds):
            break
        kernels, times = bench.tried(option, samples[0])
        samples.append(kernels)
        options.append(option)
        milliseconds = {name: one["latency_ms"]["median"] for name, one in times.items()}
        found = Round(option, predicted, times["pruned"]["speedup"]["original"], milliseconds, table.error)
        rounds.append(found)
        turns.update(f"{found.speedup:.2f}x")
        if found.calm and ACCEPTED[0] * speedup <= found.speedup <= ACCEPTED[1] * speedup:
            break
    return rounds


def _aimed(space: Space, table: Table, near: Round | None, speedup: float) -> tuple[Array, float]:
    """The option that the table expects at the goal, and how many times as fast as the original it expects it to be."""

    def us(option: Array) -> float:
        return float(table(space.axes(option)[None])[0])

    # What the last round missed, the table misses for its neighbours too.
    original = us(near.option) * near.speedup if near is not None and near.calm else us(space.whole)
    path = descend(space, table)
    point = path.within(original / (AIM * speedup))
    option: Array = path.options[-1 if point is None else point]
    return option, original / us(option)


def _accepted(rounds: Sequence[Round], speedup: float, bench: Bench) -> Round:
    """The best round. Raises InputError where none can be trusted, or none is fast enough."""
    best, calm = _best(rounds, speedup), [one for one in rounds if one.calm]
    if not calm:
        spread = rounds[-1].measured
        raise InputError(
            f"speedup={speedup:g}: no measurement could be trusted, half of the last one's lay outside "
            f"{spread['low']:.2f}x to {spread['high']:.2f}x; other processes use the processor, run it again when it "
            "is free, or prune to macs="
        )
    if best.speedup < LEAST * speedup:
        raise InputError(
            f"speedup={speedup:g} is out of reach on {bench.name} (threads={bench.runtime.threads}, "
            f"batch={len(bench.example)}): the smallest network tried runs "
            f"{max(one.speedup for one in calm):.2f}x as fast; ask for less, or lower floor or round_to"
        )
    return best


def _best(rounds: Sequence[Round], speedup: float) -> Round:
    """Of those that can be trusted, and then of those fast enough, the nearest to the goal."""
    return min(
        rounds,
        key=lambda one: (not one.calm, one.speedup < LEAST * speedup, abs(math.log(one.speedup / (AIM * speedup)))),
    )


def _total(kernels: Sequence[Kernel]) -> float:
    return sum(kernel.us for kernel in kernels)
