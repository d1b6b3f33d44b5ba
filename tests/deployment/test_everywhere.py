"""export_all(): a row a runtime; one that crashes, hangs or is missing takes nothing else with it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from rarefy.cli.main import run
from rarefy.deployment.everywhere import COLUMNS, export_all, shown
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.system import memory

pytest.importorskip("onnxruntime")

FAKES = """
import dataclasses, os, signal, subprocess, sys, time
from pathlib import Path

from rarefy.errors import MissingDependency
from rarefy.runtimes.onnxruntime import OnnxRuntime


@dataclasses.dataclass(frozen=True)
class Crashing(OnnxRuntime):
    def export(self, graph, path):
        os.kill(os.getpid(), signal.SIGSEGV)


@dataclasses.dataclass(frozen=True)
class CrashingLater(OnnxRuntime):
    def compare(self, graph, path, inputs, batch=32, on=None):
        os.abort()


@dataclasses.dataclass(frozen=True)
class Hanging(OnnxRuntime):
    def export(self, graph, path):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(os.environ["HANGING_CHILD"]).write_text(str(child.pid))
        time.sleep(600)


@dataclasses.dataclass(frozen=True)
class Missing(OnnxRuntime):
    def export(self, graph, path):
        raise MissingDependency("nowhere", "nowhere")


@dataclasses.dataclass(frozen=True)
class Leaving(OnnxRuntime):
    def export(self, graph, path):
        sys.exit(3)


@dataclasses.dataclass(frozen=True)
class Raising(OnnxRuntime):
    def export(self, graph, path):
        Path(path).write_bytes(b"half of ")
        raise ValueError("no such kernel")


@dataclasses.dataclass(frozen=True)
class Wrong(OnnxRuntime):
    def compare(self, graph, path, inputs, batch=32, on=None):
        found = super().compare(graph, path, inputs, batch, on)
        return {**found, "passed": False, "first_diverging_layer": "0"}
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "__init__.py").write_text("")
    (tmp_path / "mylab" / "fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HANGING_CHILD", str(tmp_path / "child"))
    return "mylab.fakes"


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(2, 4))


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_crashes_hangs_and_gaps_are_rows(fakes: str, graph: fx.GraphModule, tmp_path: Path) -> None:
    names = [f"{fakes}:{name}" for name in ("Crashing", "Missing", "Leaving", "Wrong", "CrashingLater")]
    rows = export_all(graph, tmp_path / "out", only=["onnxruntime"], also=names)
    states = [row["state"] for row in rows]
    assert states == ["written", "failed", "skipped", "failed", "differs", "failed"], rows
    good, crashed, missing, left, wrong, later = rows
    assert good["parity"]["passed"] and good["latency_ms"] > 0  # type: ignore[index, operator]
    assert Path(str(good["file"])).stat().st_size == good["size_bytes"]
    assert "killed by SIGSEGV" in crashed["note"] and crashed["file"] is None
    assert "pip install 'rarefy[nowhere]'" in missing["note"]
    assert "ended with 3" in left["note"]
    assert wrong["note"] == "0 is the first layer that differs"
    assert "SIGABRT" in later["note"]
    assert all(len(shown(row)) == len(COLUMNS) for row in rows)


def test_what_hangs_is_ended_with_its_children(fakes: str, graph: fx.GraphModule, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(InputError, match="Hanging: took more than 8 s and was ended"):
        export_all(graph, tmp_path / "out", only=[f"{fakes}:Hanging"], seconds=8)
    assert time.monotonic() - begun < 120
    if (tmp_path / "child").exists():  # it came so far
        assert gone(int((tmp_path / "child").read_text()))


def test_half_a_file_of_one_that_raises_is_not_left(fakes: str, graph: fx.GraphModule, tmp_path: Path) -> None:
    rows = export_all(graph, tmp_path / "out", only=["onnxruntime"], also=[f"{fakes}:Raising"], compare=False)
    assert [row["state"] for row in rows] == ["written", "failed"]
    assert rows[1]["note"] == "its process ended with 1 (ValueError: no such kernel)" and rows[1]["file"] is None
    assert [path.name for path in (tmp_path / "out").glob("*.onnx")] == ["onnxruntime.onnx"]


def test_what_takes_all_memory_is_ended_before_the_system_does_it(
    fakes: str, graph: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free, told by a stand-in: a 20th of it at the second look."""
    free = iter([1_000])
    monkeypatch.setattr(memory, "available", lambda: next(free, 50))
    with pytest.raises(InputError, match="Hanging: took nearly all memory that was free and was ended"):
        export_all(graph, tmp_path / "out", only=[f"{fakes}:Hanging"], seconds=90)
    if (tmp_path / "child").exists():
        assert gone(int((tmp_path / "child").read_text()))


def test_a_file_is_no_folder(graph: fx.GraphModule, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="out: is a file; name a folder"):
        export_all(graph, tmp_path / "out", only=["onnxruntime"])


def test_the_command_refuses_what_belongs_to_one_file(
    graph: fx.GraphModule, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rarefy.artifact import folder
    from rarefy.deployment import everywhere

    saved = str(folder.save(graph, tmp_path / "saved"))
    asked = ["export", saved, "--runtime", "all", "--output", str(tmp_path / "out")]
    assert run([*asked, "--certify", str(tmp_path / "c.json")]) == 2
    assert "leave them out with --runtime all" in capsys.readouterr().err
    written = {"runtime": "a", "state": "written", "file": "f", "size_bytes": 3, "latency_ms": 1.0, "note": ""}
    failed = {**written, "runtime": "b", "state": "failed", "note": "it died"}
    parity = {"parity": {"agreement": 1.0, "ulp": 0}}
    monkeypatch.setattr(everywhere, "export_all", lambda *_, **__: [{**written, **parity}, {**failed, **parity}])
    assert run([*asked, "--json"]) == 1
    found = capsys.readouterr()
    assert "b: it died; the other files are good" in found.err
    assert [row["state"] for row in json.loads(found.out)["runtimes"]] == ["written", "failed"]
