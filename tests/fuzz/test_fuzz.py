"""Every parser of strangers' files, fed mutations of real ones: it answers or raises a RarefyError, in time and memory.

``make test`` runs a few of each, the same every time. ``RAREFY_FUZZ=1000000 pytest tests/fuzz -m slow`` runs so many
in all, others with another ``RAREFY_FUZZ_SEED``. What failed is left in the test's folder as ``input``.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import random
import resource
import signal
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_files
import pytest
import torch
from fuzz_mutations import mutated, mutated_json, mutated_zip
from onnx import helper
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from torch import nn

from rarefy.artifact import folder, signing
from rarefy.compression import recipe
from rarefy.data import decoding, sources
from rarefy.data.augmentation import Augmentation
from rarefy.data.items import Items
from rarefy.errors import RarefyError
from rarefy.graph.capture import capture
from rarefy.models import load
from rarefy.models.checkpoint import entries
from rarefy.reports import report, view

SECONDS, BYTES = 20, 1 << 30  # of one execution (a busy machine is four times as slow), and of all
SHORT, LONG = 8, int(os.environ.get("RAREFY_FUZZ", "0"))
SEED = int(os.environ.get("RAREFY_FUZZ_SEED", "0"))

Mutate = Callable[[random.Random, bytes], bytes]
Parse = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Target:
    """corpus: real files. parse: what is done with one, in a folder of its own. cost: milliseconds, about."""

    corpus: Callable[[Path], list[bytes]]
    mutate: Mutate
    parse: Parse
    cost: int = 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


# ------------------------------------------------------------------ saved folders


def saved(place: Path) -> Path:
    if (place / "saved").exists():
        return place / "saved"
    graph = capture(Net().eval(), torch.zeros(2, 1, 8, 8))
    with torch.no_grad():
        graph.get_parameter("conv.weight").flatten()[1:].zero_()
    graph.meta["sparse"] = ["conv.weight"]
    return folder.save(graph, place / "saved")


def part(name: str) -> Callable[[Path], list[bytes]]:
    return lambda place: [(saved(place) / name).read_bytes()]


def loaded_with(name: str) -> Parse:
    """The folder with that file; its hash is put into the manifest, or nothing behind it would be reached."""

    def parse(data: bytes, place: Path) -> object:
        target = place / "saved"
        (target / name).write_bytes(data)
        if name != folder.MANIFEST:
            manifest = json.loads((target / folder.MANIFEST).read_bytes())
            manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            (target / folder.MANIFEST).write_text(json.dumps(manifest))
        return folder.load(target)

    return parse


def weights_mutated(draw: random.Random, data: bytes) -> bytes:
    """The header as JSON, or the bytes behind it."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if draw.random() < 0.5:
        header = mutated_json(draw, header)
    elif draw.random() < 0.8:
        rest = bytes(byte ^ (draw.random() < 0.02) * draw.randrange(256) for byte in rest)
    else:
        return mutated(draw, data)
    return len(header).to_bytes(8, "little") + header + rest


def signed(place: Path) -> list[bytes]:
    pytest.importorskip("model_signing")
    signing.keygen(place / "key")
    signing.sign(saved(place), place / "key")
    return [(place / "saved" / folder.SIGNATURE).read_bytes()]


def verified(data: bytes, place: Path) -> object:
    (place / "saved" / folder.SIGNATURE).write_bytes(data)
    return signing.verify(place / "saved", next(one for one in place.iterdir() if one.name.endswith("pub")))


# ------------------------------------------------------------------ models and weights


def weights_file(suffix: str, nested: bool = False) -> Parse:
    def parse(data: bytes, place: Path) -> object:
        file = place / f"w{suffix}"
        file.write_bytes(data)
        return entries(file)

    return parse


def checkpoints(place: Path) -> list[bytes]:
    found = []
    for zipped in (True, False):
        buffer = io.BytesIO()
        content = {"state_dict": Net().state_dict(), "epoch": 3, "args": {"lr": 0.1}}
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        found.append(buffer.getvalue())
    return found


def index(place: Path) -> list[bytes]:
    for name in "ab":
        (place / f"{name}.safetensors").write_bytes(safetensors_bytes({name: torch.zeros(2)}))
    return [b'{"metadata": {"total_size": 9}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}']


def either(draw: random.Random, data: bytes) -> bytes:
    return (mutated_zip if data.startswith(b"PK") else mutated)(draw, data)


def program(place: Path) -> list[bytes]:
    buffer = io.BytesIO()
    free = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(Net().eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=free), buffer)
    return [buffer.getvalue()]


def model_file(name: str) -> Parse:
    def parse(data: bytes, place: Path) -> object:
        (place / name).write_bytes(data)
        return load.load(str(place / name))

    return parse


def onnx_bytes(place: Path) -> list[bytes]:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("Reshape", ["m", "s"], ["y"]),
    ]
    constants = {"w": np.ones((2, 1, 3, 3), np.float32), "s": np.array([-1, 2])}
    return [onnx_files.write(place / "m.onnx", nodes, {"x": ["n", 1, 8, 8]}, ["y"], constants).read_bytes()]


# ------------------------------------------------------------------ data


def pictures(place: Path) -> list[bytes]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8))
    found = []
    for form in ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP"):
        for one in (image, image.convert("L"), *([image.convert("P")] if form in ("PNG", "BMP") else [])):
            buffer = io.BytesIO()
            one.save(buffer, form)
            found.append(buffer.getvalue())
    return found


def decoded(data: bytes, place: Path) -> object:
    source = Items("fuzz", [data], torch.arange(1), None)
    decoder = decoding.Decoder(source, (3, 8, 8), 1.0, Image.Resampling.BILINEAR, Augmentation())
    found = decoder[0, None]
    assert (found.image is None) == bool(found.broken or found.refused)
    return found


def array(place: Path) -> list[bytes]:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((8, 8, 3), np.uint8))
    return [buffer.getvalue()]


def decoded_array(data: bytes, place: Path) -> object:
    (place / "x.npy").write_bytes(data)
    source = Items("fuzz", [str(place / "x.npy")], torch.arange(1), None)
    return decoding.Decoder(source, (3, 8, 8), 1.0, Image.Resampling.BILINEAR, Augmentation())[0, None]


def shard(place: Path) -> list[bytes]:
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for index in range(3):
                for name, content in (("png", pictures(place)[1]), ("cls", str(index).encode())):
                    long = "" if form == tarfile.USTAR_FORMAT else "long" * 30
                    info = tarfile.TarInfo(f"{long}{index}.{name}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        found.append(buffer.getvalue())
    return found


def table(place: Path) -> list[bytes]:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = {"info": {"features": {"label": {"names": ["a", "b"]}}}}
    found = []
    for compression in ("snappy", "zstd", "none"):
        rows = [{"bytes": one, "path": "x"} for one in pictures(place)[:4]]
        content = arrow.table({"image": rows, "label": [0, 1, 0, None]})
        parquet.write_table(
            content.replace_schema_metadata({"huggingface": json.dumps(names)}), place / "x", compression=compression
        )
        found.append((place / "x").read_bytes())
    return found


def source_of(form: str, suffix: str) -> Parse:
    """Opened, cut in two, and each item asked for."""

    def parse(data: bytes, place: Path) -> object:
        file = place / f"d{suffix}"
        file.write_bytes(data)
        for split in ("train", "val"):
            source = sources.load(f"{form}:{file}", split, shared=True)
            assert isinstance(source, Items)
            decoder = decoding.Decoder(source, (3, 8, 8), 1.0, Image.Resampling.BILINEAR, Augmentation())
            for index in range(min(len(source), 6)):
                _ = decoder[index, None]
        return None

    return parse


# ------------------------------------------------------------------ recipes and reports

RECIPE = b"""
model = "timm:resnet18?num_classes=10"  # a source
weights = 'best.safetensors'
seed = 3
input = [3, 32, 32]
[data]
train = "imagefolder:data/train"
mean = [0.485, 0.456, 0.406]
[budget]
max_drop = "0.5%"
size = "2MB"
[[step]]
do = "prune"
macs = 0.5
criterion = "taylor:batches=20"
[[step]]
do = "distill"
epochs = 3
"""


def recipe_of(data: bytes, place: Path) -> object:
    (place / "r.toml").write_bytes(data)
    return recipe.read(place / "r.toml")


MODEL: dict[str, Any] = {
    "name": "net", "weight_bytes": 4000, "parameters": 1000, "macs": 5000,
    "evaluation": {
        "metric": "accuracy", "label": "top-1", "unit": "%", "value": 0.9, "interval": [0.8, 0.95], "samples": 100,
        "drop": {"value": 0.01, "interval": [-0.01, 0.03]},
    },
    "latency_ms": {"median": 1.0, "p25": 0.9, "p75": 1.1},
}  # fmt: skip
REPORT = {
    "title": "net", "before": MODEL, "after": {**copy.deepcopy(MODEL), "weight_bytes": 1000},
    "goals": [{"name": "size", "wanted": 2000, "found": 1000, "met": True, "advice": None}],
    "steps": [{"step": "prune", "name": "prune", "kept": True, "why": "it pays", "facts": {"macs": 0.5}}],
    "warnings": ["measured on a busy machine"],
}  # fmt: skip


def reported(data: bytes, place: Path) -> object:
    from rarefy.system import strict_json

    facts = strict_json.parse(data, "report.json")
    view.view(facts)
    return report.html(facts), report.summary(facts)


TARGETS = {
    "graph.json": Target(part(folder.GRAPH), mutated_json, loaded_with(folder.GRAPH), 50),
    "weights of a folder": Target(part(folder.WEIGHTS), weights_mutated, loaded_with(folder.WEIGHTS), 10),
    "manifest": Target(part(folder.MANIFEST), mutated_json, loaded_with(folder.MANIFEST), 5),
    "signature": Target(signed, mutated_json, verified, 10),
    "safetensors": Target(
        lambda _: [safetensors_bytes(Net().state_dict())], weights_mutated, weights_file(".safetensors")
    ),
    "checkpoint": Target(checkpoints, either, weights_file(".pt"), 5),
    "index": Target(index, mutated_json, weights_file(".index.json")),
    "pt2": Target(program, mutated_zip, model_file("m.pt2"), 100),
    "onnx": Target(onnx_bytes, mutated, model_file("m.onnx"), 10),
    "picture": Target(pictures, mutated, decoded),
    "array": Target(array, mutated, decoded_array),
    "tar": Target(shard, mutated, source_of("tar", ".tar"), 5),
    "parquet": Target(table, mutated, source_of("parquet", ".parquet"), 10),
    "recipe": Target(lambda _: [RECIPE], mutated, recipe_of, 40),
    "report.json": Target(lambda _: [json.dumps(REPORT).encode()], mutated_json, reported, 60),
}  # fmt: skip


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """What takes longer is interrupted by what no parser may catch as a broken file."""

    def late(*_: object) -> None:
        raise KeyboardInterrupt(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(name: str, count: int, place: Path) -> tuple[int, int]:
    """So many executions; how many files were taken, and how many refused."""
    target = TARGETS[name]
    corpus = target.corpus(place)
    taken = refused = 0
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(count):
        draw = random.Random(f"{name} {SEED} {index}")
        data = target.mutate(draw, draw.choice(corpus)) if index else corpus[0]
        try:
            with limited(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.parse(data, place)
            taken += 1
        except RarefyError as error:
            refused += 1
            assert "\n" not in str(error), str(error)
        except BaseException as error:
            (place / "input").write_bytes(data)
            raise AssertionError(f"{name}, number {index} (seed {SEED}): {type(error).__name__}: {error}") from error
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) < BYTES
    return taken, refused


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_answers_or_raises_a_rarefy_error(name: str, tmp_path: Path) -> None:
    count = max(12, SHORT * 100 // TARGETS[name].cost)
    taken, refused = run(name, count, tmp_path)
    assert taken + refused == count and taken > 0  # the whole file is taken: what is fed reaches the parser


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="set RAREFY_FUZZ to the number of executions")
@pytest.mark.parametrize("name", TARGETS)
def test_many(name: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    taken, refused = run(name, LONG // len(TARGETS), tmp_path)
    print(f"{name}: {taken + refused:,} executions, {refused:,} refused, {time.monotonic() - begin:.0f} s")
