"""The front as people read it: a row a point, on a terminal, in a notebook, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from rarefy.reports import prices as reckoned
from rarefy.reports import shown, units
from rarefy.reports.facts import Point as Mark
from rarefy.reports.prices import Prices
from rarefy.reports.units import Metric, short

if TYPE_CHECKING:
    from rarefy.compression.search.front import Clock, Front, Point, Quartiles


class Table(NamedTuple):
    """columns: what each cell of a row is. rows: a row a point. note: what stands below."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, ...]]
    note: str


def metric_of(about: Mapping[str, object]) -> Metric:
    """What the search's points are judged by."""
    return Metric(str(about["metric"]), str(about["metric"]), str(about["unit"]))


def table(found: Front, points: Sequence[Point], prices: Prices | None = None) -> Table:
    """Of these points of the front."""
    about = found.about
    asked = prices or reckoned.of({"prices": about.get("prices") or {}})[0]
    metric, threads = metric_of(about), int(str(about["threads"]))
    further = sorted({name for one in found.points for name in one.get("elsewhere", {})})
    rows = [
        (
            f"#{one['number']}" + (" beaten" if one["beaten"] else ""),
            one["name"],
            f"{metric.value(one['value'])} ({' to '.join(map(metric.number, one['interval']))})",
            metric.difference(-one["drop"]) + _paired(one, metric),
            _latency(one),
            f"{short(one['speedup']['median'])}×",
            *(_latency(one.get("elsewhere", {}).get(name)) for name in further),
            units.size(one["size_bytes"]),
            units.size(one.get("memory_bytes")),
            f"{short(asked.millijoules(one['latency_ms']['median'], threads))} mJ",
            short(asked.for_load(1e3 / one["latency_ms"]["median"], threads).money),
        )
        for one in points
    ]
    columns = ["point", "what", str(about["metric"]), "change", "latency, ms", "speed"]
    columns += [*(f"on {name}, ms" for name in further), "size", "memory", "energy, est."]
    note = (
        f"{len(found.best)} of {len(found.points)} points are beaten by none, judged on {about['samples']:,} images; "
        f"energy and money are estimates: {asked.watts_per_core:g} W a core, {short(asked.requests_per_second)} "
        "requests a second, one image at a time; --prices has your own"
    )
    return Table([*columns, f"{asked.currency} a month, est."], rows, note)


def listed(found: Front) -> dict[str, object]:
    """All points for a report, each with its recipe and the folder of the run that it was measured in."""
    told = table(found, found.points)
    rows = [
        [*row, one["folder"] or f"work/{one['number']:04d}", one["recipe"]]
        for row, one in zip(told.rows, found.points, strict=True)
    ]
    return {"columns": [*told.columns, "run", "recipe"], "rows": rows, "note": told.note}


def html(found: Front) -> str:
    """The points that nobody beats, as the HTML of a notebook's cell."""
    told = table(found, found.best)
    head, *body = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in (told.columns, *told.rows))
    rows = "".join(f"<tr>{line}</tr>" for line in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table><p>{escape(told.note)}</p>"


def picture(found: Front) -> shown.Picture:
    """All points with their intervals, those that are beaten pale. Raises InputError for fewer than two."""
    return shown.drawn(marks(found.points), metric_of(found.about))


def marks(points: Sequence[Point]) -> list[Mark]:
    """As a report draws them."""
    return [
        Mark(
            name=f"#{one['number']}",
            value=one["value"],
            interval=(one["interval"][0], one["interval"][1]),
            latency_ms=one["latency_ms"]["median"],
            size_bytes=one["size_bytes"],
            chosen=False,
            beaten=one["beaten"],
        )
        for one in points
    ]


def _latency(one: Clock | None) -> str:
    if one is None:
        return "can't run"
    return _spread(one["latency_ms"]) + (" disturbed" if one["disturbed"] else "")


def _spread(one: Quartiles) -> str:
    return f"{short(one['median'])} ({short(one['low'])} to {short(one['high'])})"


def _paired(one: Point, metric: Metric) -> str:
    if "drop_interval" not in one:
        return ""
    low, high = sorted(-end for end in one["drop_interval"])
    return f" ({metric.signed(low)} to {metric.signed(high)})"
