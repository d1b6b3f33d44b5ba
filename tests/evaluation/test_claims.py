"""verify --claims: what a folder truly says of itself holds, and any of it that was edited does not."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits
from torch import nn

from rarefy import demo
from rarefy.artifact import folder as folder_
from rarefy.cli import main
from rarefy.deployment import latency
from rarefy.deployment.export import export
from rarefy.evaluation import claims
from rarefy.evaluation.evaluate import evaluate
from rarefy.graph.macs import count_macs
from rarefy.models import load

Facts = dict[str, Any]
DATA = ("--data", "sklearn:digits")
MODEL = f"{__name__}:small"


def small() -> nn.Module:
    return demo.model(width=8)


@pytest.fixture(scope="module", autouse=True)
def _few_rounds() -> Iterator[None]:
    """Latency is told and not judged: a few rounds of it are enough."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(claims, "timed", functools.partial(latency.timed, repeats=5, warmup=1))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, its file, and a report that says what is true of both."""
    place = tmp_path_factory.mktemp("claims")
    graph = load.graph_of(load.load(MODEL), (1, 8, 8))
    file = place / "model.onnx"
    parity = export(graph, file, inputs=next(iter(digits().data.inputs("val", 64, 64, seed=0))))
    folder = folder_.save(graph, place / "model", files={"model.onnx": file, "report.html": b"<p>"})
    listed = folder_.read_manifest(folder)["files"]
    facts = {
        "title": "a test",
        "before": {"name": "original"},
        "after": {
            "evaluation": evaluate(graph, digits(), progress=False).to_json(),
            "size_bytes": listed["weights.safetensors"]["size"],
            "parameters": sum(one.numel() for one in graph.parameters()),
            "macs": count_macs(graph),
            "latency_ms": {"median": 0.1},
        },
        "parity": parity,
        "provenance": {"hashes": {name: one["sha256"] for name, one in listed.items()}},
    }
    folder_.add(folder, {"report.json": json.dumps(facts, default=str).encode()})
    return folder


def reseal(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edited(made: Path, place: Path, change: Callable[[Facts], object]) -> Path:
    """A copy whose report says otherwise, and whose manifest lists that report."""
    folder = place / "edited"
    shutil.copytree(made, folder)
    facts = json.loads((folder / "report.json").read_text())
    change(facts)
    (folder / "report.json").write_text(json.dumps(facts))
    reseal(folder)
    load.load(str(folder))  # nothing else is wrong with it
    return folder


def judged(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """The exit code, the claims by name, and what stderr says."""
    code = main.run(["verify", str(folder), "--claims", *options, "--json"])
    out, err = capsys.readouterr()
    return code, {one["name"]: one for one in json.loads(out)["claims"]} if out else {}, err


def test_what_is_true_holds(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, err = judged(capsys, made, *DATA)
    assert (code, err) == (0, "")
    accuracy = next(name for name in told if "top-1" in name)
    held = {name for name, one in told.items() if one["holds"]}
    assert held == {"hashes", "content", "size_bytes", "parameters", "macs", "parity", accuracy}
    assert {name for name, one in told.items() if one["holds"] is None} == {"latency_ms", "beside the original"}
    assert told[accuracy]["claimed"] == pytest.approx(told[accuracy]["found"], abs=0.01)
    assert main.run(["verify", str(made), "--claims", *DATA]) == 0
    assert "not judged" in capsys.readouterr().out


def test_without_data_accuracy_is_not_judged(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = judged(capsys, made)
    assert code == 0 and told["accuracy"]["holds"] is None and "--data" in told["accuracy"]["note"]
    assert told["size_bytes"]["holds"] and told["parity"]["holds"]
    assert main.run(["verify", str(made), *DATA]) == 2
    assert "pass it, or leave them out" in capsys.readouterr().err


def wider(facts: Facts) -> None:
    """Any number lies within a claimed interval of everything."""
    facts["after"]["evaluation"] |= {"value": 0.95, "interval": [0.0, 1.0]}


def of_few(facts: Facts) -> None:
    facts["after"]["evaluation"] |= {"value": 0.95, "interval": [0.0, 1.0], "samples": 1}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("size_bytes", lambda facts: facts["after"].update(size_bytes=facts["after"]["size_bytes"] - 1)),
        ("parameters", lambda facts: facts["after"].update(parameters=facts["after"]["parameters"] // 2)),
        ("macs", lambda facts: facts["after"].update(macs="few")),
        ("top-1", lambda facts: facts["after"]["evaluation"].update(value=0.95)),
        ("top-1", wider),
        ("top-1", of_few),
        ("parity", lambda facts: facts.update(parity={"agreement": 1.01})),
    ],
)
def test_what_was_edited_does_not_hold(
    name: str, change: Callable[[Facts], object], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told, err = judged(capsys, edited(made, tmp_path, change), *DATA)
    failed = [one for one, found in told.items() if found["holds"] is False]
    assert code == 1 and len(failed) == 1 and name in failed[0]
    assert f"{failed[0]} is not as claimed; do not rely on it" in err and len(err.splitlines()) == 1


def test_a_claimed_content_is_compared(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = edited(made, tmp_path, lambda facts: None)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "content": "0" * 64}))
    code, told, _ = judged(capsys, folder)
    assert code == 1 and told["content"]["holds"] is False and told["hashes"]["holds"]


@pytest.mark.parametrize("name", ["graph.json", "model.onnx", "report.json", "report.html"])
def test_a_file_that_is_not_as_listed_is_refused(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edited(made, tmp_path, lambda facts: None)
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    code, _, err = judged(capsys, folder)
    assert code == 2 and f"{name}: differs from what manifest.json lists" in err and len(err.splitlines()) == 1


def test_a_file_of_another_model_has_no_parity(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exported file is the one that users run; it is not bound to the weights but by what it answers."""
    folder = edited(made, tmp_path, lambda facts: facts["provenance"]["hashes"].pop("model.onnx"))
    other = load.graph_of(load.load(MODEL), (1, 8, 8))
    for parameter in other.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(5))
    export(other, folder / "model.onnx", compare=False)
    reseal(folder)
    code, told, err = judged(capsys, folder, *DATA)
    assert code == 1 and told["parity"]["holds"] is False, err


def test_a_signed_folder_is_asked_for_both(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("model_signing", reason="signing needs pip install 'rarefy[sign]'")
    from rarefy.artifact import signing

    folder = edited(made, tmp_path, lambda facts: None)
    private, public = signing.keygen(tmp_path / "me.pem")
    signing.sign(folder, private)
    code, told, _ = judged(capsys, folder, "--key", str(public))
    assert code == 0 and told["hashes"]["holds"]
    (folder / "notes.txt").write_text("more")
    code, told, err = judged(capsys, folder, "--key", str(public))
    assert code == 1 and not told and "notes.txt" in err


@pytest.mark.parametrize("kind", ["none", "wild"])
def test_a_folder_that_claims_nothing(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not claimed is told, not judged; tables that are none are refused."""
    graph = load.graph_of(load.load(MODEL), (1, 8, 8))
    folder = folder_.save(graph, tmp_path / "model")
    if kind == "wild":
        hashes = {name: one["sha256"] for name, one in folder_.read_manifest(folder)["files"].items()}
        facts = {"after": [1, 2], "provenance": {"hashes": hashes}}
        folder_.add(folder, {"report.json": json.dumps(facts).encode()})
        code, _, err = judged(capsys, folder, *DATA)
        assert code == 2 and "is no table" in err and len(err.splitlines()) == 1
        return
    code, told, _ = judged(capsys, folder, *DATA)
    assert code == 0 and told["content"]["holds"] and "latency_ms" not in told
