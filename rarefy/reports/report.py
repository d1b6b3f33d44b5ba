"""report(): what was done to a model and what came of it, as one HTML file, as JSON, and as text.

The HTML file is self-contained: no network, no script (a Content-Security-Policy in it forbids both), figures as inline
SVG and plain boxes, light and dark, printable. Everything is escaped: names of models and layers come from files. It
leaves out what it is not told; it computes ratios and sentences from the facts, and never a fact.

The facts are one JSON-able dictionary (``rarefy.reports.facts``); every key is optional.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from rarefy.errors import InputError
from rarefy.reports.facts import Table, clean
from rarefy.reports.view import environment, view
from rarefy.system.files import replacing


def report(facts: Table, path: str | os.PathLike[str]) -> Path:
    """Write the HTML file at ``path`` and the same facts as JSON beside it (``report.html``, ``report.json``).

    facts: as in ``rarefy.reports.facts``. path: a file there is replaced.

    Raises InputError for another suffix, FormatError for what is no report, OSError where it can't be written.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{target}: a report is an HTML file; give a name that ends in .html")
    page, text = html(facts), as_json(facts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:  # neither takes its place before both are written
        for file, content in ((target, page), (target.with_suffix(".json"), text)):
            stack.enter_context(replacing(file)).write_text(content, encoding="utf-8")
    return target


def as_json(facts: Table) -> str:
    """The facts as JSON text, keys in the order given; NaN and infinity become null."""
    return json.dumps(clean(facts), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def html(facts: Table) -> str:
    """The facts as one HTML page. Raises FormatError."""
    templates = environment(trim=True)
    return templates.get_template("report.html").render(view(facts)) + "\n"


def summary(facts: Table) -> str:
    """The facts in a few lines of text: the verdict, the comparison, what was undone. Raises FormatError."""
    shown = view(facts)
    lines = [shown["verdict"]["sentence"]] if shown["verdict"] else []
    lines += [f"  try: {advice}" for advice in (shown["verdict"]["advice"] if shown["verdict"] else [])]
    lines += [f"warning: {warning}" for warning in shown["warnings"]]
    if shown["comparison"]:
        rows = [
            ("", "before", "after", "change"),
            *((row["label"], row["before"], row["after"], row["change"]) for row in shown["comparison"]),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines += [
            "",
            *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        ]
    undone = [step for step in shown["steps"] if step["kept"] is False]
    if undone:
        lines += ["", *(f"undone: {step['name']}: {step['why'] or 'it did not pay'}" for step in undone)]
    return "\n".join(lines) + "\n"
