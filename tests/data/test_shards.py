"""Images in tar shards and Parquet files: read where they lie, in a reproducible order.

What is broken or hostile is counted and named, and hurts nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import ended
from PIL import Image

from rarefy.cli import main
from rarefy.data import parquet_pages, sources
from rarefy.data.formats import parquet as parquet_
from rarefy.data.items import Items
from rarefy.data.shards import MOST_BYTES, Shards, files_of, shuffled
from rarefy.errors import DataError
from rarefy.tasks.classification import Classification

SIZE = 8


def picture(value: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE, 3), value, dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def sample(index: int, label: int | str | None = None) -> list[tuple[tarfile.TarInfo, bytes]]:
    found = [member(f"{index:06d}.png", picture(index % 256))]
    return found if label is None else [*found, member(f"{index:06d}.cls", str(label).encode())]


def write(file: Path, members: Sequence[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(file, "w", format=form) as opened:
        for info, content in members:
            opened.addfile(info, io.BytesIO(content))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 40 images; image i is grey of level i, and of class i mod 10."""
    place = tmp_path / "data"
    place.mkdir()
    for shard in range(3):
        write(
            place / f"train-{shard:06d}.tar",
            [one for index in range(40 * shard, 40 * shard + 40) for one in sample(index, index % 10)],
        )
    return place


def task_of(text: str, **options: Any) -> Classification:
    return Classification(**{"train": text, "size": SIZE, "mean": 0, "std": 1, "augment": "none", **options})


def levels(batches: Any) -> tuple[list[int], list[int]]:
    """Grey level of each image, and its label."""
    found = [(inputs, targets) for inputs, targets in batches]
    return (torch.cat([x[:, 0, 0, 0] for x, _ in found]) * 255).round().int().tolist(), torch.cat(
        [y for _, y in found]
    ).tolist()


# ------------------------------------------------------------------ order and content


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_comes_once_with_its_label(folder: Path, workers: int) -> None:
    task = task_of(f"tar:{folder}", workers=workers)
    assert task.length("train") == 120 and task.classes == 10 and task.unreadable("train") == {}
    assert levels(task.batches("train", 16)) == (list(range(120)), [index % 10 for index in range(120)])
    seen, labels = levels(task.batches("train", 16, shuffle_seed=3))
    assert sorted(seen) == list(range(120)) and seen != list(range(120)) and labels == [index % 10 for index in seen]


def test_the_order_follows_the_seed_and_the_epoch_and_goes_on_anywhere(folder: Path) -> None:
    task = task_of(f"tar:{folder}", augment="crop,flip")
    options: dict[str, Any] = {"shuffle_seed": 5, "augment": True, "epoch": 1}
    whole = list(task.batches("train", 8, **options))
    for start, workers in ((0, 2), (4, 0), (14, 2)):
        rest = list(
            task_of(f"tar:{folder}", augment="crop,flip", workers=workers).batches("train", 8, start=start, **options)
        )
        assert len(rest) == len(whole) - start
        assert all(torch.equal(x, a) and torch.equal(y, b) for (x, y), (a, b) in zip(rest, whole[start:]))
    for other in ({"epoch": 2}, {"shuffle_seed": 6}):
        assert not torch.equal(
            torch.cat([y for _, y in whole]),
            torch.cat([y for _, y in task.batches("train", 8, **{**options, **other})]),
        )


def test_a_shuffled_order_is_a_permutation_that_stays_near() -> None:
    blocks = torch.arange(50).repeat_interleave(40)
    window = 100
    places = []
    for epoch in range(200):
        order = shuffled(blocks, window, torch.Generator().manual_seed(epoch))
        assert torch.equal(order.sort().values, torch.arange(2000))
        for first in range(
            0, 2000, window
        ):  # a stretch as long as a window meets two windows, of at most 100/40 + 2 shards each
            assert len(blocks[order[first : first + window]].unique()) <= 2 * 4
        places.append(order.argsort())
    mean = torch.stack(places).double().mean(0)  # of a uniform place: 999.5, deviation 577 / sqrt(200) = 41
    assert float((mean - 999.5).abs().max()) < 5 * 41
    assert len(shuffled(blocks[:0], window, torch.Generator())) == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("{folder}", 120),
        ("{folder}/train-{{000000..000001}}.tar", 80),
        ("{folder}/train-00000[12].tar", 80),
        ("{folder}/train-000002.tar", 40),
    ],
)
def test_shards_are_named_as_a_folder_a_range_or_a_pattern(folder: Path, text: str, count: int) -> None:
    assert task_of("tar:" + text.format(folder=folder)).length("train") == count


def test_a_folder_is_divided_by_its_files_names_else_a_fifth_of_each_class_is_for_validation(folder: Path) -> None:
    held = task_of(f"tar:{folder}", val=f"tar:{folder}")
    assert (held.length("train"), held.length("val")) == (100, 20)
    assert not set(levels(held.batches("train", 16))[0]) & set(levels(held.batches("val", 16))[0])
    write(folder / "validation-000000.tar", [one for index in range(200, 210) for one in sample(index, index % 10)])
    named = task_of(f"tar:{folder}", val=f"tar:{folder}")
    assert (named.length("train"), levels(named.batches("val", 16))[0]) == (120, list(range(200, 210)))
    assert len({one.fingerprint(split) for one in (held, named) for split in ("train", "val")}) == 4


def test_long_names_and_other_members_are_read(tmp_path: Path) -> None:
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        long = "deep/" * 40 + "name"
        named = [
            member(f"{long}.cls", b"3\n"),
            member(f"{long}.json", b"{}"),
            member(f"{long}.JPG", picture(100, "JPEG")),
        ]
        content = [member("notes.txt", b"x"), *named, member("._0001.png", b"mac"), *sample(5, 4)]
        task = task_of(f"tar:{write(tmp_path / f'{number}.tar', content, form)}")
        assert levels(task.batches("train", 2)) == ([100, 5], [3, 4]) and task.unreadable("train") == {}


def test_a_description_beside_a_picture_names_its_class(tmp_path: Path) -> None:
    said = [b'{"label": 7, "text": "a"}', b'{"cls": 2}', b'{"label": 4}', b'{"label": "x"}', b"no", b'{"label": -1}']
    members = [one for place, text in enumerate(said) for one in (*sample(place), member(f"{place:06d}.json", text))]
    members.insert(6, member("000002.cls", b"5"))  # what stands alone counts
    task = task_of(f"tar:{write(tmp_path / 'a.tar', members)}")
    assert levels(task.batches("train", 4)) == ([0, 1, 2], [7, 2, 5])
    source = task.data.source("train")
    assert isinstance(source, Items) and source.store is not None
    assert source.store.left_out.count == 3 and "no label in a .cls or .json" in source.store.left_out.first[0]


def test_shards_without_labels_give_images_only(tmp_path: Path) -> None:
    task = task_of(
        f"tar:{write(tmp_path / 'a.tar', [one for index in range(8) for one in sample(index)])}", class_count=10
    )
    assert torch.cat(list(task.inputs("train", 8, 4))).shape == (8, 3, SIZE, SIZE)
    with pytest.raises(DataError, match="has no labels"):
        list(task.batches("train", 4))


# ------------------------------------------------------------------ broken and hostile


def bomb() -> bytes:
    """A PNG of 200 bytes that declares 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


ESCAPE = "0008\x1b[2J.png"
AT_INDEX = {  # no sample: found when the headers are walked
    "link": (
        [member("0001.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), member("0001.cls", b"1")],
        "is a link or no plain file",
    ),
    "hard link": (
        [member("0002.png", type=tarfile.LNKTYPE, linkname="000000.png"), member("0002.cls", b"1")],
        "is a link or no plain file",
    ),
    "device": ([member("0003.png", type=tarfile.CHRTYPE), member("0003.cls", b"1")], "is a link or no plain file"),
    "no label": ([member("0004.png", picture(1))], "has no label"),
    "no image": ([member("0005.cls", b"1")], "has a label and no image"),
    "word": ([member("0006.png", picture(1)), member("0006.cls", b"cat")], "no class index"),
    "negative": ([member("0007.png", picture(1)), member("0007.cls", b"-1")], "no class index"),
    "long label": ([member(ESCAPE, picture(1)), member(ESCAPE.replace("png", "cls"), b"1" * 10_000)], "no class index"),
    "large": ([member("0009.png", bytes(MOST_BYTES + 1)), member("0009.cls", b"1")], "too many for an image"),
}  # fmt: skip
AT_DECODING = {
    "garbage": b"no image",
    "empty": b"",
    "cut": picture(1)[:40],
    "bomb": bomb(),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/tmp/owned) (w) file\n",
}


@pytest.mark.parametrize("name", AT_INDEX)
def test_what_is_no_sample_is_left_out_and_named(tmp_path: Path, name: str) -> None:
    members, why = AT_INDEX[name]
    file = write(tmp_path / "a.tar", [*sample(10, 1), *members, *sample(11, 2), *sample(12, 3)])
    task = task_of(f"tar:{file}")
    assert levels(task.batches("train", 2)) == ([10, 11, 12], [1, 2, 3])
    told = task.unreadable("train")
    assert told["count"] == 1 and why in told["first"] and "a.tar" in told["first"] and "\x1b" not in told["first"]
    assert task.describe()["train"]["unreadable"] == told
    with pytest.raises(DataError, match="1 members can't be used, the first is .*a.tar"):
        task_of(f"tar:{file}", strict=True).length("train")


@pytest.mark.parametrize("name", AT_DECODING)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_no_image_is_left_out_and_named(tmp_path: Path, name: str, workers: int) -> None:
    broken = [member("0002.png", AT_DECODING[name]), member("0002.cls", b"9")]
    file = write(tmp_path / "a.tar", [*sample(10, 1), *broken, *sample(11, 2), *sample(12, 3)])
    task = task_of(f"tar:{file}", workers=workers)
    assert levels(task.batches("train", 2)) == ([10, 11, 12], [1, 2, 3])
    assert task.unreadable("train")["count"] == 1 and "a.tar: 0002.png" in task.unreadable("train")["first"]
    batches = list(task_of(f"tar:{file}").batches("train", 4, augment=True))  # in training the next one stands in
    assert levels(batches) == ([10, 11, 11, 12], [1, 2, 2, 3])
    with pytest.raises(DataError, match=r"1 of 4 images can't be read, the first is .*a.tar: 0002.png"):
        list(task_of(f"tar:{file}", strict=True, workers=workers).batches("train", 2))


def test_names_that_lead_elsewhere_are_only_names(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    names = ["../../outside", "/etc/outside", "a/../../../outside", "C:\\outside"]
    members = [
        one
        for index, name in enumerate(names)
        for one in (member(f"{name}.png", picture(index)), member(f"{name}.cls", b"1"))
    ]
    before = sorted(str(one) for one in tmp_path.rglob("*"))
    task = task_of(f"tar:{write(inside / 'a.tar', members)}")
    assert levels(task.batches("train", 4))[0] == [0, 1, 2, 3]
    assert sorted(str(one) for one in tmp_path.rglob("*")) == sorted([*before, str(inside / "a.tar")])


@pytest.mark.parametrize(
    "size",
    [b"77777777777\0", b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", b"\xff" * 12, b"00000000x00\0", b"99999999999\0"],
)
def test_a_size_that_is_not_there_loses_one_member(tmp_path: Path, size: bytes) -> None:
    file = write(tmp_path / "a.tar", [*sample(10, 1), *sample(11, 2), *sample(12, 3)])
    content = bytearray(file.read_bytes())
    place = content.index(b"000011.png")
    content[place + 124 : place + 136] = size
    content[place + 148 : place + 156] = b" " * 8
    content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + 512])
    file.write_bytes(content)
    task = task_of(f"tar:{file}")
    assert levels(task.batches("train", 2)) == ([10, 12], [1, 3])
    assert (
        task.unreadable("train")["count"] == 2 and "damaged header" in task.unreadable("train")["first"]
    )  # the label is then without image


def test_damage_loses_what_is_damaged(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tar", [one for index in range(20) for one in sample(index, index % 10)])
    content = bytearray(file.read_bytes())
    place = content.index(b"000007.png")
    content[place : place + 700] = bytes(range(250)) * 2 + bytes(range(200))
    file.write_bytes(content)
    task = task_of(f"tar:{file}")
    assert levels(task.batches("train", 4))[0] == [index for index in range(20) if index != 7]
    file.write_bytes(content[: content.index(b"000015.png") + 600])  # cut off in the middle of an image
    cut = task_of(f"tar:{file}")
    assert levels(cut.batches("train", 4))[0] == [index for index in range(15) if index != 7]
    assert cut.unreadable("train")["count"] >= 2


def test_a_shard_that_shrinks_while_it_is_read(folder: Path) -> None:
    task = task_of(f"tar:{folder}")
    task.length("train")
    last = folder / "train-000002.tar"
    last.write_bytes(last.read_bytes()[:10_000])
    seen = levels(task.batches("train", 8))[0]
    assert seen[:80] == list(range(80)) and len(seen) < 120
    assert task.unreadable("train")["count"] == 120 - len(seen)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x1f\x8b" + bytes(600), "is compressed"),
        (bytes(10_240), "has no images"),
        (b"not a tar " * 200, "has no images"),
    ],
)
def test_what_is_no_shard(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=why):
        task_of(f"tar:{tmp_path}").length("train")
    with pytest.raises(DataError, match="no such file"):
        task_of(f"tar:{tmp_path}/b.tar").length("train")
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match=r"no \*.tar in that folder"):
        task_of(f"tar:{tmp_path}").length("train")


def test_many_broken_members_are_counted_and_few_are_kept_by_name(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.tar",
        [one for index in range(3000) for one in (member(f"{index}.png", b""), member(f"{index}.cls", b"cat"))],
    )
    store = Shards("x", files_of("x", str(file), "train", ".tar")[0])
    assert len(store) == 0 and store.left_out.count == 3000 and len(store.left_out.first) == 100
    same = write(tmp_path / "b.tar", [member("0.png", picture(1)) for _ in range(3000)])
    assert len(Shards("x", [str(same)])) == 1  # one key is one sample


def test_strict_on_the_command_line_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [one for index in range(40) for one in sample(index, index % 10)]
    file = write(tmp_path / "a.tar", [*members, member("9999.png", picture(1)), member("9999.cls", b"cat")])
    common = ["distill", "tests.data.test_shards:net", "--train", f"tar:{file}", "--image-size", str(SIZE),
                  "--steps", "2", "--batch-size", "16", "--device", "cpu"]  # fmt: skip
    assert main.run([*common, "--strict", "-o", str(tmp_path / "strict")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "1 members can't be used, the first is" in lines[0] and "9999" in lines[0]
    assert main.run([*common, "-o", str(tmp_path / "done")]) == 0
    told = capsys.readouterr().out
    assert "left out of train" in told and "9999" in told
    manifest = json.loads((tmp_path / "done" / "manifest.json").read_text())
    assert manifest["task"]["train"]["unreadable"]["count"] == 1


def net() -> torch.nn.Module:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 10),
    )
    model.input_shape = (3, SIZE, SIZE)  # type: ignore[assignment]
    return model


def test_memory_is_flat_in_a_small_run(tmp_path: Path) -> None:
    bench = Path(__file__).resolve().parents[2] / "bench" / "shards.py"
    options = [
        "--images",
        "10000",
        "--shards",
        "4",
        "--batch-size",
        "50",
        "--workers",
        "0",
        "--folder",
        str(tmp_path / "shards"),
        "--check",
    ]
    done = subprocess.run(
        [sys.executable, str(bench), *options], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["left_out"] == 2


# ------------------------------------------------------------------ parquet

arrow = pytest.importorskip("pyarrow")


def table(values: Sequence[Any], labels: Sequence[int | None], **columns: Any) -> Any:
    schema_of = {"image": arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])}
    names = {
        "info": {
            "features": {
                "image": {"_type": "Image"},
                "label": {"names": [f"kind {index}" for index in range(10)], "_type": "ClassLabel"},
            }
        }
    }
    fields = [arrow.field("image", schema_of["image"]), arrow.field("label", arrow.int64())]
    arrays = [
        arrow.array([{"bytes": value, "path": None} for value in values], schema_of["image"]),
        arrow.array(labels, arrow.int64()),
    ]
    for name, column in columns.items():
        made = arrow.array(column)
        fields.append(arrow.field(name, made.type))
        arrays.append(made)
    return arrow.Table.from_arrays(arrays, schema=arrow.schema(fields, metadata={"huggingface": json.dumps(names)}))


def store(file: Path, content: Any, rows: int = 16) -> Path:
    from pyarrow import parquet

    parquet.write_table(content, file, row_group_size=rows)
    return file


def test_parquet_that_names_fewer_classes_than_it_labels(tmp_path: Path) -> None:
    file = store(tmp_path / "x.parquet", table([picture(index) for index in range(9)], [0, 0, 0, 1, 1, 1, 12, 11, 11]))
    source = sources.load(f"parquet:{file}", "val", shared=True)
    assert "12: one image each, which is for training" in source.notes[0]  # type: ignore[union-attr]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["zstd", "gzip", "snappy", "brotli", "lz4"])
def test_a_page_that_unfolds_too_far_is_refused_before_it_does(
    tmp_path: Path, compression: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet

    monkeypatch.setattr(parquet_pages, "UNFOLDED", 2**20)
    content = table([bytes(2**21), *[picture(index) for index in range(9)]], [0] * 10)
    parquet.write_table(
        content, tmp_path / "x.parquet", compression=compression, use_dictionary=False, data_page_version=version
    )
    source = sources.load(f"parquet:{tmp_path / 'x.parquet'}", "train")
    with pytest.raises(DataError, match=r"row group 0 unfolds from [0-9,]+ bytes to 2,0"):
        _ = source.items[1]  # type: ignore[union-attr]
    monkeypatch.setattr(parquet_pages, "UNFOLDED", 2**22)
    assert source.items[1] == picture(0)  # type: ignore[union-attr]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_description_that_contradicts_itself_ends_no_process(tmp_path: Path) -> None:
    """Asked for a column's description, pyarrow aborts: each bit of the schema, which tells what may be missing."""
    file = store(
        tmp_path / "x.parquet", table([picture(index) for index in range(9)], [index % 3 for index in range(9)])
    )
    data = file.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for place in range(footer, footer + 130):
                for mask in (1, 2, 4):
                    file.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
                    with contextlib.suppress(DataError, OSError):
                        source = sources.load(f"parquet:{file}", "train")
                        _ = source.items[0]  # type: ignore[union-attr]
            code = 0
        finally:
            os._exit(code)
    code, _ = ended(child, 120)
    assert code == 0


def test_a_dictionary_that_repeats_its_images_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = table([picture(index % 2) for index in range(200)], [index % 2 for index in range(200)])
    source = sources.load(f"parquet:{store(tmp_path / 'x.parquet', content, 200)}", "train")
    whole = [source.items[index] for index in range(200)]  # type: ignore[union-attr]
    assert whole == [picture(index % 2) for index in range(200)]
    monkeypatch.setattr(parquet_, "REPEATED", 20 * len(whole[0]))
    source.items._cached.clear()  # type: ignore[union-attr]
    with pytest.raises(DataError, match="row group 0 repeats its images to more than"):
        _ = source.items[0]  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", [0, 2])
def test_parquet_of_hugging_face(tmp_path: Path, workers: int) -> None:
    for part in range(2):
        indices = range(50 * part, 50 * part + 50)
        store(
            tmp_path / f"train-{part:05d}-of-00002.parquet",
            table([picture(index) for index in indices], [index % 10 for index in indices]),
        )
    store(
        tmp_path / "test-00000-of-00001.parquet", table([picture(index) for index in range(200, 210)], list(range(10)))
    )
    task = task_of(f"parquet:{tmp_path}", val=f"parquet:{tmp_path}", workers=workers)
    assert (task.length("train"), task.length("val"), task.classes) == (100, 10, 10)
    assert task.class_names == tuple(f"kind {index}" for index in range(10))
    assert levels(task.batches("train", 7)) == (list(range(100)), [index % 10 for index in range(100)])
    whole = list(task.batches("train", 8, shuffle_seed=1, augment=True))
    assert len(set(levels(whole)[0])) == 96
    rest = list(task.batches("train", 8, shuffle_seed=1, augment=True, start=9))
    assert all(torch.equal(x, a) for (x, _), (a, _) in zip(rest, whole[9:])) and len(rest) == 3


def test_broken_rows_of_parquet_are_counted_and_named(tmp_path: Path) -> None:
    values = [picture(1), None, b"garbage", bomb(), picture(5), picture(6)]
    task = task_of(f"parquet:{store(tmp_path / 'a.parquet', table(values, [1, 2, 3, 4, 5, None]), 2)}")
    assert levels(task.batches("train", 3)) == ([1, 5], [1, 5])
    assert task.unreadable("train")["count"] == 4 and "a.parquet: row 5" in task.unreadable("train")["first"]


def test_parquet_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(DataError, match="is no Parquet file that can be read"):
        task_of(f"parquet:{tmp_path}/a.parquet").length("train")
    file = store(tmp_path / "b.parquet", table([picture(1)], [1], thumb=[b"x"], fine=[3]))
    with pytest.raises(
        DataError, match=r"2 columns of bytes \(image, thumb\); name that of the images with \?image=NAME"
    ):
        task_of(f"parquet:{file}").length("train")
    with pytest.raises(DataError, match="'label' is no column of images; have image, thumb"):
        task_of(f"parquet:{file}?image=label").length("train")
    with pytest.raises(DataError, match="unknown option 'picture'"):
        task_of(f"parquet:{file}?picture=image").length("train")
    assert levels(task_of(f"parquet:{file}?image=image&label=fine").batches("train", 1)) == ([1], [3])


def test_parquet_keeps_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.data.formats import parquet as parquet

    noise: list[bytes] = []
    for seed in range(64):
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "PNG")
        noise.append(stream.getvalue())
    file = store(tmp_path / "a.parquet", table(noise, [0] * 64), 4)
    monkeypatch.setattr(parquet, "CACHE", 40_000)  # three row groups of 12.5 kB
    found = parquet.Parquet("x", [str(file)])
    assert 4 <= found.window <= 14
    groups = []
    read = found._column
    monkeypatch.setattr(
        found, "_column", lambda block: (groups.append(block not in {key[1] for key in found._cached}), read(block))[1]
    )
    for index in shuffled(found.blocks, found.window, torch.Generator().manual_seed(0)).tolist():
        assert found[index] == noise[index]
        assert sum(column.nbytes for column in found._cached.values()) <= 40_000
    assert sum(groups) <= 3 * 16  # of 16 row groups, none is read over and over
