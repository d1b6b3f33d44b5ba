"""The front: what of all that a search found nobody beats in accuracy, latency and size at once, and how one is picked.

``front.json`` in the search's folder holds the points as they were measured, each beside the original in rounds that
take turns; ``points/`` the saved folders of those that are not beaten. Energy is an estimate: the time of a run times
the
power that a core is said to draw (``reports/prices.py``), and is labelled so.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from rarefy.compression.recipe import share, size
from rarefy.compression.run import read_json
from rarefy.compression.search import table
from rarefy.errors import InputError
from rarefy.reports import prices, shown
from rarefy.reports.facts import is_number
from rarefy.system.strict_json import expect

FILE, POINTS = "front.json", "points"
MOST_POINTS = 10_000


class Quartiles(TypedDict):
    median: float
    low: float
    high: float


class Clock(TypedDict):
    """latency_ms: and speedup against the original, median and quartiles, on one runtime."""

    latency_ms: Quartiles
    speedup: Quartiles
    disturbed: bool


class Point(Clock):
    """A trial that was measured.

    value: the metric's, drop: against the original's, on the same images; both with intervals of 95 %. elsewhere: how
    fast on the search's other runtimes, by name, without those that can't run it. size_bytes: of the weights on disk.
    memory_bytes: at its peak, once it is saved. beaten: another is as good in accuracy, latency (on each runtime) and
    size, and better in one. folder: where it is saved, in the search's folder; "" where it is not.
    """

    number: int
    name: str
    value: float
    interval: list[float]
    drop: float
    drop_interval: NotRequired[list[float]]
    elsewhere: NotRequired[dict[str, Clock]]
    size_bytes: int
    memory_bytes: NotRequired[int | None]
    seconds: float
    recipe: str
    beaten: bool
    folder: str


@dataclass(frozen=True)
class Front:
    """folder: of the search. points: by latency, the fastest first. about: host, runtime, metric, what was asked."""

    folder: Path
    points: Sequence[Point]
    about: Mapping[str, object]

    @property
    def best(self) -> list[Point]:
        """Those that nobody beats."""
        return [one for one in self.points if not one["beaten"]]

    def pick(self, wish: str) -> Point:
        """The point for a wish: ``"5ms"``, ``"drop=0.5%"``, ``"1MB"``, ``"2x"``, or a trial's number, ``"#7"``.

        ``"5ms@openvino"`` looks at another runtime of the search. Of those within a limit of latency, size or speed the
        most accurate; within a drop, the fastest. Raises InputError where none is, which says how near the nearest
        comes.
        """
        return picked(self.best, wish)

    def _repr_html_(self) -> str:
        """For a notebook: the points that nobody beats."""
        return table.html(self)

    def plot(self) -> shown.Picture:
        """All points, as a notebook draws them; ``plot().save("front.svg")`` writes it."""
        return table.picture(self)

    def __str__(self) -> str:
        lines = [f"{len(self.best)} of {len(self.points)} points are not beaten ({self.folder})"]
        lines += [
            f"  #{one['number']:<4}{one['latency_ms']['median']:8.3f} ms {one['size_bytes'] / 1e3:10.1f} kB  "
            f"{one['value']:.4f}  {one['name']}"
            for one in self.best
        ]
        return "\n".join(lines)


def read(folder: str | os.PathLike[str]) -> Front:
    """The front of a search's folder. Raises InputError where there is none."""
    path = Path(folder)
    if not (path / FILE).exists():
        raise InputError(
            f"{path}: holds no front yet; give the folder that `rarefy compress --search` works in, once a trial is "
            f"done"
        )
    told, where = read_json(path / FILE), f"{path / FILE}"
    points, about = told.get("points"), told.get("about")
    good = isinstance(points, list) and len(points) <= MOST_POINTS and all(map(_is_point, points))
    expect(good, where, "its points are none of a front; begin the search anew")
    expect(_is_about(about), where, "it does not say of what search it is; begin it anew")
    return Front(path, cast(list[Point], points), cast(dict[str, object], about))


def _is_point(value: object) -> bool:
    """Has it what a point has, of its types? A stranger's folder may say anything, also where others lie."""
    if not isinstance(value, dict):
        return False
    further = value.get("elsewhere", {})
    if not isinstance(further, dict) or not all(map(_is_clock, (value, *further.values()))):
        return False
    place = value.get("folder")
    return (
        all(type(value.get(name)) is int and value[name] >= 0 for name in ("number", "size_bytes"))
        and all(is_number(value.get(name)) for name in ("value", "drop", "seconds"))
        and type(value.get("beaten")) is bool
        and all(isinstance(value.get(name), str) for name in ("name", "recipe"))
        and _is_pair(value.get("interval"))
        and _is_pair(value.get("drop_interval", [0, 0]))
        and (value.get("memory_bytes") is None or (is_number(value["memory_bytes"]) and value["memory_bytes"] >= 0))
        and (place == "" or (isinstance(place, str) and place == f"{POINTS}/{value['number']:04d}"))
    )


def _is_clock(value: object) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), dict) for name in ("latency_ms", "speedup"))
        and all(_above(value[name].get(key)) for name in ("latency_ms", "speedup") for key in Quartiles.__annotations__)
        and type(value.get("disturbed")) is bool
    )


def _above(value: object) -> bool:
    return is_number(value) and 0 < value < 1e12


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _is_about(value: object) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in ("host", "runtime", "metric", "unit"))
        and all(type(value.get(name)) is int and 0 <= value[name] < 2**40 for name in ("threads", "samples"))
        and (value.get("title") is None or isinstance(value["title"], str))
        and _is_priced(value.get("prices", {}))
    )


def _is_priced(value: object) -> bool:
    try:
        prices.of({"prices": value})
    except InputError:
        return False
    return True


def numbers(point: Point) -> dict[str, float]:
    """What a logger is told of a point."""
    return {
        "value": point["value"],
        "drop": point["drop"],
        "latency_ms": point["latency_ms"]["median"],
        "speedup": point["speedup"]["median"],
        "size_bytes": point["size_bytes"],
        "seconds": point["seconds"],
    }


def mark(points: Sequence[Point]) -> list[Point]:
    """By latency, each with whether it is beaten."""
    found: list[Point] = [{**one, "beaten": any(_beats(other, one) for other in points)} for one in points]
    return sorted(found, key=lambda one: (one["latency_ms"]["median"], one["number"]))


def _beats(one: Point, other: Point) -> bool:
    mine, theirs = (
        (-point["drop"], -point["latency_ms"]["median"], -point["size_bytes"], *(-each for each in further))
        for point, further in zip((one, other), _elsewhere(one, other), strict=True)
    )
    at_least = all(a >= b for a, b in zip(mine, theirs, strict=True))
    return at_least and (mine != theirs or one["number"] < other["number"])


def _elsewhere(*points: Point) -> list[list[float]]:
    """Of each point its milliseconds on every runtime that one of them was timed on; infinite where it can't run."""
    told = [one.get("elsewhere", {}) for one in points]
    names = sorted({name for one in told for name in one})
    return [[one[name]["latency_ms"]["median"] if name in one else math.inf for name in names] for one in told]


_WISHES: Mapping[str, tuple[str, Callable[[Point, float], bool]]] = {
    "ms": ("latency", lambda point, most: point["latency_ms"]["median"] <= most),
    "x": ("speed", lambda point, least: point["speedup"]["median"] >= least),
    "bytes": ("size", lambda point, most: point["size_bytes"] <= most),
}


def _timed_on(points: Sequence[Point], where: str, wish: str) -> list[Point]:
    """The points as they run there. where: a runtime of the search, with or without its options."""
    names = sorted({name for one in points for name in one.get("elsewhere", {})})
    found = next((name for name in names if where in (name, name.partition(":")[0])), None)
    if found is None:
        have = f"have {', '.join(names)}" if names else "it was timed on one runtime alone; leave out the @"
        raise InputError(f"--pick {wish}: no point was timed on {where}; {have}")
    return [{**one, **one["elsewhere"][found]} for one in points if found in one.get("elsewhere", {})]


def picked(points: Sequence[Point], wish: str) -> Point:
    """``Front.pick`` of these points."""
    if not points:
        raise InputError("the front has no point yet; go on with the search")
    text, _, where = wish.strip().partition("@")
    if where:
        chosen = picked(_timed_on(points, where, wish), text)
        return next(one for one in points if one["number"] == chosen["number"])
    number = re.fullmatch(r"#?(\d+)", text)
    if number:
        found = next((one for one in points if one["number"] == int(number[1])), None)
        if found is None:
            have = ", ".join(f"#{one['number']}" for one in points)
            raise InputError(f"--pick {wish}: no point of the front has that number; have {have}")
        return found
    if text.startswith("drop"):
        most = share(text.partition("=")[2] or text.removeprefix("drop"), f"--pick {wish}")
        able = [one for one in points if one["drop"] <= most]
        if not able:
            least = min(one["drop"] for one in points)
            raise InputError(
                f"--pick {wish}: the least drop found is {100 * least:.2f}%; ask for that, or search longer"
            )
        return min(able, key=lambda one: (one["latency_ms"]["median"], one["size_bytes"]))
    unit, limit = _limit(text, wish)
    label, holds = _WISHES[unit]
    able = [one for one in points if holds(one, limit)]
    if not able:
        raise InputError(f"--pick {wish}: no point has that {label}; {_nearest(points, unit)}")
    return min(able, key=lambda one: (one["drop"], one["latency_ms"]["median"], one["size_bytes"]))


def _limit(text: str, wish: str) -> tuple[str, float]:
    found = re.fullmatch(r"([0-9.]+)\s*(ms|us|s|x)", text)
    if found:
        try:
            value = float(found[1])
        except ValueError:
            value = -1.0
        if value > 0:
            return ("x", value) if found[2] == "x" else ("ms", value * {"ms": 1.0, "us": 1e-3, "s": 1e3}[found[2]])
    try:
        return "bytes", size(text, f"--pick {wish}")
    except InputError as error:
        raise InputError(f"--pick {wish}: is no wish; write 5ms, 2x, 1MB, drop=0.5%, or a number such as #7") from error


def _nearest(points: Sequence[Point], unit: str) -> str:
    if unit == "bytes":
        return f"the smallest has {min(one['size_bytes'] for one in points):,} bytes; ask for that, or search longer"
    if unit == "x":
        fastest = max(one["speedup"]["median"] for one in points)
        return f"the fastest is {fastest:.2f}x as fast; ask for that, or search longer"
    fastest = min(one["latency_ms"]["median"] for one in points)
    return f"the fastest takes {fastest:.3f} ms; ask for that, or search longer"


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area between points (both coordinates are to be small) and a reference that is worse than all that count."""
    inside = sorted({one for one in points if one[0] < reference[0] and one[1] < reference[1]})
    area, height = 0.0, reference[1]
    for x, y in inside:
        if y < height:
            area += (reference[0] - x) * (height - y)
            height = y
    return area
