"""What a search found, and who else works at it: ``rarefy front``, ``compare``, ``worker``."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rarefy.cli.options import Json, OptionalOutput, PricesOption, app
from rarefy.cli.outputs import claim_folder
from rarefy.cli.terminal import say, show_json, show_table
from rarefy.errors import InputError

if TYPE_CHECKING:
    from rarefy.compression.search.front import Front, Point


@app.command()
def front(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Of `rarefy compress --search`.")],
    pick: Annotated[
        str | None,
        typer.Option(
            metavar="WISH",
            help="One point: 5ms, 2x or 1MB (the most accurate within it), drop=0.5% (the fastest within it), or #7; "
            "5ms@openvino on another runtime of the search.",
        ),
    ] = None,
    output: OptionalOutput = None,
    every: Annotated[bool, typer.Option("--all", help="Points that others beat, too.")] = False,
    prices: PricesOption = None,
    as_json: Json = False,
) -> None:
    """The best of what a search found, by latency; with --pick one of them, copied to --output."""
    from rarefy.compression.search import front as front_
    from rarefy.reports import prices as reckoned

    if output is not None and pick is None:
        raise InputError("--output is where one point is copied; say which with --pick, such as --pick 5ms")
    found = front_.read(folder)
    if told := reckoned.told(prices):
        found = dataclasses.replace(found, about={**found.about, "prices": told["prices"]})
    if pick is None:
        show(found, as_json, every)
        return
    point = found.pick(pick)
    place = Path(folder) / point["folder"] if point["folder"] else None
    target = _copied(place, output, point) if output is not None else place
    if as_json:
        show_json({**point, "folder": None if target is None else str(target)})
        return
    _show_front(found, [point])
    say(str(target) if target is not None else f"#{point['number']} is not saved yet: the search still runs")


def show(found: Front, as_json: bool, every: bool = False) -> None:
    """The front; with ``every`` also what is beaten."""
    if as_json:
        show_json({"points": found.points, "about": found.about})
        return
    _show_front(found, found.points if every else found.best)
    if (found.folder / "report.html").exists():
        say(f"report: {found.folder / 'report.html'}")


def _copied(place: Path | None, output: str, point: Point) -> Path:
    from rarefy.artifact.folder import load

    if place is None:
        raise InputError(
            f"#{point['number']} is not saved yet: the search still runs; wait for its end, or go on with it"
        )
    target = Path(claim_folder(output))
    load(place)  # what was changed since it was saved is refused
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(place, target)
    return target


def _show_front(found: Front, points: Sequence[Point]) -> None:
    from rarefy.compression.search.table import table

    about, told = found.about, table(found, points)
    show_table(f"{about.get('title') or found.folder}, on {about['host']}, {about['runtime']}", told.columns, told.rows)
    say(told.note)


@app.command()
def worker(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Of a search that `rarefy compress --search` began.")],
    trust_modules: Annotated[
        bool,
        typer.Option(
            "--trust-modules", help="Let modules run that the search's recipe names and that lie in this folder."
        ),
    ] = False,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Where the search keeps its trials, if it was begun with that.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Work at a search beside whoever does, on this machine or another that sees the folder, until it is done.

    Any number of workers come and go; one that is killed gives its trial back. Latency is measured on the machine that
    the search began on, and nowhere else.
    """
    from rarefy.compression import recipe
    from rarefy.compression.search import search as search_
    from rarefy.system.dependencies import asking

    told = search_.settings(Path(folder))
    if told["storage"] != storage:  # a stranger's folder sends nobody anywhere
        where = (
            f"at {told['storage']}; if that is yours, pass --storage"
            if told["storage"]
            else "in its folder; leave out --storage"
        )
        raise InputError(f"{folder}: its search keeps trials {where}")
    file = Path(folder) / search_.RECIPE
    if not file.exists():
        raise InputError(
            f"{folder}: was begun in Python without a recipe; call rarefy.search(model, task, folder=...) there again, "
            "which joins in"
        )
    with contextlib.nullcontext() if trust_modules else asking(file):
        asked = recipe.read(file)
        task = recipe.make_task(asked.data, asked.task)
        found = search_.resumed(folder, task).work()
    if as_json:
        show(found, as_json)
    else:
        say(f"{folder}: no trial is left ({len(found.points)} were measured on {told['host']})")


@app.command()
def compare(
    folders: Annotated[
        list[str], typer.Argument(metavar="FOLDER...", help="Folders that rarefy saved, or report.json files.")
    ],
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="Write the table as a page (.html), too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Reports side by side: accuracy with its interval, latency, size, and what each is against its own original."""
    from rarefy.cli.judge import _recorded
    from rarefy.cli.outputs import claim_file
    from rarefy.reports import shown

    if len(folders) < 2:
        raise InputError("compare: give two folders at least")
    target = claim_file(output, (".html", ".htm")) if output is not None else None
    told = {name: _recorded(Path(name), None) for name in dict.fromkeys(folders)}
    table = shown.compared(told)
    if target is not None:
        target.write_text(shown.html(table), encoding="utf-8")
    if as_json:
        show_json({"columns": table.columns, "rows": table.rows, "warnings": table.warnings})
        return
    show_table("", ("", *table.columns), table.rows)
    for warning in table.warnings:
        say(f"warning: {warning}")
    if target is not None:
        say(f"page: {target}")
