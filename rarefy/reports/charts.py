"""Figures of a report: bars as shares of a width, curves and the frontier as coordinates. The template draws them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rarefy.reports.facts import Curve, Point, Side
from rarefy.reports.units import Form, Metric, Number, count, ms, percent, short, size

CROWDED = 12  # points, from which on those that are beaten go without their names
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460.0, 240.0, 58.0, 14.0, 12.0, 42.0
_LETTER, _LINE = 6.3, 12.0  # a letter's width and a line's height, about

Drawn = dict[str, object]  # what the template draws, by the names that it uses


def bars(before: Side, after: Side) -> list[Drawn]:
    """Pairs of bars, the longer one full."""
    rows: tuple[tuple[str, Number, Number, Form], ...] = (
        ("latency", before["latency_ms"].get("median"), after["latency_ms"].get("median"), ms),
        ("size", before.get("size_bytes"), after.get("size_bytes"), size),
        ("MACs", before.get("macs"), after.get("macs"), count),
        ("parameters", before.get("parameters"), after.get("parameters"), count),
        ("peak memory", before.get("peak_memory_bytes"), after.get("peak_memory_bytes"), size),
    )
    found: list[Drawn] = []
    for label, left, right, form in rows:
        if left is not None and right is not None and (top := max(left, right)) > 0:
            widths = {"left": percent(left / top), "right": percent(right / top)}
            found.append({"label": label, "before": form(left), "after": form(right), **widths})
    return found


def chart(curve: Curve) -> Drawn | None:
    """Lines over a grid; None where there is no point."""
    series = []
    for item in curve["series"]:
        pairs = zip(item["x"], item["y"], strict=False)
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        if points:
            series.append((item["name"], _thinned(points)))
    if not series:
        return None
    axes = _axes([x for _, points in series for x, _ in points], [y for _, points in series for _, y in points])
    lines = []
    for index, (name, points) in enumerate(series):
        places = [(axes.x(x), axes.y(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dot = places[0] if len(places) == 1 else None
        lines.append({"name": name, "path": path, "dot": dot, "colour": index % 5, "last": short(points[-1][1])})
    return {"title": curve["title"], "x": curve["x"], "y": curve["y"], "lines": lines, **_frame(axes)}


def frontier(candidates: Sequence[Point], metric: Metric) -> Drawn | None:
    """The metric over latency (or over size where no latency is told), with intervals; None for fewer than two
    points."""
    timed = any("latency_ms" in item for item in candidates)
    points = []
    for item in candidates:
        cost = item.get("latency_ms") if timed else item.get("size_bytes")
        value = item.get("value")
        if cost is not None and value is not None:
            low, high = item.get("interval") or (value, value)
            x = cost if timed else 1e-6 * cost
            points.append((item, x, metric.scale * value, metric.scale * low, metric.scale * high))
    if len(points) < 2:
        return None
    axes = _axes([point[1] for point in points], [number for _, _, *ys in points for number in ys])
    marks = []
    taken = [_around(axes.x(x) - 6, axes.y(y) + 4, 12.0) for _, x, y, _, _ in points]
    sign = -1 if metric.lower else 1
    beaten = [_beaten(item, x, y, points, sign) for item, x, y, _, _ in points]
    crowded = len(points) > CROWDED
    for (item, x, y, low, high), pale in sorted(
        zip(points, beaten, strict=True), key=lambda pair: (not pair[0][0]["chosen"], pair[1])
    ):
        name, left, top = item["name"], axes.x(x), axes.y(y)
        mark = {
            "name": name,
            "x": round(left, 1),
            "y": round(top, 1),
            "low": round(axes.y(low), 1),
            "high": round(axes.y(high), 1),
            "chosen": item["chosen"],
            "beaten": pale,
            "label": None if crowded and pale and not item["chosen"] else _label(name, left, top, taken),
            "text": f"{name}: {metric.value(item['value'])}, {short(x)} {'ms' if timed else 'MB'}",
        }
        marks.append(mark)
    return {"marks": marks, "x": "latency, ms" if timed else "size, MB", "y": metric.axis, **_frame(axes)}


def _beaten(item: Point, x: float, y: float, points: Sequence[Sequence[Any]], sign: int) -> bool:
    """As whoever measured it says; else whether another is both faster and better."""
    told = item.get("beaten")
    if told is not None:
        return told
    return any(other[1] <= x and sign * other[2] >= sign * y and other[1:3] != (x, y) for other in points)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _around(x: float, y: float, width: float) -> Box:
    """The box of a text that starts at x, on the line y."""
    return x, y - _LINE, x + width, y


def _label(name: str, x: float, y: float, taken: list[Box]) -> Drawn:
    """Where a point's name stands: beside it, above or below, the nearest place that is inside the figure and free. It
    is
    then taken."""
    width = _LETTER * len(name)
    places = [
        (x + side * 9 - (width if side < 0 else 0), y + shift)
        for shift in (4, -8, 17, -21, 30, -34, 43, -47, 56)
        for side in (1, -1)
    ]
    places += [(min(max(x - width / 2, _LEFT), _WIDTH - width), y + shift) for shift in (-13, 21, -26, 34, -39, 47)]

    def free(place: tuple[float, float]) -> bool:
        left, top, right, bottom = _around(*place, width)
        inside = left >= _LEFT and right <= _WIDTH and top >= 0 and bottom <= _HEIGHT - _BOTTOM
        return inside and not any(
            left < other[2] and other[0] < right and top < other[3] and other[1] < bottom for other in taken
        )

    chosen = next(filter(free, places), places[0])
    taken.append(_around(*chosen, width))
    return {"x": round(chosen[0], 1), "y": round(chosen[1], 1)}


class _Axes(NamedTuple):
    """x, y: from a value to its place in the figure."""

    ticks_x: list[float]
    ticks_y: list[float]
    x: Callable[[float], float]
    y: Callable[[float], float]


def _axes(xs: Sequence[float], ys: Sequence[float]) -> _Axes:
    ticks_x, ticks_y = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    low_x, high_x = min(*xs, ticks_x[0]), max(*xs, ticks_x[-1])
    low_y, high_y = min(*ys, ticks_y[0]), max(*ys, ticks_y[-1])
    across, along = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    return _Axes(
        ticks_x,
        ticks_y,
        lambda x: _LEFT + across * (x - low_x) / (high_x - low_x),
        lambda y: _TOP + along * (1 - (y - low_y) / (high_y - low_y)),
    )


def _frame(axes: _Axes) -> Drawn:
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": _HEIGHT - _BOTTOM,
        "ticks_x": [(round(axes.x(value), 1), short(value)) for value in axes.ticks_x],
        "ticks_y": [(round(axes.y(value), 1), short(value)) for value in axes.ticks_y],
    }


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that span low to high: 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most that many points: means of equal stretches, so that a noisy curve stays honest."""
    if len(points) <= most:
        return list(points)
    bounds = [round(index * len(points) / most) for index in range(most + 1)]
    parts = [points[start:stop] for start, stop in itertools.pairwise(bounds)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
