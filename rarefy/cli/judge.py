"""How good, how fast, how big, and what it says: ``rarefy evaluate``, ``measure``, ``predict``, ``report``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli.inputs import agreed_shape, device_of, fitted, loaded, prepared, reference_graph, session, shape_of
from rarefy.cli.options import (
    Batch,
    DataOptions,
    Device,
    Json,
    ModelOptions,
    PricesOption,
    Reference,
    ReferenceWeights,
    Runtime,
    Seed,
    Signer,
    app,
    grouped,
)
from rarefy.cli.outputs import claim_file, claim_pictures, facts_of, show_comparison, unreadable_rows
from rarefy.cli.terminal import say, show_json
from rarefy.errors import FormatError, GoalMissed, InputError

if TYPE_CHECKING:
    from rarefy.evaluation.evaluation import Evaluation


@app.command()
@grouped
def evaluate(
    model: ModelOptions,
    data: DataOptions,
    reference: Reference = None,
    reference_weights: ReferenceWeights = None,
    runtime: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Judge the exported file in this runtime, not the model in PyTorch."),
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Exit 1 if more is lost than this: 0.5% or 0.005.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="val or train.")] = "val",
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="The first N images only.")] = None,
    corruptions: Annotated[
        str | None, typer.Option(metavar="LIST", help="Robustness too: all, or names such as fog,jpeg.")
    ] = None,
    batch_size: Batch = 64,
    seed: Seed = 0,
    device: Device = None,
    key: Signer = None,
    as_json: Json = False,
) -> None:
    """Accuracy with its interval, worst class, calibration, agreement with the reference, paired drop, robustness."""
    from rarefy.compression import recipe
    from rarefy.evaluation.evaluate import evaluate as verb
    from rarefy.tasks.metric import shown_change

    if max_drop is not None and reference is None:
        raise InputError("--max-drop compares with the original; name it with --reference")
    if split not in ("train", "val"):
        raise InputError(f"--split {split!r}: give train or val")
    most = recipe.share(max_drop, "--max-drop") if max_drop is not None else None
    source, judged, task = prepared(model, data, key=key)
    other = reference_graph(reference, reference_weights, model.classes, task)
    names = "all" if corruptions == "all" else tuple(filter(None, (corruptions or "").split(",")))
    with contextlib.ExitStack() as stack:
        subject = judged if runtime is None else stack.enter_context(session(runtime, source, judged, batch_size))
        found = verb(
            subject,
            task,
            reference=other,
            split="train" if split == "train" else "val",
            batch_size=batch_size,
            limit=limit,
            corruptions=names,
            seed=seed,
            device=device_of(device),
        )
    left_out = task.data.unreadable(split)
    if as_json:
        show_json({**found.to_json(), **({"unreadable": left_out} if left_out else {})})
    else:
        _show_evaluation(found, source.text, str(reference), unreadable_rows(task))
    if most is not None and found.drop is not None and found.drop["value"] > most:
        lost, allowed = shown_change(found.drop["value"], found.unit), 100 * most if found.unit == "%" else most
        raise GoalMissed(
            f"{source.text}: loses {lost} against {reference}, more than {allowed:g}; "
            "compress less, or train longer (`rarefy distill`)"
        )


def _show_evaluation(found: Evaluation, name: str, reference: str, left_out: list[tuple[str, str]]) -> None:
    facts: dict[str, Any] = {"after": {"name": name, "evaluation": found.to_json()}}
    if found.reference is not None:
        facts["before"] = {"name": reference, "evaluation": found.reference.to_json()}
    show_comparison(facts)
    for what, which in left_out:
        say(f"{what}: {which}")
    for warning in found.warnings:
        say(f"warning: {name}: {warning}")


@app.command()
@grouped
def measure(
    model: ModelOptions,
    reference: Reference = None,
    reference_weights: ReferenceWeights = None,
    runtime: Runtime = "onnxruntime",
    batch_size: Batch = 1,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Timed runs of each model, taking turns.")] = 100,
    key: Signer = None,
    as_json: Json = False,
) -> None:
    """Bytes, parameters, MACs, latency on the runtime, peak memory; with --reference, of both, interleaved."""
    from rarefy import plugins
    from rarefy.deployment import latency
    from rarefy.evaluation import measure as measure_
    from rarefy.models import load

    plugins.resolve("runtimes", runtime)
    source = loaded(model.model, model.weights, model.classes, key)
    graph = load.graph_of(source, shape_of(model), model.core)
    shape = tuple(graph.meta["inputs"][0]["shape"])
    models = {source.text: graph}
    if reference is not None:
        other = loaded(reference, reference_weights, model.classes)
        models = {str(reference): load.graph_of(other, shape), **models}
    found = measure_.measure(models, runtime=runtime, batch=batch_size, repeats=repeats)
    if as_json:
        show_json(found)
        return
    named = list(found.items())
    doubt = latency.doubt(named[-1][1]["latency_ms"])
    show_comparison(
        {
            "after": {"name": named[-1][0], **named[-1][1]},
            **({"before": {"name": named[0][0], **named[0][1]}} if len(named) > 1 else {}),
        }
    )
    if doubt:
        say(f"warning: {doubt}")


@app.command()
@grouped
def predict(
    model: ModelOptions,
    pictures: Annotated[list[str], typer.Argument(metavar="PICTURE...", help="Files of pictures, or a folder.")],
    data: DataOptions,
    reference: Reference = None,
    reference_weights: ReferenceWeights = None,
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FOLDER", help="Where the drawn pictures go.")
    ] = "predicted",
    least: Annotated[
        float, typer.Option(metavar="SCORE", min=0, max=1, help="Boxes of a lower score are not shown.")
    ] = 0.3,
    as_json: Json = False,
) -> None:
    """What a model says of pictures, written and drawn: boxes, or the likeliest classes; with --reference beside what
    the original says.

    Names of classes are the saved folder's, or those of --data.
    """
    from rarefy.compression import recipe
    from rarefy.evaluation import showing
    from rarefy.models import load

    files = showing.pictures(pictures)
    folder = claim_pictures(output)
    options = data.options()
    source = loaded(model.model, model.weights, model.classes)
    kind = data.task if data.task != showing.USUAL else showing.kind_of(source, files)
    named_by = [options.pop(name) for name in ("train", "val") if name in options][:1]
    known = getattr(recipe.make_task({"val": named_by[0]}, kind), "class_names", None) if named_by else None
    task, _ = fitted({**options, "strict": True}, source, kind, shape_of(model), files)
    graph = load.graph_of(source, agreed_shape(shape_of(model), task), model.core)
    other = reference_graph(reference, reference_weights, model.classes, task)
    named = {model.model: graph} if other is None else {str(reference): other, model.model: graph}
    found = showing.shown(named, task, files, known, least)
    told = [
        {"picture": file, "drawn": str(one.saved(folder)), **{
            name: [answer.to_json() for answer in answers] for name, answers in one.said.items()
        }}
        for file, one in zip(files, found, strict=True)
    ]  # fmt: skip
    if as_json:
        show_json(told)
        return
    for file, one, row in zip(files, found, told, strict=True):
        for name, answers in one.said.items():
            who = f" ({name})" if len(named) > 1 else ""
            say(f"{file}{who}: {', '.join(answer.text for answer in answers) or 'nothing'}")
        say(f"  {row['drawn']}")


@app.command("report")
@grouped
def report_command(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder that `rarefy compress` saved, or its report.json.")
    ],
    data: DataOptions,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="An .html file; default: FOLDER-report.html.")
    ] = None,
    reference: Reference = None,
    reference_weights: ReferenceWeights = None,
    runtime: Runtime = "onnxruntime",
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Judge on the first N images only.")] = None,
    prices: PricesOption = None,
    key: Signer = None,
    as_json: Json = False,
) -> None:
    """The report of a folder as HTML. With data (and --reference), what it claims is measured again, here and now."""
    from rarefy.reports import prices as prices_
    from rarefy.reports import report

    place = Path(folder)
    beside = place.resolve() if place.is_dir() else place.resolve().parent
    target = claim_file(output or f"{beside}-report.html", (".html", ".htm"))
    if (target.resolve().parent / "manifest.json").exists():
        raise InputError(
            f"{target}: lies in a saved folder, whose files are sealed by their hashes; choose another --output"
        )
    again = data.options()
    table = prices_.told(prices)
    if again:
        facts = _measured_again(place, data, reference, reference_weights, runtime, limit, key)
    elif reference is not None:
        raise InputError("--reference is judged on data; pass --data, or leave it out")
    else:
        facts = _recorded(place, key)
    facts |= table
    report.report(facts, target)
    if as_json:
        show_json(facts)
    else:
        say(report.summary(facts).rstrip())
        if not again:
            say(f"\n{facts['provenance']['claim']}")
        say(f"\nreport: {target}")


def _recorded(place: Path, key: str | None) -> dict[str, Any]:
    """The facts that lie in a saved folder, and who vouches for them."""
    from rarefy.artifact import snapshot
    from rarefy.evaluation import recorded
    from rarefy.reports import view

    file = place / recorded.REPORT if place.is_dir() else place
    facts = None
    if place.is_dir() or (place.name == recorded.REPORT and (place.parent / snapshot.MANIFEST).exists()):
        with snapshot.hold(place if place.is_dir() else place.parent, key) as held:
            facts = recorded.of_folder(held)
            if held.is_signed:
                held.check()
    elif key is not None:
        raise InputError(f"{place}: --key checks the signature of a folder that rarefy saved; give the folder")
    elif os.path.lexists(file):
        facts = recorded.of_file(file)
    if facts is None:
        raise InputError(
            f"{file}: no such file; give a folder that `rarefy compress` saved, or pass --data to measure it now"
        )
    try:
        view.view(facts)
    except FormatError as error:
        raise FormatError(f"{file}: is no report ({error}); pass --data to measure the folder again") from error
    if not {"before", "after", "goals", "steps"} & facts.keys():
        raise FormatError(f"{file}: is no report; give a folder that `rarefy compress` saved, or its report.json")
    claim = "recorded when the folder was made, and signed by the owner of the key; --data measures it again"
    if key is None:
        claim = "recorded by whoever made it, and not measured now; --data measures it again, --key says who made it"
    return {**facts, "provenance": {**(facts.get("provenance") or {}), "claim": claim}}


def _measured_again(
    place: Path,
    data: DataOptions,
    reference: str | None,
    reference_weights: str | None,
    runtime: str,
    limit: int | None,
    key: str | None,
) -> dict[str, Any]:
    """What is measured here and now, and nothing else: what the folder's own report claims is left out."""
    source, graph, task = prepared(ModelOptions(str(place)), data, key=key)
    other = reference_graph(reference, reference_weights, None, task)
    facts = facts_of({"title": str(place)}, graph, other, task, runtime, limit)
    content = source.folder.manifest.get("content") if source.folder is not None else None
    provenance = {"measured": "here and now, all of it", "content": content, "signed": key is not None}
    return {**facts, "goals": [], "provenance": provenance}
