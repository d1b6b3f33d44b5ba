"""What the program says of itself and of this machine: ``rarefy demo``, ``list``, ``doctor``."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated, Any

import typer

from rarefy.cli.options import Json, Seed, app
from rarefy.cli.outputs import claim_folder, show_report
from rarefy.cli.terminal import say, show_json, show_table, size_text
from rarefy.errors import InputError

PRESETS = {
    "fast": "10 epochs: a look at what distillation will give",
    "normal": "30 epochs: the default",
    "patient": "200 epochs on mixed pictures: the most accuracy",
}


@app.command()
def demo(
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FOLDER", help="Where the result goes.")
    ] = "demo-out",
    task: Annotated[
        str, typer.Option(metavar="TASK", help="classification (scikit-learn's digits) or detection (drawn shapes).")
    ] = "classification",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a small network, compress it, and save, sign and explain the result: two to four minutes, no download."""
    from rarefy.demo import demonstrate

    small = claim_folder(os.path.join(output, "small"))
    claim_folder(os.path.join(output, "original"))
    facts = demonstrate(output, seed=seed, task=task)
    show_report(facts, small, as_json)


@app.command("list")
def list_choices(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="criteria, losses, rounding, ...: without one, all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The choices that come with rarefy, a line each, with their options."""
    from rarefy import plugins

    if kind is not None and kind not in plugins.KINDS:
        raise InputError(f"no kind {kind!r}; have {', '.join(plugins.KINDS)}")
    found = {
        name: [_choice(name, choice) for choice in plugins.available(name)]
        for name in ([kind] if kind else plugins.KINDS)
    }
    if as_json:
        show_json(found)
        return
    if kind is None:
        rows = list(PRESETS.items())
        show_table("to start with: --preset of distill, training= in Python", ("preset", "what"), rows)
    for name, choices in found.items():
        show_table(
            name,
            ("choice", "what", "options"),
            [
                (item["name"], item["summary"], " ".join(f"{key}={value}" for key, value in item["options"].items()))
                for item in choices
            ],
        )


def _choice(kind: str, name: str) -> dict[str, Any]:
    from rarefy import plugins

    options = {}
    for field in dataclasses.fields(plugins.choice_class(kind, name)):
        options[field.name] = "..." if field.default is dataclasses.MISSING else field.default
    return {"name": name, "summary": plugins.summary(kind, name), "options": options}


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can do, what is missing, and how to get it."""
    from rarefy.compression.environment import examine

    found = examine()
    if as_json:
        show_json(found)
        return
    cpu, torch = found["cpu"], found["torch"]
    flags = (
        "the system does not say"
        if cpu["flags"] is None
        else ", ".join(name for name, have in cpu["flags"].items() if have) or "none of note"
    )
    rows = [
        ("system", f"{found['system']}, Python {found['python']}"),
        ("processor", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores usable"),
        ("instructions", flags),
        ("memory", size_text(found["memory_bytes"])),
        ("torch", f"{torch['version']}, {torch['threads']} threads, {torch['vector']}"),
        *(
            ("GPU", f"{gpu['name']}, compute capability {gpu['compute_capability']}, {size_text(gpu['memory_bytes'])}")
            for gpu in found["gpus"]
        ),
        *((f"runtime {name}", version or "not installed") for name, version in found["runtimes"].items()),
        *(
            (name, version or "not installed")
            for name, version in found["packages"].items()
            if name not in ("torch", *found["runtimes"])
        ),
    ]
    show_table("this machine", ("what", "found"), rows)
    for sentence in found["advice"]:
        say(f"* {sentence}")
