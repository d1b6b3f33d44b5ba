from __future__ import annotations

from typing import Any

from torch import fx

from rarefy.compression.candidate import Candidate, Outcome
from rarefy.evaluation import measure
from rarefy.graph.macs import layer_macs

# ------------------------------------------------------------------ what the report shows


def _step_facts(outcome: Outcome) -> dict[str, Any]:
    step = {"step": outcome.step["do"], "options": {key: value for key, value in outcome.step.items() if key != "do"}}
    told = {**step, "kept": outcome.kept, "why": outcome.why}
    if outcome.candidate is None:
        return told
    found = outcome.candidate.found
    return {
        **told,
        "facts": {key: value for key, value in found["facts"].items() if value is not None},
        "seconds": found["seconds"],
        "value": outcome.candidate.value,
        "latency_ms": found["latency_ms"]["median"],
        "size_bytes": outcome.candidate.size,
    }


def _curves(candidate: Candidate) -> list[dict[str, Any]]:
    curve = candidate.found.get("curve") or []
    if not curve:
        return []
    epochs = [point["epoch"] for point in curve]
    charts = [{"title": f"{candidate.name}: loss", "x": "epoch", "y": "loss", "key": "loss", "scale": 1.0}]
    charts += [{"title": f"{candidate.name}: validation", "x": "epoch", "y": "top-1, %", "key": "val", "scale": 100.0}]
    return [
        {
            "title": one["title"],
            "x": one["x"],
            "y": one["y"],
            "series": [
                {
                    "name": one["key"],
                    "x": [epoch for epoch, point in zip(epochs, curve, strict=True) if point[one["key"]] is not None],
                    "y": [one["scale"] * point[one["key"]] for point in curve if point[one["key"]] is not None],
                }
            ],
        }
        for one in charts
    ]


def _layers(before: fx.GraphModule, after: fx.GraphModule) -> list[dict[str, Any]]:
    """Each layer with a weight: channels and MACs on both sides, and how it was quantised."""
    was, now = _weighted(before), _weighted(after)
    history = [record["facts"] for record in after.meta.get("history", []) if record["step"] == "quantize"]
    rounded = {layer.get("weight", layer["name"]): layer for layer in (history[-1]["layers"] if history else [])}
    reasons = dict(history[-1].get("reasons") or ()) if history else {}
    rows = []
    for name, (channels, macs) in was.items():
        row: dict[str, Any] = {"name": name.removesuffix(".weight"), "channels_before": channels, "macs_before": macs}
        if name in now:
            row |= {"channels_after": now[name][0], "macs_after": now[name][1], "bits": 32, "activation_bits": 32}
        facts = rounded.get(name) or rounded.get(row["name"])
        if facts is not None:
            row |= {
                key: facts[key] for key in ("bits", "activation_bits", "error", "sqnr_db") if facts.get(key) is not None
            }
        elif row["name"] in reasons:
            row["why"] = reasons[row["name"]]
        rows.append(row)
    return rows


def _weighted(graph: fx.GraphModule) -> dict[str, tuple[int, int]]:
    """{name of the weight: (output channels, MACs)}."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found: dict[str, tuple[int, int]] = {}
    for name, macs in layer_macs(graph).items():
        source = nodes[name].args[1] if len(nodes[name].args) > 1 else None
        while isinstance(source, fx.Node) and source.op == "call_function" and source.args:
            source = source.args[0]
        if isinstance(source, fx.Node) and source.op == "get_attr":
            target = str(source.target)
            weight: Any = (
                graph.get_parameter(target) if target in dict(graph.named_parameters()) else graph.get_buffer(target)
            )
            found[target.removesuffix(measure.CODES)] = (weight.shape[0], macs)
    return found


def _points(share: float) -> str:
    return f"{100 * share:.2f} points"
