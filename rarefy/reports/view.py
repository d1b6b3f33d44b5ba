"""What the page shows, as text and coordinates: ratios, sentences and rows from the facts. Nothing in it is markup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

from rarefy.errors import FormatError
from rarefy.reports import prices, pruned
from rarefy.reports.charts import Drawn, bars, chart, frontier
from rarefy.reports.comparison import Row, comparison_rows
from rarefy.reports.drawing import PictureView, picture_views
from rarefy.reports.facts import Facts, Layer, Parity, Step, checked, number
from rarefy.reports.glossary import GLOSSARY, OF_CLASSES
from rarefy.reports.prices import CostView
from rarefy.reports.units import (
    Metric,
    Number,
    count,
    decibels,
    mean,
    metric_of,
    ms,
    percent,
    plain,
    seconds,
    share,
    short,
    size,
    thousands,
)
from rarefy.reports.verdict import GoalView, VerdictView, goal_view, risks, robustness_of, verdict_view
from rarefy.system.text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

LOADING = 0.2  # share of a training from which on loading data is worth a thought
WEAK = 20.0  # decibels of a layer's signal to noise below which its bar is red


Lines = list[tuple[str, str]]  # name and value


class StepView(TypedDict):
    name: str
    options: str
    kept: bool | None
    why: str
    after: str
    seconds: str
    loading: str
    pruned: Lines
    facts: Lines


class View(TypedDict):
    """What the template lays out."""

    title: str
    verdict: VerdictView | None
    warnings: list[str]
    goals: list[GoalView]
    tiles: list[Row]
    comparison: list[Row]
    names: tuple[str, str]
    bars: list[Drawn]
    frontier: Drawn | None
    listed: Drawn | None
    layers: Drawn | None
    steps: list[StepView]
    curves: list[Drawn]
    robustness: Drawn | None
    parity: Drawn | None
    pictures: list[PictureView]
    costs: CostView | None
    risks: list[str]
    signed_by: str
    provenance: Drawn
    glossary: Mapping[str, str]


SPACES = "\n\t\xa0\u2007\u2009\u202f"


def environment(trim: bool = False) -> Environment:
    """Where pages are made. What they are told is text: no mark of HTML, and no character that hides or turns others.

    trim: lines that hold nothing but commands of the template leave nothing.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: object) -> object:
        return printable(value, SPACES) if isinstance(value, str) and not isinstance(value, Markup) else value

    templates = PackageLoader("rarefy.reports", "templates")
    return Environment(
        loader=templates,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=trim,
        lstrip_blocks=trim,
    )


def _listed(told: Mapping[str, object]) -> Drawn | None:
    """A table as it was told: texts in columns and rows. Raises FormatError."""
    if not told:
        return None
    columns, rows = (told.get(name) for name in ("columns", "rows"))
    if not isinstance(columns, list) or not isinstance(rows, list):
        raise FormatError("listed: is no table with columns and rows")
    if any(not isinstance(row, list) or len(row) != len(columns) for row in rows):
        raise FormatError("listed: a row has not a cell a column")
    return {"columns": columns, "rows": rows, "note": str(told.get("note", ""))}


def view(told: Mapping[str, object]) -> View:
    """What the template lays out. told: the facts. Raises FormatError for what is none."""
    facts = checked(told)
    before, after, metric = facts["before"], facts["after"], metric_of(facts)
    goals = [goal_view(goal, metric) for goal in facts["goals"]]
    comparison = comparison_rows(before, after, metric)
    return View(
        title=facts["title"] or "A compressed model",
        verdict=verdict_view(facts, goals, comparison, metric),
        warnings=facts["warnings"],
        goals=goals,
        tiles=[row for row in comparison if row["tile"]],
        comparison=comparison,
        names=(before["name"] or "original", after["name"] or "compressed"),
        bars=bars(before, after),
        frontier=frontier(facts["frontier"], metric),
        listed=_listed(facts["listed"]),
        layers=_layers(facts["layers"]),
        steps=[_step(step, metric) for step in facts["steps"]],
        curves=[drawn for curve in facts["curves"] if (drawn := chart(curve))],
        robustness=_robustness(facts, metric),
        parity=_parity(facts["parity"], metric),
        pictures=picture_views(facts["pictures"]),
        costs=prices.view(facts),
        risks=risks(facts, goals, metric),
        signed_by=prices.signed_by(facts),
        provenance=_provenance(facts["provenance"]),
        glossary={word: said for word, said in GLOSSARY.items() if metric.of_classes or word not in OF_CLASSES},
    )


# ------------------------------------------------------------------------------------------------------------- steps


def _step(step: Step, metric: Metric) -> StepView:
    asked = {key: value for key, value in step["options"].items() if not _is_neutral(value) and key != "seed"}
    after = (metric.value(step.get("value")), ms(step.get("latency_ms")), size(step.get("size_bytes")))
    return StepView(
        name=step["step"] or "step",
        options=", ".join(f"{key}={plain(value)}" for key, value in asked.items()),
        kept=step["kept"],
        why=step["why"],
        after=", ".join(filter(None, after)),
        seconds=seconds(step.get("seconds")),
        loading=_loading(step),
        pruned=pruned.rows(step["facts"]) if step["step"] == "prune" else [],
        facts=_single(step["facts"]),
    )


def _loading(step: Step) -> str:
    """What part of a training waited for its data, and what that means; the training loop's share of its own time."""
    timing = step["facts"].get("timing")
    waited = number({**step["facts"], **(timing if isinstance(timing, Mapping) else {})}, "data_share")
    if waited is None:
        return ""
    slow = "a faster disk or more workers would shorten it"
    quick = "loading data was not what took the time"
    told = slow if waited >= LOADING else quick
    return f"{short(percent(waited))} % of the training was spent waiting for data: {told}"


def _is_neutral(value: object) -> bool:
    """Does an option say that there is nothing to say?"""
    return value in (None, False, 0, "", "no", "auto", [], {})


def _single(table: Mapping[str, object], *but: str) -> Lines:
    """What of a table is one value to show."""
    found = {key: value for key, value in table.items() if key not in but}
    return [(key, plain(value)) for key, value in found.items() if not isinstance(value, (Mapping, list, type(None)))]


# ------------------------------------------------------------------------------------------------ layers, robustness


def _layers(layers: Sequence[Layer]) -> Drawn | None:
    if not layers:
        return None
    widest = max(layer.get("channels_before", 0) for layer in layers) or 1
    rows = [_layer(layer, widest) for layer in layers]
    columns = ("kept", "bits", "activations", "error", "output", "why", "macs", "bytes")
    noisy = sorted((layer for layer in layers if "sqnr_db" in layer), key=lambda layer: layer["sqnr_db"])[:5]
    return Drawn(
        rows=rows,
        columns={key: any(row[key] for row in rows) for key in columns},
        worst=[(layer["name"], decibels(layer["sqnr_db"])) for layer in noisy],
    )


def _layer(layer: Layer, widest: float) -> Drawn:
    was, now, error = layer.get("channels_before"), layer.get("channels_after"), layer.get("error")
    noise = -10 * math.log10(error) if error is not None and error > 0 else None
    both = was is not None and now is not None
    return Drawn(
        name=layer["name"],
        kept=f"{thousands(now)} of {thousands(was)}" if both else "",
        # The area stands for channels: square root, so that narrow layers stay visible.
        width=percent(math.sqrt(was / widest)) if was is not None else 0,
        share=percent(now / was) if was and now is not None else 0,
        bits=short(layer["bits"]) if "bits" in layer else "",
        activations=short(layer["activation_bits"]) if "activation_bits" in layer else "",
        error=decibels(noise),
        clean=percent(min(1.0, max(0.0, noise / 60))) if noise is not None else 0,
        weak=noise is not None and noise < WEAK,
        output=decibels(layer.get("sqnr_db")),
        why=layer["why"],
        macs=count(layer.get("macs_after")),
        bytes=size(layer.get("bytes")),
    )


def _robustness(facts: Facts, metric: Metric) -> Drawn | None:
    tables = robustness_of(facts)
    names = list(dict.fromkeys(name for table in tables for name in table))
    if not names:
        return None
    severities = list(dict.fromkeys(severity for table in tables for row in table.values() for severity in row))
    rows = []
    for name in names:
        left, right = (table.get(name, {}) for table in tables)
        means = [mean(left.values()), mean(right.values())]
        rows.append(
            Drawn(
                name=name.replace("_", " "),
                means=[metric.value(one) for one in means],
                widths=_widths(means, metric),
                change=metric.change(*means),
                cells=[(metric.value(left.get(one)), metric.value(right.get(one))) for one in severities],
            )
        )
    overall = [mean(mean(row.values()) for row in table.values()) for table in tables]
    return Drawn(
        what="Accuracy" if metric.of_classes else metric.label,
        rows=rows,
        severities=severities,
        overall=[metric.value(one) for one in overall],
        change=metric.change(*overall),
    )


def _widths(means: Sequence[Number], metric: Metric) -> list[float]:
    """Of bars, in percent: of shares, of 1; of anything else, of the longer one."""
    longest = 1.0 if metric.unit == "%" else max((abs(one) for one in means if one), default=1.0)
    return [percent(abs(one) / longest) if one is not None else 0 for one in means]


# --------------------------------------------------------------------------------------------- parity and provenance


def _parity(parity: Parity | None, metric: Metric) -> Drawn | None:
    if not parity:
        return None
    answer = "same top-1" if metric.of_classes else "same answer"
    rows = []
    if "agreement" in parity:
        of = f" of {parity['samples']:,} inputs" if "samples" in parity else ""
        rows.append((answer if answer == "same answer" else f"{answer} answer", f"{share(parity['agreement'])}{of}"))
    if "largest_difference" in parity:
        ulp = f" ({short(parity['ulp'])} units in the last place)" if "ulp" in parity else ""
        rows.append(("largest difference of an output", f"{parity['largest_difference']:.3g}{ulp}"))
    rows.append(("first layer that differs", parity["first_diverging_layer"] or "none"))
    for name, one in parity["also"].items():
        first = one["first_diverging_layer"]
        differs = f"first differs at {first}" if first else "no layer differs"
        rows.append((f"the same file on {name}", f"{share(one.get('agreement'))} {answer}, {differs}"))
    rows += [(key.replace("_", " "), value) for key, value in _single(parity, *Parity.__annotations__)]
    layers = [(one["name"], plain(one["difference"])) for one in parity["layers"] if "difference" in one]
    return Drawn(rows=rows, layers=layers, passed=parity["passed"])


def _provenance(provenance: Mapping[str, object]) -> Drawn:
    lists = {key: value for key, value in provenance.items() if isinstance(value, list) and value}
    commands = lists.pop("commands", [])
    return Drawn(
        single=_single(provenance, "recipe") + [(key, ", ".join(map(plain, value))) for key, value in lists.items()],
        tables=[(key, _flat(value)) for key, value in provenance.items() if isinstance(value, Mapping) and value],
        commands=[str(command) for command in commands],
        recipe=str(provenance.get("recipe") or ""),
    )


def _flat(table: Mapping[str, object], prefix: str = "") -> Lines:
    """The values of a table and of those within it, by dotted name."""
    rows: Lines = []
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name}.")
        elif value is not None and value != []:
            rows.append((name, ", ".join(map(plain, value)) if isinstance(value, list) else plain(value)))
    return rows
