"""Candidate: a model found on the way, as it lies in the working folder, with what was measured of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NotRequired, Self, TypedDict, cast

from torch import fx

from rarefy.artifact import folder as folder_
from rarefy.compression.gates import Measurement, Ratio
from rarefy.deployment.latency import Quartiles, RunTime
from rarefy.errors import FormatError
from rarefy.reports.facts import Epoch, Evaluation
from rarefy.system import strict_json
from rarefy.system.files import opened


class Record(TypedDict):
    """What its manifest says of a candidate, under "found".

    step, options: the verb, and what was asked of it. facts: numbers, words and seconds from the verb's own record.
    curve: of a training, an entry an epoch. seconds: that the step took. evaluation: of the exported file, against the
        original.
    latency_ms, speedup: of one run in which it took turns with the original and with the model that the step started
        from; where it was not timed, none.
    """

    step: str
    name: str
    seconds: float
    evaluation: Evaluation
    latency_ms: NotRequired[RunTime]
    speedup: dict[str, Quartiles]
    options: NotRequired[Mapping[str, object]]
    facts: NotRequired[Mapping[str, object]]
    curve: NotRequired[list[Epoch] | None]


SEAL = "seal"  # the key
RUN = "run.json"  # what the folder around belongs to


def seal(value: object, *digests: str) -> str:
    """sha256 of what is written into a working folder: that it is as it was written, by no key, so not by whom."""
    text = json.dumps(strict_json.plain(value, SEAL), sort_keys=True, allow_nan=False)
    return hashlib.sha256("\n".join([text, *digests]).encode()).hexdigest()


def belongs(folder: Path) -> tuple[str, str]:
    """Of which step, and of which run, a candidate's folder is: part of its seal."""
    return folder.name, digest_of(folder.parent / RUN)


def digest_of(file: Path) -> str:
    """sha256 of its bytes."""
    with opened(file) as stored:
        return hashlib.file_digest(stored, "sha256").hexdigest()


def _unsealed(folder: Path) -> object:
    """What was found of the candidate, if nothing in its folder was changed since. Raises FormatError."""
    manifest = folder_.read_manifest(folder)
    listed, found = manifest["files"], manifest.get("found")
    others = sorted(listed.keys() - {folder_.GRAPH, folder_.WEIGHTS})
    changed = next((name for name in sorted(listed) if digest_of(folder / name) != listed[name]["sha256"]), None)
    digests = (str(listed[name]["sha256"]) for name in others)
    whole = seal(found, str(manifest.get("content")), *digests, *belongs(folder))
    if changed is not None or manifest.get(SEAL) != whole:
        raise FormatError(
            f"{folder / (changed or folder_.MANIFEST)}: was changed since it was written, or is another run's; "
            "delete the working folder to start anew"
        )
    return found


@dataclass(frozen=True)
class Candidate:
    """folder: as ``artifact.save`` wrote it, with the exported file. measurement: what the gates look at."""

    folder: Path
    record: Record
    measurement: Measurement

    @classmethod
    def read(cls, folder: Path, index: int) -> Self:
        """The candidate that step ``index`` left in ``folder``. Raises FormatError."""
        record = cast(Record, _unsealed(folder))
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
