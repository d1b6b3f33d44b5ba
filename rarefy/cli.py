"""The command line: text is parsed, the verbs are called, and what they found is printed. Nothing is decided here.

Results go to stdout (``--json`` for machines), progress to stderr. Exit codes:

==== =====================================================================================
0    done
1    a check said no: a missed goal, a refused signature, a self-check, diverged training
2    wrong usage, bad input, no room on the disk, interrupted
70   a bug of rarefy's; ``--debug`` shows the traceback
==== =====================================================================================

An error is one line on stderr: what, where, with what, and the way out.

torch is imported inside the commands, so that ``rarefy --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import json
import logging
import math
import os
import sys
import tempfile
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from rarefy.errors import CheckFailed, FormatError, GoalMissed, InputError, RarefyError

BUG = 70

app = typer.Typer(
    name="rarefy",
    help="Makes a trained PyTorch classifier smaller and faster without making it worse, and proves it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL = "Models"
_DATA = "Data"


@dataclass
class ModelOptions:
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME, package.module:function, a saved folder, or a .pt2 file.")
    ]
    weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="Weights: .safetensors, or a checkpoint of a state_dict.", rich_help_panel=_MODEL)
    ] = None
    classes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Outputs of the classifier, where the source builds one.", rich_help_panel=_MODEL)
    ] = None
    input: Annotated[str | None, typer.Option(metavar="C,H,W", help="Shape of an input, without the batch.", rich_help_panel=_MODEL)] = None
    core: Annotated[str | None, typer.Option(metavar="NAME", help="Take this submodule only.", rich_help_panel=_MODEL)] = None


@dataclass
class DataOptions:
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Train and validation data of one source: imagefolder:PATH (with train/ and val/ in it), torchvision:NAME?root=PATH, sklearn:digits, package.module:function.",
            rich_help_panel=_DATA,
        ),
    ] = None
    train: Annotated[str | None, typer.Option(metavar="SOURCE", help="Training data.", rich_help_panel=_DATA)] = None
    val: Annotated[str | None, typer.Option(metavar="SOURCE", help="Validation data.", rich_help_panel=_DATA)] = None
    size: Annotated[int | None, typer.Option(metavar="PIXELS", min=1, help="Images are brought to this size.", rich_help_panel=_DATA)] = (
        None
    )
    crop: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of the shorter side that the centre crop keeps.", rich_help_panel=_DATA)
    ] = None
    mean: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Mean of each channel, of pixels from 0 to 1.", rich_help_panel=_DATA)
    ] = None
    std: Annotated[str | None, typer.Option(metavar="R,G,B", help="Standard deviation of each channel.", rich_help_panel=_DATA)] = None
    augment: Annotated[
        str | None, typer.Option(metavar="LIST", help="What varies training images, for example flip,crop.", rich_help_panel=_DATA)
    ] = None
    workers: Annotated[int | None, typer.Option(metavar="N", min=0, help="Processes that decode images.", rich_help_panel=_DATA)] = None


Output = Annotated[str, typer.Option("-o", "--output", metavar="PATH", help="Where the result goes.")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if there is one.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="The same seed gives the same result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Batch = Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.")]
Runtime = Annotated[str, typer.Option(metavar="NAME", help="Where the model will run; see `rarefy list runtimes`.")]
Ignore = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Layers to leave alone; may be given more than once.")]


def grouped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Typer sees each field of a parameter that is one of the option classes above as an option of its own."""
    hints = typing.get_type_hints(function, include_extras=True)
    groups, parameters = {}, []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(hint):
            groups[parameter.name] = hint
            fields = typing.get_type_hints(hint, include_extras=True)
            parameters += [
                inspect.Parameter(field.name, parameter.KEYWORD_ONLY, default=_default(field), annotation=fields[field.name])
                for field in dataclasses.fields(hint)
            ]
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hint))

    def command(**given: Any) -> Any:
        packed = {
            name: group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)}) for name, group in groups.items()
        }  # type: ignore[operator]
        return function(**packed, **given)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(sorted(parameters, key=lambda item: item.default is not inspect.Parameter.empty))  # type: ignore[attr-defined]
    return command


def _default(field: dataclasses.Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


@app.command("list")
def list_choices(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="criteria, losses, rounding, calibration, runtimes.")] = None,
    as_json: Json = False,
) -> None:
    """The choices that come with rarefy, a line each, with their options."""
    from rarefy import plugins

    if kind is not None and kind not in plugins.KINDS:
        raise InputError(f"no kind {kind!r}; have {', '.join(plugins.KINDS)}")
    found = {name: [_choice(name, choice) for choice in plugins.available(name)] for name in ([kind] if kind else plugins.KINDS)}
    if as_json:
        _json(found)
        return
    for name, choices in found.items():
        _table(
            name,
            ("choice", "what", "options"),
            [(item["name"], item["summary"], " ".join(f"{key}={value}" for key, value in item["options"].items())) for item in choices],
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
    from rarefy.doctor import examine

    found = examine()
    if as_json:
        _json(found)
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
        ("memory", _bytes(found["memory_bytes"])),
        ("torch", f"{torch['version']}, {torch['threads']} threads, {torch['vector']}"),
        *(
            ("GPU", f"{gpu['name']}, compute capability {gpu['compute_capability']}, {_bytes(gpu['memory_bytes'])}")
            for gpu in found["gpus"]
        ),
        *((f"runtime {name}", version or "not installed") for name, version in found["runtimes"].items()),
        *((name, version or "not installed") for name, version in found["packages"].items() if name not in ("torch", *found["runtimes"])),
    ]
    _table("this machine", ("what", "found"), rows)
    for sentence in found["advice"]:
        _print(f"* {sentence}")


def main() -> None:
    """The program ``rarefy``."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """The command line with those arguments; returns the exit code."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with _own_output_only(debug):
            code = typer.main.get_command(app).main(args=arguments, prog_name="rarefy", standalone_mode=False)
            sys.stdout.flush()
            return int(code or 0)
    except BrokenPipeError:  # the reader of our output went away, as in `rarefy list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if isinstance(error, (SystemExit, GeneratorExit)):
            raise
        if debug:
            traceback.print_exc()
        line, code = explain(error)
        if line:
            sys.stderr.write(f"rarefy: {one_line(line)}\n")
        return code


def explain(error: BaseException) -> tuple[str, int]:
    """An exception's line and exit code."""
    if isinstance(error, RarefyError):
        return str(error), error.exit_code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "interrupted; nothing that existed was changed, and a run with a working folder goes on where it was when started again", 2
    if isinstance(error, TyperException):
        message = error.format_message()
        if not message:  # no arguments: the help was printed
            return "", 2
        context = getattr(error, "ctx", None)
        return f"{message} `{context.command_path if context else 'rarefy'} --help` shows what there is", 2
    chain = list(_causes(error))
    if any(_is_full(cause) for cause in chain):
        return (
            "the disk is full, or a file may not grow further; what was there before is unchanged: make room, or choose another --output",
            2,
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or type(error).__name__}; check the path and its permissions", 2
    if any(isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError" for cause in chain):
        return "out of memory; pass a smaller --batch-size, or --device cpu if the GPU is too small", 2
    if isinstance(error, OSError):
        return f"{error.strerror or error}; check the paths and their permissions", 2
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"{type(error).__name__} at {where}: {error}; this is a bug of rarefy's: --debug shows the traceback, please report it", BUG


def one_line(text: str) -> str:
    """Without line breaks and without control characters: names come from files, and a terminal obeys what it is sent."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(str(text).split()))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", -1)):
        return True
    text = str(error)
    return any(
        sign in text
        for sign in ("No space left on device", "File too large", "os error 28)", "os error 27)", "PytorchStreamWriter failed writing")
    )


@contextlib.contextmanager
def _own_output_only(debug: bool) -> Iterator[None]:
    """Other packages' warnings and logs are for developers (``--debug``)."""
    if debug:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _console() -> Any:
    from rich.console import Console

    width = None if sys.stdout.isatty() else max(120, int(os.environ.get("COLUMNS", "0") or 0))
    return Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)


def _print(text: str) -> None:
    _console().print(text, soft_wrap=True)


def _note(text: str) -> None:
    sys.stderr.write(f"rarefy: {one_line(text)}\n")


def _json(value: Any) -> None:
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    """As JSON has it: no NaN, no tuples, no paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    _console().print(table)


def _bytes(count: float | None) -> str:
    if count is None:
        return "unknown"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} bytes"


if __name__ == "__main__":
    main()
