"""``rarefy prune`` and ``rarefy mask``: channels that leave, weights that become zero."""

from __future__ import annotations

import shutil
from typing import Annotated, Any

import typer

from rarefy import plugins
from rarefy.cli.inputs import device_of, prepared, share_or_count
from rarefy.cli.options import (
    DataOptions,
    Device,
    Fields,
    FileOptions,
    Json,
    ModelOptions,
    OptionalOutput,
    Output,
    app,
    grouped,
)
from rarefy.cli.outputs import claim_files, claim_folder, save_result
from rarefy.cli.terminal import show_json, show_table
from rarefy.errors import InputError
from rarefy.pruning.options import MaskOptions, Options

ASKED = Fields(Options, {"batch": "batch_size"}, without=("task", "device", "checkpoint", "progress"))


@app.command()
@grouped
def prune(
    model: ModelOptions,
    data: DataOptions,
    given: Annotated[dict[str, Any], ASKED],
    files: FileOptions,
    output: OptionalOutput = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only show what would leave together, and what can't leave and why.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Remove whole channels. Data is only needed to repair, by criteria that look at it, and by schedules that train:
    these go on after a kill."""
    for target in given.keys() & {"macs", "params"}:
        given[target] = share_or_count(given[target])
    asked = Options(**{**given, "repair": False})  # what is no choice is told before a model is loaded
    plugins.resolve("runtimes", asked.runtime)
    if explain:
        _, graph, _ = prepared(model, data, needed=False)
        return _show_coupling(graph, asked.globs, asked.heads, as_json)
    if output is None:
        raise InputError("no --output is given; pass -o PATH, or --explain to only look (rarefy prune --help)")
    folder = claim_folder(output)
    claim_files(files, "onnxruntime")
    source, graph, task = prepared(model, data, needed=False)
    from rarefy.pruning.prune import prune as verb

    small = verb(graph, **given, task=task, device=device_of(device), checkpoint=f"{folder}.work")
    save_result(small, folder, source, task, as_json, before=graph, files=files)
    shutil.rmtree(f"{folder}.work", ignore_errors=True)


@app.command()
@grouped
def mask(
    model: ModelOptions,
    data: DataOptions,
    output: Output,
    given: Annotated[dict[str, Any], Fields(MaskOptions, without=("task",))],
    files: FileOptions,
    as_json: Json = False,
) -> None:
    """Make single weights zero, and keep them so in training: smaller on disk, no faster on ONNX Runtime.

    wanda needs data.
    """
    MaskOptions(**given)  # what is no choice is told before a model is loaded
    folder = claim_folder(output)
    claim_files(files, "onnxruntime")
    source, graph, task = prepared(model, data, needed=False)
    from rarefy.pruning.mask import mask as verb

    sparse = verb(graph, **given, task=task)
    save_result(sparse, folder, source, task, as_json, before=graph, files=files)


def _show_coupling(graph: Any, ignore: tuple[str, ...], heads: str, as_json: bool) -> None:
    from rarefy.pruning.groups.groups import couple

    coupling = couple(graph, ignore, heads)
    groups = coupling.groups()
    if as_json:
        show_json(
            {
                "groups": [{"channels": width, "members": members} for width, members in groups],
                "frozen": coupling.frozen,
                "unknown_operators": coupling.unknown,
            }
        )
        return
    rows = [(number, width, ", ".join(members)) for number, (width, members) in enumerate(groups, 1)]
    show_table("leave together", ("group", "channels", "tensors[axis]"), rows, (0, 1))
    show_table("outputs that stay", ("layer", "because"), list(coupling.frozen.items()))
    if coupling.unknown:
        show_table(
            "operators without a rule",
            ("operator", "nodes"),
            [(name, ", ".join(nodes)) for name, nodes in coupling.unknown.items()],
        )
