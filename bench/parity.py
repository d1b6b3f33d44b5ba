"""From one set of scales to every runtime: does each file give the answers of the simulation?

    python bench/parity.py [--only NAME ...] [--runtimes NAME ...] [--images N] [--folder DIR] [--check]

EfficientNet-Lite0, MobileNetV2, ResNet-56, YOLOX-Nano and FastestDet with their real weights (``panel_networks``) and
a ViT-Tiny of timm's with random ones, in int8 by default settings, 128 samples for calibration, others compared. Made
once for ONNX Runtime and exported to every runtime that takes such grids; ExecuTorch and TensorRT want grids of their
own and get a model made for them. TensorRT's file is run by ONNX Runtime.

A row a network and runtime: bytes of the file; on how many samples the most likely class is the simulation's (of a
detector, on how many each of its outputs differs by at most 1 % of its variance); the largest difference of a rounded
value in codes, each layer given what the file gave it; the first layer that differs by more than one.

``--check`` exits 1 where fewer than 99.9 % agree or a layer differs, 2 where nothing ran.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import real_data
from bench.panel_networks import CALIBRATION, Network, networks
from rarefy import capture, load, plugins, quantize, save
from rarefy.cli.terminal import show_table
from rarefy.errors import RarefyError
from rarefy.models import load as sources

NAMES = ("efficientnet-lite0", "mobilenetv2", "resnet56", "vit-tiny", "yolox-nano", "fastestdet")
OWN = ("executorch", "tensorrt")  # runtimes that a model is made for by itself
LEAST = 0.999
BATCH = 8


def vit_tiny() -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=1000).eval()


def known() -> dict[str, Network]:
    found = networks()
    like = found["mobilenetv2"]
    return {**found, "vit-tiny": Network("vit-tiny", vit_tiny, like.inputs, like.judged)}


def samples(network: Network, split: str, count: int) -> list[Tensor]:
    """(count, ...) of each input."""
    columns = zip(*network.inputs(split, count), strict=True)
    return [torch.from_numpy(np.concatenate(column)) for column in columns]


def batches(given: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    yield from zip(*(one.split(BATCH) for one in given), strict=True)


def made_for(network: Network, runtime: str, home: Path) -> Any:
    """The int8 graph, from the folder where it was made before."""
    saved = home / f"{network.name}_{runtime}"
    if saved.exists():
        return load(saved)
    given = samples(network, "train", CALIBRATION)
    source = network.model()
    model = sources.load(f"onnx:{source}").model if isinstance(source, Path) else source
    graph = capture(model, tuple(one[:2] for one in given))
    small = quantize(graph, batches=batches(given), images=CALIBRATION, runtime=runtime, progress=False)
    save(small, saved)
    return small


def row_of(small: Any, name: str, given: list[Tensor], home: Path) -> dict[str, Any]:
    runtime = plugins.resolve("runtimes", name if name == "tensorrt" else f"{name}:threads=1")
    file = runtime.export(small, home / f"{name}{runtime.suffix}")
    reader = plugins.resolve("runtimes", "onnxruntime:threads=1") if name == "tensorrt" else None
    found = runtime.compare(small, file, given, batch=BATCH, on=reader)
    return {
        "runtime": name,
        "bytes": file.stat().st_size,
        **{key: found[key] for key in ("agreement", "samples", "ulp", "first_diverging_layer", "largest_difference")},
        "passed": found["agreement"] >= LEAST and found["first_diverging_layer"] is None,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--only", nargs="+", default=list(NAMES), choices=NAMES, metavar="NAME")
    option("--runtimes", nargs="+", metavar="NAME", help="default: all but inductor and cuda, which need a compiler")
    option("--images", type=int, default=256)
    option("--folder", type=Path, help="keeps the int8 models")
    option("--check", action="store_true")
    return parser.parse_args()


def main() -> int:
    given, rows, skipped = arguments(), [], {}
    torch.set_num_threads(1)
    home = given.folder or Path(tempfile.mkdtemp(prefix="rarefy-parity-"))
    home.mkdir(parents=True, exist_ok=True)
    chosen = given.runtimes or [one for one in plugins.available("runtimes") if one not in ("inductor", "cuda")]
    table = known()
    for name in given.only:
        try:
            real_data.data_folder()
            judged = samples(table[name], "val", min(given.images, table[name].judged))
        except (RarefyError, OSError, ImportError) as error:
            skipped[name] = str(error).splitlines()[0]
            continue
        for runtime in chosen:
            try:
                small = made_for(table[name], runtime if runtime in OWN else "onnxruntime", home)
                rows.append({"network": name, **row_of(small, runtime, judged, home)})
            except (RarefyError, OSError) as error:
                skipped[f"{name}, {runtime}"] = str(error).splitlines()[0][:200]
            print(f"{name}, {runtime}: done", file=sys.stderr, flush=True)
    shown = [
        (
            one["network"], one["runtime"], f"{one['bytes']:,}", f"{one['agreement']:.2%} of {one['samples']}",
            one["ulp"], one["first_diverging_layer"] or "",
        )
        for one in rows
    ]  # fmt: skip
    show_table("parity", ("network", "runtime", "bytes", "same answers", "codes apart", "first that differs"), shown)
    for name, why in skipped.items():
        print(f"skipped: {name}: {why}")
    short = [f"{one['network']}, {one['runtime']}" for one in rows if not one["passed"]]
    print(json.dumps({"bench": "parity", "rows": rows, "skipped": skipped, "short": short}))
    for one in short:
        print(f"falls short: {one}")
    return 2 if given.check and not rows else int(given.check and bool(short))


if __name__ == "__main__":
    sys.exit(main())
