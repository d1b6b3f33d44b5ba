"""report(): what was done to a model and what came of it, as one HTML file, as JSON, and as text.

The HTML file is self-contained: no network, no script (a Content-Security-Policy in it forbids both), figures as inline SVG and
plain boxes, light and dark, printable. Everything is escaped: names of models and layers come from files. It leaves out what it
is not told; it computes ratios and sentences from the facts, and never a fact.

The facts are one JSON-able dictionary. Every key is optional::

    title        str      what was compressed, "timm:resnet18 on imagefolder:data"
    verdict      {"status": "met" | "missed" | "none", "sentence": str, "advice": [str]}     made from the goals where missing
    goals        [{"name": "max_drop" | "speedup" | "size" | any text, "asked": number, "reached": number, "met": bool, "advice": str}]
                          max_drop is a share (0.005), speedup a ratio, size in bytes; "unit" says it for other names:
                          "share" | "ratio" | "bytes" | "ms"
    warnings     [str]    what makes the comparison worthless, such as an original without its weights
    before       the original, and
    after        the result:
        {"name": str,
         "evaluation": Evaluation.to_json(): metric, value, interval (lo, hi), samples, top5, worst_class {index, name, value, samples},
                       calibration_error, agreement, drop {value, interval}, robustness {corruption: {severity: value}},
         "parameters": int, "macs": int (batch 1), "size_bytes": int (weights on disk), "peak_memory_bytes": int,
         "latency_ms": number | {"median", "low", "high", "batch", "threads", "runtime", "repeats"},
         "speedup": {"median", "low", "high"} of the ratios to the original, or {"original": those}}
    frontier     [{"name": str, "value": share, "interval": [lo, hi], "latency_ms": number, "size_bytes": int, "chosen": bool}]
    layers       [{"name": str, "channels_before": int, "channels_after": int, "bits": number, "activation_bits": number,
                   "error": noise power / signal power, "sqnr_db": of its output, "why": it stays in float, "macs_before": int, "macs_after": int, "bytes": int}]
    steps        [{"step": str, "options": {}, "facts": {}, "seconds": number, "kept": bool, "why": str,
                   "value": share after it, "latency_ms": number, "size_bytes": int}]
    curves       [{"title": str, "x": str, "y": str, "series": [{"name": str, "x": [number], "y": [number]}]}]
    parity       {"agreement": share, "samples": int, "largest_difference": number, "ulp": number, "first_diverging_layer": str | None,
                  "layers": [{"name": str, "difference": number}], "passed": bool}
    robustness   {"before": {corruption: {severity: value}}, "after": ...}                    taken from the evaluations where missing
    provenance   {"environment": {}, "hashes": {}, "commands": [str], "seed": int, "recipe": str, "created": str, ...}

A number that is None, NaN or infinite counts as not told.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from rarefy.errors import InputError

Facts = Mapping[str, Any]

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


def report(facts: Facts, path: str | os.PathLike[str]) -> Path:
    """Write the HTML file at ``path`` and the same facts as JSON beside it (``report.html``, ``report.json``).

    A file there is replaced. Raises InputError for another suffix, OSError where it can't be written.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{target}: a report is an HTML file; give a name that ends in .html")
    target.parent.mkdir(parents=True, exist_ok=True)
    for file, content in ((target, html(facts)), (target.with_suffix(".json"), as_json(facts))):
        partial = file.with_name(f".{file.name}.part")
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, file)
    return target


def told_by(history: Sequence[Facts]) -> dict[str, Any]:
    """The facts ``steps``, ``layers`` and ``curves`` as a graph's ``meta["history"]`` tells them."""
    steps: list[dict[str, Any]] = []
    layers: dict[str, dict[str, Any]] = {}
    curves: list[dict[str, Any]] = []
    for record in history:
        facts = record.get("facts") or {}
        step = {"step": record.get("step"), "options": record.get("options") or {}, "facts": facts}
        spent = (facts.get("timing") or {}).get("seconds")
        steps.append(step if spent is None else {**step, "seconds": spent})
        for parameter, (was, now) in (facts.get("channels") or {}).items():
            layer = layers.setdefault(parameter.removesuffix(".weight"), {"name": parameter.removesuffix(".weight")})
            layer.setdefault("channels_before", was)
            layer["channels_after"] = now
        for told in facts.get("layers") or []:
            layers.setdefault(told["name"], {"name": told["name"]}).update(
                {key: told[key] for key in ("bits", "activation_bits", "error", "sqnr_db", "bytes") if told.get(key) is not None}
            )
        for name, why in facts.get("reasons") or []:
            if name in (facts.get("float") or []):
                layers.setdefault(name, {"name": name})["why"] = why
        if facts.get("curve"):
            curves += _curves_of(str(record.get("step")), facts["curve"])
    return {"steps": steps, "layers": list(layers.values()), "curves": curves}


def _curves_of(step: str, points: Sequence[Facts]) -> list[dict[str, Any]]:
    epochs = [point.get("epoch") for point in points]
    loss = {"title": f"{step}: loss", "x": "epoch", "y": "loss"}
    value = {"title": f"{step}: accuracy on the validation data", "x": "epoch", "y": "top-1, %"}
    seen = [(point.get("epoch"), 100 * point["val"]) for point in points if _number(point.get("val"))]
    found = [{**loss, "series": [{"name": "training loss", "x": epochs, "y": [point.get("loss") for point in points]}]}]
    if seen:
        found.append(
            {
                **value,
                "series": [{"name": "student" if step == "distill" else "model", "x": [x for x, _ in seen], "y": [y for _, y in seen]}],
            }
        )
    return found


def as_json(facts: Facts) -> str:
    """The facts as JSON text, keys in the order given; NaN and infinity become null."""
    return json.dumps(_clean(facts), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def html(facts: Facts) -> str:
    """The facts as one HTML page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rarefy.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(view(facts)) + "\n"


def summary(facts: Facts) -> str:
    """The facts in a few lines of text: the verdict, the comparison, what was undone."""
    shown = view(facts)
    lines = [shown["verdict"]["sentence"]] if shown["verdict"] else []
    lines += [f"  try: {advice}" for advice in (shown["verdict"] or {}).get("advice", [])]
    lines += [f"warning: {warning}" for warning in shown["warnings"]]
    if shown["comparison"]:
        rows = [
            ("", "before", "after", "change"),
            *((row["label"], row["before"], row["after"], row["change"]) for row in shown["comparison"]),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines += ["", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)]
    undone = [step for step in shown["steps"] if step["kept"] is False]
    if undone:
        lines += ["", *(f"undone: {step['name']}: {step['why'] or 'it did not pay'}" for step in undone)]
    return "\n".join(lines) + "\n"


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
            missed = "; ".join(f"{goal['label']} {goal['reached']} instead of {goal['asked']}" for goal in goals if not goal["met"])
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
    return {"share": _points, "ratio": lambda ratio: f"{_short(ratio)}×", "bytes": size, "ms": _ms}.get(str(unit), _short)(value)


def _comparison(before: Facts, after: Facts) -> list[dict[str, Any]]:
    """The rows of the table; ``tile`` marks those also shown large."""
    rows: list[dict[str, Any]] = []
    first, second = before.get("evaluation") or {}, after.get("evaluation") or {}

    def add(
        label: str, term: str, left: str, right: str, change: str = "", note: str = "", good: bool | None = None, tile: bool = False
    ) -> None:
        if left or right:
            rows.append(
                {"label": label, "term": term, "before": left, "after": right, "change": change, "note": note, "good": good, "tile": tile}
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
        *(_gain(_median(before), _median(after), "faster", "slower") if ratio is None else _gain(ratio, 1.0, "faster", "slower")),
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
    add("calibration error", "calibration error", _share(first.get("calibration_error")), _share(second.get("calibration_error")))
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
        [f"{_short(latency['low'])} to {_short(latency['high'])}"] if _number(latency.get("low")) and _number(latency.get("high")) else []
    )
    inside += [f"batch {latency['batch']}"] if _number(latency.get("batch")) else []
    inside += [f"{latency['threads']} thread{'s' if latency['threads'] != 1 else ''}"] if _number(latency.get("threads")) else []
    inside += [str(latency["runtime"])] if latency.get("runtime") else []
    return _ms(latency["median"]) + (f" ({', '.join(inside)})" if inside else "")


def _median(model: Facts) -> Any:
    latency = model.get("latency_ms")
    return latency.get("median") if isinstance(latency, Mapping) else latency


def _speedup(model: Facts) -> float | None:
    """The median of the ratios within rounds, which goals are judged by too, and not the ratio of two medians."""
    told = model.get("speedup")
    told = told.get("original", told) if isinstance(told, Mapping) else {}
    return told["median"] if isinstance(told, Mapping) and _number(told.get("median")) else None


def _step(step: Facts) -> dict[str, Any]:
    options = ", ".join(
        f"{key}={plain(value)}" for key, value in (step.get("options") or {}).items() if not _neutral(value) and key != "seed"
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
    slow = "a faster disk or more workers would shorten it" if share >= LOADING else "loading data was not what took the time"
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
    rows += [(str(key).replace("_", " "), plain(value)) for key, value in parity.items() if key not in known and _told(value)]
    layers = [
        (str(layer.get("name")), plain(layer.get("difference"))) for layer in parity.get("layers") or [] if _number(layer.get("difference"))
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
    return {"single": single + lists, "tables": tables, "commands": commands, "recipe": str(provenance.get("recipe") or "")}


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
                {"label": label, "before": form(left), "after": form(right), "left": _percent(left / top), "right": _percent(right / top)}
            )
    return found


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
    columns = {key: any(row[key] for row in rows) for key in ("kept", "bits", "activations", "error", "output", "why", "macs", "bytes")}
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
    severities = list(dict.fromkeys(str(severity) for table in (first, second) for row in table.values() for severity in row))
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
    return {"rows": rows, "severities": severities, "overall": [_share(mean) for mean in overall], "change": _change_in_points(*overall)}


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460.0, 240.0, 58.0, 14.0, 12.0, 42.0


def _chart(curve: Facts) -> dict[str, Any] | None:
    """Lines over a grid."""
    series = []
    for item in curve.get("series") or []:
        points = [(x, y) for x, y in zip(item.get("x") or [], item.get("y") or [], strict=False) if _number(x) and _number(y)]
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
            {"name": name, "path": path, "dot": placed[0] if len(placed) == 1 else None, "colour": index % 5, "last": _short(points[-1][1])}
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
    key, form = ("latency_ms", "latency, ms") if any(_number(item.get("latency_ms")) for item in candidates) else ("size_bytes", "size, MB")
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
        (x + side * 9 - (width if side < 0 else 0), y + shift) for shift in (4, -8, 17, -21, 30, -34, 43, -47, 56) for side in (1, -1)
    ]
    places += [(min(max(x - width / 2, _LEFT), _WIDTH - width), y + shift) for shift in (-13, 21, -26, 34, -39, 47)]

    def free(place: tuple[float, float]) -> bool:
        left, top, right, bottom = _around(*place, width)
        inside = left >= _LEFT and right <= _WIDTH and top >= 0 and bottom <= _HEIGHT - _BOTTOM
        return inside and not any(left < other[2] and other[0] < right and top < other[3] and other[1] < bottom for other in taken)

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
    return (value[0], value[1]) if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_number, value)) else None


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
