"""Candidate: a model found on the way, as it lies in the working folder, with what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NotRequired, Self, TypedDict, cast

from torch import fx

from rarefy.artifact import folder as folder_
from rarefy.compression.gates import Measurement, Ratio
from rarefy.deployment.latency import Quartiles, RunTime
from rarefy.reports.facts import Epoch, Evaluation


class Record(TypedDict):
    """What its manifest says of a candidate, under "found".

    step, options: the verb, and what was asked of it. facts: numbers, words and seconds from the verb's own record.
    curve: of a training, an entry an epoch. seconds: that the step took. evaluation: of the exported file, against the
        original.
    latency_ms, speedup: of one run in which it took turns with the original and with the model that the step started
        from.
    """

    step: str
    name: str
    seconds: float
    evaluation: Evaluation
    latency_ms: RunTime
    speedup: dict[str, Quartiles]
    options: NotRequired[Mapping[str, object]]
    facts: NotRequired[Mapping[str, object]]
    curve: NotRequired[list[Epoch] | None]


@dataclass(frozen=True)
class Candidate:
    """folder: as ``artifact.save`` wrote it, with the exported file. measurement: what the gates look at."""

    folder: Path
    record: Record
    measurement: Measurement

    @classmethod
    def read(cls, folder: Path, index: int) -> Self:
        """The candidate that step ``index`` left in ``folder``. Raises FormatError."""
        record = cast(Record, folder_.read_manifest(folder)["found"])
        drop = record["evaluation"]["drop"]
        measurement = Measurement(
            index=index,
            name=record["name"],
            value=record["evaluation"]["value"],
            drop=drop["value"] if drop else 0.0,
            size=(folder / folder_.WEIGHTS).stat().st_size,
            speedup={name: Ratio(**spread) for name, spread in record["speedup"].items()},
        )
        return cls(folder, record, measurement)

    @property
    def index(self) -> int:
        return self.measurement.index

    @property
    def name(self) -> str:
        return self.measurement.name

    @cached_property
    def graph(self) -> fx.GraphModule:
        """The model, loaded and checked once. It is shared: who changes it works on a copy."""
        return folder_.load(self.folder)
