"""``rarefy compress`` and ``rarefy run``: one budget, from the command line or from a recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy import plugins
from rarefy.cli.inputs import agreed_shape, check_data, device_of, fitted, loaded, output_count
from rarefy.cli.options import (
    _BUDGET,
    DataOptions,
    Device,
    Json,
    Key,
    LogsOption,
    ModelOptions,
    Output,
    PricesOption,
    Runtime,
    Seed,
    Store,
    app,
    given_only,
    grouped,
)
from rarefy.cli.outputs import claim_file, claim_folder, readable, show_report
from rarefy.compression.budget import Budget
from rarefy.errors import InputError

GOALS = {
    one.name: typer.Option(metavar=one.metadata["metavar"], help=one.metadata["help"], rich_help_panel=_BUDGET)
    for one in dataclasses.fields(Budget)
}  # of the budget; its shares and sizes are text here ("0.5%", "2MB")

Search = Annotated[
    str | None,
    typer.Option(
        metavar="LONG", help="Try many recipes, and keep the front: 60min or 2h of work, or so many trials, 40."
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A further runtime that a search times each model on. May be given repeatedly."),
]


@app.command()
@grouped
def compress(
    model: ModelOptions,
    data: DataOptions,
    output: Output,
    max_drop: Annotated[str | None, GOALS["max_drop"]] = None,
    speedup: Annotated[float | None, GOALS["speedup"]] = None,
    size: Annotated[str | None, GOALS["size"]] = None,
    step: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A step of your own recipe, in order: 'prune macs=0.5', 'mask sparsity=2:4', 'distill epochs=3', "
            "'quantize'. May be given more than once.",
        ),
    ] = None,
    search: Search = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of a search's longest trainings; default 20.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Where a search keeps its trials; default: a journal in --output.")
    ] = None,
    runtime: Runtime = "onnxruntime",
    also: Also = None,
    seed: Seed = 0,
    device: Device = None,
    store: Store = None,
    key: Key = None,
    logs: LogsOption = None,
    prices: PricesOption = None,
    as_json: Json = False,
) -> None:
    """Prune, distil and quantise under one budget; measure, export, report and save.

    Started again with the same arguments after a kill, it goes on where it was.
    """
    from rarefy.compression import recipe

    loggers = plugins.several("loggers", logs)
    content = {
        **{name: value for name, value in vars(model).items() if value is not None},
        "task": data.task,
        "data": data.options(),
        "budget": given_only(max_drop=max_drop, speedup=speedup, size=size),
        "runtime": runtime,
        "output": output,
        **{"seed": seed, "device": device, "store": store},
    }
    steps = [recipe.step(text, f"--step {text!r}") for text in step or ()]
    if search is not None:
        if steps or key is not None:
            raise InputError("--search finds the steps by itself, and signs none: leave --step and --key out")
        how = {**_length(search), **given_only(epochs=epochs, storage=storage, also=also, prices=prices)}
        return _search(recipe.check(content, "compress"), {**how, "logs": loggers}, as_json)
    if epochs is not None or storage is not None or also:
        raise InputError("--epochs, --storage and --also belong to --search; pass it, or a step 'distill epochs=3'")
    _compress(recipe.check({**content, "step": steps}, "compress"), key, as_json, {"logs": loggers, "prices": prices})


@app.command("run")
def run_recipe(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FOLDER", help="In place of the recipe's output.")
    ] = None,
    trust_modules: Annotated[
        bool,
        typer.Option(
            "--trust-modules", help="Let modules run that the recipe names and that lie beside it, or in this folder."
        ),
    ] = False,
    key: Key = None,
    logs: LogsOption = None,
    prices: PricesOption = None,
    as_json: Json = False,
) -> None:
    """Carry out a recipe: `rarefy compress`, written down."""
    from rarefy.compression import recipe
    from rarefy.system.dependencies import asking

    loggers = plugins.several("loggers", logs)
    with contextlib.nullcontext() if trust_modules else asking(Path(path)):
        asked = recipe.read(path)
        if output is not None:
            asked = dataclasses.replace(asked, output=output)
        _compress(asked, key, as_json, {"logs": loggers, "prices": prices})


def _compress(asked: Any, key: str | None, as_json: bool, how: Mapping[str, Any]) -> None:
    """how: logs and prices, as ``rarefy.compress`` takes them."""
    from rarefy.compression.run import locked_folder
    from rarefy.models import load
    from rarefy.reports import prices

    prices.told(how["prices"])  # read before hours of work
    if asked.output is None:
        raise InputError('the recipe names no output; add output = "small/", or pass -o')
    check_data(asked.data)
    output = claim_folder(asked.output)
    signer = readable(key, "--key") if key else None
    source = loaded(asked.model, asked.weights, asked.classes)
    task, data = fitted(asked.data, source, asked.task, asked.input)
    asked = dataclasses.replace(asked, data=data)
    graph = load.graph_of(source, agreed_shape(asked.input, task), asked.core)
    task.check(output_count(graph, getattr(task, "output", None)))
    budget = Budget(**asked.budget)
    workdir = Path(f"{output}.work")
    with locked_folder(workdir):
        result = _carried_out(asked, graph, task, budget, workdir, source.text, how)
        result.save(output)
        if signer:
            from rarefy.artifact import signing

            signing.sign(output, signer)
        shutil.rmtree(workdir, ignore_errors=True)
    show_report(result.report, output, as_json)


def _carried_out(
    asked: Any, graph: Any, task: Any, budget: Budget, workdir: Path, title: str, how: Mapping[str, Any]
) -> Any:
    from rarefy.compression import compress as compress_module
    from rarefy.compression import recipe

    return compress_module.compress(
        graph,
        task,
        budget=budget,
        steps=asked.steps or None,
        runtime=asked.runtime,
        workdir=workdir,
        seed=asked.seed,
        device=device_of(asked.device),
        store=asked.store,
        title=title,
        recipe=recipe.write(asked),
        **how,
    )


# ---------------------------------------------------------------------------------------------------------------- init

_QUESTIONS = {
    "model": ("The model (timm:resnet18, package.module:function, a saved folder, an .onnx file)", None),
    "data": ("Its data (imagefolder:PATH, sklearn:digits, ...; `rarefy compress --help` has more)", None),
    "max_drop": ("Accuracy that may be lost", "0.5%"),
    "speedup": ("How many times faster", "2"),
    "runtime": ("Where it will run (`rarefy list runtimes`)", "onnxruntime"),
}


@app.command("init")
def write_recipe(
    path: Annotated[str, typer.Argument(metavar="RECIPE", help="The TOML file to write.")] = "recipe.toml",
    model: Annotated[str | None, typer.Option(metavar="MODEL", help=_QUESTIONS["model"][0] + ".")] = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help=_QUESTIONS["data"][0] + ".")] = None,
    max_drop: Annotated[str | None, GOALS["max_drop"]] = None,
    speedup: Annotated[float | None, GOALS["speedup"]] = None,
    runtime: Annotated[str | None, typer.Option(metavar="NAME", help=_QUESTIONS["runtime"][0] + ".")] = None,
) -> None:
    """Write a recipe for `rarefy run`: five questions, of which those are asked that no option answers."""
    from rarefy.cli.terminal import say
    from rarefy.compression import recipe

    target = claim_file(path, (".toml",), "RECIPE")
    if target.exists():
        raise InputError(f"{path}: is there already; give another name")
    given = {"model": model, "data": data, "max_drop": max_drop, "speedup": speedup, "runtime": runtime}
    answers = {name: _answer(name, value) for name, value in given.items()}
    content = {
        "model": answers["model"],
        "data": {"train": answers["data"], "val": answers["data"]},
        "budget": {"max_drop": answers["max_drop"], "speedup": answers["speedup"]},
        "runtime": answers["runtime"],
        "output": f"{target.stem}-out/",
    }
    target.write_text(recipe.write(recipe.check(content, "init")), encoding="utf-8")
    say(f"{target}: carry it out with `rarefy run {target}`")


def _answer(name: str, given: object) -> object:
    question, usual = _QUESTIONS[name]
    if given is not None:
        return given
    if not sys.stdin.isatty():
        if usual is not None:
            return usual
        raise InputError(f"init: nobody is there to be asked; pass --{name}")
    return typer.prompt(question, default=usual)


# -------------------------------------------------------------------------------------------------------------- search


def _length(text: str) -> dict[str, float | int]:
    """``"40"`` trials, ``"90min"`` or ``"2h"`` of work."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(trials?|min|minutes?|m|h|hours?)?\s*", text)
    if found is None or (found[2] in (None, "trial", "trials") and "." in found[1]):
        raise InputError(
            f"--search {text!r}: write a number of trials, 40, or of minutes or hours of work, 60min or 2h"
        )
    if found[2] in (None, "trial", "trials"):
        return {"trials": int(found[1])}
    return {"minutes": float(found[1]) * (60 if found[2].startswith("h") else 1)}


def _search(asked: Any, how: dict[str, Any], as_json: bool) -> None:
    from rarefy.cli.search import show
    from rarefy.compression import recipe
    from rarefy.compression.search import search as search_
    from rarefy.models import load

    check_data(asked.data)
    source = loaded(asked.model, asked.weights, asked.classes)
    task, data = fitted(asked.data, source, asked.task, asked.input)
    graph = load.graph_of(source, agreed_shape(asked.input, task), asked.core)
    if asked.store is not None:
        graph.meta["store"] = asked.store
    task.check(output_count(graph, getattr(task, "output", None)))
    found = search_.search(
        graph,
        task,
        folder=asked.output,
        budget=Budget(**asked.budget),
        runtime=asked.runtime,
        seed=asked.seed,
        device=device_of(asked.device),
        title=source.text,
        recipe=recipe.write(dataclasses.replace(asked, data=data)),
        **how,
    )
    show(found, as_json)
