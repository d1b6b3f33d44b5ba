from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.reports.charts import _bars, _chart, _frontier
from rarefy.reports.facts import Facts
from rarefy.reports.units import (
    _change_in_points,
    _clean,
    _difference,
    _mean,
    _median,
    _ms,
    _neutral,
    _number,
    _pair,
    _percent,
    _points,
    _share,
    _short,
    _signed,
    _told,
    count,
    plain,
    seconds,
    size,
)

GLOSSARY = {
    "accuracy": "The share of validation images whose most likely class is the right one (top-1); top-5: the right one is among the five most likely.",
    "interval": "The range that holds the true value with 95 % confidence, given how many images were tried (Wilson). Differences inside it may be chance.",
    "drop": "How much accuracy was lost, counted on the same images through both models (paired), in points: from 93.4 % to 92.9 % is 0.5 points.",
    "agreement": "The share of images on which both models give the same most likely class, right or wrong.",
    "calibration error": "How far the model's confidence is from its accuracy, on average (ECE, 15 bins): 0 is perfect.",
    "worst class": "The class with the lowest accuracy: a good mean can hide a class that was lost.",
    "latency": "Time for one run of the model on the named runtime: the median of runs in which both models take turns.",
    "size": "Bytes of the weights on disk.",
    "parameters": "How many numbers the model has learned.",
    "MACs": "Multiplications with additions for one image: the work to do, though not always the time it takes.",
    "peak memory": "The most memory one run takes.",
    "pruning": "Removing whole channels that matter least; the model becomes narrower and needs no special hardware.",
    "distillation": "Training the small model to answer like the original.",
    "quantization": "Storing and multiplying 8-bit integers instead of 32-bit floats.",
    "bits": "Bits that store one weight of the layer: 32 is float, 8 is int8.",
    "error": "What rounding to few bits changed in the layer's weights: signal-to-noise in decibels, more is better; 30 dB is an error of 0.1 % of the power.",
    "output": "How much of a layer's output is noise, from its own rounding and from all before it: signal-to-noise in decibels against the float model.",
    "parity": "Whether the file that is deployed answers like the model that was tested.",
    "gate": "After each step the model is measured again; a step that does not pay for what it costs is undone.",
    "robustness": "Accuracy on images that were made worse on purpose (noise, blur, weather, compression), at rising strengths.",
    "frontier": "All candidates that were found: none of those shown as best is both slower and less accurate than another.",
}


def view(facts: Facts) -> dict[str, Any]:
    """What the template lays out: text, and coordinates. Nothing in it is markup."""
    facts = _clean(facts)
    before, after = facts.get("before") or {}, facts.get("after") or {}
    goals = [_goal(goal) for goal in facts.get("goals") or []]
    comparison = _comparison(before, after)
    return {
        "title": str(facts.get("title") or "A compressed model"),
        "verdict": _verdict(facts, goals, comparison),
        "warnings": [str(warning) for warning in facts.get("warnings") or []],
        "goals": goals,
        "tiles": [row for row in comparison if row["tile"]],
        "comparison": comparison,
        "names": (str(before.get("name") or "original"), str(after.get("name") or "compressed")),
        "bars": _bars(before, after),
        "frontier": _frontier(facts.get("frontier") or []),
        "layers": _layers(facts.get("layers") or []),
        "steps": [_step(step) for step in facts.get("steps") or []],
        "curves": [chart for curve in facts.get("curves") or [] if (chart := _chart(curve))],
        "robustness": _robustness(facts, before, after),
        "parity": _parity(facts.get("parity")),
        "provenance": _provenance(facts.get("provenance") or {}),
        "glossary": GLOSSARY,
    }


# ------------------------------------------------------------------ words


def _verdict(facts: Facts, goals: list[dict[str, Any]], comparison: list[dict[str, Any]]) -> dict[str, Any] | None:
    given = facts.get("verdict") or {}
    met = sum(goal["met"] for goal in goals)
    status = given.get("status") or ("none" if not goals else "met" if met == len(goals) else "missed")
    sentence = given.get("sentence")
    if not sentence:
        gains = "; ".join(f"{row['label']}: {row['change']}" for row in comparison if row["tile"] and row["change"])
        if not goals:
            sentence = f"No goal was set. {gains}." if gains else ""
        elif met == len(goals):
            all_of_them = {1: "The goal was", 2: "Both goals were"}.get(met, f"All {met} goals were")
            sentence = f"{all_of_them} met. {gains}."
        else:
            missed = "; ".join(
                f"{goal['label']} {goal['reached']} instead of {goal['asked']}" for goal in goals if not goal["met"]
            )
            sentence = f"{len(goals) - met} of {len(goals)} goals missed: {missed}."
    if not sentence:
        return None
    advice = list(given.get("advice") or []) or [goal["advice"] for goal in goals if not goal["met"] and goal["advice"]]
    light = {"met": "neutral" if facts.get("warnings") else "good", "missed": "bad"}.get(status, "neutral")
    word = {"met": "Goals met", "missed": "Goal missed"}.get(status, "Result")
    return {"light": light, "word": word, "sentence": str(sentence).strip(), "advice": [str(item) for item in advice]}


LOADING = 0.2  # share of a training from which on loading data is worth a thought

_GOALS = {
    "max_drop": ("accuracy drop", "share", "at most"),
    "speedup": ("speed", "ratio", "at least"),
    "size": ("size", "bytes", "at most"),
}


def _goal(goal: Facts) -> dict[str, Any]:
    label, unit, bound = _GOALS.get(str(goal.get("name")), (str(goal.get("name") or "goal"), None, ""))
    unit = goal.get("unit") or unit
    return {
        "label": label,
        "asked": f"{bound} {_in_unit(goal.get('asked'), unit)}".strip(),
        "reached": _in_unit(goal.get("reached"), unit),
        "met": bool(goal.get("met")),
        "advice": "" if goal.get("met") else str(goal.get("advice") or ""),
    }


def _in_unit(value: Any, unit: str | None) -> str:
    if not _number(value):
        return str(value) if value is not None else "not measured"
    return {"share": _points, "ratio": lambda ratio: f"{_short(ratio)}×", "bytes": size, "ms": _ms}.get(
        str(unit), _short
    )(value)


def _comparison(before: Facts, after: Facts) -> list[dict[str, Any]]:
    """The rows of the table; ``tile`` marks those also shown large."""
    rows: list[dict[str, Any]] = []
    first, second = before.get("evaluation") or {}, after.get("evaluation") or {}

    def add(
        label: str,
        term: str,
        left: str,
        right: str,
        change: str = "",
        note: str = "",
        good: bool | None = None,
        tile: bool = False,
    ) -> None:
        if left or right:
            rows.append(
                {
                    "label": label,
                    "term": term,
                    "before": left,
                    "after": right,
                    "change": change,
                    "note": note,
                    "good": good,
                    "tile": tile,
                }
            )

    metric = str(second.get("metric") or first.get("metric") or "accuracy")
    drop = second.get("drop") or {}
    lost = drop.get("value") if _number(drop.get("value")) else _difference(first.get("value"), second.get("value"))
    change, note = "", ""
    if _number(lost):
        change = f"{_signed(-100 * lost)} points"
        between = _pair(drop.get("interval"))
        note = f"{_signed(-100 * between[1])} to {_signed(-100 * between[0])}, on the same images" if between else ""
    add(
        metric.replace("top1", "top-1 accuracy"),
        "accuracy",
        _accuracy(first),
        _accuracy(second),
        change,
        note,
        None if not _number(lost) else lost <= 0.005,
        True,
    )
    ratio = _speedup(after) if before else None
    add(
        "latency",
        "latency",
        _latency_text(before),
        _latency_text(after),
        *(
            _gain(_median(before), _median(after), "faster", "slower")
            if ratio is None
            else _gain(ratio, 1.0, "faster", "slower")
        ),
        tile=True,
    )
    for label, key, less, more, form, tile in (
        ("size", "size_bytes", "smaller", "larger", size, True),
        ("MACs", "macs", "fewer", "more", count, True),
        ("parameters", "parameters", "fewer", "more", count, False),
        ("peak memory", "peak_memory_bytes", "less", "more", size, False),
    ):
        left, right = before.get(key), after.get(key)
        add(
            label,
            label,
            form(left) if _number(left) else "",
            form(right) if _number(right) else "",
            *_gain(left, right, less, more),
            tile=tile,
        )
    add(
        "top-5 accuracy",
        "accuracy",
        _share(first.get("top5")),
        _share(second.get("top5")),
        _change_in_points(first.get("top5"), second.get("top5")),
    )
    add("worst class", "worst class", _worst(first), _worst(second))
    add(
        "calibration error",
        "calibration error",
        _share(first.get("calibration_error")),
        _share(second.get("calibration_error")),
    )
    add("agreement with the original", "agreement", "", _share(second.get("agreement")))
    return rows


def _gain(left: Any, right: Any, less: str, more: str) -> tuple[str, str, bool | None]:
    if not (_number(left) and _number(right) and left > 0 and right > 0):
        return "", "", None
    ratio = left / right
    if abs(ratio - 1) < 0.005:
        return "unchanged", "", None
    return (f"{_short(ratio)}× {less}", "", True) if ratio > 1 else (f"{_short(1 / ratio)}× {more}", "", False)


def _accuracy(evaluation: Facts) -> str:
    if not _number(evaluation.get("value")):
        return ""
    text = _share(evaluation["value"])
    between = _pair(evaluation.get("interval"))
    inside = [f"{100 * between[0]:.2f} to {100 * between[1]:.2f}"] if between else []
    inside += [f"{evaluation['samples']:,} images"] if _number(evaluation.get("samples")) else []
    return f"{text} ({', '.join(inside)})" if inside else text


def _worst(evaluation: Facts) -> str:
    worst = evaluation.get("worst_class") or {}
    if not _number(worst.get("value")):
        return ""
    name = str(worst.get("name") or worst.get("index"))
    name = f"class {name}" if name.isdigit() else name
    samples = f", {worst['samples']:,} images" if _number(worst.get("samples")) else ""
    return f"{_share(worst['value'])} ({name}{samples})"


def _latency_text(model: Facts) -> str:
    latency = model.get("latency_ms")
    if _number(latency):
        return _ms(latency)
    if not isinstance(latency, Mapping) or not _number(latency.get("median")):
        return ""
    inside = (
        [f"{_short(latency['low'])} to {_short(latency['high'])}"]
        if _number(latency.get("low")) and _number(latency.get("high"))
        else []
    )
    inside += [f"batch {latency['batch']}"] if _number(latency.get("batch")) else []
    inside += (
        [f"{latency['threads']} thread{'s' if latency['threads'] != 1 else ''}"]
        if _number(latency.get("threads"))
        else []
    )
    inside += [str(latency["runtime"])] if latency.get("runtime") else []
    return _ms(latency["median"]) + (f" ({', '.join(inside)})" if inside else "")


def _speedup(model: Facts) -> float | None:
    """The median of the ratios within rounds, which goals are judged by too, and not the ratio of two medians."""
    told = model.get("speedup")
    told = told.get("original", told) if isinstance(told, Mapping) else {}
    return told["median"] if isinstance(told, Mapping) and _number(told.get("median")) else None


def _step(step: Facts) -> dict[str, Any]:
    options = ", ".join(
        f"{key}={plain(value)}"
        for key, value in (step.get("options") or {}).items()
        if not _neutral(value) and key != "seed"
    )
    after = [
        _share(step["value"]) if _number(step.get("value")) else "",
        _ms(step["latency_ms"]) if _number(step.get("latency_ms")) else "",
    ]
    after += [size(step["size_bytes"])] if _number(step.get("size_bytes")) else []
    return {
        "name": str(step.get("step") or "step"),
        "options": options,
        "kept": step.get("kept"),
        "why": str(step.get("why") or ""),
        "after": ", ".join(filter(None, after)),
        "seconds": seconds(step["seconds"]) if _number(step.get("seconds")) else "",
        "loading": _loading(step),
        "facts": [(str(key), plain(value)) for key, value in (step.get("facts") or {}).items() if _told(value)],
    }


def _loading(step: Facts) -> str:
    """What part of a training waited for its data, and what that means; the training loop's share of its own time."""
    facts = step.get("facts") or {}
    share = {**facts, **(facts.get("timing") or {})}.get("data_share")
    if not _number(share):
        return ""
    slow = (
        "a faster disk or more workers would shorten it"
        if share >= LOADING
        else "loading data was not what took the time"
    )
    return f"{_short(_percent(share))} % of the training was spent waiting for data: {slow}"


def _parity(parity: Facts | None) -> dict[str, Any] | None:
    if not parity:
        return None
    rows = []
    if _number(parity.get("agreement")):
        samples = f" of {parity['samples']:,} inputs" if _number(parity.get("samples")) else ""
        rows.append(("same top-1 answer", f"{_share(parity['agreement'])}{samples}"))
    if _number(parity.get("largest_difference")):
        ulp = f" ({_short(parity['ulp'])} units in the last place)" if _number(parity.get("ulp")) else ""
        rows.append(("largest difference of an output", f"{parity['largest_difference']:.3g}{ulp}"))
    first = parity.get("first_diverging_layer")
    rows.append(("first layer that differs", str(first) if first else "none"))
    for name, one in (parity.get("also") or {}).items():
        differs = one.get("first_diverging_layer")
        rows.append(
            (
                f"the same file on {name}",
                f"{_share(one['agreement'])} same top-1, {f'first differs at {differs}' if differs else 'no layer differs'}",
            )
        )
    known = {"agreement", "samples", "largest_difference", "ulp", "first_diverging_layer", "layers", "passed", "also"}
    rows += [
        (str(key).replace("_", " "), plain(value)) for key, value in parity.items() if key not in known and _told(value)
    ]
    layers = [
        (str(layer.get("name")), plain(layer.get("difference")))
        for layer in parity.get("layers") or []
        if _number(layer.get("difference"))
    ]
    return {"rows": rows, "layers": layers, "passed": parity.get("passed")}


def _provenance(provenance: Facts) -> dict[str, Any]:
    single = [(str(key), plain(value)) for key, value in provenance.items() if _told(value) and key != "recipe"]
    tables = [(str(key), _flat(value)) for key, value in provenance.items() if isinstance(value, Mapping) and value]
    commands = [str(command) for command in provenance.get("commands") or []]
    lists = [
        (str(key), ", ".join(map(plain, value)))
        for key, value in provenance.items()
        if isinstance(value, list) and key != "commands" and value
    ]
    return {
        "single": single + lists,
        "tables": tables,
        "commands": commands,
        "recipe": str(provenance.get("recipe") or ""),
    }


def _flat(value: Facts, prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if item in (None, [], {}):
            continue
        name = f"{prefix}{key}"
        rows += (
            _flat(item, f"{name}.")
            if isinstance(item, Mapping)
            else [(name, ", ".join(map(plain, item)) if isinstance(item, list) else plain(item))]
        )
    return rows


def _layers(layers: Sequence[Facts]) -> dict[str, Any] | None:
    if not layers:
        return None
    widest = max((layer.get("channels_before") or 0 for layer in layers), default=0) or 1
    rows = []
    for layer in layers:
        was, now, error = layer.get("channels_before"), layer.get("channels_after"), layer.get("error")
        decibels = -10 * math.log10(error) if _number(error) and error > 0 else None
        rows.append(
            {
                "name": str(layer.get("name")),
                "kept": f"{now:,} of {was:,}" if _number(was) and _number(now) else "",
                # The area stands for channels: square root, so that narrow layers stay visible.
                "width": _percent(math.sqrt(was / widest)) if _number(was) else 0,
                "share": _percent(now / was) if _number(was) and _number(now) and was else 0,
                "bits": _short(layer["bits"]) if _number(layer.get("bits")) else "",
                "activations": _short(layer["activation_bits"]) if _number(layer.get("activation_bits")) else "",
                "error": f"{decibels:.1f} dB" if decibels is not None else "",
                "clean": _percent(min(1.0, max(0.0, decibels / 60))) if decibels is not None else 0,
                "weak": decibels is not None and decibels < 20,
                "output": f"{layer['sqnr_db']:.1f} dB" if _number(layer.get("sqnr_db")) else "",
                "why": str(layer.get("why") or ""),
                "macs": count(layer["macs_after"]) if _number(layer.get("macs_after")) else "",
                "bytes": size(layer["bytes"]) if _number(layer.get("bytes")) else "",
            }
        )
    columns = {
        key: any(row[key] for row in rows)
        for key in ("kept", "bits", "activations", "error", "output", "why", "macs", "bytes")
    }
    noisy = sorted((layer for layer in layers if _number(layer.get("sqnr_db"))), key=lambda layer: layer["sqnr_db"])[:5]
    worst = [(str(layer.get("name")), f"{layer['sqnr_db']:.1f} dB") for layer in noisy]
    return {"rows": rows, "columns": columns, "worst": worst}


def _robustness(facts: Facts, before: Facts, after: Facts) -> dict[str, Any] | None:
    given = facts.get("robustness") or {}
    first = given.get("before") or (before.get("evaluation") or {}).get("robustness") or {}
    second = given.get("after") or (after.get("evaluation") or {}).get("robustness") or {}
    names = list(dict.fromkeys([*first, *second]))
    if not names:
        return None
    severities = list(
        dict.fromkeys(str(severity) for table in (first, second) for row in table.values() for severity in row)
    )
    rows = []
    for name in names:
        left = {str(key): value for key, value in (first.get(name) or {}).items()}
        right = {str(key): value for key, value in (second.get(name) or {}).items()}
        means = [_mean(side.values()) for side in (left, right)]
        rows.append(
            {
                "name": str(name).replace("_", " "),
                "means": [_share(mean) for mean in means],
                "widths": [_percent(mean) if mean is not None else 0 for mean in means],
                "change": _change_in_points(*means),
                "cells": [(_share(left.get(severity)), _share(right.get(severity))) for severity in severities],
            }
        )
    overall = [_mean([_mean(table[name].values()) for name in table]) for table in (first, second)]
    return {
        "rows": rows,
        "severities": severities,
        "overall": [_share(mean) for mean in overall],
        "change": _change_in_points(*overall),
    }
