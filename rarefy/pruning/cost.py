from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx

from rarefy.graph.macs import MACS, products
from rarefy.graph.nodes import operator_name
from rarefy.pruning.groups.groups import Coupling
from rarefy.pruning.groups.labels import Value, compact

# ------------------------------------------------------------------------------------------------------------------ cost


@dataclass(frozen=True)
class Polynomial:
    """A sum of products of widths: ``coefficients * prod(widths[factors])``; ``widths = counts @ alive``, with a last width of 1."""

    coefficients: np.ndarray
    factors: np.ndarray

    def __call__(self, widths: np.ndarray) -> int:
        return round(float((self.coefficients * np.append(widths, 1.0)[self.factors].prod(1)).sum()))


class _Widths:
    """The distinct axes of the network as vectors of classes, and how many positions of each survive."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.index: dict[bytes, int] = {}
        self.vectors: list[np.ndarray] = []

    def add(self, classes: Tensor) -> int:
        vector = classes.contiguous().numpy()
        key = vector.tobytes()
        if key not in self.index:
            self.index[key] = len(self.vectors)
            self.vectors.append(vector)
        return self.index[key]

    def counted(self) -> _Counted:
        axis = np.repeat(np.arange(len(self.vectors)), [len(vector) for vector in self.vectors])
        return _Counted(np.concatenate(self.vectors), axis, (len(self.vectors), self.count))


@dataclass(frozen=True, eq=False)
class _Counted:
    """How many positions of each axis survive. classes, axis: (positions,) of all axes.  shape: axes, classes."""

    classes: np.ndarray
    axis: np.ndarray
    shape: tuple[int, int]

    def __call__(self, alive: np.ndarray) -> np.ndarray:
        """(classes,) bool -> (axes,)."""
        return np.bincount(self.axis, alive[self.classes], self.shape[0])

    def of(self, members: np.ndarray) -> np.ndarray:
        """(axes, members): how many positions each of these classes has."""
        place = np.full(self.shape[1], -1)
        place[members] = np.arange(len(members))
        column = place[self.classes]
        index = (self.axis * len(members) + column)[column >= 0]
        return (
            np.bincount(index, minlength=self.shape[0] * len(members))
            .reshape(self.shape[0], len(members))
            .astype(np.float64)
        )


def _polynomial(terms: list[tuple[float, list[int]]]) -> Polynomial:
    longest = max((len(factors) for _, factors in terms), default=1) or 1
    padded = [factors + [-1] * (longest - len(factors)) for _, factors in terms]
    coefficients = np.array([coefficient for coefficient, _ in terms], dtype=np.float64)
    return Polynomial(coefficients, np.array(padded, dtype=np.int64).reshape(-1, longest))


def _costs(coupling: Coupling, widths: _Widths) -> tuple[Polynomial, Polynomial]:
    """MACs and parameters as polynomials of the widths."""
    cache: dict[int, list[tuple[int, int]]] = {}

    def varying(node: fx.Node) -> list[tuple[int, int]]:
        found = []
        for layer in coupling.values[node].layers:
            if id(layer) not in cache:
                own = compact(layer)
                cache[id(layer)] = [
                    (axis, widths.add(own.flatten())) for axis, size in enumerate(own.shape) if size > 1
                ]
            found += cache[id(layer)]
        return found

    macs = []
    for node in coupling.graph.graph.nodes:
        if operator_name(node) not in MACS:
            continue
        for product in products(node, coupling.found):
            coefficient, factors = 1.0, []
            for source, axis in product:
                own = next((index for place, index in varying(source) if place == axis), None)
                if own is None:
                    coefficient *= coupling.values[source].shape[axis]
                else:
                    factors.append(own)
            macs.append((coefficient, factors))
    parameters = dict(coupling.graph.named_parameters())
    by_name: dict[str, list[int]] = {}
    for row in coupling.rows:
        name = next((name for name in row.names if name in parameters), None)
        if name is not None:
            by_name.setdefault(name, []).append(widths.add(row.classes))
    params = []
    for name, parameter in parameters.items():
        factors = by_name.get(name, [])
        params.append((parameter.numel() / math.prod(len(widths.vectors[index]) for index in factors), factors))
    return _polynomial(macs), _polynomial(params)


def _add_activations(coupling: Coupling, widths: _Widths) -> None:
    seen: set[int] = set()
    for values in coupling.values.values():
        for value in values if isinstance(values, list) else [values]:
            for layer in value.layers if isinstance(value, Value) else ():
                if id(layer) not in seen:
                    seen.add(id(layer))
                    widths.add(compact(layer).flatten())
    for row in coupling.rows:
        widths.add(row.classes)
