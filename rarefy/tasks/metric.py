"""Metric: how good a model is on a task, how sure that is, and how much worse than another model on the same images.

A metric is handed the outputs and targets of batch after batch (``add``) and keeps of each image what its numbers need.
Who judges a model makes one metric for each model (``task.metric()``), adds the same batches to all, and reads them:
nobody but the metric knows how outputs are read, and nobody else knows its name, its unit, or which direction is
better.

A metric names this protocol as its base and then needs ``name``, ``unit``, ``better``, ``samples``, ``add``, ``value``,
``interval`` and ``paired``; the rest has an answer here. ``metrics/accuracy.py`` is an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

from rarefy.errors import DataError

Better = Literal["higher", "lower"]
Outputs = Any  # what a model returns for a batch, a Tensor or several: the loss and the metric of its task know
Targets = Any  # what the data says of a batch's images: likewise


class OutputError(DataError):
    """The metric can't read what the model returns. Who runs the model puts its name before the message."""


@dataclass(frozen=True)
class Difference:
    """How much worse one model is than another on the same images.

    value, interval: positive is worse, in the metric's unit. lost, gained: what only the other and what only this one
    gets right.
    agreement: share of the images to which both give the same answer. details: what else the metric tells, JSON-able.
    """

    value: float
    interval: tuple[float, float]
    lost: int | None = None
    gained: int | None = None
    agreement: float | None = None
    details: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        counts = {"lost": self.lost, "gained": self.gained}
        told = {name: count for name, count in counts.items() if count is not None}
        return {"value": self.value, "interval": list(self.interval), **told, **self.details}


class Metric(Protocol):
    """A number by which models are compared.

    name: its key in reports and manifests ("top1"). unit: "%" for shares of 1, else the unit of its numbers, or "".
    better: which direction is better.
    """

    name: str
    unit: str
    better: Better

    @property
    def label(self) -> str:
        """The name as people write it ("top-1")."""
        return self.name

    @property
    def samples(self) -> int:
        """Number of images added so far."""
        ...

    def add(self, outputs: Outputs, targets: Targets) -> None:
        """One batch; NaN and infinity are as wrong as can be. Raises OutputError for outputs it can't read."""
        ...

    def value(self) -> float:
        """The number, over all images added."""
        ...

    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        ...

    def paired(self, reference: Self) -> Difference:
        """How much worse than the reference, to which the same images were added in the same order."""
        ...

    def details(self) -> dict[str, object]:
        """What else there is to tell, JSON-able: further keys of an evaluation's JSON, and its attributes."""
        return {}

    def warnings(self, whole: bool) -> tuple[str, ...]:
        """What makes the number worthless, a line each. whole: were these all images of the split?"""
        return ()

    def text(self) -> str:
        """All of it in a line."""
        low, high = (shown(bound, bare(self.unit)) for bound in self.interval())
        return f"{self.label} {shown(self.value(), self.unit)} ({low} to {high}, {self.samples} images)"


def worth(value: float, better: Better) -> float:
    """A number that is larger for the better of two values."""
    return value if better == "higher" else -value


def shown(value: float, unit: str) -> str:
    """A metric's value as people read it: ``91.73%`` of a share, ``1.234 years`` of anything else."""
    return f"{value:.2%}" if unit == "%" else f"{value:.4g} {unit}".rstrip()


def bare(unit: str) -> str:
    """The unit of numbers beside one that has said it: of shares their "%", else none."""
    return unit if unit == "%" else ""


def shown_change(change: float, unit: str) -> str:
    """A difference of two values: ``0.85 points`` of shares, ``0.01234 years`` of anything else."""
    return f"{100 * change:.2f} points" if unit == "%" else shown(change, unit)
