"""Answers: what a model says of a picture, as people read it: names with how sure it is, and boxes where it says where.

A task whose models' outputs can be shown keeps ``Answering``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from rarefy.data.boxes.boxes import CLASS, SCORE
from rarefy.tasks.metric import Outputs

MOST_NAMED = 5  # classes of a picture


@dataclass(frozen=True)
class Answer:
    """One thing that is said. kind: the class. score: from 0 to 1.

    corners: left, top, right, bottom in pixels of the picture; None: it is said of all of it.
    """

    kind: int
    name: str
    score: float
    corners: tuple[float, float, float, float] | None = None

    @property
    def text(self) -> str:
        return f"{self.name} {self.score:.2f}"

    def to_json(self) -> dict[str, object]:
        where = {} if self.corners is None else {"box": [round(value, 2) for value in self.corners]}
        return {"class": self.kind, "name": self.name, "score": self.score, **where}


@runtime_checkable
class Answering(Protocol):
    """A task whose models' outputs can be shown."""

    def answers(
        self, outputs: Outputs, sizes: Sequence[tuple[int, int]], names: Sequence[str] | None, least: float
    ) -> list[list[Answer]]:
        """Of each picture what is said of it, the surest first.

        sizes: (H, W) of the pictures. names: of the classes, None: their numbers. least: score of what is said.
        """
        ...


def named(kind: int, names: Sequence[str] | None) -> str:
    return names[kind] if names is not None and kind < len(names) else str(kind)


def likeliest(shares: Tensor, names: Sequence[str] | None) -> list[list[Answer]]:
    """Of each picture its five likeliest classes. shares: (N, classes), from 0 to 1."""
    best = shares.topk(min(MOST_NAMED, shares.shape[1]), 1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[Answer(kind, named(kind, names), score) for kind, score in zip(*one, strict=True)] for one in pairs]


def around(rows: Tensor, names: Sequence[str] | None, least: float) -> list[Answer]:
    """Of a picture its boxes, the surest first. rows: (m, 6) as ``boxes.py`` says, in the picture's pixels."""
    kept = rows[(rows[:, CLASS] >= 0) & (rows[:, SCORE] >= least)]
    order = kept[:, SCORE].argsort(descending=True, stable=True)
    return [
        Answer(int(kind), named(int(kind), names), score, (left, top, right, bottom))
        for left, top, right, bottom, kind, score in kept[order].tolist()
    ]
