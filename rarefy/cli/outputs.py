"""Where results go, and what is printed of them."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rarefy.artifact.words import STORES
from rarefy.cli.options import FileOptions
from rarefy.cli.terminal import say, show_json, show_table, size_text
from rarefy.errors import GoalMissed, InputError, SelfCheckFailed

# ------------------------------------------------------------------ where results go


def claim_folder(text: str, files: FileOptions | None = None, runtime: Any = "onnxruntime") -> str:
    """The folder may be made, or is one of ours (or empty), to be replaced: told before hours of work, not after.

    files: what is asked for beside it, of that runtime; none of its names is one that can't be.
    """
    path = Path(text)
    if (
        path.is_dir()
        and any(path.iterdir())
        and not ((path / "graph.json").is_file() and (path / "manifest.json").is_file())
    ):
        raise InputError(f"{text}: exists and was not saved by rarefy, so it is left alone; choose another --output")
    if path.exists() and not path.is_dir():
        raise InputError(f"{text}: is a file; --output names a folder")
    claim_parent(path)
    if os.path.lexists(path.absolute().parent / "manifest.json"):
        from rarefy.artifact import folder

        if folder.is_artifact(path.absolute().parent):
            raise InputError(f"{text}: lies in a saved folder, which holds files only; choose another --output")
    if files is not None:
        _claim_files(files, runtime)
    return str(path)


def claim_file(text: str, suffixes: Sequence[str], option: str = "--output") -> Path:
    path = Path(text)
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{text}: give a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise InputError(f"{text}: is a folder; {option} names a file")
    claim_parent(path, option)
    return path


def claim_pictures(text: str) -> Path:
    """A folder, there or not, that pictures are put into beside what is in it."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise InputError(f"{text}: is a file; --output names a folder")
    if (path / "manifest.json").exists():
        raise InputError(f"{text}: is a saved folder, whose files are sealed by their hashes; choose another --output")
    claim_parent(path / "picture")
    return path


def claim_parent(path: Path, option: str = "--output") -> None:
    parent = path.absolute().parent
    if os.path.lexists(parent / "manifest.json"):
        from rarefy.artifact import folder

        if folder.is_artifact(parent):  # files that are written there get into its manifest
            folder.check_open(parent)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror}); choose another {option}") from error


def readable(text: str, option: str) -> str:
    if not os.path.isfile(text):
        raise InputError(f"{option} {text}: no such file; make a pair of keys with `rarefy keygen`")
    return text


def _claim_files(files: FileOptions, runtime: Any) -> None:
    """Names that can be what they say: told before hours of work, not after."""
    from rarefy.deployment.export import runtime_of

    claim_store(files.store)
    if files.onnx is not None:
        runtime_of(claim_file(files.onnx, (".onnx",), "--onnx"), runtime)
    if files.report is not None:
        claim_file(files.report, (".html", ".htm"), "--report")


def claim_store(store: str | None) -> None:
    """Raises InputError for a way that no folder is stored in."""
    if store is not None and store not in STORES:
        raise InputError(f"--store {store}: is none of {', '.join(STORES)}; leave it out for {STORES[0]}")


def save_result(
    graph: Any,
    folder: str,
    source: Any,
    task: Any,
    as_json: bool,
    *,
    before: Any,
    files: FileOptions,
    runtime: Any = "onnxruntime",
) -> None:
    """Save, write what else is asked for, and show it. before: the graph that the step began with."""
    from rarefy.artifact import folder as folder_module
    from rarefy.deployment import description
    from rarefy.deployment import export as export_
    from rarefy.evaluation import measure
    from rarefy.graph.macs import count_macs

    description.remember_source(graph, source.preprocessing)
    if files.store is not None:
        graph.meta["store"] = files.store
    described = task.describe() if task is not None else None
    manifest = {"model": source.text, "weights": source.weights, "task": described}
    folder_module.save(graph, folder, manifest=manifest)
    step = graph.meta["history"][-1]
    found = {
        "folder": folder,
        "step": step["step"],
        "options": step["options"],
        "facts": step["facts"],
        "parameters": measure.count_parameters(graph),
        "macs": count_macs(graph),
        "weight_bytes": measure.weight_bytes(graph),
        "task": described,
        "taken": source.taken,
    }
    parity: dict[str, Any] = {}
    if files.onnx is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a parity that did not pass is raised below
            parity = export_.export(graph, files.onnx, runtime=runtime)
        found |= {"onnx": files.onnx, "parity": parity}
    if files.report is not None:
        _write_report(files.report, {"title": source.text}, graph, before, task, runtime)
        found["report"] = files.report
    if as_json:
        show_json(found)
    else:
        _show_result(found, source.text, task)
    if parity.get("passed") is False:
        raise SelfCheckFailed(f"{files.onnx}: {export_.doubt(parity, 'inputs')}")


def _write_report(path: str, facts: dict[str, Any], graph: Any, before: Any, task: Any, runtime: Any) -> None:
    from rarefy.artifact.folder import placing
    from rarefy.reports import report

    judged = None if task is None or task.data.val is None else task
    told = facts_of(facts, graph, before, judged, runtime)
    with placing(path) as place:
        report.report(told, place)


def facts_of(
    facts: dict[str, Any], graph: Any, before: Any, task: Any, runtime: Any, limit: int | None = None
) -> dict[str, Any]:
    """``facts``, and what is measured here and now of a model, and of the one before it, where there is one.

    task: that both are judged on; None: they are not.
    """
    from rarefy.deployment import latency
    from rarefy.evaluation import measure
    from rarefy.evaluation.evaluate import evaluate
    from rarefy.reports import facts as facts_module

    models = {"after": graph} if before is None else {"before": before, "after": graph}
    judged = None if task is None else evaluate(graph, task, reference=before, limit=limit)
    costs = measure.measure(models, runtime=runtime)
    for name in models:
        evaluation = judged if judged is None or name == "after" else judged.reference
        told = {} if evaluation is None else {"evaluation": evaluation.to_json()}
        facts[name] = {**facts.get(name, {}), **costs[name], **told}
    metric = ("top-1", "%") if judged is None else (judged.label, judged.unit)
    told_by = facts_module.told_by(graph.meta.get("history", []), *metric)
    doubt = latency.doubt(costs["after"]["latency_ms"])
    return {**told_by, **facts, "warnings": [doubt] if doubt else []}


def _show_result(found: Mapping[str, Any], name: str, task: Any) -> None:
    from rarefy.reports import pruned, units

    told = pruned.rows(found["facts"]) if found["step"] == "prune" else []
    facts = [
        (name.replace("_", " "), units.plain(value))
        for name, value in found["facts"].items()
        if value is not None and not isinstance(value, (Mapping, list, tuple))
    ]
    rows = [
        ("parameters", f"{found['parameters']:,}"),
        ("MACs", f"{found['macs']:,}"),
        ("weights", size_text(found["weight_bytes"])),
        *facts,
        *told,
        *unreadable_rows(task),
        ("saved in", found["folder"]),
        *((key, found[key]) for key in ("onnx", "report") if key in found),
    ]
    show_table(f"{found['step']}: {name}", ("what", "found"), rows)
    if told and (warning := pruned.warning(found["facts"])):
        say(f"warning: {warning}")


def unreadable_rows(task: Any) -> list[tuple[str, str]]:
    """Of each split, what could not be read, and what was wrong with its annotations."""
    said = task.describe() if task is not None else {}
    parts = {split: said[split] for split in ("train", "val") if isinstance(said.get(split), Mapping)}
    found = {split: one["unreadable"] for split, one in parts.items() if "unreadable" in one}
    return [
        *((f"left out of {split}", f"{one['count']:,}, the first is {one['first']}") for split, one in found.items()),
        *((f"wrong in {split}", fault) for split, one in parts.items() for fault in one.get("faults", ())),
    ]


# ------------------------------------------------------------------ printing


def show_report(facts: Mapping[str, Any], folder: str, as_json: bool) -> None:
    """The result, and exit 1 for a missed goal; one that is not shown by the images is none."""
    from rarefy.reports import view

    shown = view.view(facts)
    verdict = shown["verdict"]
    sentence, advice = (verdict["sentence"], verdict["advice"]) if verdict is not None else ("", [])
    if as_json:
        show_json(facts)
    else:
        show_comparison(facts)
        say(sentence)
        for warning in shown["warnings"]:
            say(f"warning: {warning}")
        say(f"report: {Path(folder) / 'report.html'}")
    more = f"; try: {'; '.join(advice)}" if advice else ""
    if verdict is not None and verdict["status"] == "not shown" and more and not as_json:
        say(more.removeprefix("; "))
    if any(goal["status"] == "missed" for goal in shown["goals"]):
        raise GoalMissed(f"{sentence} The best model found is in {folder}{more}")
    parity = facts.get("parity") or {}
    if parity.get("passed") is False:
        layer = parity.get("first_diverging_layer")
        raise SelfCheckFailed(
            f"{folder}: the runtime's file gives the same answer as the model on {parity['agreement']:.1%} of "
            f"{parity['samples']} images only"
            f"{f', and {layer} is the first layer that differs' if layer else ''}; do not deploy it; name the layer "
            "in ignore= and run again"
        )


def show_comparison(facts: Mapping[str, Any]) -> None:
    from rarefy.reports import view

    shown = view.view(facts)
    both = "before" in facts
    columns = ("", *shown["names"], "change") if both else ("", shown["names"][1])
    rows = [
        (row["label"], row["before"], row["after"], f"{row['change']}{'; ' + row['note'] if row['note'] else ''}")
        if both
        else (row["label"], row["after"])
        for row in shown["comparison"]
    ]
    show_table("", columns, rows)
    if shown["robustness"]:
        drawn = cast(list[dict[str, Any]], shown["robustness"]["rows"])
        worse = [
            (row["name"], *row["means"], row["change"]) if both else (row["name"], row["means"][1]) for row in drawn
        ]
        show_table("robustness, mean of the strengths", ("corruption", *columns[1:]), worse)
    for step in shown["steps"]:
        if step["kept"] is False:
            say(f"undone: {step['name']}: {step['why']}")
