"""Which classes stay: the largest part of a ranking that a target allows.

Classes stand in families by the first layer that makes them. ``ranking`` says how scores of different families compare:

* ``global``      by the damage done to the network: a family that loses the share r of its importance is damaged by
                  ``n r^2`` (``families.py``), and the class that does least damage leaves first;
* ``loss``        the same with the sum of the family's scores for n, for scores that are changes of the loss
                  (hessian:group=true, taylor:form=fisher) and so compare between layers as they are;
* ``local``       every family keeps the same fraction;
* ``isomorphic``  families whose coupled operators are alike are ranked together, by the damage of ``global``, and each
                  such set keeps the same fraction (arXiv 2407.04616).

The best-ranked classes are kept, as many as the target allows: found by bisection, because what a class costs depends
on all others (``cost.py`` is exact). The result is the largest prefix of the ranking, each family rounded down to
``round_to``, that is within the target; so it misses it by less than a step. In every tensor the best ``floor`` of the
classes are safe, and at least one, so no layer disappears.

The square is why no layer becomes a bottleneck. Scores divided by their family's mean, as DepGraph ranks them, cut the
residual stream first, and lost 10 points more in ``bench/pruning_accuracy.py``.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, fx

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.pruning.cost import Costs, costs_of
from rarefy.pruning.families import damages, families_of, like_families, outputs_of, places, producers_of, shares_before
from rarefy.pruning.groups.groups import Coupling
from rarefy.pruning.options import Target
from rarefy.tasks.task import Task

EVERY: Mapping[str, int] = types.MappingProxyType({})


class Criterion(Protocol):
    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Task | None, seed: int) -> Tensor: ...


class Selection(Protocol):
    def keys(self, scores: np.ndarray, seed: int) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Plan:
    """alive: (classes,) bool.  reached: keep, macs and params as fractions.  macs, params: [before, after].

    whole: the layers whose family stays whole, because it is narrower than round_to.
    """

    alive: Tensor
    reached: dict[str, float]
    macs: list[int]
    params: list[int]
    whole: list[str]


@dataclass(frozen=True, eq=False)
class Ranking:
    """Classes in families, in the order in which they stay.

    rule: one of ``options.RANKINGS``.  round_to, floor: as ``prune`` takes them.
    order: (classes,) the best first.
    family, producer, place: (classes,); place counts the better ones of the same family.
    importance: (classes,) the scores.  outputs: (classes,) outputs of layers that leave with one.
    sizes, least: (families,) classes, and how many of them stay in any case; family 0 holds class 0, the frozen one.
    """

    coupling: Coupling
    rule: str
    round_to: int
    floor: float
    order: np.ndarray
    family: np.ndarray
    producer: np.ndarray
    place: np.ndarray
    importance: np.ndarray
    outputs: np.ndarray
    sizes: np.ndarray
    least: np.ndarray
    costs: Costs

    @property
    def whole(self) -> np.ndarray:
        """(families,) is it narrower than ``round_to``, so that all of it stays?"""
        return self.sizes < self.round_to

    def alive(self, counts: np.ndarray) -> np.ndarray:
        """(families,) classes kept -> (classes,) bool, rounded down to ``round_to`` but to no less than ``least``."""
        rounded = np.where(counts == self.sizes, self.sizes, counts // self.round_to * self.round_to)
        alive: np.ndarray = self.place < np.maximum(rounded, self.least)[self.family]
        alive[0] = True
        return alive

    def best(self, count: int) -> np.ndarray:
        """(classes,) bool: the ``count`` best, each family rounded."""
        return self.alive(np.bincount(self.family[self.order[:count]], minlength=len(self.sizes)))

    def plan(self, alive: np.ndarray) -> Plan:
        everything, after = self.costs(np.ones(len(alive), dtype=bool)), self.costs(alive)
        stay = dict.fromkeys(self.producer[self.whole[self.family]].tolist())
        return Plan(
            torch.from_numpy(alive),
            {kind: after[kind] / everything[kind] for kind in after if everything[kind]},
            [everything["macs"], after["macs"]],
            [everything["params"], after["params"]],
            [self.coupling.rows[index - 1].names[0] for index in stay if index > 0],
        )


def rank(
    coupling: Coupling,
    scores: Tensor,
    *,
    rule: str = "global",
    round_to: int = 1,
    floor: float = 0.1,
    select: Selection | None = None,
    seed: int = 0,
    was: Mapping[str, int] = EVERY,
) -> Ranking:
    """The ranking of all classes; scores: (classes,), larger is more important.

    rule, round_to, floor, seed: as ``prune`` takes them (rule: its ``ranking``).  select: None for the best.
    was: outputs that layers had before earlier prunings, of which ``floor`` is a share.
    """
    count, costs = coupling.count, costs_of(coupling)
    producer, outputs = producers_of(coupling), outputs_of(coupling)
    family = families_of(coupling, producer, round_to)
    importance = scores.double().cpu().numpy()
    select = plugins.resolve("selection", "best") if select is None else select
    key = _keys(coupling, importance, outputs, producer, rule, select, seed)
    safe = _protected(costs.axes, _even(key, producer), _floors(coupling, costs.axes, floor, was))
    # The best first: class 0, then the protected ones.
    order = np.lexsort((np.arange(count), -key, ~safe, np.arange(count) != 0))
    place = np.empty(count, dtype=np.int64)
    place[order] = places(family[order])
    sizes = np.bincount(family, minlength=int(family.max()) + 1)
    least = np.bincount(family[safe], minlength=len(sizes))
    least = np.minimum(np.maximum(-(-least // round_to) * round_to, round_to), sizes)
    return Ranking(
        coupling, rule, round_to, floor, order, family, producer, place, importance, outputs, sizes, least, costs
    )


def choose(ranking: Ranking, target: Target) -> Plan:
    """Which classes stay. Raises InputError if the target is out of reach."""
    count, costs = ranking.coupling.count, ranking.costs
    if isinstance(target.value, Mapping):
        return ranking.plan(ranking.alive(_by_layer(ranking, target.value)))
    everything = costs(np.ones(count, dtype=bool))
    value = target.number
    limit = (value if value > 1 else value * everything[target.kind]) + 1e-6
    if target.kind == "keep" and ranking.rule == "local":
        return ranking.plan(ranking.alive(_fractions(ranking, value)))
    low, high = 0, count  # the best ``low`` are as few as can be, the best ``high`` are everything
    smallest = costs(ranking.best(0))[target.kind]
    if smallest > limit:
        raise InputError(_unreachable(ranking, target, smallest, everything[target.kind]))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if costs(ranking.best(middle))[target.kind] <= limit else (low, middle)
    most = ranking.best(high)
    return ranking.plan(most if costs(most)[target.kind] <= limit else ranking.best(low))


def _keys(
    coupling: Coupling,
    scores: np.ndarray,
    outputs: np.ndarray,
    producer: np.ndarray,
    rule: str,
    select: Selection,
    seed: int,
) -> np.ndarray:
    """A key for each class, to be compared between all of them."""
    _, group = np.unique(producer, return_inverse=True)
    if rule != "local":
        useful = np.maximum(scores, 0.0)
        weight = np.bincount(group, useful)[group] if rule == "loss" else outputs * np.bincount(group)[group]
        scores = np.where(scores < 0, scores, damages(useful, group) * weight)
    keys = select.keys(scores, seed)
    if rule in ("global", "loss"):
        return keys
    if rule == "isomorphic":
        group = like_families(coupling, producer)
    return shares_before(np.lexsort((np.arange(len(scores)), -keys, group)), group)


def _even(key: np.ndarray, producer: np.ndarray) -> np.ndarray:
    """Keys by which axes of several families want the same of each."""
    order = np.lexsort((np.arange(len(key)), -key))
    return shares_before(order, np.unique(producer, return_inverse=True)[1])


def _floors(coupling: Coupling, axes: list[np.ndarray], floor: float, was: Mapping[str, int]) -> list[float]:
    """Of each axis, the share that is safe."""
    first = {
        row.classes.numpy().tobytes(): was[row.names[0]] / len(row.classes)
        for row in coupling.rows
        if row.produces and row.names[0] in was
    }
    return [floor * first.get(vector.tobytes(), 1.0) for vector in axes]


def _protected(axes: list[np.ndarray], key: np.ndarray, floors: list[float]) -> np.ndarray:
    """The classes no threshold may remove: of each axis the best share, and one at least where nothing is frozen."""
    safe = np.zeros(len(key), dtype=bool)
    safe[0] = True
    for vector, floor in zip(axes, floors, strict=True):
        present = np.unique(vector)
        free = present[present > 0]
        fixed = int((vector == 0).sum())
        least = max(math.ceil(floor * (len(free) + fixed) - 1e-9) - fixed, 0 if fixed else 1)
        if least > 0:
            safe[free[np.lexsort((free, -key[free]))[:least]]] = True
    return safe


def names_of(ranking: Ranking) -> list[list[str]]:
    """(families,) the layers that make each family's classes, in the order of the network; none of family 0."""
    found: list[list[str]] = [[] for _ in ranking.sizes]
    for row in ranking.coupling.rows:
        for index in np.unique(ranking.family[row.classes.numpy()]) if row.produces else ():
            if index:
                found[index].append(row.names[0].removesuffix(".weight"))
    return found


def _by_layer(ranking: Ranking, shares: Mapping[str, float]) -> np.ndarray:
    """(families,) classes kept: of the last glob that matches a layer of the family; all, where none does."""
    counts, names = ranking.sizes.copy(), names_of(ranking)
    for glob, share in shares.items():
        hit = [index for index, layers in enumerate(names) if any(fnmatchcase(layer, glob) for layer in layers)]
        if not hit:
            some = ", ".join(layers[0] for layers in names if layers)[:200]
            raise InputError(f"keep: {glob!r} matches no layer whose channels can leave; have {some}")
        counts[hit] = np.floor(ranking.sizes[hit] * share + 1e-9).astype(np.int64)
    return np.asarray(np.maximum(counts, np.minimum(ranking.least, ranking.sizes)))


def _fractions(ranking: Ranking, share: float) -> np.ndarray:
    """keep= of every family. Raises InputError where that is no multiple of ``round_to``."""
    sizes, round_to = ranking.sizes, ranking.round_to
    counts = np.floor(sizes * share + 1e-9).astype(np.int64)
    bad = (counts < round_to) & (sizes > 1) & (counts < sizes) & (np.arange(len(sizes)) > 0) & (round_to > 1)
    if bad.any():
        worst = int(np.flatnonzero(bad)[0])
        row = ranking.coupling.rows[int(ranking.producer[ranking.family == worst][0]) - 1]
        fits = 2 ** int(math.log2(max(int(counts[worst]), 1)))
        raise InputError(
            f"{row.names[0].removesuffix('.weight')}: {sizes[worst]} channels cannot be rounded to a multiple of "
            f"{round_to} at keep={share}; pass round_to={fits} or list it in ignore"
        )
    return np.asarray(np.maximum(counts, ranking.least))


def _unreachable(ranking: Ranking, target: Target, smallest: int, everything: int) -> str:
    reach = smallest if target.number > 1 else round(smallest / everything + 5e-5, 4)
    reasons = [f"floor={ranking.floor} of each layer stays"]
    if ranking.round_to > 1:
        reasons.append(f"{int(ranking.whole[1:].sum())} families are narrower than round_to={ranking.round_to}")
    frozen = ranking.coupling.frozen
    if frozen:
        name, why = next(iter(frozen.items()))
        reasons.append(f"{len(frozen)} layers are frozen, such as {name}: {why}")
    return (
        f"{target} is out of reach, the least is {target.kind}={reach} ({'; '.join(reasons)}); "
        f"raise {target.kind}, or lower floor or round_to"
    )
