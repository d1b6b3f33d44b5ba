from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard


def _median(model: Mapping[str, Any]) -> Any:
    latency = model.get("latency_ms")
    return latency.get("median") if isinstance(latency, Mapping) else latency


# ------------------------------------------------------------------ numbers as text


def size(value: float) -> str:
    """Bytes: ``"1.23 MB"``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{_short(value / scale)} {unit}"
    return f"{value:.0f} B"


def count(value: float) -> str:
    """A count: ``"11.7 M"``."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{_short(value / scale)} {unit}"
    return f"{value:.0f}"


def seconds(value: float) -> str:
    """A duration: ``"3 min 20 s"``."""
    if value < 60:
        return f"{_short(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _short(value: float) -> str:
    """Three significant digits, without an exponent where one can do without."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if abs(value) >= 100:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:.3g}"


def _ms(value: float) -> str:
    return f"{_short(value)} ms"


def _share(value: Any) -> str:
    return f"{100 * value:.2f} %" if _number(value) else ""


def _points(value: float) -> str:
    return f"{_short(100 * value)} points"


def _signed(value: float) -> str:
    return f"{'+' if value > 0.005 else '−' if value < -0.005 else ''}{abs(value):.2f}"


def _change_in_points(left: Any, right: Any) -> str:
    change = _difference(right, left)
    return f"{_signed(100 * change)} points" if change is not None else ""


def _difference(left: Any, right: Any) -> float | None:
    return left - right if _number(left) and _number(right) else None


def _mean(values: Iterable[Any]) -> float | None:
    told = [value for value in values if _number(value)]
    return sum(told) / len(told) if told else None


def _percent(share: float) -> float:
    return round(100 * share, 2)


def _pair(value: Any) -> tuple[float, float] | None:
    return (
        (value[0], value[1])
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_number, value))
        else None
    )


def _neutral(value: Any) -> bool:
    """Does an option say that there is nothing to say?"""
    return value in (None, False, 0, "", "no", "auto", [], {})


def _told(value: Any) -> bool:
    """Is it one value to show?"""
    return value is not None and not isinstance(value, (Mapping, list))


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: Any) -> str:
    """A value of any kind on one line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(plain, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) + "}"
    return str(value)


def _clean(value: Any) -> Any:
    """As JSON has it: text keys, lists, and None for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
