"""``rarefy distill``: a student learns from its teacher, or from labels alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from rarefy.cli.inputs import device_of, loaded, prepared, weight_of
from rarefy.cli.options import DataOptions, Device, Fields, FileOptions, Json, ModelOptions, Output, app, grouped
from rarefy.cli.outputs import claim_files, claim_folder, save_result
from rarefy.distillation.options import Training, training_of
from rarefy.errors import InputError

Teachers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODEL",
        help="Who teaches: a source, like MODEL, or several, also as 2*MODEL. Without one, labels alone do.",
    ),
]
TeacherWeights = Annotated[
    list[str] | None, typer.Option(metavar="FILE", help="The teacher's weights; one for each, in their order.")
]
Student = Annotated[
    str | None,
    typer.Option(
        metavar="CHOICE",
        help="Train a student made of MODEL, which teaches it: depth:keep=0.5, timm:resnet18; "
        "see `rarefy list students`.",
    ),
]
Loss = Annotated[
    str,
    typer.Option(
        metavar="CHOICE", help="Distillation loss, or a sum: 'lskd + 50*mse:on=stages'; see `rarefy list losses`."
    ),
]
Preset = Annotated[
    str | None, typer.Option(metavar="NAME", help="fast, normal or patient; what else you say goes before it.")
]


@app.command()
@grouped
def distill(
    model: ModelOptions,
    data: DataOptions,
    given: Annotated[dict[str, Any], Fields(Training)],
    output: Output,
    files: FileOptions,
    teacher: Teachers = None,
    teacher_weights: TeacherWeights = None,
    student: Student = None,
    loss: Loss = "lskd",
    preset: Preset = None,
    cache: Annotated[str | None, typer.Option(metavar="FOLDER", help="Keep the teacher's answers there.")] = None,
    logs: Annotated[str | None, typer.Option(metavar="FOLDER", help="For TensorBoard.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train MODEL, or with --student one made of it, to answer like the teacher.

    Killed and started again, it goes on where it was.
    """
    from rarefy.distillation.distill import distill as verb
    from rarefy.distillation.distill import train as without_teacher
    from rarefy.distillation.objective import terms
    from rarefy.distillation.teachers import student_kind, student_of

    training = training_of(preset, given, "distill")
    terms(loss)
    if student is not None:
        student_kind(student)
    if teacher and len(teacher_weights or ()) not in (0, len(teacher)):
        raise InputError(
            f"--teacher-weights: {len(teacher_weights or ())} files for {len(teacher)} teachers; "
            "give one for each, or none"
        )
    if cache is not None and not teacher and student is None:
        raise InputError("--cache: keeps a teacher's answers, and there is none; pass --teacher, or leave it out")
    folder = claim_folder(output)
    claim_files(files, "onnxruntime")
    source, graph, task = prepared(model, data)
    before = graph
    common: dict[str, Any] = {
        "training": training,
        "device": device_of(device),
        "checkpoint": f"{folder}.work",
        "logs": logs,
    }
    guides = _guides(teacher or (), teacher_weights or (), model.classes, task)
    if student is not None:
        graph, guides = student_of(student, graph, task=task, seed=training.seed), guides or [(1.0, graph)]
    if not guides:
        trained = without_teacher(graph, task, **common)
    else:
        trained = verb(graph, guides, task, loss=loss, cache=cache, **common)
    if int(os.environ.get("RANK", "0")):  # under torchrun the first process saves for all
        return
    save_result(trained, folder, source, task, as_json, before=before, files=files)
    shutil.rmtree(f"{folder}.work", ignore_errors=True)


def _guides(teachers: Sequence[str], weights: Sequence[str], classes: int | None, task: Any) -> list[tuple[float, Any]]:
    """[(share, graph), ...] of ``2*MODEL`` and the like."""
    from rarefy.models import load

    found = []
    files: Sequence[str | None] = weights or [None] * len(teachers)
    for text, file in zip(teachers, files, strict=True):
        number, star, name = text.partition("*")
        share = weight_of(number, f"--teacher {text}") if star else 1.0
        guide = loaded(name if star else text, file, classes)
        found.append((share, load.graph_of(guide, task.data.input_shape)))
    return found
