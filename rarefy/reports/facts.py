"""What a report is made of: one JSON-able dictionary, typed here, and checked at the door.

Whoever makes a report leaves out what there is not to say. ``checked`` refuses what has another form, and completes the
rest: in what it returns texts, lists and tables are always there, perhaps empty, and a number is there or its key is
not. A number that is None, NaN or infinite counts as not told. Reports that an earlier rarefy wrote stay readable.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

from rarefy.errors import FormatError
from rarefy.reports.drawing import Pictured
from rarefy.system.strict_json import Json

Hint = Any  # an annotation
Interval = tuple[float, float]
Table = Mapping[str, object]


class Spread(TypedDict, total=False):
    """Median and quartiles: of milliseconds, or of ratios of speed."""

    median: float
    low: float
    high: float


class Latency(Spread, total=False):
    """Milliseconds of one run, and how they were taken. disturbed: too few of the rounds could be trusted."""

    batch: int
    threads: int
    runtime: str
    repeats: int
    rounds: int
    disturbed: bool


class Drop(TypedDict, total=False):
    """How much worse than the original, in the metric's unit: positive is worse."""

    value: float
    interval: Interval


class WorstClass(TypedDict, total=False):
    index: int
    name: str
    value: float
    samples: int


class Evaluation(TypedDict, total=False):
    """``Evaluation.to_json()``.

    metric, label: the metric's name, and as people write it. unit: "%" for shares of 1. better: "higher" or "lower".
    top5, worst_class, calibration_error: of classifiers. robustness: {corruption: {severity: value}}.
    """

    metric: str
    label: str
    unit: str
    better: str
    value: float
    interval: Interval
    samples: int
    top5: float
    worst_class: WorstClass
    calibration_error: float
    agreement: float
    drop: Drop | None
    robustness: Mapping[str, Mapping[str, float | None]]
    warnings: list[str]


class Throughput(TypedDict, total=False):
    batch: int  # at which one process answers most images a second
    per_second: float
    threads: int


class Side(TypedDict, total=False):
    """The original, or the result.

    macs: of one sample. *_bytes: of the weights on disk, of its tensors once loaded, of the runtime's file.
    ``checked`` also takes a number as latency_ms, and the Spread against the original as speedup ({"original": it}).
    """

    name: str
    evaluation: Evaluation
    parameters: int
    macs: int
    size_bytes: int
    memory_bytes: int
    read_bytes: int
    peak_memory_bytes: int | None
    throughput: Throughput | None
    latency_ms: Latency
    speedup: Mapping[str, Spread]


class Goal(TypedDict, total=False):
    """name: "max_drop", "speedup", "size" or any text.

    unit: "share" of max_drop, "ratio" of speedup and "bytes" of size unless said; "ms", or the unit's own name.
    status: "met", "missed", or "not shown": what was reached is within what was asked, and its interval, paired, on
        that many samples, is not. met: is it "met"? Reports that an earlier rarefy wrote have no status.
    """

    name: str
    asked: object
    reached: object
    met: bool
    status: str
    interval: Interval
    samples: int
    advice: str
    unit: str


def status(goal: Goal) -> str:
    """What the goal says, or what its ``met`` does."""
    return goal.get("status") or ("met" if goal.get("met") else "missed")


class Verdict(TypedDict, total=False):
    """Made from the goals where it is missing. status: "met", "not shown", "missed" or "none"."""

    status: str
    sentence: str
    advice: list[str]


class Point(TypedDict, total=False):
    """A candidate. value: the metric's. beaten: by another; None: whoever draws it finds out."""

    name: str
    value: float
    interval: Interval
    latency_ms: float
    size_bytes: int
    chosen: bool
    beaten: bool | None


class Layer(TypedDict, total=False):
    """error: noise power / signal power of its weights. sqnr_db: of its output. why: it stays in float."""

    name: str
    channels_before: int
    channels_after: int
    bits: float
    activation_bits: float
    error: float
    sqnr_db: float
    why: str
    macs_before: int
    macs_after: int
    bytes: int


class Step(TypedDict, total=False):
    """options: as asked. facts: what the step says of itself. value, latency_ms, size_bytes: of the model after it."""

    step: str
    options: Table
    facts: Table
    seconds: float
    kept: bool | None
    why: str
    value: float
    latency_ms: float
    size_bytes: int


class Series(TypedDict, total=False):
    name: str
    x: list[float | None]
    y: list[float | None]


class Curve(TypedDict, total=False):
    title: str
    x: str
    y: str
    series: list[Series]


class LayerDifference(TypedDict, total=False):
    name: str
    difference: float


class Parity(TypedDict, total=False):
    """Of the exported file with the model in PyTorch. also: on other runtimes. Other keys are shown, too."""

    agreement: float
    samples: int
    largest_difference: float
    ulp: float
    first_diverging_layer: str
    layers: list[LayerDifference]
    passed: bool | None
    also: Mapping[str, Parity]


class Facts(TypedDict, total=False):
    """All that a report shows.

    title: what was compressed. warnings: what makes the comparison worthless, such as an original without its weights.
    before, after: original and result. pictures: those that changed most. listed: columns, rows, note. robustness:
    {"before", "after": {corruption: {severity: value}}}, else the evaluations'. prices, about: see ``prices.py``.
    provenance: {"environment": {}, "hashes": {}, "commands": [], "seed", "recipe", "created", ...}.
    """

    title: str
    verdict: Verdict
    goals: list[Goal]
    warnings: list[str]
    before: Side
    after: Side
    frontier: list[Point]
    listed: Table
    layers: list[Layer]
    steps: list[Step]
    curves: list[Curve]
    parity: Parity | None
    pictures: list[Pictured]
    robustness: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    prices: Table
    about: Table
    provenance: Mapping[str, Json]


# ----------------------------------------------------------------------------------------------------------- the door


def checked(facts: Mapping[str, Json]) -> Facts:
    """The facts, complete. Raises FormatError, which names the place that has another form."""
    _expect(isinstance(raw := clean(facts), Mapping), raw, "facts", "table")
    sides = {name: _side(raw.get(name), name) for name in ("before", "after")}
    if not raw.get("before"):
        sides["after"].pop("speedup", None)
    return cast(Facts, _table(Facts, {**raw, **sides}, ""))


def _side(raw: Json, where: str) -> dict[str, Json]:
    _expect(raw is None or isinstance(raw, Mapping), raw, where, "table")
    side = dict(raw or {})
    if is_number(side.get("latency_ms")):
        side["latency_ms"] = {"median": side["latency_ms"]}
    ratios = side.get("speedup")
    _expect(ratios is None or isinstance(ratios, Mapping), ratios, f"{where}.speedup", "table")
    if ratios and "original" not in ratios:
        side["speedup"] = {"original": ratios}
    return side


def _table(kind: Hint, raw: Json, where: str) -> dict[str, Json]:
    """Each key that ``kind``, a TypedDict, has; others as they are."""
    _expect(raw is None or isinstance(raw, Mapping), raw, where, "table")
    given, hints = raw or {}, _hints(kind)
    found = {key: value for key, value in given.items() if key not in hints}
    for key, hint in hints.items():
        value = _value(hint, given.get(key), f"{where}.{key}" if where else key)
        if value is not None or _is_optional(hint) or hint is object:
            found[key] = value
    return found


@functools.cache
def _hints(kind: Hint) -> dict[str, Json]:
    return typing.get_type_hints(kind)


def _value(hint: Hint, value: Json, where: str) -> Json:
    """value in the form that the annotation asks for; None: there is none."""
    if _is_optional(hint):
        inner = next(part for part in typing.get_args(hint) if part is not types.NoneType)
        return None if value in (None, {}) else _value(inner, value, where) if inner is not bool else value
    if hint in (int, float):
        return value if is_number(value) else None
    if hint is bool:
        return bool(value)
    if hint is str:
        return "" if value is None else str(value)
    if typing.is_typeddict(hint):
        return _table(hint, value, where)
    origin: object = typing.get_origin(hint)
    parts = typing.get_args(hint)
    if origin is list:
        _expect(value is None or isinstance(value, list), value, where, "list")
        return [_value(parts[0], item, f"{where}[{index}]") for index, item in enumerate(value or [])]
    if origin is tuple:
        return tuple(value) if isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) else None
    if origin is Mapping:
        _expect(value is None or isinstance(value, Mapping), value, where, "table")
        return {key: _value(parts[1], item, f"{where}.{key}") for key, item in (value or {}).items()}
    return value


def _is_optional(hint: Hint) -> bool:
    return types.NoneType in typing.get_args(hint)


def _expect(holds: bool, value: object, where: str, form: str) -> None:
    if not holds:
        raise FormatError(f"{where}: {str(value)[:80]!r} is no {form}")


def is_number(value: object) -> typing.TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(table: Mapping[str, object], key: str) -> float | None:
    """The number of that name; None where there is none."""
    value = table.get(key)
    return value if is_number(value) else None


def clean(value: Json) -> Json:
    """As JSON has it: text keys, lists, and None for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


# ----------------------------------------------------------------------------------------------- of a graph's history

ROUNDING = ("bits", "activation_bits", "error", "sqnr_db")


class Epoch(TypedDict, total=False):
    """An entry of a training's curve. val: the metric on the validation images."""

    epoch: int
    loss: float | None
    val: float | None


def told_by(history: Sequence[Mapping[str, Json]], label: str = "top-1", unit: str = "%") -> Facts:
    """The facts ``steps``, ``layers`` and ``curves`` as a graph's ``meta["history"]`` tells them.

    label, unit: of the metric that its trainings looked at.
    """
    steps: list[Step] = []
    layers: dict[str, Layer] = {}
    charts: list[Curve] = []
    for record in history:
        verb, facts = str(record.get("step")), record.get("facts") or {}
        step = Step(step=verb, options=record.get("options") or {}, facts=facts)
        spent = (facts.get("timing") or {}).get("seconds")
        steps.append(step if spent is None else {**step, "seconds": spent})
        for parameter, (was, now) in (facts.get("channels") or {}).items():
            layer = layers.setdefault(name := parameter.removesuffix(".weight"), Layer(name=name))
            layer.setdefault("channels_before", was)
            layer["channels_after"] = now
        for told in facts.get("layers") or []:
            layers.setdefault(told["name"], Layer(name=told["name"])).update(rounding(told, *ROUNDING, "bytes"))
        for name, why in facts.get("reasons") or []:
            if name in (facts.get("float") or []):
                layers.setdefault(name, Layer(name=name))["why"] = why
        lines = ("training loss", "student" if verb == "distill" else "model")
        title = "accuracy on the validation data" if unit == "%" else f"{label} on the validation data"
        charts += curves(verb, facts.get("curve") or [], label, unit, title, lines)
    return Facts(steps=steps, layers=list(layers.values()), curves=charts)


def rounding(layer: Mapping[str, Json], *keys: str) -> Layer:
    """What a quantization's record says of a layer."""
    return cast(Layer, {key: layer[key] for key in keys or ROUNDING if layer.get(key) is not None})


def curves(
    name: str, epochs: Sequence[Epoch], label: str, unit: str, validation: str, lines: tuple[str, str]
) -> list[Curve]:
    """A chart of the loss, and one of the metric if it was looked at.

    label, unit: of the metric. validation: end of the second chart's title. lines: names of loss and metric.
    """
    charts = (
        ("loss", "loss", "loss", 1.0, lines[0]),
        ("val", validation, ", ".join(filter(None, (label, unit))), 100.0 if unit == "%" else 1.0, lines[1]),
    )
    found: list[Curve] = []
    for key, title, axis, factor, line in charts:
        if points := [(one.get("epoch"), factor * value) for one in epochs if is_number(value := one.get(key))]:
            series = Series(name=line, x=[x for x, _ in points], y=[y for _, y in points])
            found.append(Curve(title=f"{name}: {title}", x="epoch", y=axis, series=[series]))
    return found
