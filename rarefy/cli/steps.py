"""``rarefy prune``, ``mask``, ``cluster``, ``distill``, ``quantize``: one step each, its options those of the verb."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import rarefy
from rarefy import plugins
from rarefy.cli.inputs import device_of, loaded, prepared, share_or_count, weight_of
from rarefy.cli.options import (
    DataOptions,
    Device,
    Fields,
    FileOptions,
    Json,
    LogsOption,
    ModelOptions,
    OptionalOutput,
    Output,
    app,
    grouped,
)
from rarefy.cli.outputs import claim_folder, save_result
from rarefy.cli.terminal import show_json, show_table
from rarefy.distillation.options import Training, training_of
from rarefy.errors import InputError
from rarefy.pruning.options import MaskOptions
from rarefy.pruning.options import Options as PruneOptions
from rarefy.quantization.options import ClusterOptions
from rarefy.quantization.options import Options as QuantizeOptions

PRUNING = Fields(PruneOptions, {"batch": "batch_size"}, without=("task", "device", "checkpoint", "progress"))
QUANTIZING = Fields(QuantizeOptions, {"weights": "weight_grid", "activations": "activation_grid"})
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


# ------------------------------------------------------------------------------------------------- prune, mask, cluster


@app.command()
@grouped
def prune(
    model: ModelOptions,
    data: DataOptions,
    given: Annotated[dict[str, Any], PRUNING],
    files: FileOptions,
    output: OptionalOutput = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only show what would leave together, and what can't leave and why.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Remove whole channels. Data is only needed to repair, by criteria that look at it, and by schedules that train:
    these go on after a kill."""
    for target in given.keys() & {"macs", "params"}:
        given[target] = share_or_count(given[target])
    asked = PruneOptions(**{**given, "repair": False})  # what is no choice is told before a model is loaded
    plugins.resolve("runtimes", asked.runtime)
    if explain:
        _, graph, _ = prepared(model, data, needed=False)
        return _show_coupling(graph, asked.globs, asked.heads, as_json)
    if output is None:
        raise InputError("no --output is given; pass -o PATH, or --explain to only look (rarefy prune --help)")
    folder = claim_folder(output, files)
    source, graph, task = prepared(model, data, needed=False)
    small = rarefy.prune(graph, **given, task=task, device=device_of(device), checkpoint=f"{folder}.work")
    save_result(small, folder, source, task, as_json, before=graph, files=files)
    shutil.rmtree(f"{folder}.work", ignore_errors=True)


@app.command()
@grouped
def mask(
    model: ModelOptions,
    data: DataOptions,
    output: Output,
    given: Annotated[dict[str, Any], Fields(MaskOptions, without=("task",))],
    files: FileOptions,
    as_json: Json = False,
) -> None:
    """Make single weights zero, and keep them so in training: smaller on disk, no faster on ONNX Runtime.
    wanda needs data."""
    MaskOptions(**given)  # what is no choice is told before a model is loaded
    folder = claim_folder(output, files)
    source, graph, task = prepared(model, data, needed=False)
    save_result(rarefy.mask(graph, **given, task=task), folder, source, task, as_json, before=graph, files=files)


@app.command()
@grouped
def cluster(
    model: ModelOptions,
    data: DataOptions,
    output: Output,
    given: Annotated[dict[str, Any], Fields(ClusterOptions)],
    files: FileOptions,
    as_json: Json = False,
) -> None:
    """Let the weights of a layer share few values, which distill learns: smaller with --store smallest, no faster."""
    ClusterOptions(**given)  # what is no choice is told before a model is loaded
    folder = claim_folder(output, files)
    source, graph, task = prepared(model, data, needed=False)
    save_result(rarefy.cluster(graph, **given, task=task), folder, source, task, as_json, before=graph, files=files)


def _show_coupling(graph: Any, ignore: tuple[str, ...], heads: str, as_json: bool) -> None:
    from rarefy.pruning.groups.groups import couple

    coupling = couple(graph, ignore, heads)
    groups = coupling.groups()
    if as_json:
        show_json(
            {
                "groups": [{"channels": width, "members": members} for width, members in groups],
                "frozen": coupling.frozen,
                "unknown_operators": coupling.unknown,
            }
        )
        return
    rows = [(number, width, ", ".join(members)) for number, (width, members) in enumerate(groups, 1)]
    show_table("leave together", ("group", "channels", "tensors[axis]"), rows, (0, 1))
    show_table("outputs that stay", ("layer", "because"), list(coupling.frozen.items()))
    if coupling.unknown:
        show_table(
            "operators without a rule",
            ("operator", "nodes"),
            [(name, ", ".join(nodes)) for name, nodes in coupling.unknown.items()],
        )


# ------------------------------------------------------------------------------------------------------------- distill


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
    loss: Loss = "auto",
    preset: Preset = None,
    cache: Annotated[str | None, typer.Option(metavar="FOLDER", help="Keep the teacher's answers there.")] = None,
    logs: LogsOption = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train MODEL, or with --student one made of it, to answer like the teacher.

    Killed and started again, it goes on where it was.
    """
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
    folder = claim_folder(output, files)
    source, graph, task = prepared(model, data)
    before = graph
    common: dict[str, Any] = {
        "training": training,
        "device": device_of(device),
        "checkpoint": f"{folder}.work",
        "logs": plugins.several("loggers", logs),
    }
    guides = _guides(teacher or (), teacher_weights or (), model.classes, task)
    if student is not None:
        graph, guides = student_of(student, graph, task=task, seed=training.seed), guides or [(1.0, graph)]
    if not guides:
        trained = rarefy.train(graph, task, **common)
    else:
        trained = rarefy.distill(graph, guides, task, loss=loss, cache=cache, **common)
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


# ------------------------------------------------------------------------------------------------------------ quantize


@app.command()
@grouped
def quantize(
    model: ModelOptions,
    data: DataOptions,
    given: Annotated[dict[str, Any], QUANTIZING],
    files: FileOptions,
    output: OptionalOutput = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Only show each layer's bits, range and noise, and what stays in float and why."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """8-bit integers in place of floats, calibrated on a few images, without training."""
    asked = QuantizeOptions(**given)
    for kind, choice in (
        ("calibration", asked.calibration),
        ("calibration", asked.weight_calibration),
        ("rounding", asked.rounding),
        ("runtimes", asked.runtime),
    ):
        plugins.resolve(kind, choice)
    if output is None and not explain:
        raise InputError("no --output is given; pass -o PATH, or --explain to only look (rarefy quantize --help)")
    folder = claim_folder(output, files, asked.runtime) if output is not None and not explain else None
    images_needed = str(asked.activations).strip() != "float"  # weights alone need none
    source, graph, task = prepared(model, data, needed=images_needed)
    small = rarefy.quantize(graph, task, **given)
    if folder is None:
        return _show_noise(small, as_json)
    save_result(small, folder, source, task, as_json, before=graph, files=files, runtime=asked.runtime)


def _show_noise(graph: Any, as_json: bool) -> None:
    from rarefy.quantization.explain import explain

    found = explain(graph)
    if as_json:
        show_json(found)
        return

    def decibels(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    rows = [
        (
            row["name"],
            row["grid"] or "",
            row["activation_grid"] or "float",
            "" if row["range"] is None else f"{row['range'][0]:.4g} to {row['range'][1]:.4g}",
            decibels(-10 * math.log10(row["error"]) if row["error"] else None),
            decibels(row["sqnr_db"]),
        )
        for row in found["layers"]
    ]
    show_table("in integers", ("layer", "weights", "reads", "range", "weights, dB", "output, dB"), rows, (4, 5))
    left = [(row["name"], row["why"] or "", decibels(row["sqnr_db"])) for row in found["float"]]
    show_table("in float", ("operator", "because", "output, dB"), left, (2,))
