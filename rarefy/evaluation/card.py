"""README.md of a model: what it is, what was measured of it, how it is fed, which files there are, and its licences.

It is written from what the folder says of itself: the graph (``deployment/description.py``), its history, and the
report where one lies beside it. Its head is the YAML that the Hugging Face hub reads of a model card. What names of
classes, layers and files say is text, whatever marks they hold. The licence of a model is its owner's to say:
``unknown`` stands there until somebody does (``rarefy card FOLDER --license apache-2.0``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import fx

from rarefy.artifact import folder as folder_
from rarefy.artifact.snapshot import hold
from rarefy.deployment import description
from rarefy.errors import InputError
from rarefy.evaluation import recorded
from rarefy.graph import history
from rarefy.graph.nodes import Value
from rarefy.reports import view
from rarefy.reports.units import plain
from rarefy.system.files import content
from rarefy.system.text import one_line

README = "README.md"
MOST_BYTES = 2**20  # of one that the user wrote
MOST_CLASSES = 20  # that are named
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
FILES = {
    "graph.json": "the network, as data: no code",
    "weights.safetensors": "the weights",
    "manifest.json": "how it was made; the hash of every file",
    "model.sig": "the signature",
    "model.onnx": "what is deployed",
    "model.xml": "OpenVINO's form of it, its weights in `model.bin`",
    "model.zip": "torch.compile's form of it",
    "report.html": "what was done, and what came of it",
    "report.json": "the same, for programs",
    "predict.py": "pictures through `model.onnx`",
    README: "this page",
}

Rows = Sequence[Sequence[object]]


def text(
    graph: fx.GraphModule, facts: Mapping[str, object] | None = None, files: Collection[str] = (), license: str = ""
) -> str:
    """The page.

    facts: of the report (``rarefy/reports/facts.py``). files: names of the folder's. license: of the model, as the hub
    spells it (``apache-2.0``).

    Raises InputError for a licence that is none, FormatError for facts that are none.
    """
    if license and not LICENSE.fullmatch(license):
        raise InputError(f"license={license!r}: write it as the hub does, in small letters: apache-2.0, mit, cc-by-4.0")
    told = description.of(graph)
    parts = [_head(told, license), _what(graph, told, facts), _measured(facts), _fed(told), _made(graph)]
    parts += [_files({*files, README}), _licences(license)]
    return "\n".join(part for part in parts if part)


def write(folder: str | os.PathLike[str], *, license: str = "", source: str | os.PathLike[str] | None = None) -> Path:
    """README.md put into a saved folder and its manifest; one that is there is replaced.

    source: a file of the user's own, taken as it is; None: ``text`` of what the folder says. Raises InputError for a
    signed folder, FormatError for one that is not as it was saved.
    """
    folder_.check_open(Path(folder))
    if source is None:
        page = of_folder(folder, license=license).encode()
    elif license:
        raise InputError("card: a page of one's own says its licence itself; leave out --license, or --from")
    else:
        page = content(Path(source), MOST_BYTES)
    folder_.add(folder, {README: page})
    return Path(folder) / README


def of_folder(folder: str | os.PathLike[str], *, license: str = "") -> str:
    """The page of a saved folder. Raises FormatError."""
    with hold(folder) as held:
        facts = recorded.of_folder(held)
        return text(held.graph(), facts, held.manifest["files"], license)


def _head(told: Mapping[str, Value], license: str) -> str:
    tasks = {"classification": "image-classification", "detection": "object-detection"}
    lines = ["---", "library_name: rarefy", f"license: {license or 'unknown'}"]
    if str(told.get("task")) in tasks and isinstance(told.get("preprocessing", told.get("feed")), Mapping):
        lines.append(f"pipeline_tag: {tasks[str(told['task'])]}")
    return "\n".join([*lines, "tags:", "- model-compression", "- rarefy", "---", ""])


def _what(graph: fx.GraphModule, told: Mapping[str, Value], facts: Mapping[str, object] | None) -> str:
    shown = view.view(facts) if facts is not None else None
    title = _safe(shown["title"]) if shown is not None else "A compressed model"
    names = told.get("class_names")
    steps = ", ".join(dict.fromkeys(_safe(record["step"]) for record in history.records(graph)))
    lines = [f"# {title}", ""]
    task = f"A model for {_safe(told['task'])}" if "task" in told else "A model"
    lines.append(
        f"{task}, made smaller with [rarefy](https://pypi.org/project/rarefy/){f' ({steps})' if steps else ''}."
    )
    if isinstance(names, (list, tuple)):
        shown_names = ", ".join(_safe(one) for one in names[:MOST_CLASSES])
        lines.append(
            f"It tells {len(names)} classes apart: {shown_names}{', ...' if len(names) > MOST_CLASSES else ''}."
        )
    if shown is not None and shown["verdict"] is not None:
        lines += ["", _safe(shown["verdict"]["sentence"])]
    return "\n".join([*lines, ""])


def _measured(facts: Mapping[str, object] | None) -> str:
    lines = ["## Measured", ""]
    if facts is None:
        return "\n".join([*lines, "Nothing is recorded; `rarefy report FOLDER --data ...` measures.", ""])
    shown = view.view(facts)
    both = any(row["before"] for row in shown["comparison"])
    rows = [
        (
            row["label"],
            *([row["before"]] if both else []),
            row["after"],
            "; ".join(filter(None, (row["change"], row["note"]))),
        )
        for row in shown["comparison"]
    ]
    lines += _table(("", *([shown["names"][0]] if both else []), shown["names"][1], "change"), rows)
    lines += ["", "Ranges in brackets hold the true value with 95 % confidence."]
    lines += [f"Warning: {_safe(warning)}" for warning in shown["warnings"]]
    return "\n".join([*lines, ""])


def _fed(told: Mapping[str, Value]) -> str:
    inputs = told["inputs"]
    assert isinstance(inputs, list)
    rows = [
        (f"input `{_code(one['name'])}`", f"{_shape(one['shape'])}, {one['dtype']}")
        for one in inputs
        if isinstance(one, Mapping)
    ]
    rows.append((f"answer `{_code(told['answer'])}`", f"ends in {told['answer_ends_in']}"))
    known = told.get("feed", told.get("preprocessing"))
    if isinstance(known, Mapping):
        rows += [(str(key), plain(value)) for key, value in known.items()]
    code = '```python\nimport rarefy\n\nmodel = rarefy.load("FOLDER")  # an nn.Module; no code of the folder runs\n```'
    return "\n".join(["## How to feed it", "", *_table(("what", "value"), rows), "", code, ""])


def _made(graph: fx.GraphModule) -> str:
    records = history.records(graph)
    if not records:
        return ""
    rows = [
        (one["step"], ", ".join(f"{key}={plain(value)}" for key, value in one["options"].items() if value is not None))
        for one in records
    ]
    return "\n".join(["## How it was made", "", *_table(("step", "options"), rows), ""])


def _files(names: Collection[str]) -> str:
    rows = [
        (f"`{name}`", FILES.get(name, ""))
        for name in sorted({*names, "graph.json", "weights.safetensors", "manifest.json"})
    ]
    return "\n".join(["## Files", "", *_table(("file", "what"), rows), ""])


def _licences(license: str) -> str:
    rows = [
        ("these weights", license or "*to be filled in*"),
        ("the original's weights", "*to be filled in*"),
        ("the training data", "*to be filled in*"),
    ]
    return "\n".join(["## Licences", "", *_table(("of", "licence"), rows), ""])


def _table(head: Sequence[object], rows: Rows) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    own = re.compile(r"`[A-Za-z0-9._-]+`|\*to be filled in\*|(input|answer) `[A-Za-z0-9._-]+`|---")
    cells = ((str(one) if own.fullmatch(str(one)) else _safe(one) for one in line) for line in lines)
    return [f"| {' | '.join(line)} |" for line in cells]


def _safe(value: object) -> str:
    """Text in which nothing is a mark of Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~])", r"\\\1", one_line(value))


def _code(value: object) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", str(value))


def _shape(value: object) -> str:
    return " x ".join(["N", *(str(one) for one in value)]) if isinstance(value, (list, tuple)) else str(value)
