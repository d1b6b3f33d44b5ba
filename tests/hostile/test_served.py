"""The model.onnx of a stranger's folder: what it may do in a runtime, and as a model of its own (``onnx:``)."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import onnx
import pytest
import torch
from bad_onnx import KINDS
from bounds import bounded
from torch import nn

from rarefy import plugins
from rarefy.artifact import folder as folder_
from rarefy.artifact import snapshot
from rarefy.cli import main
from rarefy.deployment import served
from rarefy.errors import FormatError, RarefyError
from rarefy.graph.capture import capture
from rarefy.models import load

ROOT = Path(__file__).parents[2]
SECONDS, MEMORY = 5, 512 * 2**20
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    graph = capture(net.eval(), torch.zeros(2, 1, 8, 8))
    place = tmp_path_factory.mktemp("served")
    plugins.resolve("runtimes", "onnxruntime").export(graph, place / "model.onnx")
    return folder_.save(graph, place / "good", files={"model.onnx": (place / "model.onnx").read_bytes()})


def changed(good: Path, name: str) -> bytes:
    model = onnx.load(str(good / "model.onnx"))
    KINDS[name][0](model)
    return model.SerializeToString()


def test_the_good_file_is_served(good: Path) -> None:
    graph, runtime = folder_.load(good), plugins.resolve("runtimes", "onnxruntime")
    with bounded(MEMORY, SECONDS):
        served._check_onnx(good / "model.onnx", graph, "x", 64)  # not because it is what is written now
        served.check(good / "model.onnx", graph, runtime, "x")


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_does_harm_is_not_run(name: str, good: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(changed(good, name))
    graph, runtime = folder_.load(good), plugins.resolve("runtimes", "onnxruntime")
    words = KINDS[name][1]
    with bounded(MEMORY, SECONDS):
        try:
            served.check(file, graph, runtime, "x")
            assert not words, "it is served"
            runtime.open(file).outputs(torch.zeros(64, 1, 8, 8))  # what no rule of ours refuses, the runtime may
        except RarefyError as refusal:
            text = str(refusal)
            assert words in text and text.isprintable() and len(text) < 1000
            assert not words or text.rpartition(" [")[2].rstrip("]") in snapshot.REFUSALS


def test_the_list_is_what_is_written() -> None:
    known = {one.name for one in onnx.defs.get_all_schemas()} | {"QuickGelu"}
    source = "".join(one.read_text() for one in (ROOT / "rarefy" / "deployment" / "onnx").glob("*.py"))
    named = {word for word in re.findall(r'"([A-Z]\w*)"', source) if word in known}
    assert frozenset.union(*served.WRITTEN.values()) == named


@pytest.mark.parametrize("suffix", served.UNREADABLE)
def test_what_cannot_be_read_is_run_only_as_it_is_written_now(suffix: str, good: Path, tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Writer:
        content: bytes

        def export(self, graph: object, path: Path) -> Path:
            path.write_bytes(self.content)
            return path

    file, graph = tmp_path / f"model{suffix}", folder_.load(good)
    file.write_bytes(b"written")
    served.check(file, graph, Writer(b"written"), "x")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"^x: is not what rarefy writes .*\[served-other\]$"):
        served.check(file, graph, Writer(b"other"), "x")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KINDS)
def test_it_is_no_model_either_or_one_within_bounds(name: str, good: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(changed(good, name))
    with bounded(MEMORY, SECONDS):
        try:
            graph = load.graph_of(load.load(f"onnx:{file}"), (1, 8, 8))
        except RarefyError as refusal:
            assert str(refusal).isprintable() and len(str(refusal)) < 1000
        else:
            with torch.no_grad():
                graph(*(torch.zeros(2, *one["shape"]) for one in graph.meta["inputs"]))


COMMANDS = {
    "evaluate": ("evaluate", "{}", "--data", "sklearn:digits", "--runtime", "onnxruntime"),
    "openvino": ("evaluate", "{}", "--data", "sklearn:digits", "--runtime", "openvino"),
    "verify": ("verify", "{}", "--claims", "--data", "sklearn:digits"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_do_not_run_it(command: str, good: Path, tmp_path: Path) -> None:
    """Each in a process of its own, that ends with 2, in a line, in 5 s and 512 MB; the good file is run."""
    from test_hostile_commands import ADDRESSES, ends

    if command == "openvino":
        pytest.importorskip("openvino")
    parts = COMMANDS[command]
    assert main.run([part.format(good) for part in parts]) == 0  # what is imported here, no child imports
    graph = folder_.load(good)
    for name, (_, words) in KINDS.items():
        if words:
            folder = folder_.save(graph, tmp_path / "bad", files={"model.onnx": changed(good, name)})
            code, said, seconds, resident = ends(tmp_path, *(part.format(folder) for part in parts))
            lines = said.splitlines()
            assert code == 2 and len(lines) == 1 and words in lines[0] and lines[0].isprintable(), (name, said[-500:])
            assert seconds < SECONDS and resident < ADDRESSES, (name, seconds, resident)
    print(f"{command}: {sum(bool(words) for _, words in KINDS.values())} files, each refused")
