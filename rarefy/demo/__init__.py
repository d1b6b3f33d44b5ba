"""The demos: a small network is trained, compressed, measured and signed, from what comes with the packages alone.

``digits.py`` is a classifier of handwritten digits, ``shapes.py`` a detector of drawn shapes.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.demo.digits import Net, model
from rarefy.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from rarefy.reports.facts import Facts
    from rarefy.tasks.task import Task

__all__ = ["Demo", "Net", "demonstrate", "model"]

NAMES = {"classification": "digits", "detection": "shapes"}  # task -> file
Options = Mapping[str, Any]  # keywords of a verb


@dataclass(frozen=True)
class Demo:
    """What is shown. model: untrained; source: as the command line names it. training: options of ``train``.

    budget: of ``compress``; smaller: times, on disk. steps: of its recipe.
    """

    task: Task
    model: nn.Module
    source: str
    title: str
    training: Options
    steps: Sequence[Options]
    budget: Options = field(default_factory=lambda: {"max_drop": 0.005, "speedup": 1.5})
    smaller: int = 8


def demonstrate(folder: str | os.PathLike[str], seed: int = 0, task: str = "classification") -> Facts:
    """Train, compress, save, sign; returns the report's facts.

    folder: where ``original/``, ``small/`` and a pair of keys are left. task: of ``NAMES``.
    """
    from rarefy.artifact import folder as folder_
    from rarefy.artifact import signing
    from rarefy.compression import budget, compress
    from rarefy.distillation import distill
    from rarefy.evaluation import measure
    from rarefy.tasks import detector

    if task not in NAMES:
        raise InputError(f"no demo of {task!r}; have {', '.join(NAMES)}")
    demo: Demo = importlib.import_module(f"rarefy.demo.{NAMES[task]}").demo(seed)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    untrained = detector.capture(demo.model, demo.task.data.input_shape)
    original = distill.train(untrained, demo.task, **demo.training, seed=seed, checkpoint=place / "train.work")
    folder_.save(original, place / "original", manifest={"model": demo.source, "task": demo.task.describe()})
    result = compress.compress(
        original,
        demo.task,
        budget=budget.Budget(**demo.budget, size=measure.weight_bytes(original) // demo.smaller),
        steps=demo.steps,
        workdir=place / "compress.work",
        seed=seed,
        title=demo.title,
    )
    result.save(place / "small")
    key = place / "demo.key"
    if not key.exists():
        signing.keygen(key)
    signing.sign(place / "small", key)
    for work in ("train.work", "compress.work"):
        shutil.rmtree(place / work, ignore_errors=True)
    return result.report
