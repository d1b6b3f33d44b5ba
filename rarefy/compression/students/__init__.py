"""Students: a network to train, made from its teacher by a word. One kind a file.

    make(teacher, task, seed) -> the student, a new graph whose inputs and outputs have the teacher's shapes

``made`` takes the word: ``"depth:keep=0.5"``, ``"width:macs=0.25"``, ``"copy:fresh=true"``; a source of another model (``"timm:resnet18"``, ``"small/"``,
see ``rarefy/models/load.py``), built with as many outputs as the teacher has; or an object with ``make``. The record it leaves in ``meta["history"]``
says what was asked, and MACs and parameters before and after.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.graph.macs import count_macs, count_parameters
from rarefy.graph.shapes import output_shapes


@runtime_checkable
class Student(Protocol):
    def make(self, teacher: fx.GraphModule, task: Any, seed: int) -> fx.GraphModule: ...


def made(student: Any, teacher: fx.GraphModule, *, task: Any = None, seed: int = 0) -> fx.GraphModule:
    """The student that ``student`` names, as a new graph on the teacher's device; the teacher stays as it is.

    task: for kinds that look at images. seed: of what is drawn. Raises InputError for a word that names nothing, or a student that does not fit.
    """
    kind = resolve(student)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        graph = kind.make(teacher, task, seed)
    ours, theirs = output_shapes(graph), output_shapes(teacher)
    if ours != theirs:
        raise InputError(
            f"student {_said(kind)}: answers {ours}, the teacher {theirs}; choose one with the teacher's classes"
        )
    graph.meta.setdefault("history", []).append(
        {
            "step": "student",
            "options": {"student": _said(kind), "seed": seed},
            "facts": {
                "macs": [count_macs(teacher), count_macs(graph)],
                "params": [count_parameters(teacher), count_parameters(graph)],
                **graph.meta.pop("student", {}),
            },
        }
    )
    return graph


def resolve(student: Any) -> Student:
    """The object for a word. Raises InputError."""
    from rarefy.compression.students._other import Other

    found = student
    if isinstance(student, str):
        head = student.strip().partition(":")[0].replace("-", "_")
        found = plugins.resolve("students", student) if head in plugins.available("students") else Other.of(student)
    if not isinstance(found, Student):
        raise InputError(
            f"student={student!r}: a {type(found).__name__} makes no student; it needs make(teacher, task, seed) (rarefy/compression/students)"
        )
    return found


def _said(kind: Student) -> str:
    from rarefy.compression.students._other import Other

    return kind.text if isinstance(kind, Other) else plugins.describe(kind)
