"""Several reports in one table: a row a figure, a column a report, and what makes them hard to compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rarefy.reports.comparison import comparison_rows
from rarefy.reports.facts import Facts, checked
from rarefy.reports.units import metric_of


class Table(NamedTuple):
    """columns: names of the reports. rows: label, then a cell a report. warnings: why figures may not compare."""

    columns: list[str]
    rows: list[tuple[str, ...]]
    warnings: list[str]


def table(reports: Mapping[str, Mapping[str, object]]) -> Table:
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


def html(shown: Table) -> str:
    """A page of its own, without script or network."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rarefy.reports", "templates"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("compare.html").render(shown._asdict()) + "\n"
