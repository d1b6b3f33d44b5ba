"""What a trial may choose, and the recipe of ``compress`` that it is.

A family is what leaves together (``pruning/families.py``): of each one of a few widths. Weights have so many bits in
the
mean, which the step ``quantize`` shares out by an integer program of its own; a level switch moves a layer's bits by
name. A rung is how much training a trial gets: 0 repair without training, 1 a fast one, 2 a patient one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from rarefy import plugins
from rarefy.compression.budget import Step
from rarefy.errors import FormatError
from rarefy.reports.facts import is_number

BITS = (8.0, 6.0, 4.0)  # weights' average; None: float
RUNGS = 3
STUDENTS = ("depth:keep=0.75", "depth:keep=0.5")


@dataclass(frozen=True)
class Family:
    """name: of the first layer that makes it. widths: channels that may stay, ascending, the last is all."""

    name: str
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Genome:
    """A trial's choice.

    levels: a family's index into its widths. bits: of weights, in the mean; None: float. switched: bits by layer, after
    a level switch. student: a kind of ``students/`` in place of pruning. rung: of training. parent: the trial whose
    float
    model it begins with; None: the original. params: plain parameters, chosen by Optuna.
    """

    levels: tuple[int, ...]
    bits: float | None = 8.0
    switched: Mapping[str, int] = field(default_factory=dict)
    student: str | None = None
    rung: int = 0
    parent: int | None = None
    params: Mapping[str, float | str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, told: Mapping[str, object]) -> Genome:
        """Raises FormatError for what is none."""
        if not told.keys() <= _KEPT.keys() or not all(_KEPT[key](told.get(key)) for key in {"levels", *told}):
            raise FormatError(
                f"a trial of the search says what is no choice ({str(told)[:200]}); begin in another folder"
            )
        checked: dict[str, Any] = {**told, "levels": tuple(cast(list[int], told["levels"]))}
        return cls(**checked)

    @property
    def structure(self) -> tuple[object, ...]:
        """What two trials of one network and number format have in common, whatever they were trained."""
        return self.levels, self.bits, tuple(sorted(self.switched.items())), self.student


def _is_params(value: object) -> bool:
    """Numbers, and names of what comes with rarefy: a stranger's list of trials names no code."""
    return isinstance(value, Mapping) and all(
        is_number(one)
        if key != "criterion"
        else isinstance(one, str) and one.partition(":")[0] in plugins.available("criteria")
        for key, one in value.items()
    )


def _is_small(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


# What each part of a trial may be, in a file.
_KEPT: Mapping[str, Callable[[object], bool]] = {
    "levels": lambda value: isinstance(value, list | tuple) and all(map(_is_small, value)),
    "bits": lambda value: value is None or (is_number(value) and 1 <= value <= 32),
    "switched": lambda value: (
        isinstance(value, Mapping) and all(_is_small(one) and one <= 32 for one in value.values())
    ),
    "student": lambda value: value in (None, *STUDENTS),
    "rung": lambda value: _is_small(value) and cast(int, value) < RUNGS,
    "parent": lambda value: value is None or _is_small(value),
    "params": _is_params,
}


@dataclass(frozen=True)
class Lengths:
    """Epochs of the rungs that train, pictures a step, and the loss against labels (0 where there are none)."""

    fast: int
    patient: int
    batch_size: int
    hard_weight: float = 1.0

    def of(self, rung: int) -> int:
        return self.fast if rung == 1 else self.patient


def widths_of(families: Sequence[Family], levels: Sequence[int]) -> list[int]:
    return [one.widths[level] for one, level in zip(families, levels, strict=True)]


def recipe(
    families: Sequence[Family], genome: Genome, lengths: Lengths, parent: Genome | None = None, taught: bool = False
) -> list[Step]:
    """The steps of the trial. parent: of the trial that it begins with. taught: was that one trained already?"""
    steps: list[Step] = []
    before = [one.widths[-1] for one in families] if parent is None else widths_of(families, parent.levels)
    after = widths_of(families, genome.levels)
    shares = {
        one.name: new / old for one, old, new in zip(families, before, after, strict=True) if new < old
    }  # fmt: skip
    if shares and genome.student is None:
        prune: dict[str, object] = {"do": "prune", "keep": shares, "floor": 0.0}
        if "criterion" in genome.params:
            prune["criterion"] = genome.params["criterion"]
        steps.append({**prune, "repair": True} if genome.rung == 0 else prune)
    elif parent is not None:  # the start as a step of its own, which the training after it has to better
        steps.append({"do": "prune", "keep": 1.0})
    fresh = genome.student is not None and (parent is None or parent.student != genome.student)
    if genome.rung > 0 or fresh:
        training: dict[str, object] = {
            "do": "distill",
            "epochs": lengths.of(max(genome.rung, 1)),
            "batch_size": lengths.batch_size,
            "hard_weight": lengths.hard_weight,
            "lr": float(genome.params.get("lr", 0.05)) * (0.5 if taught else 1.0),
        }
        steps.append({**training, "student": genome.student} if fresh else training)
    if genome.bits is not None:
        steps.append({"do": "quantize", **({} if (text := weights_text(genome)) is None else {"weights": text})})
    return steps or [{"do": "prune", "keep": 1.0}]


def weights_text(genome: Genome) -> str | None:
    """As ``quantize`` takes its weights; None: its default."""
    if genome.switched:
        return ";".join(["int8", *(f"{name}=int{bits}" for name, bits in sorted(genome.switched.items()))])
    return None if genome.bits == BITS[0] else f"mixed:bits={genome.bits:g},choices=2/3/4/5/6/8"
