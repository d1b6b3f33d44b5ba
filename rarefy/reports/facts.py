from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.reports.units import _number

Facts = Mapping[str, Any]


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
                {
                    key: told[key]
                    for key in ("bits", "activation_bits", "error", "sqnr_db", "bytes")
                    if told.get(key) is not None
                }
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
                "series": [
                    {
                        "name": "student" if step == "distill" else "model",
                        "x": [x for x, _ in seen],
                        "y": [y for _, y in seen],
                    }
                ],
            }
        )
    return found
