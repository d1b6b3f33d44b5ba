"""The table of before and after: of each row, what it shows of a side, and of the change between the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

from rarefy.reports.facts import Interval, Side, number
from rarefy.reports.units import Metric, Number, count, ms, share, short, size

TOLERATED = 0.005  # loss of a share that is not called worse, if it may be chance


class Row(TypedDict):
    """A row of the comparison. term: in the glossary. good: is the change one; None: neither. tile: is it also shown
    large?"""

    label: str
    term: str
    before: str
    after: str
    change: str
    note: str
    good: bool | None
    tile: bool


class Change(NamedTuple):
    """text: of the change. good: is it one; None: neither. note: under it."""

    text: str = ""
    good: bool | None = None
    note: str = ""


class _Kind(NamedTuple):
    """A kind of row. label, term: of the row and in the glossary. text: of a side. change: between two. of_original:
    shown of it too?"""

    label: str
    term: str
    text: Callable[[Side], str]
    change: Callable[[Side, Side], Change] = lambda before, after: Change()
    tile: bool = False
    of_original: bool = True


def comparison_rows(before: Side, after: Side, metric: Metric) -> list[Row]:
    """The rows of the table, those that have something to tell."""
    rows = []
    for kind in (*_metric_rows(metric), *_COSTS, *_DETAILS):
        left, right = kind.text(before) if kind.of_original else "", kind.text(after)
        if not (left or right):
            continue
        change = kind.change(before, after)
        rows.append(
            Row(
                label=kind.label,
                term=kind.term,
                before=left,
                after=right,
                change=change.text,
                note=change.note,
                good=change.good,
                tile=kind.tile,
            )
        )
    return rows


def _metric_rows(metric: Metric) -> list[_Kind]:
    def text(side: Side) -> str:
        evaluation = side["evaluation"]
        value, interval = evaluation.get("value"), evaluation.get("interval")
        if value is None:
            return ""
        inside = [f"{metric.number(interval[0])} to {metric.number(interval[1])}"] if interval else []
        inside += [f"{evaluation['samples']:,} images"] if "samples" in evaluation else []
        return _with(metric.value(value), inside)

    def change(before: Side, after: Side) -> Change:
        drop, values = after["evaluation"]["drop"] or {}, [side["evaluation"].get("value") for side in (before, after)]
        lost, interval = drop.get("value"), drop.get("interval")
        if lost is None and values[0] is not None and values[1] is not None:
            lost = values[1] - values[0] if metric.lower else values[0] - values[1]
        if lost is None:
            return Change()
        sign = 1 if metric.lower else -1  # from worse to the change of the value
        ends = sorted(sign * end for end in interval) if interval else []
        note = " to ".join(map(metric.signed, ends)) + ", on the same images" if ends else ""
        return Change(metric.difference(sign * lost), _is_good(lost, interval, metric), note)

    return [_Kind(metric.name, "accuracy" if metric.of_classes else metric.name, text, change, tile=True)]


def _is_good(lost: float, interval: Interval | None, metric: Metric) -> bool | None:
    """A gain is good; a loss never is, and one that may be chance, of a share if it is small, is neither."""
    if lost <= 0:
        return True if lost < 0 else None
    sure = interval is not None and interval[0] > 0
    if metric.unit == "%":
        return False if sure or lost > TOLERATED else None
    return False if sure or interval is None else None


def _latency(side: Side) -> str:
    latency = side["latency_ms"]
    if "median" not in latency:
        return ""
    inside = []
    if "low" in latency and "high" in latency:
        inside.append(f"{short(latency['low'])} to {short(latency['high'])}")
    if "batch" in latency:
        inside.append(f"batch {latency['batch']}")
    if "threads" in latency:
        inside.append(f"{latency['threads']} thread{'s' if latency['threads'] != 1 else ''}")
    if latency["runtime"]:
        inside.append(latency["runtime"])
    return _with(ms(latency["median"]), inside)


def _speed(before: Side, after: Side) -> Change:
    """The median of the ratios within rounds, which goals are judged by too; the ratio of two medians where it is
    missing."""
    ratio = after["speedup"].get("original", {}).get("median")
    if ratio is not None:
        return _gain(ratio, 1.0, "faster", "slower")
    return _gain(before["latency_ms"].get("median"), after["latency_ms"].get("median"), "faster", "slower")


def _gain(left: Number, right: Number, less: str, more: str) -> Change:
    if left is None or right is None or left <= 0 or right <= 0:
        return Change()
    ratio = left / right
    if abs(ratio - 1) < 0.005:
        return Change("unchanged")
    return Change(f"{short(ratio)}× {less}", True) if ratio > 1 else Change(f"{short(1 / ratio)}× {more}", False)


def _worst(side: Side) -> str:
    worst = side["evaluation"]["worst_class"]
    if "value" not in worst:
        return ""
    name = worst["name"] or str(worst.get("index"))
    inside = [f"class {name}" if name.isdigit() else name]
    inside += [f"{worst['samples']:,} images"] if "samples" in worst else []
    return _with(share(worst["value"]), inside)


def _with(text: str, inside: Sequence[str]) -> str:
    return f"{text} ({', '.join(inside)})" if inside else text


def _top5(before: Side, after: Side) -> Change:
    return Change(Metric().change(before["evaluation"].get("top5"), after["evaluation"].get("top5")))


def _evaluated(key: str) -> Callable[[Side], str]:
    return lambda side: share(number(side["evaluation"], key))


def _cost(label: str, key: str, form: Callable[[Number], str], less: str, more: str, tile: bool = False) -> _Kind:
    def text(side: Side) -> str:
        return form(number(side, key))

    def change(before: Side, after: Side) -> Change:
        return _gain(number(before, key), number(after, key), less, more)

    return _Kind(label, label, text, change, tile)


_COSTS = (
    _Kind("latency", "latency", _latency, _speed, tile=True),
    _cost("size", "size_bytes", size, "smaller", "larger", tile=True),
    _cost("weights in memory", "memory_bytes", size, "less", "more"),
    _cost("weights read a run", "read_bytes", size, "less", "more"),
    _cost("MACs", "macs", count, "fewer", "more", tile=True),
    _cost("parameters", "parameters", count, "fewer", "more"),
    _cost("peak memory", "peak_memory_bytes", size, "less", "more"),
)
_DETAILS = (
    _Kind("top-5 accuracy", "accuracy", _evaluated("top5"), _top5),
    _Kind("worst class", "worst class", _worst),
    _Kind("calibration error", "calibration error", _evaluated("calibration_error")),
    _Kind("agreement with the original", "agreement", _evaluated("agreement"), of_original=False),
)
