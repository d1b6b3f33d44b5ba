"""Every parser of strangers' files, fed mutations of real ones: it answers or raises a RarefyError, in time and memory.

``make test`` runs a few of each, the same every time. ``make fuzz`` runs a million in all, or an hour, whichever ends
first (``RAREFY_FUZZ``, ``RAREFY_FUZZ_SECONDS``), others with another ``RAREFY_FUZZ_SEED``. What failed is left in the
test's folder as ``input-NUMBER``, and the others go on.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_files
import pytest
import torch
from fuzz_mutations import mutated, mutated_json, mutated_words, mutated_zip
from onnx import helper
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from torch import nn

from rarefy.artifact import folder, signing
from rarefy.artifact.coding import text
from rarefy.cli.search import show
from rarefy.compression import recipe
from rarefy.compression import run as run_
from rarefy.compression.search import front
from rarefy.data import decoding, sources
from rarefy.data.augmentation import Augmentation
from rarefy.data.boxes.targets import BoxTargets
from rarefy.data.items import Items
from rarefy.errors import InputError, RarefyError
from rarefy.graph.capture import capture
from rarefy.models import load
from rarefy.models.checkpoint import entries
from rarefy.reports import prices, report, shown, view
from rarefy.system import strict_json

if not hasattr(os, "fork"):
    pytest.skip("no processes are forked here", allow_module_level=True)

SECONDS, BYTES = 5, 1 << 30  # of one execution, on the processor (12 times as long by the clock), and of all
STUCK = 20 * SECONDS  # of one execution, by the clock
SHORT, LONG = 8, int(os.environ.get("RAREFY_FUZZ", "0"))
HOUR = float(os.environ.get("RAREFY_FUZZ_SECONDS", "3600"))  # of all targets
FAILED = 10  # of one target, with which it ends
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


def part(name: str, store: str = "readable") -> Callable[[Path], list[bytes]]:
    def read(place: Path) -> list[bytes]:
        if store != "readable":
            folder.save(folder.load(saved(place)), place / "saved", store=store)
        return [(saved(place) / name).read_bytes()]

    return read


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


def text_mutated(draw: random.Random, data: bytes) -> bytes:
    """The frame, or the text in it."""
    if draw.random() < 0.3:
        return mutated(draw, data)
    return text.folded(mutated_json(draw, text.unfolded(data, "graph.json")))


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


def animated(place: Path) -> list[bytes]:
    """Pictures of several frames, of which the first counts."""
    draw = np.random.default_rng(1)
    frames = [Image.fromarray(draw.integers(0, 256, (9, 11, 3), dtype=np.uint8)) for _ in range(3)]
    found = []
    for form, options in (
        ("GIF", {"duration": 40, "loop": 0}),
        ("GIF", {"duration": [1, 2, 3], "disposal": 2, "transparency": 1}),
        ("PNG", {"duration": 40}),
        ("WEBP", {"duration": 40}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ):
        buffer = io.BytesIO()
        frames[0].save(buffer, form, save_all=True, append_images=frames[1:], **options)
        found.append(buffer.getvalue())
    buffer = io.BytesIO()
    frames[0].quantize(4).save(buffer, "GIF", interlace=1)
    return [*found, buffer.getvalue()]


def decoded(data: bytes, place: Path) -> object:
    source = Items("fuzz", [data], torch.arange(1), None)
    decoder = decoding.Decoder(source, (3, 8, 8), 1.0, Image.Resampling.BILINEAR, Augmentation())
    found = decoder[0, None]
    assert (found.made is None) == bool(found.broken or found.refused)
    return found


def array(place: Path) -> list[bytes]:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((8, 8, 3), np.uint8))
    return [buffer.getvalue()]


def decoded_array(data: bytes, place: Path) -> object:
    (place / "x.npy").write_bytes(data)
    source = Items("fuzz", [str(place / "x.npy")], torch.arange(1), None)
    return decoding.Decoder(source, (3, 8, 8), 1.0, Image.Resampling.BILINEAR, Augmentation())[0, None]


def arrays(place: Path) -> list[bytes]:
    draw = np.random.default_rng(2)
    images, labels = draw.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), np.arange(12) % 3
    found = []
    for write, content in (
        (np.savez, {"x_train": images[:8], "y_train": labels[:8], "x_test": images[8:], "y_test": labels[8:]}),
        (np.savez_compressed, {"images": images[..., 0], "labels": np.array(["cat", "dog", "cow"])[labels]}),
        (np.savez_compressed, {"train_images": images, "train_labels": labels[:, None], "note": np.float64(1)}),
        (np.savez, {"x": np.asfortranarray(images / 255).astype(">f4"), "y": labels == 1}),
    ):
        buffer = io.BytesIO()
        write(buffer, **content)
        found.append(buffer.getvalue())
    return found


TABLES = [
    b"image,label\n" + b"".join(b"%d.png,%s\n" % (place, b"cat" if place % 2 else b"dog") for place in range(6)),
    b'\xef\xbb\xbfid;split;"class name"\r\n' + b"".join(
        b'"images/%d";%s;"a ""b"", c"\r\n' % (place, b"train" if place < 4 else b"test") for place in range(6)
    ),
    b"".join(b"%d\t%d\n" % (place, place % 3) for place in range(6)),
]  # fmt: skip


def table_of(data: bytes, place: Path) -> object:
    """Beside six pictures."""
    images = place / "images"
    if not images.exists():
        images.mkdir()
        for index in range(6):
            (images / f"{index}.png").write_bytes(pictures(place)[1])
    return source_of("csv", ".csv")(data, place)


def shard(place: Path) -> list[bytes]:
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for index in range(24):  # enough that some can be held out
                for name, content in (("png", pictures(place)[1]), ("cls", str(index % 3).encode())):
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
            if not isinstance(source, Items):  # of arrays
                assert len(source.images) and (source.labels is None or len(source.images) == len(source.labels))
                continue
            decoder = decoding.Decoder(source, (3, 8, 8), 1.0, Image.Resampling.BILINEAR, Augmentation())
            for index in range(min(len(source), 6)):
                _ = decoder[index, None]
        return None

    return parse


# ------------------------------------------------------------------ boxes

SCENES = {
    "info": {"year": 2024}, "licenses": [],
    "images": [{"id": 7 + index, "file_name": f"{index}.png", "width": 11, "height": 9} for index in range(3)],
    "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog", "supercategory": "animal"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 5, 5], "area": 25.0, "segmentation": []},
        {"id": 2, "image_id": 8, "category_id": 3, "bbox": [0.5, 0.5, 3, 4.5], "iscrowd": 1},
    ],
}  # fmt: skip
BOX = b"<bndbox><xmin>%d</xmin><ymin>2</ymin><xmax>6.5</xmax><ymax>7</ymax></bndbox>"
VOC = b"""<annotation><folder>x</folder><filename>0.png</filename>
<size><width>11</width><height>9</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult>%b</object>
<object><name>dog &amp; co</name>%b</object>
</annotation>""" % (BOX % 1, BOX % 2)
YOLO = [
    b"train: images\nval: [images]\nnames: {0: cat, 1: 'dog'}\nkpt_shape: [17, 3]\n",
    b"# a comment\ntrain: [images, images/]\nnc: 2\nnames:\n  - &a cat\n  - dog\nmore: *a\n",
    b"0 0.5 0.5 0.2 0.3\n1 0.25 0.25 0.1 0.1\n1 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9\n",
]  # fmt: skip


def scene_of(form: str) -> Parse:
    """Beside three pictures; a file that says nothing of itself is yolo's of boxes."""

    def parse(data: bytes, place: Path) -> object:
        images = place / "images"
        if not images.exists():
            images.mkdir()
            for index in range(3):
                (images / f"{index}.png").write_bytes(pictures(place)[1])
        given = {
            "coco": "coco:{0}/images?annotations={0}/scenes.json",
            "voc": "voc:{0}/images",
            "yolo": "yolo:{0}/d.yaml",
        }
        yolo = form == "yolo"
        boxes = yolo and data[:1] in b"01"
        file = images / "0.txt" if boxes else place / "d.yaml" if yolo else images / "0.xml"
        (place / "scenes.json" if form == "coco" else file).write_bytes(data)
        if boxes:
            (place / "d.yaml").write_bytes(YOLO[0])
        elif yolo:
            (images / "0.txt").write_bytes(YOLO[2])
        source = sources.load(given[form].format(place), "train", shared=True, targets=BoxTargets())
        assert isinstance(source, Items)
        return [source.items[index] for index in range(len(source.items))]

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
    facts = strict_json.parse(data, "report.json")
    view.view(facts)
    return report.html(facts), report.summary(facts), shown.html(shown.compared({"a": facts, "b": REPORT}))


PRICES = b"""[prices]
requests_per_second = 100
watts_per_core = 8.0
currency = "EUR"
load = 0.6
[about]
author = "Vision team"
"""


def priced(data: bytes, place: Path) -> object:
    (place / "p.toml").write_bytes(data)
    return prices.read(place / "p.toml")[0].for_load(50.0, 2)


POINT = {
    "number": 3, "name": "#3", "value": 0.9, "interval": [0.8, 0.95], "drop": 0.01, "drop_interval": [0.0, 0.02],
    "latency_ms": {"median": 2.0, "low": 1.9, "high": 2.1}, "speedup": {"median": 2.0, "low": 1.9, "high": 2.1},
    "disturbed": False, "size_bytes": 4000, "memory_bytes": None, "seconds": 4.0, "recipe": "prune macs=0.5",
    "beaten": False, "folder": "points/0003",
}  # fmt: skip
ABOUT = {"host": "here", "runtime": "onnxruntime", "threads": 1, "metric": "top-1", "unit": "%", "samples": 100}
FRONT = {"points": [POINT, {**POINT, "number": 4, "folder": ""}], "about": {**ABOUT, "title": "a net", "budget": {}}}


def fronted(data: bytes, place: Path) -> object:
    """As a stranger seals it."""
    run_.write_json(place / "front.json", strict_json.parse(data, "front.json"))
    found = front.read(place)
    for wish in ("5ms", "2x", "1MB", "drop=0.5%", "#3"):
        with contextlib.suppress(InputError):
            found.pick(wish)
    with contextlib.redirect_stdout(io.StringIO()):
        show(found, False, True)
        show(found, True)
    return str(found)


TARGETS = {
    "graph.json": Target(part(folder.GRAPH), mutated_json, loaded_with(folder.GRAPH), 50),
    "weights of a folder": Target(part(folder.WEIGHTS), weights_mutated, loaded_with(folder.WEIGHTS), 10),
    "weights of a smallest folder": Target(
        part(folder.WEIGHTS, "smallest"), weights_mutated, loaded_with(folder.WEIGHTS), 10
    ),
    "text of a smallest folder": Target(part(folder.GRAPH, "smallest"), text_mutated, loaded_with(folder.GRAPH), 20),
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
    "animated": Target(animated, mutated, decoded),
    "npz": Target(arrays, either, source_of("npz", ".npz"), 5),
    "csv": Target(lambda _: TABLES, mutated_words, table_of, 5),
    "tar": Target(shard, mutated, source_of("tar", ".tar"), 5),
    "parquet": Target(table, mutated, source_of("parquet", ".parquet"), 10),
    "recipe": Target(lambda _: [RECIPE], mutated_words, recipe_of, 40),
    "coco": Target(lambda _: [json.dumps(SCENES).encode()], mutated_json, scene_of("coco"), 3),
    "voc": Target(lambda _: [VOC], mutated_words, scene_of("voc"), 3),
    "yolo": Target(lambda _: YOLO, mutated_words, scene_of("yolo"), 4),
    "prices": Target(lambda _: [PRICES], mutated_words, priced),
    "front.json": Target(lambda _: [json.dumps(FRONT).encode()], mutated_json, fronted, 4),
    "report.json": Target(lambda _: [json.dumps(REPORT).encode()], mutated_json, reported, 60),
}  # fmt: skip


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """What takes longer is interrupted by what no parser may catch as a broken file."""
    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 12 * seconds))

    def late(*_: object) -> None:
        raise KeyboardInterrupt(f"more than {seconds} s")

    before = [signal.signal(one, late) for one, _, _ in timers]
    for _, timer, most in timers:
        signal.setitimer(timer, most)
    try:
        yield
    finally:
        for (one, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(one, handler)


@dataclass
class Found:
    """What executions came to. begun: the number of the last one that began."""

    taken: int = 0
    refused: int = 0
    begun: int = -1
    grown: int = 0
    wrong: list[str] = field(default_factory=list)


def execute(name: str, corpus: list[bytes], place: Path, found: Found, count: int, until: float) -> Iterator[Found]:
    """From the execution behind the last one on; yields as each begins."""
    target = TARGETS[name]
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(found.begun + 1, count):
        if time.monotonic() > until or len(found.wrong) >= FAILED:
            break
        found.begun = index
        yield found
        data = drawn(name, corpus, index)
        try:
            with limited(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.parse(data, place)
            found.taken += 1
        except RarefyError as error:
            found.refused += 1
            if "\n" in str(error):
                found.wrong.append(f"number {index}: {error}")
        except BaseException as error:
            (place / f"input-{index}").write_bytes(data)
            found.wrong.append(f"number {index}: {type(error).__name__}: {error}")
    found.grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held)
    yield found


def drawn(name: str, corpus: list[bytes], index: int) -> bytes:
    draw = random.Random(f"{name} {SEED} {index}")
    return TARGETS[name].mutate(draw, draw.choice(corpus)) if index else corpus[0]


def ended(child: int, told: Path) -> int:
    """Its exit code; it is killed where it says nothing new for long: C code that never returns hears no signal."""
    said, since = b"", time.monotonic()
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        with contextlib.suppress(FileNotFoundError):
            if told.read_bytes() != said:
                said, since = told.read_bytes(), time.monotonic()
        if time.monotonic() - since > STUCK:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def run(name: str, count: int, place: Path, seconds: float = 1e9) -> tuple[int, int]:
    """So many executions, or as many as fit into so many seconds; how many files were taken, and how many refused.

    In a process of its own, which another one follows where a file kills it: the parsers of other packages are C.
    """
    corpus, told, found = TARGETS[name].corpus(place), place / "told", Found()
    until = time.monotonic() + seconds
    while True:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                faulthandler.disable()  # what dies is told by its number
                with open(told, "wb", buffering=0) as file:
                    for state in execute(name, corpus, place, found, count, until):
                        os.pwrite(file.fileno(), json.dumps(asdict(state)).encode(), 0)
                code = 0
            finally:
                os._exit(code)
        code = ended(child, told)
        found = Found(**json.loads(told.read_bytes()))
        if code == 0:
            break
        (place / f"input-{found.begun}").write_bytes(drawn(name, corpus, found.begun))
        found.wrong.append(f"number {found.begun}: exit code {code}")
    assert not found.wrong, f"{name} (seed {SEED}): " + "; ".join(found.wrong)
    assert found.grown < BYTES, f"{name}: {found.grown:,} bytes more"
    return found.taken, found.refused


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_answers_or_raises_a_rarefy_error(name: str, tmp_path: Path) -> None:
    count = max(12, SHORT * 100 // TARGETS[name].cost)
    taken, refused = run(name, count, tmp_path)
    assert taken + refused == count and taken > 0  # the whole file is taken: what is fed reaches the parser


BEGIN: list[float] = []  # when the first of the many began


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="set RAREFY_FUZZ to the number of executions")
@pytest.mark.parametrize("name", sorted(TARGETS, key=lambda one: TARGETS[one].cost))
def test_many(name: str, tmp_path: Path) -> None:
    """The quick ones first: what they leave of their time is for the others."""
    begin = time.monotonic()
    BEGIN.append(begin)
    share = (HOUR - (begin - BEGIN[0])) / (len(TARGETS) + 1 - len(BEGIN))
    taken, refused = run(name, LONG // len(TARGETS), tmp_path, share)
    print(f"{name}: {taken + refused:,} executions, {refused:,} refused, {time.monotonic() - begin:.0f} s")
