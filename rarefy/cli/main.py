"""The command line: text is parsed, the verbs are called, and what they found is printed. Nothing is decided here.

Results go to stdout (``--json`` for machines), progress to stderr. An error is one line on stderr: what, where, with
what, and the way out; the exit codes stand in ``rarefy/cli/terminal.py``.

Every file of this package is imported, and registers its commands with ``app``: a file more is a command more. torch is
imported inside the commands, so that ``rarefy --help`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from rarefy.cli.options import app
from rarefy.cli.terminal import guarded, say

# as the help lists them; others come behind
ORDER = (
    "compress run front worker prune mask cluster distill quantize evaluate measure predict export report compare card "
    "sign verify keygen push pull demo list doctor"
).split()


def _place(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


for _file in pkgutil.iter_modules([os.path.dirname(__file__)]):
    if _file.name != "main":
        importlib.import_module(f"rarefy.cli.{_file.name}")
app.registered_commands.sort(key=lambda one: _place(str(one.name or getattr(one.callback, "__name__", ""))))


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
