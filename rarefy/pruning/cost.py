"""What a network costs as classes leave it: MACs and parameters as polynomials of its widths.

The MACs of a layer are a product of widths (``graph/macs.py`` names the axes), the elements of a parameter too, and a
width is a sum over the classes that are alive. So the cost of a network that has not been built is exact, and asked for
in microseconds: ``choose`` bisects over it. ``stays`` says what of both can't leave, and why.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, fx

from rarefy.graph.macs import MACS, products
from rarefy.graph.nodes import operator_name
from rarefy.pruning.groups.groups import Coupling
from rarefy.pruning.groups.labels import Value, compact, values_in
from rarefy.reports.pruned import Held, Stays


@dataclass(frozen=True)
class Polynomial:
    """A sum of products of widths: ``coefficients * prod(widths[factors])``, where a factor of -1 is 1."""

    coefficients: np.ndarray
    factors: np.ndarray

    def __call__(self, widths: np.ndarray) -> int:
        return round(float((self.coefficients * np.append(widths, 1.0)[self.factors].prod(1)).sum()))


@dataclass(frozen=True, eq=False)
class Costs:
    """axes: the distinct axes of the network, each a vector (size,) of classes.

    count: of classes.
    macs, params: of the widths of ``axes``.
    """

    axes: list[np.ndarray]
    count: int
    macs: Polynomial
    params: Polynomial

    def __call__(self, alive: np.ndarray) -> dict[str, int]:
        """alive: (classes,) bool -> {"keep", "macs", "params"}, what there is of each."""
        widths = self.widths(alive)
        return {"keep": int(alive[1:].sum()), "macs": self.macs(widths), "params": self.params(widths)}

    def widths(self, alive: np.ndarray) -> np.ndarray:
        """(classes,) bool -> (axes,): how many positions of each axis survive."""
        return np.bincount(self._axis, alive[self._classes], len(self.axes))

    def widths_of(self, members: np.ndarray) -> np.ndarray:
        """(axes, members): how many positions of each axis each of these classes has."""
        place = np.full(self.count, -1)
        place[members] = np.arange(len(members))
        column = place[self._classes]
        index = (self._axis * len(members) + column)[column >= 0]
        shape = (len(self.axes), len(members))
        return np.bincount(index, minlength=math.prod(shape)).reshape(shape).astype(np.float64)

    @cached_property
    def _classes(self) -> np.ndarray:
        """(positions,) of all axes, one after the other."""
        return np.concatenate(self.axes)

    @cached_property
    def _axis(self) -> np.ndarray:
        """(positions,) the axis of each."""
        return np.repeat(np.arange(len(self.axes)), [len(vector) for vector in self.axes])


class _Axes:
    """The distinct axes that were met so far."""

    def __init__(self) -> None:
        self.index: dict[bytes, int] = {}
        self.vectors: list[np.ndarray] = []
        self.layers: dict[int, list[tuple[int, int]]] = {}

    def add(self, classes: Tensor) -> int:
        """Its number; classes: (size,)."""
        vector = classes.contiguous().numpy()
        key = vector.tobytes()
        if key not in self.index:
            self.index[key] = len(self.vectors)
            self.vectors.append(vector)
        return self.index[key]

    def of(self, value: Value) -> list[tuple[int, int]]:
        """(axis of the activation, number) of each axis of it that may be cut."""
        found = []
        for layer in value.layers:
            if id(layer) not in self.layers:
                own = compact(layer)
                varying = [axis for axis, size in enumerate(own.shape) if size > 1]
                self.layers[id(layer)] = [(axis, self.add(own.flatten())) for axis in varying]
            found += self.layers[id(layer)]
        return found


def costs_of(coupling: Coupling) -> Costs:
    """Of the axes of what is counted, and of all others, which cost nothing but must not vanish."""
    axes = _Axes()
    macs, params = _macs(coupling, axes), _params(coupling, axes)
    seen: set[int] = set()
    for value in coupling.values.values():
        for layer in (layer for part in values_in(value) for layer in part.layers):
            if id(layer) not in seen:
                seen.add(id(layer))
                axes.add(compact(layer).flatten())
    for row in coupling.rows:
        axes.add(row.classes)
    return Costs(axes.vectors, coupling.count, macs, params)


def _macs(coupling: Coupling, axes: _Axes) -> Polynomial:
    terms = []
    for node in coupling.graph.graph.nodes:
        for product in products(node, coupling.shapes) if operator_name(node) in MACS else ():
            coefficient, factors = 1.0, []
            for source, axis in product:
                number = _number(coupling, axes, source, axis)
                if number is None:
                    coefficient *= coupling.values[source].shape[axis]
                else:
                    factors.append(number)
            terms.append((coefficient, factors))
    return _polynomial(terms)


def _number(coupling: Coupling, axes: _Axes, source: fx.Node, axis: int) -> int | None:
    return next((number for place, number in axes.of(coupling.values[source]) if place == axis), None)


def _params(coupling: Coupling, axes: _Axes) -> Polynomial:
    parameters = dict(coupling.graph.named_parameters())
    factors: dict[str, list[int]] = {name: [] for name in parameters}
    for row in coupling.rows:
        name = next((name for name in row.names if name in parameters), None)
        if name is not None:
            factors[name].append(axes.add(row.classes))
    return _polynomial(
        [
            (parameter.numel() / math.prod(len(axes.vectors[index]) for index in factors[name]), factors[name])
            for name, parameter in parameters.items()
        ]
    )


def stays(coupling: Coupling) -> Stays:
    """What would be left if every class that may leave did: the parameters and MACs that are frozen on all their axes.

    By what froze the layer, with its largest layers.
    """
    names = {name: row.names[0] for row in coupling.rows for name in row.names}
    of_module = {name.rpartition(".")[0]: name for name in coupling.frozen}
    share: dict[str, float] = {}
    for row in coupling.rows:
        share[row.names[0]] = share.get(row.names[0], 1.0) * float((row.classes == 0).double().mean())
    params: dict[str, int] = {}
    for name, parameter in coupling.graph.named_parameters():
        first = names.get(name, name)
        owner = first if first in coupling.frozen else of_module.get(first.rpartition(".")[0], "")
        params[owner] = params.get(owner, 0) + round(parameter.numel() * share.get(first, 1.0))
    macs: dict[str, int] = {}
    for node in coupling.graph.graph.nodes:
        for product in products(node, coupling.shapes) if operator_name(node) in MACS else ():
            read = [names.get(str(source.target), "") for source in node.all_input_nodes if source.op == "get_attr"]
            owner = next((name for name in read if name in coupling.frozen), "")
            fixed = math.prod(_fixed(coupling.values[source], axis) for source, axis in product)
            macs[owner] = macs.get(owner, 0) + fixed
    reasons: dict[str, list[str]] = {}
    for name in coupling.frozen:
        if params.get(name) or macs.get(name):
            reasons.setdefault(_without_place(coupling.frozen[name]), []).append(name)
    held = []
    for why, layers in reasons.items():
        layers.sort(key=lambda name: (-params.get(name, 0), -macs.get(name, 0), name))
        held.append(
            Held(
                why=why,
                params=sum(params.get(name, 0) for name in layers),
                macs=sum(macs.get(name, 0) for name in layers),
                layers=[name.removesuffix(".weight") for name in layers[:3]],
                count=len(layers),
            )
        )
    held.sort(key=lambda one: (-one["params"], -one["macs"], one["why"]))
    return Stays(params=sum(params.values()), macs=sum(macs.values()), reasons=held)


def _fixed(value: Value, axis: int) -> int:
    """Positions of an axis that never leave."""
    layer = next((layer for layer in value.layers if layer.shape[axis] > 1), None)
    return value.shape[axis] if layer is None else int((layer == 0).sum() * value.shape[axis] // layer.numel())


def _without_place(reason: str) -> str:
    """``why (operator at place)`` -> ``why (operator)``, so that the layers of one kind stand together."""
    return re.sub(
        r" \((output|\w+) at [^()]*\)$", lambda match: "" if match[1] == "output" else f" ({match[1]})", reason
    )


def _polynomial(terms: list[tuple[float, list[int]]]) -> Polynomial:
    longest = max((len(factors) for _, factors in terms), default=1) or 1
    padded = [factors + [-1] * (longest - len(factors)) for _, factors in terms]
    coefficients = np.array([coefficient for coefficient, _ in terms], dtype=np.float64)
    return Polynomial(coefficients, np.array(padded, dtype=np.int64).reshape(-1, longest))
