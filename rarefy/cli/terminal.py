"""What goes to the terminal: results on stdout, one line for an error on stderr, and the exit code.

==== ========================================================================================
0    done, also where a goal of accuracy is reached, but not shown by the images (it is said)
1    a check said no: a missed goal, a refused signature, a self-check, diverged training
2    wrong usage, bad input, no room on the disk, interrupted
70   a bug of rarefy's; ``--debug`` shows the traceback
==== ========================================================================================
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.exceptions import TyperException

from rarefy.errors import RarefyError

BUG = 70
_for_machines = contextvars.ContextVar("for_machines", default=False)  # is the result to be JSON?
_asides: list[str] = []


def guarded(program: Callable[[list[str]], Any], arguments: Sequence[str]) -> int:
    """``program(arguments)``, with every way to fail told in one line; returns the exit code."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _for_machines.set("--json" in arguments)
    _asides.clear()
    try:
        with _own_output_only(debug):
            code = program(arguments)
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
        line, code = explain(error, arguments)
        sys.stderr.write(f"rarefy: {one_line(line)}\n")
        return code


def explain(error: BaseException, arguments: Sequence[str] = ()) -> tuple[str, int]:
    """An exception's line and exit code. arguments: the command line, to say what was given."""
    if isinstance(error, RarefyError):
        return str(error), error.exit_code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return (
            "interrupted; nothing that existed was changed, and a run with a working folder goes on where it was when "
            "started again",
            2,
        )
    if isinstance(error, TyperException):
        context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
        given = _given(arguments, getattr(parameter, "opts", ()))
        message = (
            error.format_message()
            .rstrip(".")
            .replace("Input should be", f"{given!r} should be" if given is not None else "should be")
        )
        return f"{message}; `{context.command_path if context else 'rarefy'} --help` shows what there is", 2
    chain = list(_causes(error))
    have = _options_of(arguments)
    if any(_is_full(cause) for cause in chain):
        elsewhere = ", or choose another --output" if "--output" in have else ""
        return (
            "the disk is full, or a file may not grow further; what was there before is unchanged: make room"
            f"{elsewhere}",
            2,
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or type(error).__name__}; check the path and its permissions", 2
    if any(isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError" for cause in chain):
        helps = {"--batch-size": "a smaller --batch-size", "--device": "--device cpu if the GPU is too small"}
        known = ", or ".join(way for option, way in helps.items() if option in have)
        return f"out of memory; {f'pass {known}' if known else 'end other programs, or take a smaller model'}", 2
    if isinstance(error, OSError):
        return f"{error.strerror or error}; check the paths and their permissions", 2
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return (
        f"{type(error).__name__} at {where}: {error}; this is a bug of rarefy's: --debug shows the traceback, please "
        "report it",
        BUG,
    )


def _options_of(arguments: Sequence[str]) -> set[str]:
    """The options of the verb that was called; of all verbs, where none was."""
    from rarefy.cli.options import app

    group: Any = typer.main.get_command(app)
    called = [group.commands[word] for word in arguments[:1] if word in group.commands]
    return {name for one in called or group.commands.values() for option in one.params for name in option.opts}


def _given(arguments: Sequence[str], names: Sequence[str]) -> str | None:
    """The value that stands behind an option of those names."""
    for name in names:
        for index, argument in enumerate(arguments):
            if argument == name and index + 1 < len(arguments):
                return arguments[index + 1]
            if argument.startswith(f"{name}="):
                return argument.partition("=")[2]
    return None


def one_line(text: str) -> str:
    """Without line breaks and without control characters: names come from files, and a terminal obeys what it is
    sent."""
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
        for sign in (
            "No space left on device",
            "File too large",
            "os error 28)",
            "os error 27)",
            "PytorchStreamWriter failed writing",
        )
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
    console: Any = Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)
    console.on_broken_pipe = _broken  # its own exits 1
    return console


def _broken() -> None:
    raise BrokenPipeError


def say(text: str) -> None:
    _say_asides()
    _console().print(text, soft_wrap=True)


def aside(text: str) -> None:
    """What was decided for the user, in a line before the results: at once on a terminal, else with them.

    So that what fails prints nothing but its error. Who reads JSON gets it there.
    """
    if sys.stdout.isatty() and not _for_machines.get():
        say(one_line(text))
    else:
        _asides.append(one_line(text))


def _say_asides() -> None:
    lines = list(dict.fromkeys(_asides))
    _asides.clear()
    for line in lines:
        _console().print(line, soft_wrap=True)


def show_json(value: Any) -> None:
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


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    _say_asides()
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    _console().print(table)


def size_text(count: float | None) -> str:
    if count is None:
        return "unknown"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} bytes"
