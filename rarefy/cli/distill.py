"""``rarefy distill``: a student learns from its teacher, or from labels alone."""

from __future__ import annotations

import dataclasses
import os
import shutil
from typing import Annotated, Any

import typer

from rarefy.cli.inputs import device_of, prepared, weight_of
from rarefy.cli.options import Batch, DataOptions, Device, Json, ModelOptions, Output, Seed, app, grouped
from rarefy.cli.outputs import claim_folder, save_result
from rarefy.errors import InputError


@app.command()
@grouped
def distill(
    context: typer.Context,
    model: ModelOptions,
    data: DataOptions,
    output: Output,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Who teaches: a source, like MODEL, or several, also as 2*MODEL. Without one, labels alone do.",
        ),
    ] = None,
    teacher_weights: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="The teacher's weights; one for each, in their order.")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="CHOICE",
            help="Train a student made of MODEL, which teaches it: depth:keep=0.5, timm:resnet18; see `rarefy list students`.",
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            metavar="CHOICE", help="Distillation loss, or a sum: 'lskd + 50*mse:on=stages'; see `rarefy list losses`."
        ),
    ] = "lskd",
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="fast, normal or patient; what else you say goes before it.")
    ] = None,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Times through the training data.")] = 30,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="In place of epochs.")] = None,
    batch_size: Batch = 128,
    accumulate: Annotated[int, typer.Option(metavar="N", min=1, help="A batch is done in so many parts.")] = 1,
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="sgd or adamw.")] = "sgd",
    lr: Annotated[
        float | None, typer.Option(metavar="RATE", help="Peak learning rate; default 0.05 for sgd, 0.001 for adamw.")
    ] = None,
    momentum: Annotated[float, typer.Option(metavar="SHARE", help="Of sgd.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(metavar="RATE", help="Pull of the weights towards 0.")] = 5e-4,
    warmup: Annotated[float, typer.Option(metavar="SHARE", help="Share of the run with a rising rate.")] = 0.05,
    clip: Annotated[float, typer.Option(metavar="NORM", help="Greatest norm of the gradient; 0: none.")] = 0.0,
    label_smoothing: Annotated[float, typer.Option(metavar="SHARE", help="Of the labels.")] = 0.0,
    hard_weight: Annotated[
        float, typer.Option(metavar="WEIGHT", help="Of the loss against labels; 0: unlabelled images do.")
    ] = 1.0,
    mixup: Annotated[float, typer.Option(metavar="ALPHA", help="0: off.")] = 0.0,
    cutmix: Annotated[float, typer.Option(metavar="ALPHA", help="0: off.")] = 0.0,
    ema: Annotated[float, typer.Option(metavar="DECAY", help="Moving average of the weights; 0: off.")] = 0.0,
    precision: Annotated[str, typer.Option(metavar="NAME", help="auto, fp32 or bf16.")] = "auto",
    channels_last: Annotated[str, typer.Option(metavar="WHEN", help="auto, yes or no.")] = "auto",
    compile: Annotated[str, typer.Option(metavar="HOW", help="auto, no, default or reduce-overhead.")] = "auto",
    validate_every: Annotated[int, typer.Option(metavar="EPOCHS", min=0, help="0: never.")] = 1,
    keep: Annotated[str, typer.Option(metavar="WHICH", help="The last or the best state.")] = "last",
    patience: Annotated[
        int, typer.Option(metavar="EPOCHS", min=0, help="Stop after so many without a better state; 0: never.")
    ] = 0,
    dot: Annotated[
        float,
        typer.Option(metavar="SHARE", help="More momentum for the teacher's gradient, less for the labels'; 0: off."),
    ] = 0.0,
    freeze: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the steps, the last: batch norm's statistics stand still.")
    ] = 0.0,
    loss_warmup: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the steps, the first: the teacher's weight rises.")
    ] = 0.0,
    sync_norm: Annotated[
        str, typer.Option(metavar="WHETHER", help="Under torchrun, batch norm looks at the whole batch: yes or no.")
    ] = "yes",
    live_norm: Annotated[
        str, typer.Option(metavar="WHETHER", help="In codes, batch norm is put back meanwhile: yes or no.")
    ] = "no",
    cache: Annotated[str | None, typer.Option(metavar="FOLDER", help="Keep the teacher's answers there.")] = None,
    logs: Annotated[str | None, typer.Option(metavar="FOLDER", help="For TensorBoard.")] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train MODEL, or with --student one made of it, to answer like the teacher. Killed and started again, it goes on where it was."""
    from rarefy.distillation.distill import distill as verb
    from rarefy.distillation.distill import train as without_teacher
    from rarefy.distillation.objective import terms
    from rarefy.distillation.options import Training, training_of
    from rarefy.distillation.teachers import student_kind, student_of
    from rarefy.models import load

    given = locals()
    sources_of = {field.name: context.get_parameter_source(field.name) for field in dataclasses.fields(Training)}
    said = {name: given[name] for name, source in sources_of.items() if source is not None and source.name != "DEFAULT"}
    training = training_of(preset, said, "distill")
    terms(loss)
    if student is not None:
        student_kind(student)
    if teacher and len(teacher_weights or ()) not in (0, len(teacher)):
        raise InputError(
            f"--teacher-weights: {len(teacher_weights or ())} files for {len(teacher)} teachers; give one for each, or none"
        )
    if cache is not None and not teacher and student is None:
        raise InputError("--cache: keeps a teacher's answers, and there is none; pass --teacher, or leave it out")
    folder = claim_folder(output)
    source, graph, task = prepared(model, data)
    common: dict[str, Any] = {
        "training": training,
        "device": device_of(device),
        "checkpoint": f"{folder}.work",
        "logs": logs,
    }
    guides = []
    for text, weights in zip(teacher or (), teacher_weights or [""] * len(teacher or ())):
        number, star, name = text.partition("*")
        share = weight_of(number, f"--teacher {text}") if star else 1.0
        guide = load.load(name if star else text, weights=weights or None, classes=model.classes)
        guides.append((share, load.graph_of(guide, task.data.input_shape)))
    if student is not None:
        graph, guides = student_of(student, graph, task=task, seed=seed), guides or [(1.0, graph)]
    if not guides:
        trained = without_teacher(graph, task, **common)
    else:
        trained = verb(graph, guides, task, loss=loss, cache=cache, **common)
    if int(os.environ.get("RANK", "0")):  # under torchrun the first process saves for all
        return
    save_result(trained, folder, source, task, as_json)
    shutil.rmtree(f"{folder}.work", ignore_errors=True)
