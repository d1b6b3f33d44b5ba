"""A search's folder may be a stranger's: what its files say is checked, names no code, and leads nowhere."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rarefy.cli import main
from rarefy.compression.run import write_json
from rarefy.compression.search import front, search
from rarefy.compression.search.journal import FILE, Journal
from rarefy.compression.search.space import Genome
from rarefy.errors import FormatError, InputError

POINT: dict[str, Any] = {
    "number": 3, "name": "#3", "value": 0.9, "interval": [0.8, 0.95], "drop": 0.01,
    "latency_ms": {"median": 2.0, "low": 1.9, "high": 2.1}, "speedup": {"median": 2.0, "low": 1.9, "high": 2.1},
    "disturbed": False, "size_bytes": 4000, "memory_bytes": None, "seconds": 4.0, "recipe": "prune macs=0.5",
    "beaten": False, "folder": "points/0003",
    "elsewhere": {"openvino:threads=1": {
        "latency_ms": {"median": 3.0, "low": 2.9, "high": 3.1}, "speedup": {"median": 1.5, "low": 1.4, "high": 1.6},
        "disturbed": False,
    }},
}  # fmt: skip
ABOUT: dict[str, Any] = {
    "host": "here", "runtime": "onnxruntime", "threads": 1, "metric": "top-1", "unit": "%", "samples": 100,
    "title": "a net",
}  # fmt: skip

BAD: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "no number": lambda point, about: point.pop("number"),
    "a text for a number": lambda point, about: point.update(number="3"),
    "a number below 0": lambda point, about: point.update(number=-1),
    "no interval": lambda point, about: point.pop("interval"),
    "an interval of one": lambda point, about: point.update(interval=[1]),
    "an interval of texts": lambda point, about: point.update(drop_interval=["a", "b"]),
    "no latency": lambda point, about: point.pop("latency_ms"),
    "a latency of 0": lambda point, about: point["latency_ms"].update(median=0),
    "a speed of nothing": lambda point, about: point["speedup"].update(low=None),
    "a size of text": lambda point, about: point.update(size_bytes="4 kB"),
    "a name that is a list": lambda point, about: point.update(name=["x"]),
    "a folder above": lambda point, about: point.update(folder="../../secret"),
    "a folder elsewhere": lambda point, about: point.update(folder="/etc"),
    "another's folder": lambda point, about: point.update(folder="points/0004"),
    "memory below 0": lambda point, about: point.update(memory_bytes=-1),
    "beaten by text": lambda point, about: point.update(beaten="no"),
    "other runtimes that are a list": lambda point, about: point.update(elsewhere=[1]),
    "another runtime without a latency": lambda point, about: point.update(elsewhere={"openvino": {}}),
    "another runtime's speed of text": lambda point, about: point["elsewhere"]["openvino:threads=1"].update(
        speedup="2x"
    ),
    "prices of text": lambda point, about: about.update(prices={"load": "much"}),
    "prices that are a list": lambda point, about: about.update(prices=[1]),
    "threads of text": lambda point, about: about.update(threads="two"),
    "samples of text": lambda point, about: about.update(samples="many"),
    "no metric": lambda point, about: about.pop("metric"),
    "a title that is a list": lambda point, about: about.update(title=[1]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_front_that_is_none_is_refused_in_a_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point, about = copy.deepcopy(POINT), copy.deepcopy(ABOUT)
    BAD[name](point, about)
    write_json(tmp_path / "front.json", {"points": [point], "about": about})
    for more in ([], ["--json"], ["--pick", "5ms"], ["--pick", "#3", "-o", str(tmp_path / "out")]):
        assert main.run(["front", str(tmp_path), *more]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "begin" in lines[0] and "front.json" in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [{}, {"points": 1}, {"points": [1]}, {"points": [], "about": []}, {"about": ABOUT}])
def test_what_is_no_front_at_all(value: dict[str, object], tmp_path: Path) -> None:
    write_json(tmp_path / "front.json", value)
    with pytest.raises(FormatError):
        front.read(tmp_path)


def test_a_good_front_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "front.json", {"points": [POINT, {**POINT, "number": 4, "folder": ""}], "about": ABOUT})
    found = front.read(tmp_path)
    assert [one["number"] for one in found.points] == [3, 4] and found.pick("5ms")["number"] in (3, 4)


GENOME: dict[str, Any] = {
    "levels": [1, 2], "bits": 4.5, "switched": {"conv": 4}, "student": "depth:keep=0.5", "rung": 2, "parent": 0,
    "params": {"lr": 0.05, "criterion": "taylor:batches=8"},
}  # fmt: skip


def test_a_trial_comes_back() -> None:
    genome = Genome.from_json(GENOME)
    assert genome.levels == (1, 2) and Genome.from_json(json.loads(json.dumps(genome.to_json()))) == genome
    assert Genome.from_json({"levels": []}) == Genome(())


@pytest.mark.parametrize(
    "change",
    [
        {"params": {"criterion": "evil.module:Run"}}, {"params": {"criterion": "os:abort"}}, {"params": {"lr": "x"}},
        {"student": "evil.module:Run"}, {"student": "rarefy.demo:model"}, {"levels": "01"}, {"levels": [-1]},
        {"levels": None}, {"levels": [10**30]}, {"bits": 0}, {"bits": "8"}, {"bits": 1e9}, {"switched": [1]},
        {"switched": {"x": 99}}, {"rung": 3}, {"rung": True}, {"parent": "x"}, {"more": 1}, {"params": []},
    ],
)  # fmt: skip
def test_a_trial_of_a_stranger_names_no_code_and_no_wild_numbers(change: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="says what is no choice"):
        Genome.from_json({**GENOME, **change})


@pytest.mark.parametrize("text", ["x\n", "{}\n", "[" * 5000 + "\n", '{"op_code": 99, "worker_id": "x"}\n', "\xff\n"])
def test_a_list_of_trials_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    (tmp_path / FILE).write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match="is no list of trials that a search wrote"):
        Journal(tmp_path, None, 0).trials()


def test_a_list_of_trials_that_hangs_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(FormatError, match="is a named pipe"):
        Journal(tmp_path, None, 0)


SETTINGS: dict[str, Any] = {
    "host": "here", "title": "x", "strategy": "evolution", "storage": None, "runtime": "onnxruntime", "trials": 3,
    "minutes": None, "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host": 1}, "is none that a search wrote"),
        ({"strategy": None}, "is none that a search wrote"),
        ({"storage": {}}, "is none that a search wrote"),
        ({"storage": "postgresql://evil.example/x"}, "if that is yours, pass --storage"),
        ({"storage": "sqlite:////tmp/x.db"}, "if that is yours, pass --storage"),
        ({"storage": "grpc://169.254.169.254:80"}, "if that is yours, pass --storage"),
    ],
)
def test_a_worker_is_sent_nowhere(
    change: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / search.SETTINGS, {**SETTINGS, **change})
    (tmp_path / search.RECIPE).write_text('model = "rarefy.demo:model"\n[data]\ntrain = "sklearn:digits"\n')
    assert main.run(["worker", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_search_without_its_parts_is_refused(tmp_path: Path) -> None:
    import torch

    from rarefy.artifact import folder as folder_
    from rarefy.demo import model
    from rarefy.graph.capture import capture

    place = tmp_path / search.BASE / search.FIRST
    place.parent.mkdir(parents=True)
    folder_.save(capture(model(), torch.zeros(2, 1, 8, 8)), place)
    write_json(tmp_path / search.SETTINGS, SETTINGS)
    with pytest.raises(InputError, match=r"search\.json: is none that a search wrote .*begin in another folder"):
        search.resumed(tmp_path, task=None)  # type: ignore[arg-type]
