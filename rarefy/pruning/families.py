"""Families: the classes that one layer makes, ranked and rounded together, and how scores compare between them.

A family that loses the share r of its importance is damaged by ``n r^2``, n the outputs of layers that its classes are
(a residual stream is made by many): the errors of a layer's lost channels add up, so its last channels are worth more
than its first. ``damages`` says what each class adds to r^2 as the classes leave one by one.
"""

from __future__ import annotations

import numpy as np

from rarefy.graph.nodes import operator_name
from rarefy.pruning.groups.groups import Coupling


def producers_of(coupling: Coupling) -> np.ndarray:
    """(classes,) 1 + the first row that makes the class (``Coupling.producers``); 0 for the frozen class."""
    producers: np.ndarray = coupling.producers().numpy() + 1
    producers[0] = 0
    return producers


def families_of(coupling: Coupling, producer: np.ndarray, round_to: int) -> np.ndarray:
    """(classes,) the family of each, 0 for the frozen one.

    A family is what one layer makes, split where its parts go different ways and each is a multiple of ``round_to``.
    """
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
    parts = np.where(divides[family], finer + int(family.max()) + 1, family)
    parts[0] = -1
    return np.unique(parts, return_inverse=True)[1]


def like_families(coupling: Coupling, producer: np.ndarray) -> np.ndarray:
    """(classes,) groups of families whose coupled weights belong to the same operators, along the same axes.

    The idea is that of arXiv 2407.04616.
    """
    users: dict[str, str] = {}
    for node in coupling.graph.graph.nodes:
        if node.op == "get_attr":
            users[str(node.target)] = ",".join(sorted(operator_name(user) for user in node.users))
    parts: dict[int, set[str]] = {}
    for row in coupling.rows:
        for index in set(producer[row.classes.numpy()].tolist()):
            parts.setdefault(index, set()).add(f"{users.get(row.names[0], '')}[{row.axis}]")
    names = {index: " ".join(sorted(part)) for index, part in parts.items()}
    return np.asarray(np.unique([names.get(index, "") for index in producer.tolist()], return_inverse=True)[1])


def outputs_of(coupling: Coupling) -> np.ndarray:
    """(classes,) the outputs of layers that leave with the class, 1 at least."""
    outputs = np.zeros(coupling.count)
    for row in coupling.rows:
        if row.produces:
            np.add.at(outputs, row.classes.numpy(), 1.0)
    return np.maximum(outputs, 1.0)


def damages(importance: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(classes,) what each adds to r^2 of its group as the classes leave, the least important first."""
    order = np.lexsort((importance, group))
    groups, sums = group[order], np.bincount(group, importance)
    share = np.divide(importance[order], sums[groups], out=np.zeros(len(order)), where=sums[groups] > 0)
    before = np.cumsum(share) - share
    lost = before - before[np.searchsorted(groups, groups, side="left")]  # of those of the group that left earlier
    added = np.empty(len(importance))
    added[order] = share * (2 * lost + share)
    return added


def places(group: np.ndarray) -> np.ndarray:
    """For an array of groups, how many of the same group stand before each."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    place = np.empty(len(group), dtype=np.int64)
    place[order] = np.arange(len(group)) - starts
    return place


def shares_before(order: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Minus the share of its group that stands before each class in ``order``: a key that compares between groups."""
    rank = np.empty(len(order))
    rank[order] = places(group[order])
    share: np.ndarray = (rank + 0.5) / np.bincount(group)[group]
    return -share
