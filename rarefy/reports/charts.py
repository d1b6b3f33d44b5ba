from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from rarefy.reports.facts import Facts
from rarefy.reports.units import _median, _ms, _number, _pair, _percent, _short, count, size

# ------------------------------------------------------------------ figures: shares of a width, and coordinates


def _bars(before: Facts, after: Facts) -> list[dict[str, Any]]:
    """Pairs of bars, the longer one full."""
    found = []
    for label, left, right, form in (
        ("latency", _median(before), _median(after), _ms),
        ("size", before.get("size_bytes"), after.get("size_bytes"), size),
        ("MACs", before.get("macs"), after.get("macs"), count),
        ("parameters", before.get("parameters"), after.get("parameters"), count),
        ("peak memory", before.get("peak_memory_bytes"), after.get("peak_memory_bytes"), size),
    ):
        if _number(left) and _number(right) and max(left, right) > 0:
            top = max(left, right)
            found.append(
                {
                    "label": label,
                    "before": form(left),
                    "after": form(right),
                    "left": _percent(left / top),
                    "right": _percent(right / top),
                }
            )
    return found


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460.0, 240.0, 58.0, 14.0, 12.0, 42.0


def _chart(curve: Facts) -> dict[str, Any] | None:
    """Lines over a grid."""
    series = []
    for item in curve.get("series") or []:
        points = [
            (x, y) for x, y in zip(item.get("x") or [], item.get("y") or [], strict=False) if _number(x) and _number(y)
        ]
        if points:
            series.append((str(item.get("name") or ""), _thinned(points)))
    if not series:
        return None
    axes = _axes([x for _, points in series for x, _ in points], [y for _, points in series for _, y in points])
    lines = []
    for index, (name, points) in enumerate(series):
        placed = [(axes["place_x"](x), axes["place_y"](y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        lines.append(
            {
                "name": name,
                "path": path,
                "dot": placed[0] if len(placed) == 1 else None,
                "colour": index % 5,
                "last": _short(points[-1][1]),
            }
        )
    return {
        "title": str(curve.get("title") or ""),
        "x": str(curve.get("x") or ""),
        "y": str(curve.get("y") or ""),
        "lines": lines,
        **_frame(axes),
    }


def _frontier(candidates: Sequence[Facts]) -> dict[str, Any] | None:
    """Accuracy over latency (or over size where no latency is told), with intervals."""
    key, form = (
        ("latency_ms", "latency, ms")
        if any(_number(item.get("latency_ms")) for item in candidates)
        else ("size_bytes", "size, MB")
    )
    scale = 1.0 if key == "latency_ms" else 1e-6
    points = []
    for item in candidates:
        if _number(item.get(key)) and _number(item.get("value")):
            between = _pair(item.get("interval")) or (item["value"], item["value"])
            points.append((item, scale * item[key], 100 * item["value"], 100 * between[0], 100 * between[1]))
    if len(points) < 2:
        return None
    axes = _axes([point[1] for point in points], [number for point in points for number in point[2:]])
    marks = []
    taken = [_around(axes["place_x"](x) - 6, axes["place_y"](y) + 4, 12.0) for _, x, y, _, _ in points]
    for item, x, y, low, high in sorted(points, key=lambda point: not point[0].get("chosen")):
        beaten = any(other[1] <= x and other[2] >= y and (other[1], other[2]) != (x, y) for other in points)
        left, height = axes["place_x"](x), axes["place_y"](y)
        label = _label(str(item.get("name") or ""), left, height, taken)
        marks.append(
            {
                "name": str(item.get("name") or ""),
                "x": round(left, 1),
                "y": round(height, 1),
                "low": round(axes["place_y"](low), 1),
                "high": round(axes["place_y"](high), 1),
                "chosen": bool(item.get("chosen")),
                "beaten": beaten,
                "label": label,
                "text": f"{item.get('name') or ''}: {y:.2f} %, {_short(x)} {'ms' if key == 'latency_ms' else 'MB'}",
            }
        )
    return {"marks": marks, "x": form, "y": "accuracy, %", **_frame(axes)}


_LETTER, _LINE = 6.3, 12.0  # a letter's width and a line's height, about


def _around(x: float, y: float, width: float) -> tuple[float, float, float, float]:
    """The box of a text that starts at x, on the line y."""
    return x, y - _LINE, x + width, y


def _label(name: str, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> dict[str, Any]:
    """Where a point's name stands: beside it, above or below, the nearest place that is inside the figure and free. It is then taken."""
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


def _axes(xs: Sequence[float], ys: Sequence[float]) -> dict[str, Any]:
    ticks_x, ticks_y = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    low_x, high_x = min(*xs, ticks_x[0]), max(*xs, ticks_x[-1])
    low_y, high_y = min(*ys, ticks_y[0]), max(*ys, ticks_y[-1])
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    return {
        "ticks_x": ticks_x,
        "ticks_y": ticks_y,
        "place_x": lambda x: _LEFT + wide * (x - low_x) / (high_x - low_x),
        "place_y": lambda y: _TOP + high * (1 - (y - low_y) / (high_y - low_y)),
    }


def _frame(axes: Facts) -> dict[str, Any]:
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": _HEIGHT - _BOTTOM,
        "ticks_x": [(round(axes["place_x"](value), 1), _short(value)) for value in axes["ticks_x"]],
        "ticks_y": [(round(axes["place_y"](value), 1), _short(value)) for value in axes["ticks_y"]],
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
