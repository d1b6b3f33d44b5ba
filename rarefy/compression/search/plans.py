"""Which trials come next: functions of what the finished ones found, so that any worker plans the same.

Trials come in generations, and a generation is planned once the one before is done: its plan hangs on the seed and on
what is the same on every machine (drops, the table's cost, bytes), never on a clock or on who was faster.

**First**: the original quantised, and the integer program's networks over the costs that may be asked for (``first.py``
refines each by level switches when it is carried out). **Then** some of each generation are *promoted*: the best of a
rung get the next one's training (successive halving: repair, then fast, then patient), and the others are *offspring*
of
points that nobody beats: a level switch, other bits (or one layer's bits up and another's down), or a cost that the
front has no point for. Offspring begin with the smallest trained network that they can be cut from, which teaches them,
too. The last generation is promotions alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rarefy.compression.budget import QUANTIZED_GAIN
from rarefy.compression.search.first import planned, switched
from rarefy.compression.search.profile import Profile
from rarefy.compression.search.space import BITS, RUNGS, STUDENTS, Genome

GENERATION = 6  # trials, where only minutes are given
LARGEST = 12
PROMOTED = 0.5  # of a generation
FASTEST, SLOWEST = 0.08, 0.85  # of the way from the narrowest network's cost to the whole one's: what is spanned
STUDENTS_FROM = 24  # trials


class Done(NamedTuple):
    """A finished trial. cost: in shares of the original's, of its file. bits: of each layer, where they differ."""

    number: int
    genome: Genome
    drop: float
    cost: float
    size: float
    bits: dict[str, int]


def cost_of(float_cost: float, genome: Genome) -> float:
    """Of the file: integers are expected to be so much faster."""
    return float_cost / (QUANTIZED_GAIN if genome.bits is not None else 1.0)


def cost_at(profile: Profile, way: float) -> float:
    """In shares of the whole network's. way: from the narrowest network's, 0, to the whole one's, 1."""
    least = profile.cost([0] * len(profile.families))
    return min(1.0, least + way * (1 - least))


def size_of_generation(trials: int | None) -> int:
    return GENERATION if trials is None else max(2, min(LARGEST, trials // 4))


def first(profile: Profile, count: int) -> list[Genome]:
    """The original quantised, then networks from slow to fast."""
    genomes = [Genome(profile.whole)]
    costs = np.geomspace(cost_at(profile, SLOWEST), cost_at(profile, FASTEST), max(count - 1, 1))
    genomes += [Genome(planned(profile, float(cost))) for cost in costs]
    return _distinct(genomes, ())[:count]


def following(
    profile: Profile, done: Sequence[Done], tried: Sequence[Genome], count: int, left: int, seed: int
) -> list[Genome]:
    """The next ``count``.

    tried: all that were planned, failed ones too. left: trials that are left; seed: of this plan.
    """
    random = np.random.default_rng(seed)
    last = left <= size_of_generation(left + len(tried))
    wanted = count if last else math.ceil(PROMOTED * count)
    genomes = promotions(done, tried)[:wanted]
    if left + len(tried) >= STUDENTS_FROM and not last:
        told = {one.student for one in tried}
        genomes += [Genome(profile.whole, student=name) for name in STUDENTS if name not in told][:1]
    attempts = 0
    while len(genomes) < count and attempts < 20 * count and done:
        attempts += 1
        genomes = _distinct([*genomes, offspring(profile, done, random)], tried)
    return genomes[:count]


def _distinct(genomes: Sequence[Genome], tried: Sequence[Genome]) -> list[Genome]:
    seen = {(one.structure, one.rung) for one in tried}
    found = []
    for one in genomes:
        if (one.structure, one.rung) not in seen:
            seen.add((one.structure, one.rung))
            found.append(one)
    return found


def promotions(done: Sequence[Done], tried: Sequence[Genome]) -> list[Genome]:
    """Those whose next rung is worth its training, the best first: a rung up, from the model that is there."""
    taken = {(one.structure, one.rung) for one in tried}
    able = [
        one for one in done if one.genome.rung + 1 < RUNGS and (one.genome.structure, one.genome.rung + 1) not in taken
    ]
    ranks = {one.number: rank for rank, numbers in enumerate(_fronts(able)) for one in numbers}
    gaps = _gaps(able)
    # A third of the places, in the mean, go to the rung that is trained already.
    order = sorted(able, key=lambda one: (ranks[one.number], -gaps[one.number], one.number))
    low, high = ([one for one in order if one.genome.rung == rung] for rung in (0, 1))
    mixed: list[Done] = []
    while low or high:
        mixed += low[:2] + high[:1]
        low, high = low[2:], high[1:]
    return [dataclasses.replace(one.genome, rung=one.genome.rung + 1, parent=one.number) for one in mixed]


def _fronts(done: Sequence[Done]) -> list[list[Done]]:
    """Those that nobody beats in drop and cost, then those that only these beat, ..."""
    left, found = list(done), []
    while left:
        best = [
            one
            for one in left
            if not any(
                other.drop <= one.drop and other.cost <= one.cost and (other.drop, other.cost) != (one.drop, one.cost)
                for other in left
            )
        ]
        found.append(best)
        left = [one for one in left if one not in best]
    return found


def _gaps(done: Sequence[Done]) -> dict[int, float]:
    """How far the neighbours are, on the axis of cost, in octaves."""
    order = sorted(done, key=lambda one: (one.cost, one.number))
    places = [math.log2(max(one.cost, 1e-9)) for one in order]
    gaps = {}
    for index, one in enumerate(order):
        below = places[index] - places[index - 1] if index else 2.0
        above = places[index + 1] - places[index] if index + 1 < len(order) else 2.0
        gaps[one.number] = below + above
    return gaps


def offspring(profile: Profile, done: Sequence[Done], random: np.random.Generator) -> Genome:
    """A child of a point that nobody beats."""
    best = [one for one in _fronts(done)[0] if one.genome.student is None] or list(done)
    parent = best[int(random.integers(len(best)))]
    genome = dataclasses.replace(parent.genome, rung=0, parent=None, student=None)
    kind = random.random()
    if kind < 0.25:  # where the front has no point
        costs = sorted(one.cost for one in best)
        ends = sorted([cost_at(profile, FASTEST) / QUANTIZED_GAIN, *costs, 1.0])
        index = int(np.argmax(np.diff(np.log(ends))))
        middle = math.sqrt(ends[index] * ends[index + 1])
        return dataclasses.replace(genome, levels=planned(profile, min(1.0, middle * QUANTIZED_GAIN)), switched={})
    if kind < 0.55:
        return _other_bits(parent, genome, random)
    cap = profile.cost(genome.levels) * float(random.uniform(0.75, 1.05))
    return dataclasses.replace(
        genome, levels=switched(profile, genome.levels, cap, random, int(random.integers(1, 3))), switched={}
    )


def _other_bits(parent: Done, genome: Genome, random: np.random.Generator) -> Genome:
    """Another mean of bits, or a switch: a layer up, another down."""
    layers = sorted(parent.bits)
    up = [name for name in layers if parent.bits[name] < 8]
    down = [name for name in layers if 3 < parent.bits[name] <= 8]
    if up and len(down) > 1 and random.random() < 0.5:
        raised = str(random.choice(up))
        lowered = str(random.choice([name for name in down if name != raised]))
        bits = {**parent.bits, raised: min(8, parent.bits[raised] + 1), lowered: parent.bits[lowered] - 1}
        return dataclasses.replace(genome, switched=bits)
    others = [bits for bits in (*BITS, None) if bits != genome.bits]
    return dataclasses.replace(genome, bits=others[int(random.integers(len(others)))], switched={})
