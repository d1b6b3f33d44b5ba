"""``rarefy quantize``: integers in place of floats."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from rarefy.cli.inputs import prepared
from rarefy.cli.options import Batch, DataOptions, Ignore, Json, ModelOptions, Runtime, Seed, app, grouped
from rarefy.cli.outputs import claim_folder, save_result
from rarefy.cli.terminal import show_json, show_table
from rarefy.errors import InputError


@app.command()
@grouped
def quantize(
    model: ModelOptions,
    data: DataOptions,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="PATH", help="Where the result goes.")] = None,
    images: Annotated[int, typer.Option(metavar="N", min=1, help="Images to calibrate on; they need no labels.")] = 128,
    batch_size: Batch = 16,
    weight_grid: Annotated[
        str,
        typer.Option(
            metavar="GRID",
            help="int8, int4, int4:group=32, mixed:bits=4, ...; by layer: 'int4;stem.*=int8;head=float', the last that matches holds.",
        ),
    ] = "int8",
    activation_grid: Annotated[
        str,
        typer.Option(
            metavar="GRID",
            help="uint8, uint4 (simulated), float: weights alone; a layer's input with 'uint4;fc=uint8'.",
        ),
    ] = "uint8",
    calibration: Annotated[
        str, typer.Option(metavar="CHOICE", help="Range of the activations; see `rarefy list calibration`.")
    ] = "mse",
    weight_calibration: Annotated[
        str | None,
        typer.Option(
            metavar="CHOICE", help="Range of the weights; the same choices; default: minmax at 8 bits, mse below."
        ),
    ] = None,
    rounding: Annotated[str, typer.Option(metavar="CHOICE", help="See `rarefy list rounding`.")] = "narrow",
    runtime: Runtime = "onnxruntime",
    ignore: Ignore = None,
    equalize: Annotated[
        bool,
        typer.Option(
            help="Equalise channels between layers, and let dead ones carry the noisiest, where that is exact and lowers the noise."
        ),
    ] = True,
    correct_bias: Annotated[
        bool, typer.Option(help="Mend the means that rounding moves, and how far the answers vary.")
    ] = True,
    smooth: Annotated[
        float | None,
        typer.Option(
            metavar="ALPHA", help="SmoothQuant before linear layers that read a norm; 0.5, say; default: not done."
        ),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(
            metavar="latency", help="Time each stretch of layers in integers and in float, and keep only what pays."
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Only show each layer's bits, range and noise, and what stays in float and why."
        ),
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """8-bit integers in place of floats, calibrated on a few images, without training."""
    from rarefy import plugins

    for kind, choice in (
        ("calibration", calibration),
        ("calibration", weight_calibration),
        ("rounding", rounding),
        ("runtimes", runtime),
    ):
        plugins.resolve(kind, choice)
    if output is None and not explain:
        raise InputError("no --output is given; pass -o PATH, or --explain to only look (rarefy quantize --help)")
    folder = claim_folder(output) if output is not None and not explain else None
    source, graph, task = prepared(
        model, data, needed=activation_grid.strip() != "float"
    )  # weights alone need no images
    from rarefy.quantization.quantize import quantize as verb

    small = verb(
        graph,
        task,
        images=images,
        batch_size=batch_size,
        weights=weight_grid,
        activations=activation_grid,
        calibration=calibration,
        weight_calibration=weight_calibration,
        rounding=rounding,
        runtime=runtime,
        ignore=tuple(ignore or ()),
        equalize=equalize,
        correct_bias=correct_bias,
        smooth=smooth,
        gate=gate,
        seed=seed,
    )
    if folder is None:
        return _show_noise(small, as_json)
    save_result(small, folder, source, task, as_json)


def _show_noise(graph: Any, as_json: bool) -> None:
    from rarefy.quantization.explain import explain

    found = explain(graph)
    if as_json:
        show_json(found)
        return

    def decibels(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    rows = [
        (row["name"], row["grid"] or "", row["activation_grid"] or "float", "" if row["range"] is None else f"{row['range'][0]:.4g} to {row['range'][1]:.4g}",
         decibels(-10 * math.log10(row["error"]) if row["error"] else None), decibels(row["sqnr_db"]))
        for row in found["layers"]
    ]  # fmt: skip
    show_table("in integers", ("layer", "weights", "reads", "range", "weights, dB", "output, dB"), rows, (4, 5))
    show_table("in float", ("operator", "because", "output, dB"), [(row["name"], row["why"] or "", decibels(row["sqnr_db"])) for row in found["float"]], (2,))  # fmt: skip
