"""What was checked is what is loaded: whole versions, or a refusal, whoever writes meanwhile; and nothing unlisted."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import of_one_value, value_of

from rarefy.artifact import folder as folder_
from rarefy.artifact import signing, snapshot
from rarefy.errors import FormatError, InputError, RarefyError, SignatureRefused
from rarefy.evaluation import recorded
from rarefy.models import load as sources
from rarefy.system import memory

pytest.importorskip("model_signing", reason="signing needs pip install 'rarefy[sign]'")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return signing.keygen(tmp_path_factory.mktemp("keys") / "me.pem")


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    folder = folder_.save(of_one_value(1.0), tmp_path / "model", files={"notes.txt": b"abc"})
    signing.sign(folder, keys[0])
    return folder


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def reseal(folder: Path) -> None:
    """The manifest made to fit the files, as who forges a folder would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


# ----------------------------------------------------------------------------------------------------------- with a key


def test_a_signed_folder_is_loaded_with_its_key(signed: Path, keys: tuple[Path, Path]) -> None:
    assert value_of(folder_.load(signed, key=keys[1])) == 1.0
    source = sources.load(str(signed), key=keys[1])
    assert source.folder is not None and source.folder.is_signed and source.folder.read("notes.txt", 3) == b"abc"


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: flip(folder / "weights.safetensors"),
        lambda folder: flip(folder / "graph.json"),
        lambda folder: flip(folder / "notes.txt"),
        lambda folder: flip(folder / "manifest.json", 5),
        lambda folder: (flip(folder / "weights.safetensors"), reseal(folder)),
        lambda folder: (flip(folder / "notes.txt"), reseal(folder)),
        lambda folder: (folder / "notes.txt").unlink(),
        lambda folder: (folder / "x").touch(),
        lambda folder: (folder / ".model.0123abcd.part.onnx").touch(),
        lambda folder: (folder / "model.sig").unlink(),
        lambda folder: folder_.save(of_one_value(2.0), folder),
    ],
)
def test_what_the_key_did_not_sign_is_refused(
    change: Callable[[Path], None], signed: Path, keys: tuple[Path, Path]
) -> None:
    change(signed)
    with pytest.raises(SignatureRefused) as refusal:
        folder_.load(signed, key=keys[1])
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith("]")


def test_a_content_that_the_hashes_do_not_give_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    manifest = json.loads((signed / "manifest.json").read_text())
    (signed / "model.sig").unlink()
    for content in ("0" * 64, None, [manifest["content"]]):
        (signed / "manifest.json").write_text(json.dumps({**manifest, "content": content}))
        with pytest.raises(InputError, match=r"says content .*\[content\]$"):
            signing.sign(signed, keys[0])
        assert not (signed / "model.sig").exists()


def test_another_key_and_what_is_none(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = signing.keygen(tmp_path / "other.pem")
    with pytest.raises(SignatureRefused, match="another key"):
        folder_.load(signed, key=other)
    with pytest.raises(InputError, match=r"a private key\); give the public one"):
        folder_.load(signed, key=keys[0])
    with pytest.raises(InputError, match="a key checks the signature of a folder"):
        sources.load("timm:resnet18", key=keys[1])


# ------------------------------------------------------------------------------------------- what else lies in a folder


def test_a_file_is_added_and_listed(signed: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="is signed, and nothing can be added to it"):
        folder_.add(signed, {"more.txt": b"x"})
    (signed / "model.sig").unlink()
    before = json.loads((signed / "manifest.json").read_text())
    folder_.add(signed, {"more.txt": b"x", "notes.txt": b"other"})
    after = json.loads((signed / "manifest.json").read_text())
    assert after["files"]["more.txt"] == {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}
    assert after["content"] == before["content"] and {**after, "files": 0} == {**before, "files": 0}
    with snapshot.hold(signed) as held:
        held.check()
        assert held.read("notes.txt", 10) == b"other"
    for name in ("graph.json", "model.sig", "../x", ".hidden"):
        with pytest.raises(InputError, match="can't be a file of the folder"):
            folder_.add(signed, {name: b""})
    signing.sign(signed, keys[0])
    assert value_of(folder_.load(signed, key=keys[1])) == 1.0


def test_what_is_written_into_a_saved_folder_is_listed(tmp_path: Path) -> None:
    folder = folder_.save(of_one_value(1.0), tmp_path / "model")
    with folder_.placing(folder / "x.txt") as place:
        place.write_text("x")
        place.with_suffix(".bin").write_text("y")
    assert folder_.read_manifest(folder)["files"].keys() >= {"x.txt", "x.bin"}
    folder_.load(folder)
    with folder_.placing(tmp_path / "y.txt") as place:
        assert place == tmp_path / "y.txt"


def test_a_copy_is_what_is_listed_or_gone(tmp_path: Path) -> None:
    folder = folder_.save(of_one_value(1.0), tmp_path / "model", files={"model.onnx": b"abc" * 10**6})
    with snapshot.hold(folder) as held:
        held.copy("model.onnx", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b"abc" * 10**6
        flip(folder / "model.onnx")
        with pytest.raises(FormatError, match="differs from what manifest.json lists"):
            held.copy("model.onnx", tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_weights_that_no_memory_holds_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of holes has any size and takes no disk."""
    folder = folder_.save(of_one_value(1.0), tmp_path / "model")
    size = (folder / "weights.safetensors").stat().st_size
    monkeypatch.setattr(memory, "available", lambda: size - 1)
    with pytest.raises(InputError, match=r"weights\.safetensors: takes .* GB of memory, .* end other programs"):
        folder_.load(folder)
    monkeypatch.setattr(memory, "available", lambda: size)
    assert value_of(folder_.load(folder)) == 1.0


def test_files_have_the_usual_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = folder_.save(of_one_value(1.0), tmp_path / "model", files={"notes.txt": b""})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(one.stat().st_mode) for one in folder.iterdir()} == {0o640}


# ---------------------------------------------------------------------------------------------------------------- races


def _save(folder: Path) -> None:
    torch.set_num_threads(1)
    models = [of_one_value(1.0), of_one_value(2.0, 80)]
    while True:
        for model in models:
            folder_.save(model, folder, files={"notes.txt": b"x"})


def _write_in_place(folder: Path) -> None:
    """The weights of two models in turns, into the same file, byte by byte."""
    path = folder / "weights.safetensors"
    first = path.read_bytes()
    other = first.replace(torch.tensor(1.0).numpy().tobytes(), torch.tensor(2.0).numpy().tobytes())
    assert other != first and len(other) == len(first)
    while True:
        for data in (other, first):
            with open(path, "r+b") as file:
                for begin in range(0, len(data), 1000):
                    file.write(data[begin : begin + 1000])
                    file.flush()
            time.sleep(0.002)


def _race(writer: Callable[[Path], None], folder: Path, tries: int) -> tuple[int, list[str]]:
    """How often the folder was loaded whole while the writer wrote, and the refusals, of so many tries."""
    process = multiprocessing.get_context("fork").Process(target=writer, args=(folder,), daemon=True)
    process.start()
    loads, refusals = 0, []
    try:
        for _ in range(tries):
            try:
                assert value_of(folder_.load(folder)) in (1.0, 2.0)
                loads += 1
            except RarefyError as error:
                refusals.append(str(error))
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
    print(f"{tries} loads while {writer.__name__} wrote: {loads} whole, {len(refusals)} refused")
    return loads, refusals


RACES = [60, pytest.param(10_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("tries", RACES)
def test_a_load_during_saves_gives_one_of_the_versions(tries: int, tmp_path: Path) -> None:
    folder = folder_.save(of_one_value(1.0), tmp_path / "model", files={"notes.txt": b"x"})
    loads, refusals = _race(_save, folder, tries)
    assert refusals == [] and loads > 3


@pytest.mark.parametrize("tries", RACES)
def test_a_load_during_writes_gives_the_old_version_or_none(tries: int, tmp_path: Path) -> None:
    folder = folder_.save(of_one_value(1.0), tmp_path / "model")
    original = snapshot.Snapshot.graph

    def whole(held: snapshot.Snapshot) -> torch.fx.GraphModule:
        model = original(held)
        assert value_of(model) == 1.0  # the manifest lists no other
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot.Snapshot, "graph", whole)
        loads, refusals = _race(_write_in_place, folder, tries)
    assert loads + len(refusals) > 3
    assert all("differs from what manifest.json lists" in one for one in refusals)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the hash and the use there is no moment: what changes after the last read is not seen."""
    folder = folder_.save(of_one_value(1.0), tmp_path / "model")
    original = snapshot.Snapshot._check

    def changed_then(held: snapshot.Snapshot, name: str, size: int, digest: str) -> None:
        original(held, name, size, digest)
        if name == "weights.safetensors":
            flip(folder / name)

    monkeypatch.setattr(snapshot.Snapshot, "_check", changed_then)
    assert value_of(folder_.load(folder)) == 1.0
    with pytest.raises(FormatError, match="differs from what"):
        folder_.load(folder)


# ------------------------------------------------------------------------------------------------------------- a report


def _with_report(tmp_path: Path, facts: dict[str, object]) -> Path:
    return folder_.save(of_one_value(1.0), tmp_path / "model", files={"report.json": json.dumps(facts).encode()})


def test_a_report_is_bound_to_the_model(tmp_path: Path) -> None:
    folder = folder_.save(of_one_value(1.0), tmp_path / "model")
    hashes = {name: one["sha256"] for name, one in folder_.read_manifest(folder)["files"].items()}
    facts = {"title": "x", "provenance": {"hashes": {"original": "0" * 64, **hashes}}}
    folder_.add(folder, {"report.json": json.dumps(facts).encode()})
    with snapshot.hold(folder) as held:
        assert recorded.of_folder(held) == facts
    folder = folder_.save(of_one_value(2.0), tmp_path / "other", files={"report.json": json.dumps(facts).encode()})
    with snapshot.hold(folder) as held, pytest.raises(FormatError, match="is about another model"):
        recorded.of_folder(held)
    with snapshot.hold(_with_report(tmp_path, {"title": "x"})) as held:
        with pytest.raises(FormatError, match=r"names no hash of the model.*\[report-unbound\]"):
            recorded.of_folder(held)
    with snapshot.hold(folder_.save(of_one_value(1.0), tmp_path / "none")) as held:
        assert recorded.of_folder(held) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a":' + "[" * 100 + "]" * 100 + "}", "is nested 101 deep"),
        ('{"after": {"parameters": 1e308}}', "holds the number 1e+308"),
        ('{"after": {"parameters": -1e31}}', "holds the number -1e+31"),
        ('{"title": "\\ud800"}', "half of a surrogate pair"),
        ('{"frontier": [' + ",".join(["1"] * 10_001) + "]}", "holds 10001 values in one list"),
        ('{"curves": [' + ",".join(["[1,2]"] * 100_000) + "]}", "holds more than 200000 values"),
        ('{"title": "' + "x" * 2**22 + '"}', "4,194,304 at most"),
        ("[]", "is not a JSON object"),
        ('{"a": 1, "a": 2}', "a key stands twice"),
        ('{"a": NaN}', "NaN is no number"),
    ],
)
def test_a_wild_report_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(FormatError) as refusal:
        recorded.of_file(path)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_report_without_end_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(FormatError, match="not a plain file"):
            recorded.of_file(path)
