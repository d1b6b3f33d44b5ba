"""Where results go, and what is printed of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rarefy.cli.terminal import say, show_json, show_table, size_text
from rarefy.errors import GoalMissed, InputError, SelfCheckFailed

# ------------------------------------------------------------------ where results go


def claim_folder(text: str) -> str:
    """The folder may be made, or is one of ours (or empty), to be replaced: told before hours of work, not after."""
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
    return str(path)


def claim_file(text: str, suffixes: Sequence[str]) -> Path:
    path = Path(text)
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{text}: give a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise InputError(f"{text}: is a folder; --output names a file")
    claim_parent(path)
    return path


def claim_parent(path: Path, option: str = "--output") -> None:
    parent = path.absolute().parent
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


def save_result(graph: Any, folder: str, source: Any, task: Any, as_json: bool) -> None:
    from rarefy.artifact import folder as folder_module
    from rarefy.evaluation import measure
    from rarefy.graph.macs import count_macs

    manifest = {"model": source.text, "weights": source.weights, "task": task.describe() if task is not None else None}
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
    }
    if as_json:
        show_json(found)
        return
    from rarefy.reports import units

    facts = [
        (name.replace("_", " "), units.plain(value))
        for name, value in step["facts"].items()
        if value is not None and not isinstance(value, (Mapping, list, tuple))
    ]
    rows = [
        ("parameters", f"{found['parameters']:,}"),
        ("MACs", f"{found['macs']:,}"),
        ("weights", size_text(found["weight_bytes"])),
        *facts,
        *unreadable_rows(task),
        ("saved in", folder),
    ]
    show_table(f"{step['step']}: {source.text}", ("what", "found"), rows)


def unreadable_rows(task: Any) -> list[tuple[str, str]]:
    """Of each split, what could not be read."""
    said = task.describe() if task is not None else {}
    found = {split: said[split]["unreadable"] for split in ("train", "val") if "unreadable" in said.get(split, {})}
    return [(f"left out of {split}", f"{one['count']:,}, the first is {one['first']}") for split, one in found.items()]


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
