"""Reports elsewhere than on their page: several side by side, and one in a notebook.

``compared`` puts several in one table, a row a figure, a column a report, with what makes them hard to compare.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

from rarefy.errors import InputError
from rarefy.reports import charts
from rarefy.reports.comparison import comparison_rows
from rarefy.reports.facts import Facts, Point, checked
from rarefy.reports.units import Metric, metric_of
from rarefy.reports.view import environment
from rarefy.system.files import replacing


class Table(NamedTuple):
    """columns: names of the reports. rows: label, then a cell a report. warnings: why figures may not compare."""

    columns: list[str]
    rows: list[tuple[str, ...]]
    warnings: list[str]


def compared(reports: Mapping[str, Mapping[str, object]]) -> Table:
    """reports: facts by name. Raises FormatError for what is no report."""
    facts = {name: checked(told) for name, told in reports.items()}
    cells: dict[str, dict[str, str]] = {}
    for name, one in facts.items():
        for row in comparison_rows(one["before"], one["after"], metric_of(one)):
            change = f" ({row['change']})" if row["change"] else ""
            cells.setdefault(row["label"], {})[name] = f"{row['after']}{change}"
    for name, one in facts.items():
        verdict = one["verdict"]["sentence"]
        if verdict:
            cells.setdefault("verdict", {})[name] = verdict
    rows = [(label, *(found.get(name, "") for name in facts)) for label, found in cells.items()]
    return Table(list(facts), rows, _doubts(facts))


def _doubts(facts: Mapping[str, Facts]) -> list[str]:
    """What the reports do not have in common, though their figures are set side by side."""
    seen: dict[str, dict[str, str]] = {
        "images": {name: _text(one["provenance"], "hashes", "data.val") for name, one in facts.items()},
        "original": {name: _text(one["provenance"], "hashes", "original") for name, one in facts.items()},
        "processor": {name: _text(one["provenance"], "environment", "cpu", "name") for name, one in facts.items()},
        "runtime": {name: _text(one["provenance"], "runtime") for name, one in facts.items()},
        "metric": {name: metric_of(one).name for name, one in facts.items()},
    }
    meant = {
        "images": "they were judged on different images: their accuracies do not compare",
        "original": "they come from different originals: their changes do not compare",
        "processor": "they were timed on different processors: their latencies do not compare",
        "runtime": "they were timed on different runtimes",
        "metric": "they were judged by different metrics",
    }
    return [meant[what] for what, values in seen.items() if len(set(filter(None, values.values()))) > 1]


def _text(told: object, *keys: str) -> str:
    for key in keys:
        told = told.get(key) if isinstance(told, Mapping) else None
    return str(told) if told is not None else ""


def html(found: Table) -> str:
    """A page of its own, without script or network."""
    return environment().get_template("compare.html").render(found._asdict()) + "\n"


# ------------------------------------------------------------------------------------------------------------ notebooks


@dataclass(frozen=True)
class Picture:
    """A drawing, which a notebook shows by itself. svg: its text."""

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as an .svg file, which browsers and word processors show. Raises InputError for another name."""
        target = Path(path)
        if target.suffix.lower() != ".svg":
            raise InputError(f"{target}: a picture is written as SVG; give a name that ends in .svg")
        with replacing(target) as partial:
            partial.write_text(self.svg, encoding="utf-8")
        return target


def table(told: Mapping[str, object]) -> str:
    """Before and after, as the HTML of a notebook's cell."""
    facts = checked(told)
    rows = comparison_rows(facts["before"], facts["after"], metric_of(facts))
    cells = [
        ("", "before", "after", "change"),
        *((row["label"], row["before"], row["after"], row["change"]) for row in rows),
    ]
    head, *body = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in cells)
    verdict = escape(facts["verdict"]["sentence"])
    return f"<p><b>{verdict}</b></p><table><thead><tr>{head}</tr></thead><tbody>" + "".join(
        f"<tr>{line}</tr>" for line in body
    ) + "</tbody></table>"  # fmt: skip


def frontier(told: Mapping[str, object]) -> Picture:
    """All that was found, drawn. Raises InputError where there are fewer than two points."""
    facts = checked(told)
    return drawn(facts["frontier"], metric_of(facts))


def drawn(points: Sequence[Point], metric: Metric) -> Picture:
    """Points with their intervals; those that are beaten, pale."""
    found = charts.frontier(points, metric)
    if found is None:
        raise InputError("plot: there are fewer than two points; a search, or a recipe of several steps, finds more")
    return Picture(environment().get_template("front.svg").render(found) + "\n")
