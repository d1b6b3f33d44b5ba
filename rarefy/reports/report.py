"""report(): what was done to a model and what came of it, as one HTML file, as JSON, and as text.

The HTML file is self-contained: no network, no script (a Content-Security-Policy in it forbids both), figures as inline SVG and
plain boxes, light and dark, printable. Everything is escaped: names of models and layers come from files. It leaves out what it
is not told; it computes ratios and sentences from the facts, and never a fact.

The facts are one JSON-able dictionary. Every key is optional::

    title        str      what was compressed, "timm:resnet18 on imagefolder:data"
    verdict      {"status": "met" | "missed" | "none", "sentence": str, "advice": [str]}     made from the goals where missing
    goals        [{"name": "max_drop" | "speedup" | "size" | any text, "asked": number, "reached": number, "met": bool, "advice": str}]
                          max_drop is a share (0.005), speedup a ratio, size in bytes; "unit" says it for other names:
                          "share" | "ratio" | "bytes" | "ms"
    warnings     [str]    what makes the comparison worthless, such as an original without its weights
    before       the original, and
    after        the result:
        {"name": str,
         "evaluation": Evaluation.to_json(): metric, value, interval (lo, hi), samples, top5, worst_class {index, name, value, samples},
                       calibration_error, agreement, drop {value, interval}, robustness {corruption: {severity: value}},
         "parameters": int, "macs": int (batch 1), "size_bytes": int (weights on disk), "peak_memory_bytes": int,
         "latency_ms": number | {"median", "low", "high", "batch", "threads", "runtime", "repeats"},
         "speedup": {"median", "low", "high"} of the ratios to the original, or {"original": those}}
    frontier     [{"name": str, "value": share, "interval": [lo, hi], "latency_ms": number, "size_bytes": int, "chosen": bool}]
    layers       [{"name": str, "channels_before": int, "channels_after": int, "bits": number, "activation_bits": number,
                   "error": noise power / signal power, "sqnr_db": of its output, "why": it stays in float, "macs_before": int, "macs_after": int, "bytes": int}]
    steps        [{"step": str, "options": {}, "facts": {}, "seconds": number, "kept": bool, "why": str,
                   "value": share after it, "latency_ms": number, "size_bytes": int}]
    curves       [{"title": str, "x": str, "y": str, "series": [{"name": str, "x": [number], "y": [number]}]}]
    parity       {"agreement": share, "samples": int, "largest_difference": number, "ulp": number, "first_diverging_layer": str | None,
                  "layers": [{"name": str, "difference": number}], "passed": bool}
    robustness   {"before": {corruption: {severity: value}}, "after": ...}                    taken from the evaluations where missing
    provenance   {"environment": {}, "hashes": {}, "commands": [str], "seed": int, "recipe": str, "created": str, ...}

A number that is None, NaN or infinite counts as not told.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from rarefy.errors import InputError
from rarefy.reports.facts import Facts
from rarefy.reports.units import _clean
from rarefy.reports.view import view


def report(facts: Facts, path: str | os.PathLike[str]) -> Path:
    """Write the HTML file at ``path`` and the same facts as JSON beside it (``report.html``, ``report.json``).

    A file there is replaced. Raises InputError for another suffix, OSError where it can't be written.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{target}: a report is an HTML file; give a name that ends in .html")
    target.parent.mkdir(parents=True, exist_ok=True)
    for file, content in ((target, html(facts)), (target.with_suffix(".json"), as_json(facts))):
        partial = file.with_name(f".{file.name}.part")
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, file)
    return target


def as_json(facts: Facts) -> str:
    """The facts as JSON text, keys in the order given; NaN and infinity become null."""
    return json.dumps(_clean(facts), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def html(facts: Facts) -> str:
    """The facts as one HTML page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rarefy.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(view(facts)) + "\n"


def summary(facts: Facts) -> str:
    """The facts in a few lines of text: the verdict, the comparison, what was undone."""
    shown = view(facts)
    lines = [shown["verdict"]["sentence"]] if shown["verdict"] else []
    lines += [f"  try: {advice}" for advice in (shown["verdict"] or {}).get("advice", [])]
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
