"""Who teaches, and a student made from its teacher.

A teacher is frozen, so what its answers cost can be paid once:

* Its batch norm goes into the layers before it (``graph/fold.py``): the same answers but for rounding, and a third of
  the passes over memory.
* In bf16 its weights are rounded once, not in every step. Autocast would round each to the same value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx, nn

from rarefy import plugins
from rarefy.distillation.options import Student
from rarefy.errors import InputError
from rarefy.graph import history
from rarefy.graph.fold import fold
from rarefy.graph.layers import weighted
from rarefy.graph.macs import count_macs, count_parameters
from rarefy.graph.nodes import set_attribute
from rarefy.graph.shapes import output_shapes
from rarefy.tasks.task import Task

Teachers = nn.Module | Sequence[nn.Module] | Sequence[tuple[float, nn.Module]] | None


def teachers_of(given: Teachers) -> list[tuple[float, nn.Module]]:
    """[(share, teacher), ...]; the shares sum to 1. Raises InputError."""
    if given is None:
        return []
    if isinstance(given, nn.Module):
        return [(1.0, given)]
    pairs = [(1.0, one) if isinstance(one, nn.Module) else one for one in given]
    for pair in pairs:
        if (
            not isinstance(pair, tuple)
            or len(pair) != 2
            or not isinstance(pair[1], nn.Module)
            or not 0 < float(pair[0]) < math.inf
        ):
            raise InputError(
                f"teacher: {type(pair).__name__} is no teacher; "
                "give a module, modules, or [(weight above 0, module), ...]"
            )
    if not pairs:
        raise InputError("teacher: an empty list; give at least one, or call train()")
    total = sum(float(weight) for weight, _ in pairs)
    return [(float(weight) / total, one) for weight, one in pairs]


def frozen(teacher: fx.GraphModule, bf16: bool) -> fx.GraphModule:
    """A copy of ``teacher`` that only answers: without gradients, in eval mode, folded; weights in bf16 if asked."""
    folded = fold(teacher).requires_grad_(False)
    if bf16:
        for name in _weights(folded):
            set_attribute(
                folded, name, nn.Parameter(folded.get_parameter(name).to(torch.bfloat16), requires_grad=False)
            )
    return folded.eval()


def _weights(graph: fx.GraphModule) -> list[str]:
    """Float parameters that layers alone read, as weight or bias: autocast rounds those, and nothing else sees them."""
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    read: dict[str, list[bool]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.target in parameters:
            read.setdefault(node.target, []).extend(
                weighted(user) and node in user.args[1:3] and node is not user.args[0] for user in node.users
            )
    return [name for name, alone in read.items() if all(alone) and parameters[name].dtype == torch.float32]


def student_of(
    student: str | Student, teacher: fx.GraphModule, *, task: Task | None = None, seed: int = 0
) -> fx.GraphModule:
    """The student that is meant, as a new graph on the teacher's device; the teacher stays as it is.

    student: a word (``"depth:keep=0.5"``, ``"width:macs=0.25"``, ``"copy:fresh=true"``, or the source of another model,
        ``"timm:resnet18"``, ``"small/"``), or an object that makes one.
    teacher: whom it is made from. The record in ``meta["history"]`` says MACs and parameters of both.
    task: for kinds that look at images.
    seed: of what is drawn.

    Raises InputError for a word that names nothing, or a student that does not fit.
    """
    kind = student_kind(student)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        graph = kind.make(teacher, task, seed)
    ours, theirs = output_shapes(graph), output_shapes(teacher)
    if ours != theirs:
        raise InputError(
            f"student {plugins.describe(kind)}: answers {ours}, the teacher {theirs}; "
            "choose one with the teacher's classes"
        )
    facts = {
        "macs": [count_macs(teacher), count_macs(graph)],
        "params": [count_parameters(teacher), count_parameters(graph)],
        **graph.meta.pop("student", {}),
    }
    history.append(graph, "student", {"student": plugins.describe(kind), "seed": seed}, facts)
    return graph


def student_kind(student: object) -> Student:
    """What makes it. student: a word, or that object already. Raises InputError for what makes none."""
    kind = plugins.resolve("students", student)
    if not isinstance(kind, Student):
        raise InputError(
            f"student={student!r}: a {type(kind).__name__} makes no student; it needs make(teacher, task, seed) "
            "(rarefy/compression/students)"
        )
    return kind
