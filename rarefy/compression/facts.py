"""The facts of a run, which its report shows: what was asked, what came of each step, what the result is."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from torch import fx

from rarefy import plugins
from rarefy.artifact import folder as folder_
from rarefy.compression import budget
from rarefy.compression.candidate import Candidate
from rarefy.compression.comparison import Comparison
from rarefy.compression.environment import examine
from rarefy.compression.gates import Outcome
from rarefy.compression.run import Run
from rarefy.deployment import latency
from rarefy.graph import history
from rarefy.graph.macs import layer_macs
from rarefy.graph.nodes import attribute
from rarefy.kernels.int_linear import CODES
from rarefy.reports import facts as reported
from rarefy.reports import view
from rarefy.reports.facts import Facts, Verdict
from rarefy.tasks.metric import Metric


def of(
    run: Run,
    title: str,
    recipe: str,
    candidates: Mapping[int, Candidate],
    outcomes: Sequence[Outcome],
    result: Candidate,
    compared: Comparison,
    fingerprints: Mapping[str, str],
) -> Facts:
    """All that the report shows of a run that is done.

    title, recipe: what the report calls it, and the recipe's text.
    candidates: the original, 0, and what the steps made, by index. outcomes: of the steps. result: the candidate
        chosen.
    compared: it and the original, measured side by side. fingerprints: of the data, a split.
    """
    original, metric = candidates[0], run.task.metric()
    before, after = compared.before, compared.after
    drop = after["evaluation"]["drop"]
    warnings = before["evaluation"].get("warnings", [])
    told = Facts(
        title=title or "a compressed model",
        goals=budget.goals(
            run.budget,
            drop=drop["value"] if drop else 0.0,
            speedup=after["speedup"]["original"]["median"],
            size=after["size_bytes"],
            macs=after["macs"] / max(1, before["macs"]),
            parameters=after["parameters"] / max(1, before["parameters"]),
            unit=metric.unit,
            interval=drop.get("interval") if drop else None,
            samples=after["evaluation"].get("samples"),
        ),
        warnings=[
            *(f"the original: {warning}" for warning in warnings),
            *(f"{one.name}, when it was judged: {doubt}" for one in candidates.values() if (doubt := _doubt(one))),
            *compared.doubts,
        ],
        before={"name": "original", **before},
        after={"name": result.name, **after},
        steps=[_step(one, candidates) for one in outcomes],
        frontier=[_point(one, chosen=one.index == result.index) for one in candidates.values()],
        layers=layers(original.graph, result.graph),
        curves=[chart for one in candidates.values() for chart in _curves(one, metric)],
        parity=compared.parity,
        pictures=compared.pictures,
        provenance=_provenance(run, recipe, original, result, fingerprints),
    )
    verdict = view.view(told)["verdict"]
    if verdict is not None:
        told["verdict"] = Verdict(status=verdict["status"], sentence=verdict["sentence"], advice=verdict["advice"])
    return told


def _doubt(candidate: Candidate) -> str:
    return latency.doubt(candidate.record["latency_ms"]) if "latency_ms" in candidate.record else ""


def _step(outcome: Outcome, candidates: Mapping[int, Candidate]) -> reported.Step:
    step = reported.Step(
        step=str(outcome.step["do"]),
        options={key: value for key, value in outcome.step.items() if key != "do"},
        kept=outcome.kept,
        why=outcome.why,
    )
    if outcome.result is None:
        return step
    record = candidates[outcome.result.index].record
    if "latency_ms" in record:
        step["latency_ms"] = record["latency_ms"]["median"]
    return {
        **step,
        "facts": {key: value for key, value in record["facts"].items() if value is not None},
        "seconds": record["seconds"],
        "value": outcome.result.value,
        "size_bytes": outcome.result.size,
    }


def _curves(candidate: Candidate, metric: Metric) -> list[reported.Curve]:
    epochs = candidate.record.get("curve") or []
    return reported.curves(candidate.name, epochs, metric.label, metric.unit, "validation", ("loss", "val"))


def _point(candidate: Candidate, chosen: bool) -> reported.Point:
    point = reported.Point(
        name=candidate.name,
        value=candidate.measurement.value,
        interval=candidate.record["evaluation"]["interval"],
        size_bytes=candidate.measurement.size,
        chosen=chosen,
    )
    if "latency_ms" in candidate.record:
        point["latency_ms"] = candidate.record["latency_ms"]["median"]
    return point


def _provenance(
    run: Run, recipe: str, original: Candidate, result: Candidate, fingerprints: Mapping[str, str]
) -> dict[str, object]:
    machine, described = examine(), run.task.describe()
    content = folder_.content_hash(original.folder)
    files = (folder_.GRAPH, folder_.WEIGHTS, run.model_file)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": run.seed,
        "chosen": result.index,
        "runtime": plugins.describe(run.runtime),
        "budget": {name: value for name, value in dataclasses.asdict(run.budget).items() if value is not None},
        "data": {split: described[split] for split in ("train", "val") if split in described},
        "hashes": {
            "original": content,
            "teacher": content,
            **{f"data.{split}": digest for split, digest in fingerprints.items()},
            **{name: hashlib.sha256((result.folder / name).read_bytes()).hexdigest() for name in files},
        },
        "environment": {
            **{name: machine[name] for name in ("python", "system", "runtimes")},
            "cpu": {name: machine["cpu"][name] for name in ("name", "usable_cores")},
            "torch": machine["torch"]["version"],
            "gpus": [gpu["name"] for gpu in machine["gpus"]],
        },
        "recipe": recipe,
    }


# ------------------------------------------------------------------------------------------------------------- layers


def layers(before: fx.GraphModule, after: fx.GraphModule) -> list[reported.Layer]:
    """Each layer with a weight: channels and MACs on both sides, and how it was quantised."""
    was, now = _weights(before), _weights(after)
    record = history.last(after, "quantize")
    facts = record["facts"] if record is not None else {}
    rounded = {layer.get("weight", layer["name"]): layer for layer in facts.get("layers", [])}
    reasons = dict(facts.get("reasons") or ())
    rows: list[reported.Layer] = []
    for weight, (channels, macs) in was.items():
        name = weight.removesuffix(".weight")
        row = reported.Layer(name=name, channels_before=channels, macs_before=macs)
        if weight in now:
            row["channels_after"], row["macs_after"] = now[weight]
            row["bits"] = row["activation_bits"] = 32
        quantized = rounded.get(weight) or rounded.get(name)
        if quantized is not None:
            row.update(reported.rounding(quantized))
        elif name in reasons:
            row["why"] = reasons[name]
        rows.append(row)
    return rows


def _weights(graph: fx.GraphModule) -> dict[str, tuple[int, int]]:
    """{name of the weight: (output channels, MACs)}."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found: dict[str, tuple[int, int]] = {}
    for name, macs in layer_macs(graph).items():
        source = nodes[name].args[1] if len(nodes[name].args) > 1 else None
        while isinstance(source, fx.Node) and source.op == "call_function" and source.args:
            source = source.args[0]
        if isinstance(source, fx.Node) and source.op == "get_attr":
            weight = attribute(graph, source.target)
            found[str(source.target).removesuffix(CODES)] = (weight.shape[0], macs)
    return found
