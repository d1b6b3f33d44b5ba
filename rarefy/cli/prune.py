"""``rarefy prune`` and ``rarefy mask``: channels that leave, weights that become zero."""

from __future__ import annotations

import shutil
from typing import Annotated, Any

import typer

from rarefy.cli.inputs import device_of, prepared, share_or_count
from rarefy.cli.options import DataOptions, Device, Ignore, Json, ModelOptions, Output, Runtime, Seed, app, grouped
from rarefy.cli.outputs import claim_folder, save_result
from rarefy.cli.terminal import show_json, show_table
from rarefy.errors import InputError


@app.command()
@grouped
def prune(
    model: ModelOptions,
    data: DataOptions,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="PATH", help="Where the result goes.")] = None,
    keep: Annotated[float | None, typer.Option(metavar="SHARE", help="Share of the channels to keep.")] = None,
    macs: Annotated[
        float | None, typer.Option(metavar="SHARE", help="MACs that may remain: a share, or a number above 1.")
    ] = None,
    params: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Parameters that may remain: a share, or a number above 1.")
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="Times as fast as the original, measured on --runtime; widths follow its kernels' times.",
        ),
    ] = None,
    runtime: Runtime = "onnxruntime",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of the runtime, for --speedup; default 1.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Samples a run, for --speedup.")] = 1,
    criterion: Annotated[
        str, typer.Option(metavar="CHOICE", help="What a channel is worth; see `rarefy list criteria`.")
    ] = "magnitude",
    ranking: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="global: layers compete; loss: the same, for hessian:group=true and taylor:form=fisher; local: each loses its share; isomorphic: layers of like structure compete.",
        ),
    ] = "global",
    round_to: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Channels left are a multiple of this; with --speedup 8 unless given."),
    ] = 1,
    floor: Annotated[float, typer.Option(metavar="SHARE", help="Share of any layer that stays in any case.")] = 0.1,
    ignore: Ignore = None,
    heads: Annotated[
        str, typer.Option(metavar="NAME", help="Of attention: dims, the same of each head leave; whole: heads leave.")
    ] = "dims",
    select: Annotated[
        str,
        typer.Option(
            metavar="CHOICE", help="How scores decide: best, or sample:temperature=1; see `rarefy list selection`."
        ),
    ] = "best",
    schedule: Annotated[
        str,
        typer.Option(
            metavar="CHOICE", help="oneshot, iterative:rounds=5, group_sparse:epochs=10; see `rarefy list schedules`."
        ),
    ] = "oneshot",
    check: Annotated[bool, typer.Option(help="Compare with the masked original.")] = True,
    repair: Annotated[bool, typer.Option(help="Mend it on 512 training images, without training.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only show what would leave together, and what can't leave and why.")
    ] = False,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Remove whole channels. Data is only needed to repair, by criteria that look at it, and by schedules that train: these go on after a kill."""
    from rarefy import plugins

    for kind, choice in (
        ("criteria", criterion),
        ("runtimes", runtime),
        ("selection", select),
        ("schedules", schedule),
    ):
        plugins.resolve(kind, choice)
    if explain:
        _, graph, _ = prepared(model, data, needed=False)
        return _show_coupling(graph, tuple(ignore or ()), heads, as_json)
    if output is None:
        raise InputError("no --output is given; pass -o PATH, or --explain to only look (rarefy prune --help)")
    folder = claim_folder(output)
    source, graph, task = prepared(model, data, needed=False)
    from rarefy.pruning.prune import prune as verb

    small = verb(
        graph,
        keep=keep,
        macs=share_or_count(macs),
        params=share_or_count(params),
        speedup=speedup,
        runtime=runtime,
        threads=threads,
        batch=batch_size,
        criterion=criterion,
        ranking=ranking,
        round_to=round_to,
        floor=floor,
        ignore=tuple(ignore or ()),
        heads=heads,
        select=select,
        schedule=schedule,
        task=task,
        seed=seed,
        check=check,
        device=device_of(device),
        checkpoint=f"{folder}.work",
        repair=repair,
    )
    save_result(small, folder, source, task, as_json)
    shutil.rmtree(f"{folder}.work", ignore_errors=True)


@app.command()
@grouped
def mask(
    model: ModelOptions,
    data: DataOptions,
    output: Output,
    sparsity: Annotated[
        str, typer.Option(metavar="SHARE|N:M", help="0.5: half of the weights become zero; 2:4: of each 4, 2 stay.")
    ],
    criterion: Annotated[
        str, typer.Option(metavar="CHOICE", help="What a weight is worth; see `rarefy list saliency`.")
    ] = "magnitude",
    scope: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where a share is taken: global, layer or output; default: the criterion's."),
    ] = None,
    ignore: Ignore = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make single weights zero, and keep them so in training: smaller on disk, no faster on ONNX Runtime. wanda needs data."""
    from rarefy import plugins
    from rarefy.pruning.mask import mask as verb
    from rarefy.pruning.mask import parse

    parse(sparsity)
    plugins.resolve("saliency", criterion)
    folder = claim_folder(output)
    source, graph, task = prepared(model, data, needed=False)
    sparse = verb(
        graph, sparsity=sparsity, criterion=criterion, scope=scope, ignore=tuple(ignore or ()), task=task, seed=seed
    )
    save_result(sparse, folder, source, task, as_json)


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
    show_table("leave together", ("group", "channels", "tensors[axis]"), [(number, width, ", ".join(members)) for number, (width, members) in enumerate(groups, 1)], (0, 1))  # fmt: skip
    show_table("outputs that stay", ("layer", "because"), list(coupling.frozen.items()))
    if coupling.unknown:
        show_table(
            "operators without a rule",
            ("operator", "nodes"),
            [(name, ", ".join(nodes)) for name, nodes in coupling.unknown.items()],
        )
