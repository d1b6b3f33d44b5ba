"""``rarefy quantize``: integers in place of floats."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from rarefy import plugins
from rarefy.cli.inputs import prepared
from rarefy.cli.options import DataOptions, Fields, FileOptions, Json, ModelOptions, OptionalOutput, app, grouped
from rarefy.cli.outputs import claim_files, claim_folder, save_result
from rarefy.cli.terminal import show_json, show_table
from rarefy.errors import InputError
from rarefy.quantization.options import Options

ASKED = Fields(Options, {"weights": "weight_grid", "activations": "activation_grid"})


@app.command()
@grouped
def quantize(
    model: ModelOptions,
    data: DataOptions,
    given: Annotated[dict[str, Any], ASKED],
    files: FileOptions,
    output: OptionalOutput = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Only show each layer's bits, range and noise, and what stays in float and why."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """8-bit integers in place of floats, calibrated on a few images, without training."""
    asked = Options(**given)
    for kind, choice in (
        ("calibration", asked.calibration),
        ("calibration", asked.weight_calibration),
        ("rounding", asked.rounding),
        ("runtimes", asked.runtime),
    ):
        plugins.resolve(kind, choice)
    if output is None and not explain:
        raise InputError("no --output is given; pass -o PATH, or --explain to only look (rarefy quantize --help)")
    folder = claim_folder(output) if output is not None and not explain else None
    if folder is not None:
        claim_files(files, asked.runtime)
    images_needed = str(asked.activations).strip() != "float"  # weights alone need none
    source, graph, task = prepared(model, data, needed=images_needed)
    from rarefy.quantization.quantize import quantize as verb

    small = verb(graph, task, **given)
    if folder is None:
        return _show_noise(small, as_json)
    save_result(small, folder, source, task, as_json, before=graph, files=files, runtime=asked.runtime)


def _show_noise(graph: Any, as_json: bool) -> None:
    from rarefy.quantization.explain import explain

    found = explain(graph)
    if as_json:
        show_json(found)
        return

    def decibels(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    rows = [
        (
            row["name"],
            row["grid"] or "",
            row["activation_grid"] or "float",
            "" if row["range"] is None else f"{row['range'][0]:.4g} to {row['range'][1]:.4g}",
            decibels(-10 * math.log10(row["error"]) if row["error"] else None),
            decibels(row["sqnr_db"]),
        )
        for row in found["layers"]
    ]
    show_table("in integers", ("layer", "weights", "reads", "range", "weights, dB", "output, dB"), rows, (4, 5))
    left = [(row["name"], row["why"] or "", decibels(row["sqnr_db"])) for row in found["float"]]
    show_table("in float", ("operator", "because", "output, dB"), left, (2,))
