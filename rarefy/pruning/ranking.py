from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from rarefy.errors import InputError
from rarefy.graph.nodes import operator_name
from rarefy.pruning.cost import Polynomial, _add_activations, _costs, _Counted, _Widths
from rarefy.pruning.groups.groups import Coupling
from rarefy.pruning.selection.best import Best


class Criterion(Protocol):
    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Any, seed: int) -> Tensor: ...


class Selection(Protocol):
    def keys(self, scores: np.ndarray, seed: int) -> np.ndarray: ...


RANKINGS = ("global", "loss", "local", "isomorphic")
TILE = 8  # channels, where a family's width is chosen by time: what kernels compute together, or half of it
OPTIONS = 64  # widths of a family that are tried, about


# ---------------------------------------------------------------------------------------------------------------- target


@dataclass(frozen=True)
class Target:
    """``kind``: keep, macs, params or speedup; ``value``: a fraction, or a number above 1."""

    kind: str
    value: float

    @property
    def asked(self) -> dict[str, float]:
        return {self.kind: self.value}

    def __str__(self) -> str:
        return f"{self.kind}={self.value}"


def _target(
    keep: float | None, macs: float | int | None, params: float | int | None, speedup: float | None = None
) -> Target:
    asked = (("keep", keep), ("macs", macs), ("params", params), ("speedup", speedup))
    given = {name: value for name, value in asked if value is not None}
    if len(given) != 1:
        raise InputError(
            f"give one of keep=, macs=, params=, speedup=, such as macs=0.5; got {', '.join(given) or 'none'}"
        )
    ((kind, value),) = given.items()
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind == "speedup":
        if not number or value <= 1:
            raise InputError(f"speedup={value!r} is not a ratio above 1; twice as fast is 2")
    elif not number or value <= 0 or (value > 1 and (kind == "keep" or not float(value).is_integer())):
        allowed = "a fraction in (0, 1]" if kind == "keep" else "a fraction in (0, 1] or a whole number"
        raise InputError(f"{kind}={value!r} is not {allowed}")
    return Target(kind, value)


# ---------------------------------------------------------------------------------------------------------------- choice


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


def choose(
    coupling: Coupling,
    scores: Tensor,
    target: Target,
    *,
    ranking: str = "global",
    round_to: int = 1,
    floor: float = 0.1,
    select: Selection | None = None,
    seed: int = 0,
    was: Mapping[str, int] = types.MappingProxyType({}),
) -> Plan:
    """Which classes stay. Raises InputError if the target is out of reach."""
    ranked = _order(coupling, scores, ranking, round_to, floor, select or Best(), seed, was)
    count, order, sizes, least, whole, cost = (
        coupling.count,
        ranked.order,
        ranked.sizes,
        ranked.least,
        ranked.whole,
        ranked.cost,
    )

    def alive_of(kept: int) -> np.ndarray:
        return ranked.alive(np.bincount(ranked.family[order[:kept]], minlength=len(sizes)))

    everything = cost(np.ones(count, dtype=bool))
    limit = target.value if target.value > 1 else target.value * everything[target.kind]
    if target.kind == "keep" and ranking == "local":
        alive = ranked.alive(_fractions(coupling, sizes, ranked.family, ranked.producer, target, round_to, least))
    else:
        low, high = 0, count  # alive_of(low) is as small as can be, alive_of(high) is everything
        smallest = cost(alive_of(0))[target.kind]
        if smallest > limit + 1e-6:
            raise InputError(_unreachable(coupling, target, smallest, everything, round_to, floor, whole))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(alive_of(middle))[target.kind] <= limit + 1e-6 else (low, middle)
        alive = alive_of(high) if cost(alive_of(high))[target.kind] <= limit + 1e-6 else alive_of(low)
    return _plan(coupling, ranked, alive)


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Classes in families, in the order in which they stay.

    order: (classes,) the best first.  family, producer, place: (classes,), place counts the better ones of the same family.  importance: (classes,)
    the scores.  made: (classes,) outputs of layers that leave with one.  sizes, least, whole: (families,), family 0 holds class 0, the frozen one.
    """

    order: np.ndarray
    family: np.ndarray
    producer: np.ndarray
    place: np.ndarray
    importance: np.ndarray
    made: np.ndarray
    sizes: np.ndarray
    least: np.ndarray
    whole: np.ndarray
    round_to: int
    counted: _Counted
    macs: Polynomial
    params: Polynomial

    def alive(self, counts: np.ndarray) -> np.ndarray:
        """(families,) classes kept -> (classes,) bool, rounded down to ``round_to`` but to no less than ``least``."""
        rounded = np.where(counts == self.sizes, self.sizes, counts // self.round_to * self.round_to)
        alive: np.ndarray = self.place < np.maximum(rounded, self.least)[self.family]
        alive[0] = True
        return alive

    def cost(self, alive: np.ndarray) -> dict[str, int]:
        own = self.counted(alive)
        return {"keep": int(alive[1:].sum()), "macs": self.macs(own), "params": self.params(own)}


def _order(
    coupling: Coupling,
    scores: Tensor,
    ranking: str,
    round_to: int,
    floor: float,
    select: Selection,
    seed: int,
    was: Mapping[str, int],
) -> _Ranked:
    count = coupling.count
    producer = _producers(coupling)
    family = _families(coupling, producer, round_to)
    made = _made(coupling)
    importance = scores.double().cpu().numpy()
    key = _ranked(coupling, importance, made, producer, ranking, select, seed)
    widths = _Widths(count)
    macs, params = _costs(coupling, widths)
    _add_activations(coupling, widths)
    first = {
        row.classes.numpy().tobytes(): was[row.names[0]] / len(row.classes)
        for row in coupling.rows
        if row.produces and row.names[0] in was
    }
    even = _relative(
        np.lexsort((np.arange(count), -key)), np.unique(producer, return_inverse=True)[1]
    )  # so that axes of several families want the same
    safe = _protected(widths.vectors, even, [floor * first.get(vector.tobytes(), 1.0) for vector in widths.vectors])
    sizes = np.bincount(family, minlength=int(family.max()) + 1)
    # The best first: class 0, then the protected ones.
    order = np.lexsort((np.arange(count), -key, ~safe, np.arange(count) != 0))
    place = np.empty(count, dtype=np.int64)
    place[order] = _place_in_group(family[order])
    least = np.bincount(family[safe], minlength=len(sizes))
    least = np.minimum(np.maximum(-(-least // round_to) * round_to, round_to), sizes)
    whole = sizes < round_to
    least[whole] = sizes[whole]
    return _Ranked(
        order, family, producer, place, importance, made, sizes, least, whole, round_to, widths.counted(), macs, params
    )


def _plan(coupling: Coupling, ranked: _Ranked, alive: np.ndarray) -> Plan:
    everything, after = ranked.cost(np.ones(coupling.count, dtype=bool)), ranked.cost(alive)
    stay = dict.fromkeys(ranked.producer[ranked.whole[ranked.family]].tolist())
    return Plan(
        torch.from_numpy(alive),
        {kind: after[kind] / everything[kind] for kind in after if everything[kind]},
        [everything["macs"], after["macs"]],
        [everything["params"], after["params"]],
        [coupling.rows[index - 1].names[0] for index in stay if index > 0],
    )


def _for_speed(
    coupling: Coupling, ranked: _Ranked, build: Callable[[Tensor], fx.GraphModule], speedup: float, **where: Any
) -> tuple[Plan, Any]:
    """The plan that is ``speedup`` times as fast, and what was measured; ``build``: (classes,) bool -> the graph."""
    from rarefy.pruning import latency_search, latency_table

    families = np.flatnonzero(ranked.least < ranked.sizes)
    families = families[families > 0]
    widths, damages, parts = [], [], []
    fixed = ranked.counted(~np.isin(ranked.family, families))
    for index in families:
        members = np.flatnonzero(ranked.family == index)
        members = members[np.argsort(ranked.place[members])]
        stride = ranked.round_to * max(1, round(len(members) / (OPTIONS * ranked.round_to)))
        own = np.unique(np.append(np.arange(ranked.least[index], len(members), stride), len(members)))
        widths.append(own)
        damages.append(latency_search.damage(ranked.importance[members], own) * ranked.made[members].mean())
        parts.append(np.cumsum(ranked.counted.of(members), 1)[:, own - 1].T)
    space = latency_table.Space(widths, damages, parts, fixed)

    def alive(kept: np.ndarray) -> np.ndarray:
        counts = ranked.sizes.copy()
        counts[families] = kept
        return ranked.alive(counts)

    kept, facts = latency_search.search(space, lambda kept: build(torch.from_numpy(alive(kept))), speedup, **where)
    return _plan(coupling, ranked, alive(kept)), facts


def _producers(coupling: Coupling) -> np.ndarray:
    """For each class, 1 + the first row that makes it (of any kind, if no layer does); 0 for the frozen class."""
    rows = len(coupling.rows)
    first = torch.full((coupling.count,), 2 * rows)
    for index, row in enumerate(coupling.rows):
        rank = index if row.produces else index + rows
        first[row.classes] = torch.minimum(first[row.classes], torch.tensor(rank))
    producer: np.ndarray = (first % rows + 1).numpy()
    producer[0] = 0
    return producer


def _families(coupling: Coupling, producer: np.ndarray, round_to: int) -> np.ndarray:
    """Family of each class, 0 for the frozen one: what one layer makes, split where its parts go different ways and each is a multiple."""
    _, family = np.unique(producer, return_inverse=True)
    if round_to == 1:
        return family
    signature = np.zeros(coupling.count, dtype=np.uint64)
    marks = np.random.default_rng(0).integers(1, 2**63, len(coupling.rows), dtype=np.uint64)
    for mark, row in zip(marks, coupling.rows, strict=True):
        np.add.at(signature, row.classes.numpy(), mark)
    _, first, finer = np.unique(
        np.stack((family.astype(np.uint64), signature)), axis=1, return_index=True, return_inverse=True
    )
    finer = finer.reshape(-1)
    divides = np.ones(int(family.max()) + 1, dtype=bool)
    np.logical_and.at(divides, family[first], np.bincount(finer) % round_to == 0)
    chosen = np.where(divides[family], finer + int(family.max()) + 1, family)
    chosen[0] = -1
    return np.unique(chosen, return_inverse=True)[1]


def _ranked(
    coupling: Coupling,
    scores: np.ndarray,
    made: np.ndarray,
    producer: np.ndarray,
    ranking: str,
    select: Selection,
    seed: int,
) -> np.ndarray:
    """A key for each class, to be compared between all of them."""
    _, group = np.unique(producer, return_inverse=True)
    if ranking != "local":
        useful = np.maximum(scores, 0.0)
        weight = np.bincount(group, useful)[group] if ranking == "loss" else made * np.bincount(group)[group]
        scores = np.where(scores < 0, scores, _damage(useful, group) * weight)
    keys = select.keys(scores, seed)
    if ranking in ("global", "loss"):
        return keys
    if ranking == "isomorphic":
        group = _isomorphic(coupling, producer)
    order = np.lexsort((np.arange(len(scores)), -keys, group))
    return _relative(order, group)


def _relative(order: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Minus the share of its group that stands before each class in ``order``."""
    rank = np.empty(len(order))
    rank[order] = _place_in_group(group[order])
    return -(rank + 0.5) / np.bincount(group)[group]


def _damage(importance: np.ndarray, group: np.ndarray) -> np.ndarray:
    """What each class adds to r^2 of its group as the classes leave, the least important first."""
    order = np.lexsort((importance, group))
    groups, sums = group[order], np.bincount(group, importance)
    own = np.divide(importance[order], sums[groups], out=np.zeros(len(order)), where=sums[groups] > 0)
    before = np.cumsum(own) - own
    share = before - before[np.searchsorted(groups, groups, side="left")]  # of those of the group that left earlier
    found = np.empty(len(importance))
    found[order] = own * (2 * share + own)
    return found


def _made(coupling: Coupling) -> np.ndarray:
    """For each class, the outputs of layers that leave with it, 1 at least."""
    made = np.zeros(coupling.count)
    for row in coupling.rows:
        if row.produces:
            np.add.at(made, row.classes.numpy(), 1.0)
    return np.maximum(made, 1.0)


def _isomorphic(coupling: Coupling, producer: np.ndarray) -> np.ndarray:
    """Families whose coupled weights belong to the same operators, along the same axes, are one group."""
    users: dict[str, str] = {}
    for node in coupling.graph.graph.nodes:
        if node.op == "get_attr":
            users[str(node.target)] = ",".join(sorted(operator_name(user) for user in node.users))
    parts: dict[int, set[str]] = {}
    for row in coupling.rows:
        for index in set(producer[row.classes.numpy()].tolist()):
            parts.setdefault(index, set()).add(f"{users.get(row.names[0], '')}[{row.axis}]")
    names = {index: " ".join(sorted(own)) for index, own in parts.items()}
    return np.asarray(np.unique([names.get(index, "") for index in producer.tolist()], return_inverse=True)[1])


def _place_in_group(groups: np.ndarray) -> np.ndarray:
    """For an array of groups, how many of the same group stand before each."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    place = np.empty(len(groups), dtype=np.int64)
    place[order] = np.arange(len(groups)) - starts
    return place


def _protected(vectors: list[np.ndarray], key: np.ndarray, floors: list[float]) -> np.ndarray:
    """The classes no threshold may remove: in each axis the best share of them, and one at least where nothing is frozen."""
    safe = np.zeros(len(key), dtype=bool)
    safe[0] = True
    for vector, floor in zip(vectors, floors, strict=True):
        present = np.unique(vector)
        own = present[present > 0]
        fixed = int((vector == 0).sum())
        least = max(math.ceil(floor * (len(own) + fixed) - 1e-9) - fixed, 0 if fixed else 1)
        if least > 0:
            safe[own[np.lexsort((own, -key[own]))[:least]]] = True
    return safe


def _fractions(
    coupling: Coupling,
    sizes: np.ndarray,
    family: np.ndarray,
    producer: np.ndarray,
    target: Target,
    round_to: int,
    least: np.ndarray,
) -> np.ndarray:
    """keep= of every family. Raises InputError where that is no multiple of ``round_to``."""
    counts = np.floor(sizes * target.value + 1e-9).astype(np.int64)
    bad = (counts < round_to) & (sizes > 1) & (counts < sizes) & (np.arange(len(sizes)) > 0) & (round_to > 1)
    if bad.any():
        worst = int(np.flatnonzero(bad)[0])
        name = coupling.rows[int(producer[family == worst][0]) - 1].names[0].removesuffix(".weight")
        fits = 2 ** int(math.log2(max(int(counts[worst]), 1)))
        raise InputError(
            f"{name}: {sizes[worst]} channels cannot be rounded to a multiple of {round_to} at {target}; "
            f"pass round_to={fits} or list it in ignore"
        )
    return np.asarray(np.maximum(counts, least))


def _unreachable(
    coupling: Coupling,
    target: Target,
    smallest: int,
    everything: dict[str, int],
    round_to: int,
    floor: float,
    whole: np.ndarray,
) -> str:
    reach = smallest if target.value > 1 else round(smallest / everything[target.kind] + 5e-5, 4)
    reasons = [f"floor={floor} of each layer stays"]
    if round_to > 1:
        reasons.append(f"{int(whole[1:].sum())} families are narrower than round_to={round_to}")
    if coupling.frozen:
        name, why = next(iter(coupling.frozen.items()))
        reasons.append(f"{len(coupling.frozen)} layers are frozen, such as {name}: {why}")
    why = "; ".join(reasons)
    return f"{target} is out of reach, the least is {target.kind}={reach} ({why}); raise {target.kind}, or lower floor or round_to"


def _check_scores(coupling: Coupling, scores: Tensor, criterion: str) -> None:
    if scores.shape != (coupling.count,):
        raise InputError(
            f"criterion {criterion}: returned scores of shape {tuple(scores.shape)}, must be ({coupling.count},), one a class"
        )
    bad = ~torch.isfinite(scores)
    bad[0] = False
    if bool(bad.any()):
        broken = [name for name, parameter in coupling.graph.named_parameters() if not bool(parameter.isfinite().all())]
        row = next(row for row in coupling.rows if bool(bad[row.classes].any()))
        why = (
            f"{broken[0]} is not finite, load sound weights"
            if broken
            else f"the first at {row.names[0]}, though the weights are finite"
        )
        raise InputError(f"criterion {criterion}: {int(bad.sum())} scores are NaN or infinite; {why}")


def _channels(coupling: Coupling, alive: Tensor) -> dict[str, list[int]]:
    """Outputs before and after, for the weight of each convolution and linear layer."""
    return {row.names[0]: [len(row.classes), int(alive[row.classes].sum())] for row in coupling.rows if row.produces}
