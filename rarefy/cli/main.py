"""The command line: text is parsed, the verbs are called, and what they found is printed. Nothing is decided here.

Results go to stdout (``--json`` for machines), progress to stderr. An error is one line on stderr: what, where, with what, and the
way out; the exit codes stand in ``rarefy/cli/terminal.py``.

torch is imported inside the commands, so that ``rarefy --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli.terminal import guarded, say, show_json, show_table, size_text
from rarefy.errors import FormatError, GoalMissed, InputError, SelfCheckFailed

app = typer.Typer(
    name="rarefy",
    help="Makes a trained PyTorch classifier smaller and faster without making it worse, and proves it.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from rarefy import __version__

        say(f"rarefy {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None: ...


_MODEL = "Models"
_DATA = "Data"
_BUDGET = "Budget: leave out what does not matter"


@dataclass
class ModelOptions:
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="timm:NAME, torchvision:NAME, package.module:function, a saved folder, or a .pt2 file.",
        ),
    ]
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Weights: .safetensors, or a checkpoint of a state_dict.", rich_help_panel=_MODEL
        ),
    ] = None
    classes: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Outputs of the classifier, where the source builds one.", rich_help_panel=_MODEL
        ),
    ] = None
    input: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Shape of an input, without the batch.", rich_help_panel=_MODEL)
    ] = None
    core: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take this submodule only.", rich_help_panel=_MODEL)
    ] = None


@dataclass
class DataOptions:
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Training and validation data of one source: imagefolder:PATH, tar:PATH, parquet:PATH, torchvision:NAME?root=PATH, sklearn:digits, package.module:function.",
            rich_help_panel=_DATA,
        ),
    ] = None
    train: Annotated[str | None, typer.Option(metavar="SOURCE", help="Training data.", rich_help_panel=_DATA)] = None
    val: Annotated[str | None, typer.Option(metavar="SOURCE", help="Validation data.", rich_help_panel=_DATA)] = None
    image_size: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", min=1, help="Side of the model's square input.", rich_help_panel=_DATA),
    ] = None
    channels: Annotated[int | None, typer.Option(metavar="N", help="1 or 3.", rich_help_panel=_DATA)] = None
    class_count: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Classes, where the data does not show them all.", rich_help_panel=_DATA),
    ] = None
    mean: Annotated[
        str | None,
        typer.Option(metavar="R,G,B", help="Mean of each channel, of pixels from 0 to 1.", rich_help_panel=_DATA),
    ] = None
    std: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Standard deviation of each channel.", rich_help_panel=_DATA)
    ] = None
    crop: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of the resized image that evaluation sees.", rich_help_panel=_DATA),
    ] = None
    augment: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="What varies training images: crop,flip or none.", rich_help_panel=_DATA),
    ] = None
    interpolation: Annotated[
        str | None, typer.Option(metavar="NAME", help="nearest, bilinear or bicubic.", rich_help_panel=_DATA)
    ] = None
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Processes that decode images.", rich_help_panel=_DATA)
    ] = None
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict/--skip-unreadable",
            help="Stop at an image that can't be read, or leave it out; default: stop, but in shards and Parquet files.",
            rich_help_panel=_DATA,
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """The options of the task, as far as they are given."""
        if self.data is not None and (self.train is not None or self.val is not None):
            raise InputError("--data names both splits; leave it out, or leave out --train and --val")
        return _told(
            train=self.train or self.data,
            val=self.val or self.data,
            size=self.image_size,
            channels=self.channels,
            class_count=self.class_count,
            mean=_numbers(self.mean, "--mean"),
            std=_numbers(self.std, "--std"),
            crop=self.crop,
            augment=self.augment,
            interpolation=self.interpolation,
            workers=self.workers,
            strict=self.strict,
        )


Output = Annotated[str, typer.Option("-o", "--output", metavar="PATH", help="Where the result goes.")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if there is one.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="The same seed gives the same result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Batch = Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.")]
Runtime = Annotated[str, typer.Option(metavar="NAME", help="Where the model will run; see `rarefy list runtimes`.")]
Key = Annotated[str | None, typer.Option(metavar="FILE", help="Sign the result with this private key.")]
Chain = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="A certificate up to the root (PEM); may be given more than once."),
]
Reference = Annotated[str | None, typer.Option(metavar="MODEL", help="What to compare with: a source, like MODEL.")]
ReferenceWeights = Annotated[str | None, typer.Option(metavar="FILE", help="The reference's weights.")]
Ignore = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Layers to leave alone; may be given more than once.")
]


def grouped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Typer sees each field of a parameter that is one of the option classes above as an option of its own."""
    hints = typing.get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {}
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(hint):
            groups[parameter.name] = hint
            fields = typing.get_type_hints(hint, include_extras=True)
            parameters += [
                inspect.Parameter(
                    field.name, parameter.KEYWORD_ONLY, default=_default(field), annotation=fields[field.name]
                )
                for field in dataclasses.fields(hint)
            ]
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hint))

    def command(**given: Any) -> Any:
        packed = {
            name: group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        return function(**packed, **given)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(
        sorted(parameters, key=lambda item: item.default is not inspect.Parameter.empty)
    )  # type: ignore[attr-defined]
    return command


def _default(field: dataclasses.Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


@app.command()
@grouped
def compress(
    model: ModelOptions,
    data: DataOptions,
    output: Output,
    max_drop: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Accuracy that may be lost: 0.5% or 0.005.", rich_help_panel=_BUDGET),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(metavar="RATIO", help="How many times faster on the runtime.", rich_help_panel=_BUDGET),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Largest size of the weights on disk: 500kB, 2MB.", rich_help_panel=_BUDGET),
    ] = None,
    step: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A step of your own recipe, in order: 'prune macs=0.5', 'mask sparsity=2:4', 'distill epochs=3', 'quantize'. May be given more than once.",
        ),
    ] = None,
    runtime: Runtime = "onnxruntime",
    seed: Seed = 0,
    device: Device = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Prune, distil and quantise under one budget; measure, export, report and save.

    Started again with the same arguments after a kill, it goes on where it was.
    """
    from rarefy.compression import recipe

    content = {
        **{name: value for name, value in vars(model).items() if value is not None},
        "data": data.options(),
        "budget": _told(max_drop=max_drop, speedup=speedup, size=size),
        "runtime": runtime,
        "output": output,
        "seed": seed,
        "device": device,
    }
    steps = [recipe.step(text, f"--step {text!r}") for text in step or ()]
    _compress(recipe.check({**content, "step": steps}, "compress"), key, as_json)


@app.command("run")
def run_recipe(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FOLDER", help="In place of the recipe's output.")
    ] = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Carry out a recipe: `rarefy compress`, written down."""
    from rarefy.compression import recipe

    asked = recipe.read(path)
    if output is not None:
        asked = dataclasses.replace(asked, output=output)
    _compress(asked, key, as_json)


def _compress(asked: Any, key: str | None, as_json: bool) -> None:
    from rarefy.compression import budget as budget_
    from rarefy.compression import compress as compress_
    from rarefy.compression import recipe
    from rarefy.models import load

    if asked.output is None:
        raise InputError('the recipe names no output; add output = "small/", or pass -o')
    _check_data(asked.data)
    output = _claim_folder(asked.output)
    signer = _readable(key, "--key") if key else None
    source = load.load(asked.model, weights=asked.weights, classes=asked.classes)
    asked = dataclasses.replace(asked, data=_completed(asked.data, source, asked.input))
    task = recipe.make_task(asked.data, asked.task)
    graph = load.graph_of(source, _agreed(asked.input, task), asked.core)
    task.check(_outputs(graph))
    budget = budget_.Budget(**asked.budget)
    result = compress_.compress(
        graph,
        task,
        budget=budget,
        steps=asked.steps or None,
        runtime=asked.runtime,
        workdir=f"{output}.work",
        seed=asked.seed,
        device=_device(asked.device),
        title=source.text,
        recipe=recipe.write(asked),
    )
    result.save(output)
    if signer:
        from rarefy.artifact import signing

        signing.sign(output, signer)
    shutil.rmtree(f"{output}.work", ignore_errors=True)
    _show_report(result.report, output, as_json)


@app.command()
@grouped
def prune(
    model: ModelOptions,
    data: DataOptions,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="PATH", help="Where the result goes.")] = None,
    keep: Annotated[float | None, typer.Option(metavar="SHARE", help="Share of the channels to keep.")] = None,
    macs: Annotated[
        float | None, typer.Option(metavar="SHARE", help="MACs that may remain: a share, or a number above 1.")
    ] = None,
    params: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Parameters that may remain: a share, or a number above 1.")
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="Times as fast as the original, measured on --runtime; widths follow its kernels' times.",
        ),
    ] = None,
    runtime: Runtime = "onnxruntime",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of the runtime, for --speedup; default 1.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Samples a run, for --speedup.")] = 1,
    criterion: Annotated[
        str, typer.Option(metavar="CHOICE", help="What a channel is worth; see `rarefy list criteria`.")
    ] = "magnitude",
    ranking: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="global: layers compete; loss: the same, for hessian:group=true and taylor:form=fisher; local: each loses its share; isomorphic: layers of like structure compete.",
        ),
    ] = "global",
    round_to: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Channels left are a multiple of this; with --speedup 8 unless given."),
    ] = 1,
    floor: Annotated[float, typer.Option(metavar="SHARE", help="Share of any layer that stays in any case.")] = 0.1,
    ignore: Ignore = None,
    heads: Annotated[
        str, typer.Option(metavar="NAME", help="Of attention: dims, the same of each head leave; whole: heads leave.")
    ] = "dims",
    select: Annotated[
        str,
        typer.Option(
            metavar="CHOICE", help="How scores decide: best, or sample:temperature=1; see `rarefy list selection`."
        ),
    ] = "best",
    schedule: Annotated[
        str,
        typer.Option(
            metavar="CHOICE", help="oneshot, iterative:rounds=5, group_sparse:epochs=10; see `rarefy list schedules`."
        ),
    ] = "oneshot",
    check: Annotated[bool, typer.Option(help="Compare with the masked original.")] = True,
    repair: Annotated[bool, typer.Option(help="Mend it on 512 training images, without training.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only show what would leave together, and what can't leave and why.")
    ] = False,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Remove whole channels. Data is only needed to repair, by criteria that look at it, and by schedules that train: these go on after a kill."""
    from rarefy import plugins

    for kind, choice in (
        ("criteria", criterion),
        ("runtimes", runtime),
        ("selection", select),
        ("schedules", schedule),
    ):
        plugins.resolve(kind, choice)
    if explain:
        _, graph, _ = _prepared(model, data, needed=False)
        return _show_coupling(graph, tuple(ignore or ()), heads, as_json)
    if output is None:
        raise InputError("no --output is given; pass -o PATH, or --explain to only look (rarefy prune --help)")
    folder = _claim_folder(output)
    source, graph, task = _prepared(model, data, needed=False)
    from rarefy.pruning.prune import prune as verb

    small = verb(
        graph,
        keep=keep,
        macs=_share_or_count(macs),
        params=_share_or_count(params),
        speedup=speedup,
        runtime=runtime,
        threads=threads,
        batch=batch_size,
        criterion=criterion,
        ranking=ranking,
        round_to=round_to,
        floor=floor,
        ignore=tuple(ignore or ()),
        heads=heads,
        select=select,
        schedule=schedule,
        task=task,
        seed=seed,
        check=check,
        device=_device(device),
        checkpoint=f"{folder}.work",
        repair=repair,
    )
    _save(small, folder, source, task, as_json)
    shutil.rmtree(f"{folder}.work", ignore_errors=True)


@app.command()
@grouped
def mask(
    model: ModelOptions,
    data: DataOptions,
    output: Output,
    sparsity: Annotated[
        str, typer.Option(metavar="SHARE|N:M", help="0.5: half of the weights become zero; 2:4: of each 4, 2 stay.")
    ],
    criterion: Annotated[
        str, typer.Option(metavar="CHOICE", help="What a weight is worth; see `rarefy list saliency`.")
    ] = "magnitude",
    scope: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where a share is taken: global, layer or output; default: the criterion's."),
    ] = None,
    ignore: Ignore = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make single weights zero, and keep them so in training: smaller on disk, no faster on ONNX Runtime. wanda needs data."""
    from rarefy import plugins
    from rarefy.pruning.mask import mask as verb
    from rarefy.pruning.mask import parse

    parse(sparsity)
    plugins.resolve("saliency", criterion)
    folder = _claim_folder(output)
    source, graph, task = _prepared(model, data, needed=False)
    sparse = verb(
        graph, sparsity=sparsity, criterion=criterion, scope=scope, ignore=tuple(ignore or ()), task=task, seed=seed
    )
    _save(sparse, folder, source, task, as_json)


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
    from rarefy.compression import students
    from rarefy.distillation.distill import distill as verb
    from rarefy.distillation.distill import train as without_teacher
    from rarefy.distillation.objective import terms
    from rarefy.distillation.options import Training, training_of
    from rarefy.models import load

    given = locals()
    sources_of = {field.name: context.get_parameter_source(field.name) for field in dataclasses.fields(Training)}
    said = {name: given[name] for name, source in sources_of.items() if source is not None and source.name != "DEFAULT"}
    training = training_of(preset, said, "distill")
    terms(loss)
    if student is not None:
        students.resolve(student)
    if teacher and len(teacher_weights or ()) not in (0, len(teacher)):
        raise InputError(
            f"--teacher-weights: {len(teacher_weights or ())} files for {len(teacher)} teachers; give one for each, or none"
        )
    if cache is not None and not teacher and student is None:
        raise InputError("--cache: keeps a teacher's answers, and there is none; pass --teacher, or leave it out")
    folder = _claim_folder(output)
    source, graph, task = _prepared(model, data)
    common: dict[str, Any] = {
        "training": training,
        "device": _device(device),
        "checkpoint": f"{folder}.work",
        "logs": logs,
    }
    guides = []
    for text, weights in zip(teacher or (), teacher_weights or [""] * len(teacher or ())):
        number, star, name = text.partition("*")
        share = _number_of(number, f"--teacher {text}") if star else 1.0
        guide = load.load(name if star else text, weights=weights or None, classes=model.classes)
        guides.append((share, load.graph_of(guide, task.input_shape)))
    if student is not None:
        graph, guides = students.made(student, graph, task=task, seed=seed), guides or [(1.0, graph)]
    if not guides:
        trained = without_teacher(graph, task, **common)
    else:
        trained = verb(graph, guides, task, loss=loss, cache=cache, **common)
    if int(os.environ.get("RANK", "0")):  # under torchrun the first process saves for all
        return
    _save(trained, folder, source, task, as_json)
    shutil.rmtree(f"{folder}.work", ignore_errors=True)


@app.command()
@grouped
def quantize(
    model: ModelOptions,
    data: DataOptions,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="PATH", help="Where the result goes.")] = None,
    images: Annotated[int, typer.Option(metavar="N", min=1, help="Images to calibrate on; they need no labels.")] = 128,
    batch_size: Batch = 16,
    weight_grid: Annotated[
        str,
        typer.Option(
            metavar="GRID",
            help="int8, int4, int4:group=32, mixed:bits=4, ...; by layer: 'int4;stem.*=int8;head=float', the last that matches holds.",
        ),
    ] = "int8",
    activation_grid: Annotated[
        str,
        typer.Option(
            metavar="GRID",
            help="uint8, uint4 (simulated), float: weights alone; a layer's input with 'uint4;fc=uint8'.",
        ),
    ] = "uint8",
    calibration: Annotated[
        str, typer.Option(metavar="CHOICE", help="Range of the activations; see `rarefy list calibration`.")
    ] = "mse",
    weight_calibration: Annotated[
        str | None,
        typer.Option(
            metavar="CHOICE", help="Range of the weights; the same choices; default: minmax at 8 bits, mse below."
        ),
    ] = None,
    rounding: Annotated[str, typer.Option(metavar="CHOICE", help="See `rarefy list rounding`.")] = "narrow",
    runtime: Runtime = "onnxruntime",
    ignore: Ignore = None,
    equalize: Annotated[
        bool,
        typer.Option(
            help="Equalise channels between layers, and let dead ones carry the noisiest, where that is exact and lowers the noise."
        ),
    ] = True,
    correct_bias: Annotated[
        bool, typer.Option(help="Mend the means that rounding moves, and how far the answers vary.")
    ] = True,
    smooth: Annotated[
        float | None,
        typer.Option(
            metavar="ALPHA", help="SmoothQuant before linear layers that read a norm; 0.5, say; default: not done."
        ),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(
            metavar="latency", help="Time each stretch of layers in integers and in float, and keep only what pays."
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Only show each layer's bits, range and noise, and what stays in float and why."
        ),
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """8-bit integers in place of floats, calibrated on a few images, without training."""
    from rarefy import plugins

    for kind, choice in (
        ("calibration", calibration),
        ("calibration", weight_calibration),
        ("rounding", rounding),
        ("runtimes", runtime),
    ):
        plugins.resolve(kind, choice)
    if output is None and not explain:
        raise InputError("no --output is given; pass -o PATH, or --explain to only look (rarefy quantize --help)")
    folder = _claim_folder(output) if output is not None and not explain else None
    source, graph, task = _prepared(
        model, data, needed=activation_grid.strip() != "float"
    )  # weights alone need no images
    from rarefy.quantization.quantize import quantize as verb

    small = verb(
        graph,
        task,
        images=images,
        batch_size=batch_size,
        weights=weight_grid,
        activations=activation_grid,
        calibration=calibration,
        weight_calibration=weight_calibration,
        rounding=rounding,
        runtime=runtime,
        ignore=tuple(ignore or ()),
        equalize=equalize,
        correct_bias=correct_bias,
        smooth=smooth,
        gate=gate,
        seed=seed,
    )
    if folder is None:
        return _show_noise(small, as_json)
    _save(small, folder, source, task, as_json)


@app.command()
@grouped
def evaluate(
    model: ModelOptions,
    data: DataOptions,
    reference: Reference = None,
    reference_weights: ReferenceWeights = None,
    runtime: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Judge the exported file in this runtime, not the model in PyTorch."),
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Exit 1 if more is lost than this: 0.5% or 0.005.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="val or train.")] = "val",
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="The first N images only.")] = None,
    corruptions: Annotated[
        str | None, typer.Option(metavar="LIST", help="Robustness too: all, or names such as fog,jpeg.")
    ] = None,
    batch_size: Batch = 64,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Accuracy with its interval, worst class, calibration, agreement with the reference, paired drop, robustness."""
    from rarefy.compression import recipe
    from rarefy.evaluation.evaluate import evaluate as verb

    if max_drop is not None and reference is None:
        raise InputError("--max-drop compares with the original; name it with --reference")
    if split not in ("train", "val"):
        raise InputError(f"--split {split!r}: give train or val")
    most = recipe.share(max_drop, "--max-drop") if max_drop is not None else None
    source, judged, task = _prepared(model, data)
    other = _reference(reference, reference_weights, model.classes, task)
    names = "all" if corruptions == "all" else tuple(filter(None, (corruptions or "").split(",")))
    with contextlib.ExitStack() as stack:
        subject = judged if runtime is None else stack.enter_context(_session(runtime, source.text, judged))
        found = verb(
            subject,
            task,
            reference=other,
            split=split,
            batch_size=batch_size,
            limit=limit,
            corruptions=names,
            seed=seed,
            device=_device(device),
        )
    left_out = task.unreadable(split)
    if as_json:
        show_json({**found.to_json(), **({"unreadable": left_out} if left_out else {})})
    else:
        facts: dict[str, Any] = {"after": {"name": source.text, "evaluation": found.to_json()}}
        if found.reference is not None:
            facts["before"] = {"name": str(reference), "evaluation": found.reference.to_json()}
        _show_comparison(facts)
        for what, which in _left_out(task):
            say(f"{what}: {which}")
        for warning in found.warnings:
            say(f"warning: {source.text}: {warning}")
    if most is not None and found.drop is not None and found.drop["value"] > most:
        raise GoalMissed(
            f"{source.text}: loses {100 * found.drop['value']:.2f} points against {reference}, more than {100 * most:g}; "
            "compress less, or train longer (`rarefy distill`)"
        )


@app.command()
@grouped
def measure(
    model: ModelOptions,
    reference: Reference = None,
    reference_weights: ReferenceWeights = None,
    runtime: Runtime = "onnxruntime",
    batch_size: Batch = 1,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Timed runs of each model, taking turns.")] = 100,
    as_json: Json = False,
) -> None:
    """Bytes, parameters, MACs, latency on the runtime, peak memory; with --reference, of both, interleaved."""
    from rarefy import plugins
    from rarefy.evaluation import measure as measure_module
    from rarefy.models import load

    plugins.resolve("runtimes", runtime)
    source = load.load(model.model, weights=model.weights, classes=model.classes)
    graph = load.graph_of(source, _shape(model), model.core)
    shape = tuple(graph.meta["inputs"][0]["shape"])
    models = {source.text: graph}
    if reference is not None:
        other = load.load(reference, weights=reference_weights, classes=model.classes)
        models = {str(reference): load.graph_of(other, shape), **models}
    found = measure_module.measure(models, runtime=runtime, batch=batch_size, repeats=repeats)
    if as_json:
        show_json(found)
        return
    named = list(found.items())
    _show_comparison(
        {
            "after": {"name": named[-1][0], **named[-1][1]},
            **({"before": {"name": named[0][0], **named[0][1]}} if len(named) > 1 else {}),
        }
    )


@app.command()
@grouped
def export(
    model: ModelOptions,
    data: DataOptions,
    output: Output,
    runtime: Runtime = "onnxruntime",
    compare: Annotated[bool, typer.Option(help="Run the file, and compare it with the model.")] = True,
    certify: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the certificate of parity there, as JSON; with data, the metric is in it."
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A further runtime that reads the file, for the certificate; may be repeated."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Judge on the first N images only.")] = None,
    as_json: Json = False,
) -> None:
    """Write the file that the runtime runs, and check that it answers like the model."""
    from rarefy import plugins
    from rarefy.deployment import export as export_module
    from rarefy.evaluation import certify as certify_module

    if certify is None and (also or limit is not None or data.options()):
        raise InputError("--also, --limit and data belong to the certificate; name its file with --certify")
    certify_module.readers_of(runtime, also or ())
    suffix = plugins.resolve("runtimes", runtime).suffix
    target = _claim_file(output, (".onnx", ".xml") if suffix == ".onnx" else (suffix,))
    if certify is not None:
        _claim_parent(certify, "--certify")
    _, graph, task = _prepared(model, data, needed=False)
    if certify is None:
        parity = export_module.export(graph, target, runtime=runtime, compare=compare)
    else:
        export_module.export(graph, target, runtime=runtime, compare=False)
        inputs = None if task is None else next(iter(task.inputs("val", 64, 64, seed=0)))
        facts = certify_module.certify(
            graph, target, runtime=runtime, also=also or (), inputs=inputs, task=task, limit=limit
        )
        certify.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        parity = {
            "certificate": str(certify),
            **facts["runtimes"][plugins.describe(plugins.resolve("runtimes", runtime))],
        }
        parity |= {key: facts[key] for key in ("first_diverging_layer", "passed")}
    written = {"file": str(target), "size_bytes": target.stat().st_size, "parity": parity}
    if as_json:
        show_json(written)
    else:
        rows = [
            ("file", target),
            ("size", size_text(target.stat().st_size)),
            *((name.replace("_", " "), value) for name, value in parity.items() if not isinstance(value, (list, dict))),
        ]
        show_table("exported", ("what", "found"), rows)
    if parity.get("passed") is False:
        layer = parity.get("first_diverging_layer")
        raise SelfCheckFailed(
            f"{target}: gives the model's answer on {parity['agreement']:.1%} of {parity['samples']} inputs, and "
            f"{'no layer differs by itself' if layer is None else f'{layer} is the first layer that differs'}; the file is written, do not deploy it"
        )


@app.command("report")
@grouped
def report_command(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder that `rarefy compress` saved, or its report.json.")
    ],
    data: DataOptions,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="An .html file; default: FOLDER-report.html.")
    ] = None,
    reference: Reference = None,
    reference_weights: ReferenceWeights = None,
    runtime: Runtime = "onnxruntime",
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Judge on the first N images only.")] = None,
    as_json: Json = False,
) -> None:
    """The report of a folder as HTML. With data (and --reference), what it claims is measured again, here and now."""
    from rarefy.reports import report

    place = Path(folder)
    beside = place.resolve() if place.is_dir() else place.resolve().parent
    target = _claim_file(output or f"{beside}-report.html", (".html", ".htm"))
    if (target.resolve().parent / "manifest.json").exists():
        raise InputError(
            f"{target}: lies in a saved folder, whose files are sealed by their hashes; choose another --output"
        )
    again = data.options()
    if again:
        facts = _measured_again(place, data, reference, reference_weights, runtime, limit)
    elif reference is not None:
        raise InputError("--reference is judged on data; pass --data, or leave it out")
    else:
        facts = _recorded(place)
    report.report(facts, target)
    if as_json:
        show_json(facts)
    else:
        say(report.summary(facts).rstrip())
        say(f"\nreport: {target}")


def _recorded(place: Path) -> dict[str, Any]:
    """The facts that lie in a saved folder."""
    from rarefy.reports import view

    file = place / "report.json" if place.is_dir() else place
    if not file.exists():
        raise InputError(
            f"{file}: no such file; give a folder that `rarefy compress` saved, or pass --data to measure it now"
        )
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{file}: is no JSON ({error}); pass --data to measure the folder again") from error
    try:
        view.view(facts)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise FormatError(
            f"{file}: is no report ({type(error).__name__}: {error}); pass --data to measure the folder again"
        ) from error
    if not {"before", "after", "goals", "steps"} & facts.keys():
        raise FormatError(f"{file}: is no report; give a folder that `rarefy compress` saved, or its report.json")
    return dict(facts)


def _measured_again(
    place: Path,
    data: DataOptions,
    reference: str | None,
    reference_weights: str | None,
    runtime: str,
    limit: int | None,
) -> dict[str, Any]:
    from rarefy.evaluation import measure as measure_module
    from rarefy.evaluation.evaluate import evaluate as judge
    from rarefy.reports import facts as facts_

    facts: dict[str, Any] = _recorded(place) if (place / "report.json").exists() else {"title": str(place)}
    _, graph, task = _prepared(ModelOptions(str(place)), data)
    other = _reference(reference, reference_weights, None, task)
    found = judge(graph, task, reference=other, limit=limit)
    models = {"after": graph} if other is None else {"before": other, "after": graph}
    measured = measure_module.measure(models, runtime=runtime)
    for name in models:
        evaluation = found if name == "after" else found.reference
        assert evaluation is not None
        facts[name] = {**facts.get(name, {}), **measured[name], "evaluation": evaluation.to_json()}
    facts |= {key: value for key, value in facts_.told_by(graph.meta.get("history", [])).items() if key not in facts}
    for claim in ("verdict", "warnings"):
        facts.pop(claim, None)
    facts["goals"] = []
    return facts


@app.command()
def sign(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder saved by rarefy.")],
    key: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The private key that `rarefy keygen` wrote, or the certificate's."),
    ] = None,
    certificate: Annotated[str | None, typer.Option(metavar="FILE", help="The key's certificate (PEM).")] = None,
    chain: Chain = None,
    sigstore: Annotated[
        bool, typer.Option("--sigstore", help="Sign with Sigstore: as who you are, without a key.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Sign a folder: every file in it. A key's password is taken from $RAREFY_KEY_PASSWORD."""
    from rarefy.artifact import signing

    password = os.environ.get("RAREFY_KEY_PASSWORD")
    signature = signing.sign(
        folder, key, password=password, certificate=certificate, chain=chain or (), sigstore=sigstore
    )
    if as_json:
        show_json({"folder": folder, "signature": str(signature)})
    else:
        say(f"signed: {signature}")


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A signed folder.")],
    key: Annotated[str | None, typer.Option(metavar="FILE", help="The public key.")] = None,
    chain: Chain = None,
    identity: Annotated[str | None, typer.Option(metavar="NAME", help="Who must have signed with Sigstore.")] = None,
    issuer: Annotated[str | None, typer.Option(metavar="URL", help="Who must have vouched for that identity.")] = None,
    as_json: Json = False,
) -> None:
    """Refuse (exit 1) a folder in which a file was changed, added or removed, or that another key signed."""
    from rarefy.artifact import signing

    names = signing.verify(folder, key, chain=chain or (), identity=identity, issuer=issuer)
    if as_json:
        show_json({"folder": folder, "verified": names})
    else:
        say(f"verified: all {len(names)} files of {folder} are as they were signed")


@app.command()
def keygen(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Where the private key goes; the public one lies beside it, with .pub."),
    ],
    as_json: Json = False,
) -> None:
    """Make a pair of keys to sign with. With $RAREFY_KEY_PASSWORD, the private one is encrypted."""
    from rarefy.artifact import signing

    private, public = signing.keygen(path, password=os.environ.get("RAREFY_KEY_PASSWORD"))
    if as_json:
        show_json({"private": str(private), "public": str(public)})
    else:
        say(f"private key: {private} (keep it to yourself)\npublic key:  {public} (give it to whoever verifies)")


@app.command()
def demo(
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FOLDER", help="Where the result goes.")
    ] = "demo-out",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a small network on scikit-learn's digits, compress it, and save, sign and explain the result: two minutes, no download."""
    from rarefy.demo import demonstrate

    small = _claim_folder(os.path.join(output, "small"))
    _claim_folder(os.path.join(output, "original"))
    facts = demonstrate(output, seed=seed)
    _show_report(facts, small, as_json)


@app.command("list")
def list_choices(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="criteria, losses, rounding, ...: without one, all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The choices that come with rarefy, a line each, with their options."""
    from rarefy import plugins

    if kind is not None and kind not in plugins.KINDS:
        raise InputError(f"no kind {kind!r}; have {', '.join(plugins.KINDS)}")
    found = {
        name: [_choice(name, choice) for choice in plugins.available(name)]
        for name in ([kind] if kind else plugins.KINDS)
    }
    if as_json:
        show_json(found)
        return
    for name, choices in found.items():
        show_table(
            name,
            ("choice", "what", "options"),
            [
                (item["name"], item["summary"], " ".join(f"{key}={value}" for key, value in item["options"].items()))
                for item in choices
            ],
        )


def _choice(kind: str, name: str) -> dict[str, Any]:
    from rarefy import plugins

    options = {}
    for field in dataclasses.fields(plugins.choice_class(kind, name)):
        options[field.name] = "..." if field.default is dataclasses.MISSING else field.default
    return {"name": name, "summary": plugins.summary(kind, name), "options": options}


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can do, what is missing, and how to get it."""
    from rarefy.compression.environment import examine

    found = examine()
    if as_json:
        show_json(found)
        return
    cpu, torch = found["cpu"], found["torch"]
    flags = (
        "the system does not say"
        if cpu["flags"] is None
        else ", ".join(name for name, have in cpu["flags"].items() if have) or "none of note"
    )
    rows = [
        ("system", f"{found['system']}, Python {found['python']}"),
        ("processor", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores usable"),
        ("instructions", flags),
        ("memory", size_text(found["memory_bytes"])),
        ("torch", f"{torch['version']}, {torch['threads']} threads, {torch['vector']}"),
        *(
            ("GPU", f"{gpu['name']}, compute capability {gpu['compute_capability']}, {size_text(gpu['memory_bytes'])}")
            for gpu in found["gpus"]
        ),
        *((f"runtime {name}", version or "not installed") for name, version in found["runtimes"].items()),
        *(
            (name, version or "not installed")
            for name, version in found["packages"].items()
            if name not in ("torch", *found["runtimes"])
        ),
    ]
    show_table("this machine", ("what", "found"), rows)
    for sentence in found["advice"]:
        say(f"* {sentence}")


def main() -> None:
    """The program ``rarefy``."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """The command line with those arguments; returns the exit code."""
    return guarded(_invoke, arguments)


def _invoke(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    if "_RAREFY_COMPLETE" in os.environ:  # a shell asks what could follow
        command.main(args=arguments, prog_name="rarefy")
    try:  # what command.main does, but that hides an interrupt and a closed pipe
        with command.make_context("rarefy", arguments or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    return 0


# ------------------------------------------------------------------ from text to objects


def _told(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text!r}: give one number a channel, for example 0.485,0.456,0.406") from None


def _share_or_count(value: float | None) -> float | int | None:
    """0.5 is a share; 3e6 is a number of them."""
    return int(value) if value is not None and value > 1 and value == int(value) else value


def _shape(model: ModelOptions) -> tuple[int, ...] | None:
    from rarefy.models.source import parse_shape

    return parse_shape(model.input) if model.input is not None else None


def _completed(options: Mapping[str, Any], source: Any, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The task's options, with what ``--input``, or else the model's maker, says of the input where the user says nothing.

    Its size only goes to image files (arrays have one of their own), or where the graph was captured for it.
    """
    from rarefy.graph.nodes import is_graph

    known = dict(source.preprocessing)
    if shape is not None and len(shape) == 3 and shape[1] == shape[2]:
        known["size"] = shape[1]
    files = any(
        str(options.get(split, "")).startswith(("imagefolder:", "images:", "tar:", "parquet:"))
        for split in ("train", "val")
    )
    if not files and not is_graph(source.model):
        known.pop("size", None)
    return {**known, **options}


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
    show_table("leave together", ("group", "channels", "tensors[axis]"), [(number, width, ", ".join(members)) for number, (width, members) in enumerate(groups, 1)], (0, 1))  # fmt: skip
    show_table("outputs that stay", ("layer", "because"), list(coupling.frozen.items()))
    if coupling.unknown:
        show_table(
            "operators without a rule",
            ("operator", "nodes"),
            [(name, ", ".join(nodes)) for name, nodes in coupling.unknown.items()],
        )


def _show_noise(graph: Any, as_json: bool) -> None:
    from rarefy.quantization.explain import explain

    found = explain(graph)
    if as_json:
        show_json(found)
        return

    def decibels(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    rows = [
        (row["name"], row["grid"] or "", row["activation_grid"] or "float", "" if row["range"] is None else f"{row['range'][0]:.4g} to {row['range'][1]:.4g}",
         decibels(-10 * math.log10(row["error"]) if row["error"] else None), decibels(row["sqnr_db"]))
        for row in found["layers"]
    ]  # fmt: skip
    show_table("in integers", ("layer", "weights", "reads", "range", "weights, dB", "output, dB"), rows, (4, 5))
    show_table("in float", ("operator", "because", "output, dB"), [(row["name"], row["why"] or "", decibels(row["sqnr_db"])) for row in found["float"]], (2,))  # fmt: skip


def _prepared(model: ModelOptions, data: DataOptions, needed: bool = True) -> tuple[Any, Any, Any]:
    """The source, its graph, and the task (None where no data is given and none is needed)."""
    from rarefy.compression import recipe
    from rarefy.models import load

    options = data.options()
    if needed:
        _check_data(options)
    shape = _shape(model)
    source = load.load(model.model, weights=model.weights, classes=model.classes)
    task = None
    if options:
        task = recipe.make_task(recipe.data_options(_completed(options, source, shape)))
    graph = load.graph_of(source, _agreed(shape, task), model.core)
    return source, graph, task


def _check_data(options: Mapping[str, Any]) -> None:
    if not {"train", "val"} & set(options):
        raise InputError("no data is given; pass --data SOURCE, or --train and --val")


def _agreed(shape: tuple[int, ...] | None, task: Any) -> tuple[int, ...] | None:
    """The input's shape: as given, which must be what the data gives, or else that."""
    if task is None:
        return shape
    given: tuple[int, ...] = task.input_shape
    if shape is not None and shape != given:
        asked, have = (",".join(map(str, one)) for one in (shape, given))
        raise InputError(
            f"--input {asked}: the data gives images of {have}; leave --input out, or change the data (--image-size, --channels)"
        )
    return given


def _number_of(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise InputError(f"{where}: {text!r} is not a number; write 2*MODEL") from None
    if not 0 < number < math.inf:
        raise InputError(f"{where}: the weight {text} is not above 0; write 2*MODEL")
    return number


def _device(text: str | None) -> str | None:
    """The device's name, if it is there."""
    import torch

    if text is None:
        return None
    try:
        torch.empty(0, device=torch.device(text))
    except (RuntimeError, AssertionError) as error:
        have = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise InputError(f"--device {text}: no such device here; have {', '.join(have)}") from error
    return text


def _reference(reference: str | None, weights: str | None, classes: int | None, task: Any) -> Any:
    from rarefy.models import load

    if reference is None:
        if weights is not None:
            raise InputError("--reference-weights belongs to --reference; name the model too")
        return None
    return load.graph_of(load.load(reference, weights=weights, classes=classes), task.input_shape)


@contextlib.contextmanager
def _session(runtime: str, place: str, graph: Any) -> Iterator[Callable[..., Any]]:
    """The model in the runtime: the file of a saved folder, else one exported for the occasion."""
    from rarefy import plugins

    chosen = plugins.resolve("runtimes", runtime)
    name = f"model{chosen.suffix}"
    saved = Path(place) / name
    if saved.exists():
        yield chosen.open(saved)
        return
    with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
        file = Path(folder) / name
        chosen.export(graph, file)
        yield chosen.open(file)


def _outputs(graph: Any) -> int:
    from rarefy.graph.shapes import shapes

    node = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    shape = getattr(shapes(graph).get(node), "shape", None)
    if shape is None or len(shape) != 2:
        raise InputError("the model does not return one tensor (batch, classes); name the part that does with --core")
    return int(shape[1])


# ------------------------------------------------------------------ where results go


def _claim_folder(text: str) -> str:
    """The folder may be made, or is one of ours (or empty), to be replaced: told before hours of work, not after."""
    path = Path(text)
    if (
        path.is_dir()
        and any(path.iterdir())
        and not ((path / "graph.json").is_file() and (path / "manifest.json").is_file())
    ):
        raise InputError(f"{text}: exists and was not saved by rarefy, so it is left alone; choose another --output")
    if path.exists() and not path.is_dir():
        raise InputError(f"{text}: is a file; --output names a folder")
    _claim_parent(path)
    return str(path)


def _claim_file(text: str, suffixes: Sequence[str]) -> Path:
    path = Path(text)
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{text}: give a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise InputError(f"{text}: is a folder; --output names a file")
    _claim_parent(path)
    return path


def _claim_parent(path: Path, option: str = "--output") -> None:
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror}); choose another {option}") from error


def _readable(text: str, option: str) -> str:
    if not os.path.isfile(text):
        raise InputError(f"{option} {text}: no such file; make a pair of keys with `rarefy keygen`")
    return text


def _save(graph: Any, folder: str, source: Any, task: Any, as_json: bool) -> None:
    from rarefy.artifact import folder as folder_
    from rarefy.evaluation import measure as measure_module

    manifest = {"model": source.text, "weights": source.weights, "task": task.describe() if task is not None else None}
    folder_.save(graph, folder, manifest=manifest)
    step = graph.meta["history"][-1]
    found = {
        "folder": folder,
        "step": step["step"],
        "options": step["options"],
        "facts": step["facts"],
        "parameters": measure_module.count_parameters(graph),
        "macs": measure_module.count_macs(graph),
        "weight_bytes": measure_module.weight_bytes(graph),
    }
    if as_json:
        show_json(found)
        return
    from rarefy.reports import units

    facts = [
        (name.replace("_", " "), units.plain(value))
        for name, value in step["facts"].items()
        if value is not None and not isinstance(value, (Mapping, list, tuple))
    ]
    rows = [
        ("parameters", f"{found['parameters']:,}"),
        ("MACs", f"{found['macs']:,}"),
        ("weights", size_text(found["weight_bytes"])),
        *facts,
        *_left_out(task),
        ("saved in", folder),
    ]
    show_table(f"{step['step']}: {source.text}", ("what", "found"), rows)


def _left_out(task: Any) -> list[tuple[str, str]]:
    """Of each split, what could not be read."""
    said = task.describe() if task is not None else {}
    found = {split: said[split]["unreadable"] for split in ("train", "val") if "unreadable" in said.get(split, {})}
    return [(f"left out of {split}", f"{one['count']:,}, the first is {one['first']}") for split, one in found.items()]


# ------------------------------------------------------------------ printing


def _show_report(facts: Mapping[str, Any], folder: str, as_json: bool) -> None:
    """The result, and exit 1 for a missed goal."""
    from rarefy.reports import view

    if as_json:
        show_json(facts)
    else:
        _show_comparison(facts)
        say(view.view(facts)["verdict"]["sentence"])
        for warning in view.view(facts)["warnings"]:
            say(f"warning: {warning}")
        say(f"report: {Path(folder) / 'report.html'}")
    shown = view.view(facts)
    if any(not goal["met"] for goal in shown["goals"]):
        advice = shown["verdict"]["advice"]
        raise GoalMissed(
            f"{shown['verdict']['sentence']} The best model found is in {folder}{'; try: ' + '; '.join(advice) if advice else ''}"
        )
    parity = facts.get("parity") or {}
    if parity.get("passed") is False:
        layer = parity.get("first_diverging_layer")
        raise SelfCheckFailed(
            f"{folder}: the runtime's file gives the same answer as the model on {parity['agreement']:.1%} of {parity['samples']} images only"
            f"{f', and {layer} is the first layer that differs' if layer else ''}; do not deploy it; name the layer in ignore= and run again"
        )


def _show_comparison(facts: Mapping[str, Any]) -> None:
    from rarefy.reports import view

    shown = view.view(facts)
    both = "before" in facts
    columns = ("", *shown["names"], "change") if both else ("", shown["names"][1])
    rows = [
        (row["label"], row["before"], row["after"], f"{row['change']}{'; ' + row['note'] if row['note'] else ''}")
        if both
        else (row["label"], row["after"])
        for row in shown["comparison"]
    ]
    show_table("", columns, rows)
    if shown["robustness"]:
        worse = [
            (row["name"], *row["means"], row["change"]) if both else (row["name"], row["means"][1])
            for row in shown["robustness"]["rows"]
        ]
        show_table("robustness, mean of the strengths", ("corruption", *columns[1:]), worse)
    for step in shown["steps"]:
        if step["kept"] is False:
            say(f"undone: {step['name']}: {step['why']}")


if __name__ == "__main__":
    main()
