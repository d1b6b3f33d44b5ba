"""What goes to the terminal: results on stdout, one line for an error on stderr, and the exit code.

==== ========================================================================================
0    done, also where a goal of accuracy is reached, but not shown by the images (it is said)
1    a check said no: a missed goal, a refused signature, a self-check, diverged training
2    wrong usage, bad input, no room on the disk or in memory, interrupted
70   a bug of rarefy's; ``--debug`` shows the traceback
==== ========================================================================================
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.metadata
import io
import json
import logging
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import typer
from typer.exceptions import TyperException

from rarefy.errors import InputError, RarefyError, section
from rarefy.system.failures import refusal
from rarefy.system.text import in_json, one_line, printable

try:
    import resource
except ImportError:  # Windows, which has no such limits
    resource = None  # type: ignore[assignment]

BUG = 70
LEAST_ADDRESSES = 4_000_000_000  # bytes
_for_machines = contextvars.ContextVar("for_machines", default=False)  # is the result to be JSON?
_asides: list[str] = []


def guarded(program: Callable[[list[str]], Any], arguments: Sequence[str]) -> int:
    """``program(arguments)``, with every way to fail told in one line; returns the exit code."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _make_usable()
    _for_machines.set("--json" in arguments)
    _asides.clear()
    try:
        with _own_output_only(debug):
            _check_address_space(arguments)
            code = program(arguments)
            sys.stdout.flush()
            return int(code or 0)
    except BrokenPipeError:  # the reader of our output went away, as in `rarefy list | head -1`
        _let_go(sys.stdout)
        return 0
    except BaseException as error:
        if isinstance(error, (SystemExit, GeneratorExit)):
            raise
        if debug:
            traceback.print_exc()
        line, code = explain(error, arguments)
        _tell(f"rarefy: {one_line(line)}\n{_more(error)}")
        return code


def _more(error: BaseException) -> str:
    """Where to read on, a line for who sits at a terminal: logs and programs get the error's line alone."""
    place = section(error)
    if place is None or not sys.stderr.isatty():
        return ""
    pages = Path(__file__).resolve().parents[2] / "docs"
    address = _site()
    if address is not None:
        place = f"{address.rstrip('/')}/{place.replace('.md', '/')}"
    elif (pages / "errors.md").is_file():  # a checkout
        place = f"{pages}/{place}"
    else:
        return ""
    return f"        more: {one_line(place)}\n"


def _site() -> str | None:
    """The documentation's address, if the package names one."""
    try:
        named = importlib.metadata.metadata("rarefy").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    links = dict(one.split(", ", 1) for one in named if ", " in one)
    return links.get("Documentation")


def _check_address_space(arguments: Sequence[str]) -> None:
    """torch maps 3 GB before it does anything, and its libraries abort where they are refused them."""
    if resource is None or not arguments or arguments[0] in _LIGHT or "--help" in arguments or "-h" in arguments:
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit not in (resource.RLIM_INFINITY, -1) and limit < LEAST_ADDRESSES:
        raise InputError(
            f"the process may map {limit / 1e9:.1f} GB of memory (ulimit -v), and torch alone maps 3; allow at least "
            f"{LEAST_ADDRESSES / 1e9:.0f} GB: ulimit -v unlimited"
        )


_LIGHT = ("list", "--version", "keygen")  # what needs no torch


def _make_usable() -> None:
    """Closed streams, odd encodings and a width that is no number (all are the caller's to set) stop nothing.

    A descriptor that is closed would be given to the next file opened, and a library's output written into it.
    """
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        if not re.fullmatch(r"[1-9][0-9]{0,3}", os.environ.get(name, "80")):
            del os.environ[name]
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _tell(text: str) -> None:
    """On stderr, if anybody can be told; and what could not be written to stdout is not tried again at the end."""
    for stream, words in ((sys.stderr, text), (sys.stdout, "")):
        try:
            stream.write(words)
            stream.flush()
        except (OSError, ValueError):
            _let_go(stream)


def _let_go(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


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
    refused = refusal(error)
    if refused is not None:
        have = _options_of(arguments)
        known = [way for option, way in _WAYS.get(refused.kind, {}).items() if option in have]
        return f"{refused}{', or ' if known else ''}{', or '.join(known)}", 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or type(error).__name__}; check the path and its permissions", 2
    if isinstance(error, OSError):
        return f"{error.strerror or error}; check the paths and their permissions", 2
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return (
        f"{type(error).__name__} at {where}: {error}; this is a bug of rarefy's: --debug shows the traceback, please "
        "report it",
        BUG,
    )


_WAYS = {
    "disk": {"--output": "choose another --output"},
    "memory": {"--batch-size": "pass a smaller --batch-size", "--device": "--device cpu if the GPU is too small"},
}


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

    width = None if sys.stdout.isatty() else max(120, int(os.environ.get("COLUMNS", "0")))
    console: Any = Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)
    console.on_broken_pipe = _broken  # its own exits 1
    return console


def _broken() -> None:
    raise BrokenPipeError


def say(text: str) -> None:
    _say_asides()
    _console().print(printable(text), soft_wrap=True)


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
    print(in_json(json.dumps(_plain(value), indent=2, ensure_ascii=False)))


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
    table = Table(title=printable(title, ""), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(printable(column, ""), justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell, "")) for cell in row))
    _console().print(table)


def size_text(count: float | None) -> str:
    if count is None:
        return "unknown"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} bytes"
