"""Numbers as people read them. A number that is not told, None, is no text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rarefy.reports.facts import Facts

Number = float | None
Form = Callable[[Number], str]


def size(value: Number) -> str:
    """Bytes: ``"1.23 MB"``."""
    return _scaled(value, {"GB": 1e9, "MB": 1e6, "kB": 1e3}, " B")


def count(value: Number) -> str:
    """A count: ``"11.7 M"``."""
    return _scaled(value, {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}, "")


def _scaled(value: Number, units: Mapping[str, float], unscaled: str) -> str:
    if value is None:
        return ""
    for unit, scale in units.items():
        if value >= scale:
            return f"{short(value / scale)} {unit}"
    return f"{value:.0f}{unscaled}"


def seconds(value: Number) -> str:
    """A duration: ``"3 min 20 s"``."""
    if value is None:
        return ""
    if value < 60:
        return f"{short(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def ms(value: Number) -> str:
    return "" if value is None else f"{short(value)} ms"


def share(value: Number) -> str:
    """``"93.42 %"``."""
    return "" if value is None else f"{100 * value:.2f} %"


def decibels(value: Number) -> str:
    return "" if value is None else f"{value:.1f} dB"


def thousands(value: Number) -> str:
    """A number of images or channels: ``"1,234"``."""
    return "" if value is None else f"{value:,}"


def short(value: float) -> str:
    """Three significant digits, without an exponent where one can do without."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if abs(value) >= 100:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:.3g}"


def signed(value: float) -> str:
    return f"{'+' if value > 0.005 else '−' if value < -0.005 else ''}{abs(value):.2f}"


def percent(part: float) -> float:
    """A share as a width in percent."""
    return round(100 * part, 2)


def mean(values: Iterable[Number]) -> Number:
    """Of those that are told."""
    told = [value for value in values if value is not None]
    return sum(told) / len(told) if told else None


def plain(value: object) -> str:
    """A value of any kind on one line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(plain, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) + "}"
    return str(value)


@dataclass(frozen=True)
class Metric:
    """How a report writes the values of its metric.

    name: what its row is called. label: on an axis. unit: "%" for shares of 1, which are shown in percent.
    lower: less of it is better. of_classes: it is the accuracy of a classifier.
    """

    name: str = "accuracy"
    label: str = "accuracy"
    unit: str = "%"
    lower: bool = False
    of_classes: bool = True

    @property
    def scale(self) -> float:
        return 100.0 if self.unit == "%" else 1.0

    @property
    def axis(self) -> str:
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def number(self, value: float) -> str:
        """``"93.42"``, without the unit."""
        return f"{100 * value:.2f}" if self.unit == "%" else short(value)

    def value(self, value: Number) -> str:
        """``"93.42 %"``, ``"1.23 years"``."""
        return "" if value is None else f"{self.number(value)} {self.unit}".rstrip()

    def signed(self, change: float) -> str:
        """``"−0.61"``, in points of shares, else in the unit."""
        if self.unit == "%":
            return signed(100 * change)
        return f"{'+' if change > 0 else '−' if change < 0 else ''}{short(abs(change))}"

    def change(self, before: Number, after: Number) -> str:
        """``"−0.61 points"``."""
        return "" if before is None or after is None else self.difference(after - before)

    def difference(self, change: float) -> str:
        return f"{self.signed(change)} {'points' if self.unit == '%' else self.unit}".rstrip()


def metric_of(facts: Facts) -> Metric:
    """The metric that both sides were judged by. Facts without a label are of an earlier rarefy, which knew shares
    alone."""
    sides = (facts["after"]["evaluation"], facts["before"]["evaluation"])
    evaluation = next((one for one in sides if one["metric"]), None)
    if evaluation is None:
        return Metric()
    name, label = evaluation["metric"], evaluation["label"]
    if name == "top1":
        return Metric("top-1 accuracy")
    unit, lower = evaluation["unit"] if label else "%", evaluation["better"] == "lower"
    return Metric(label or name, label or name, unit, lower, of_classes="top5" in evaluation)
