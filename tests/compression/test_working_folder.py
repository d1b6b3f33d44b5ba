"""A working folder that was edited is noticed, whatever was edited in it, and nothing of it is believed."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from digits import digits
from torch import fx

from rarefy import demo
from rarefy.compression import compress as compress_
from rarefy.compression.budget import Budget
from rarefy.compression.compress import compress
from rarefy.compression.run import Folder
from rarefy.deployment import latency
from rarefy.errors import FormatError
from rarefy.graph.capture import capture

STEPS = [{"do": "prune", "macs": 0.6, "round_to": 8}]


def model() -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(demo.model(width=8), torch.zeros(2, 1, 8, 8))


def resumed(work: Path) -> compress_.Result:
    return compress(model(), digits(), budget=Budget(), steps=STEPS, workdir=work, corruptions=(), progress=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped behind its step, before its end."""
    work = tmp_path_factory.mktemp("working") / "work"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(latency, "timed", functools.partial(latency.timed, repeats=5, warmup=1))
        patched.setattr(compress_, "compare", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            resumed(work)
    assert (work / "1-prune").is_dir() and not (work / "final.json").exists()
    return work


def flip(path: Path, place: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def manifest(work: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = work / "1-prune" / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=1, sort_keys=True))


def found(key: str, value: object) -> Callable[[Path], None]:
    return lambda work: manifest(work, lambda whole: whole["found"].update({key: value}))  # type: ignore[attr-defined]


def other_file(work: Path) -> None:
    """The file that is judged, and the manifest that lists it."""
    path = work / "1-prune" / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    entry = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
    manifest(work, lambda whole: whole["files"].update({"model.onnx": entry}))  # type: ignore[attr-defined]


def swapped(work: Path) -> None:
    """Another candidate's whole folder, in its place."""
    shutil.rmtree(work / "1-prune")
    shutil.copytree(work / "0-original", work / "1-prune")


EDITS: dict[str, Callable[[Path], object]] = {
    "weights": lambda work: flip(work / "1-prune" / "weights.safetensors"),
    "graph": lambda work: flip(work / "1-prune" / "graph.json"),
    "exported file": lambda work: flip(work / "1-prune" / "model.onnx"),
    "exported file and its entry": other_file,
    "accuracy": found("evaluation", {"value": 1.0, "drop": None}),
    "speed-up": found("speedup", {"original": {"median": 9.0, "low": 9.0, "high": 9.0}}),
    "name": found("name", "better"),
    "no seal": lambda work: manifest(work, lambda whole: whole.pop("seal")),
    "another seal": lambda work: manifest(work, lambda whole: whole.update(seal="0" * 64)),
    "the original's": lambda work: flip(work / "0-original" / "weights.safetensors"),
    "another step's folder": swapped,
    "run": lambda work: flip(work / "run.json", 40),
    "run without seal": lambda work: (work / "run.json").write_text("{}"),
    "a failure that was none": lambda work: (work / "1-prune.failed.json").write_text('{"why": "no reason"}'),
    "a final that was none": lambda work: (work / "final.json").write_text('{"facts": {}}'),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_noticed(edit: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    shutil.copytree(done, work)
    EDITS[edit](work)
    monkeypatch.setattr(Folder, "_put", lambda *_, **__: pytest.fail("a step was done"))
    with pytest.raises(FormatError, match="delete the working folder to start anew") as refusal:
        resumed(work)
    assert str(work) in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_was_not_edited_goes_on(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a kill left half written is put away, whatever it is."""
    work = tmp_path / "work"
    shutil.copytree(done, work)
    (work / ".1-prune.0123abcd.part").mkdir()
    (work / ".run.0123abcd.part.json").write_text("half")
    (work / ".link").symlink_to(done)
    monkeypatch.setattr(Folder, "_put", lambda *_, **__: pytest.fail("a step was done"))
    seen: list[object] = []
    monkeypatch.setattr(compress_, "compare", lambda *given, **_: seen.append(given) or pytest.skip.Exception())
    with pytest.raises(Exception):  # noqa: B017  what follows the steps is none of this test's
        resumed(work)
    assert seen and (done / "1-prune").is_dir()
    assert not any(one.name.startswith(".") for one in work.iterdir())
