from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import fx

from rarefy.artifact import folder as folder_
from rarefy.compression.budget import Step


@dataclass(frozen=True)
class Candidate:
    """A model found on the way, as it lies in the working folder. ``found``: what was measured of it."""

    index: int
    folder: Path
    found: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.found["name"])

    @property
    def value(self) -> float:
        return float(self.found["evaluation"]["value"])

    @property
    def drop(self) -> float:
        return float((self.found["evaluation"]["drop"] or {"value": 0.0})["value"])

    @property
    def speedup(self) -> float:
        """Against the original."""
        return float(self.found["speedup"]["original"]["median"])

    @cached_property
    def size(self) -> int:
        return (self.folder / folder_.WEIGHTS).stat().st_size

    def graph(self) -> fx.GraphModule:
        return folder_.load(self.folder)


@dataclass
class Outcome:
    """What the gate said of a step. ``candidate`` is None where the step could not be done."""

    step: Step
    candidate: Candidate | None
    kept: bool
    why: str
