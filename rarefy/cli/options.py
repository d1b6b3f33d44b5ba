"""Options that several commands share, and how a dataclass of options becomes options of a command."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from rarefy.errors import InputError
from rarefy.system.options import LARGEST

app = typer.Typer(
    name="rarefy",
    help="Makes a trained PyTorch classifier or detector smaller and faster without making it worse, and proves it.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_MODEL = "Models"
_DATA = "Data"
_BUDGET = "Budget: leave out what does not matter"


@dataclass
class ModelOptions:
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="timm:NAME, torchvision:NAME, package.module:function, a saved folder, a .pt2 file, or an .onnx file.",
        ),
    ]
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Weights: .safetensors, or a checkpoint; FILE?prefix=NAME for one of several models in it.",
            rich_help_panel=_MODEL,
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
    task: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What the model is for: classification, detection, or a task of yours, package.module:Class.",
            rich_help_panel=_DATA,
        ),
    ] = "classification"
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Training and validation data of one source: imagefolder:PATH, csv:FILE, npz:FILE, "
            "tar:PATH, parquet:PATH, "
            "torchvision:NAME?root=PATH, sklearn:digits, package.module:function; with boxes "
            "coco:IMAGES?annotations=FILE, yolo:data.yaml, voc:FOLDER.",
            rich_help_panel=_DATA,
        ),
    ] = None
    train: Annotated[str | None, typer.Option(metavar="SOURCE", help="Training data.", rich_help_panel=_DATA)] = None
    val: Annotated[str | None, typer.Option(metavar="SOURCE", help="Validation data.", rich_help_panel=_DATA)] = None
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            "--size",
            metavar="PIXELS",
            min=1,
            help="Side of the model's square input.",
            rich_help_panel=_DATA,
        ),
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
    read: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The output that the task reads, of several; default: logits.", rich_help_panel=_DATA
        ),
    ] = None
    detector: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The family of the detector, where it is not found by the model; see `rarefy list detectors`.",
            rich_help_panel=_DATA,
        ),
    ] = None
    augment: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="What varies training images: crop,flip or none; with boxes flip,scale=0.5,crop,photometric,mosaic.",
            rich_help_panel=_DATA,
        ),
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
            help="Stop at an image that can't be read, or leave it out; default: stop, but in shards and Parquet "
            "files.",
            rich_help_panel=_DATA,
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """The options of the task, as far as they are given."""
        if self.data is not None and (self.train is not None or self.val is not None):
            raise InputError("--data names both splits; leave it out, or leave out --train and --val")
        return given_only(
            train=self.train or self.data,
            val=self.val or self.data,
            size=self.image_size,
            channels=self.channels,
            class_count=self.class_count,
            mean=numbers(self.mean, "--mean"),
            std=numbers(self.std, "--std"),
            crop=self.crop,
            output=self.read,
            detector=self.detector,
            augment=self.augment,
            interpolation=self.interpolation,
            workers=self.workers,
            strict=self.strict,
        )


Store = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How the folder is stored: smallest (entropy-coded throughout), fastest (codes packed as kernels read "
        "them), readable (the graph as text); default: as MODEL, else readable.",
    ),
]


@dataclass
class FileOptions:
    """What a verb writes beside its folder."""

    onnx: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the result as an ONNX file, too, and compare it with the model."),
    ] = None
    report: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write a report (.html), too: MODEL and the result measured in turns, and judged where there is "
            "validation data.",
        ),
    ] = None
    store: Store = None


Output = Annotated[str, typer.Option("-o", "--output", metavar="PATH", help="Where the result goes.")]
OptionalOutput = Annotated[str | None, typer.Option("-o", "--output", metavar="PATH", help="Where the result goes.")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if there is one.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=LARGEST, help="The same seed gives the same result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Batch = Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.")]
Runtime = Annotated[str, typer.Option(metavar="NAME", help="Where the model will run; see `rarefy list runtimes`.")]
Key = Annotated[str | None, typer.Option(metavar="FILE", help="Sign the result with this private key.")]
LogsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--logs",
        metavar="LOGGER",
        help="Who is told the numbers while it runs: tensorboard:folder=runs (or just a folder), mlflow, wandb; see "
        "`rarefy list loggers`. May be given more than once.",
    ),
]
PricesOption = Annotated[
    str | None,
    typer.Option(
        "--prices", metavar="FILE", help="What a core draws and costs, author and licence: a TOML file, docs/search.md."
    ),
]
Signer = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="FILE", help="Accept MODEL, a signed folder, only as the owner of this public key signed it."
    ),
]
Chain = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="A certificate up to the root (PEM); may be given more than once."),
]
Reference = Annotated[str | None, typer.Option(metavar="MODEL", help="What to compare with: a source, like MODEL.")]
ReferenceWeights = Annotated[str | None, typer.Option(metavar="FILE", help="The reference's weights.")]
Ignore = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Layers to leave alone; may be given more than once.")
]


@dataclass(frozen=True)
class Fields:
    """The fields of an options dataclass, each an option of a command; defaults, help and bounds stand there.

    The command gets what the user gave, by the names of the fields; what he left out is the dataclass's own business.
    of: the dataclass. renamed: field -> option, where another option of the command has the name. without: fields that
    the command has no option for.
    """

    of: type
    renamed: Mapping[str, str] = field(default_factory=dict)
    without: Collection[str] = ()

    def parameters(self) -> Iterator[tuple[str, inspect.Parameter]]:
        """(field, parameter) of each option."""
        for one in dataclasses.fields(self.of):
            if one.name in self.without:
                continue
            kind, value = _typed(str(one.type)), one.default
            metavar = one.metadata.get("metavar") or _METAVARS.get(kind)
            told = typer.Option(metavar=metavar, min=one.metadata.get("least"), help=str(one.metadata["help"]))
            name = self.renamed.get(one.name, one.name)
            value = None if isinstance(value, tuple) and not value else _default(one)
            yield one.name, inspect.Parameter(name, _KEYWORD, default=value, annotation=Annotated[kind, told])


_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_METAVARS = {int: "N", int | None: "N", float: "NUMBER", float | None: "NUMBER", str: "TEXT", str | None: "TEXT"}


def _typed(written: str) -> Any:
    """The type that typer parses a field's text to. written: the field's annotation; what is none of these is text."""
    names = [name.strip() for name in written.split("|")]
    if any(name.startswith("Sequence[str]") for name in names):
        return list[str] | None
    known = {"bool": bool, "int": int, "float": float}
    kind: Any = next((known[name] for name in ("bool", "float", "int") if name in names and "str" not in names), str)
    return kind | None if "None" in names else kind


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """Typer sees each field of a parameter that is a dataclass of options, or has ``Fields``, as an option of its
    own."""
    hints = typing.get_type_hints(function, include_extras=True)
    groups: dict[str, type] = {}
    given_fields: dict[str, dict[str, str]] = {}  # parameter -> field -> option
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        fields = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Fields)), None)
        if fields is not None:
            listed = list(fields.parameters())
            given_fields[parameter.name] = {name: option.name for name, option in listed}
            parameters += [option for _, option in listed]
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            groups[parameter.name] = hint
            inner = typing.get_type_hints(hint, include_extras=True)
            parameters += [
                inspect.Parameter(one.name, _KEYWORD, default=_default(one), annotation=inner[one.name])
                for one in dataclasses.fields(hint)
            ]
        else:
            parameters.append(parameter.replace(kind=_KEYWORD, annotation=hint))
    parameters = _with_names_apart(parameters)

    def command(**given: Any) -> None:
        packed: dict[str, Any] = {
            name: group(**{one.name: given.pop(one.name) for one in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        context: Any = given.pop("context", None)
        for name, options in given_fields.items():
            values = {key: given.pop(option) for key, option in options.items()}
            packed[name] = {key: value for key, value in values.items() if _was_given(context, options[key])}
        return function(**packed, **given)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    ordered = sorted(parameters, key=lambda one: one.default is not inspect.Parameter.empty)
    if given_fields:
        ordered.insert(0, inspect.Parameter("context", _KEYWORD, annotation=typer.Context))
    command.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    return command


def _with_names_apart(parameters: Sequence[inspect.Parameter]) -> list[inspect.Parameter]:
    """An option's second name goes where another option of the command is called that.

    (``--size`` of ``compress`` is the model's.)
    """
    names = {f"--{one.name.replace('_', '-')}" for one in parameters}
    apart = []
    for one in parameters:
        others = names - {f"--{one.name.replace('_', '-')}"}
        if typing.get_origin(one.annotation) is Annotated:
            kind, told = typing.get_args(one.annotation)[:2]
            if others.intersection(getattr(told, "param_decls", None) or ()):
                told = copy.copy(told)
                told.param_decls = tuple(name for name in told.param_decls if name not in others)
                one = one.replace(annotation=Annotated[kind, told])
        apart.append(one)
    return apart


def _was_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def _default(one: dataclasses.Field[Any]) -> Any:
    return inspect.Parameter.empty if one.default is dataclasses.MISSING else one.default


# ------------------------------------------------------------------ from text to objects


def given_only(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text!r}: give one number a channel, for example 0.485,0.456,0.406") from None
