"""search(): the front of a few trials, gone on with, refused where it is another's, and worked at by several processes.

Digits, a tiny network; the cost is that of the MACs, so that a busy machine plans as a quiet one does.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from digits import digits

from rarefy import demo
from rarefy.artifact import folder as folder_
from rarefy.compression.budget import Budget
from rarefy.compression.run import read_json
from rarefy.compression.search import front as front_
from rarefy.compression.search import journal, profile, worker
from rarefy.compression.search.search import resumed, search
from rarefy.errors import InputError
from rarefy.graph.capture import capture

PROGRAM = """
import sys
import torch

torch.set_num_threads(1)
from rarefy import demo
from rarefy.compression.budget import Budget
from rarefy.compression.search import profile
from rarefy.compression.search.search import search
from rarefy.graph.capture import capture
from rarefy.tasks import Classification

profile._table = lambda network, space, runtime, seed: (profile.macs_table(network), "MACs")
task = Classification(train="sklearn:digits", val="sklearn:digits", augment="none")
torch.manual_seed(0)
net = capture(demo.model(width=8), torch.zeros(2, 1, 8, 8))
search(net, task, folder=sys.argv[1], trials=int(sys.argv[2]), epochs=2, seed=3, corruptions=[],
       budget=Budget(max_drop=0.5))
"""


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_table", lambda network, *_: (profile.macs_table(network), "MACs"))


def untrained(width: int = 8) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return capture(demo.model(width=width), torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "give trials= or minutes="),
        ({"trials": 3, "minutes": 2.0}, "one of them"),
        ({"trials": 0}, "not between 1"),
        ({"minutes": float("nan")}, "is no time"),
        ({"trials": 2, "epochs": 0}, "less than 1"),
        ({"trials": 2, "strategy": "luck"}, "have evolution, tpe, random"),
    ],
)
def test_what_is_no_search_is_told_before_anything_is_done(asked: dict[str, float], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        search(untrained(), digits(), folder=tmp_path / "s", progress=False, **asked)  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


def test_claims_go_with_the_process_and_beats_of_other_machines_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "work" / "0003"
    with journal.claimed(place) as ours:
        assert ours
        other = "import sys; from pathlib import Path; from rarefy.compression.search.journal import claimed\n"
        other += "with claimed(Path(sys.argv[1])) as ours: sys.exit(10 + ours)"
        known = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        assert subprocess.run([sys.executable, "-c", other, str(place)], env=known, check=False).returncode == 10
    beat = place.with_name("0003.claim")
    beat.write_text("elsewhere 17\n")
    with journal.claimed(place) as ours:
        assert not ours  # it beats on another machine
    os.utime(beat, (time.time() - 1000, time.time() - 1000))
    with journal.claimed(place) as ours:
        assert ours  # it has fallen silent
    monkeypatch.setenv("RAREFY_HOST", "elsewhere")
    assert journal.host() == "elsewhere"


@pytest.mark.slow
def test_a_search_finds_saves_goes_on_and_is_no_others(tmp_path: Path) -> None:
    events: list[str] = []
    given = {"epochs": 2, "corruptions": [], "budget": Budget(max_drop=0.5), "progress": False}
    found = search(
        untrained(), digits(), folder=tmp_path / "s", trials=4, on_event=lambda what, _: events.append(what), **given
    )  # type: ignore[arg-type]
    assert len(found.points) == 4 and events.count("trial") == 4 and events.count("saved") == len(found.best)
    for one in found.best:
        graph = folder_.load(tmp_path / "s" / one["folder"])
        assert graph(torch.rand(2, 1, 8, 8)).shape == (2, 10)
        told = json.loads((tmp_path / "s" / one["folder"] / "report.json").read_text())
        assert [mark["name"] for mark in told["frontier"] if mark["chosen"]] == [f"#{one['number']}"]
        assert [goal["name"] for goal in told["goals"]] == ["max_drop"]
    assert (tmp_path / "s" / "report.html").exists() and not any(one["folder"] for one in found.points if one["beaten"])
    more = search(untrained(), digits(), folder=tmp_path / "s", trials=6, **given)  # type: ignore[arg-type]
    assert len(more.points) == 6 and [one["name"] for one in more.points if one["number"] < 4]
    with pytest.raises(InputError, match="another model"):
        search(untrained(12), digits(), folder=tmp_path / "s", trials=6, **given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is in use for something else"):
        search(untrained(), digits(), folder=tmp_path / "s" / "points", trials=6, **given)  # type: ignore[arg-type]
    assert resumed(tmp_path / "s", digits(), progress=False).work().points == front_.read(tmp_path / "s").points
    (tmp_path / "s" / "front.json").write_text((tmp_path / "s" / "front.json").read_text().replace("8 bits", "9 bits"))
    with pytest.raises(InputError, match="was changed"):
        front_.read(tmp_path / "s")


def start(folder: Path, trials: int, **environment: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[2])
    known = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(trials)], env=known, stderr=subprocess.PIPE, text=True
    )


def models(folder: Path) -> dict[int, tuple[str, str]]:
    """Of each trial its choice, and the hash of its model."""
    setting = read_json(folder / "search.json")
    trials = journal.Journal(folder, None, int(str(setting["seed"]))).trials()
    return {
        one.number: (
            json.dumps(one.genome.to_json(), sort_keys=True),
            hashlib.sha256((folder / str(one.told["result"]) / "weights.safetensors").read_bytes()).hexdigest(),
        )
        for one in trials
        if one.state == "done"
    }


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_two_workers_of_which_some_are_killed_do_the_trials_of_one(tmp_path: Path) -> None:
    alone = start(tmp_path / "one", 8)
    _, errors = alone.communicate(timeout=600)
    assert alone.returncode == 0, errors
    expected = models(tmp_path / "one")
    assert len(expected) == 8

    first = start(tmp_path / "two", 8, RAREFY_HOST="here")
    workers = [first]
    try:
        while not (tmp_path / "two" / "profile.json").exists():
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.05)
        # As if on another machine: it makes, and never times.
        workers.append(start(tmp_path / "two", 8, RAREFY_HOST="there"))
        for turn, which in enumerate((1, 0, 1)):
            time.sleep(2.5 + turn)
            workers[which].kill()
            workers[which].communicate()
            workers[which] = start(tmp_path / "two", 8, RAREFY_HOST=("here", "there")[which])
        for one in workers:
            _, errors = one.communicate(timeout=600)
            assert one.returncode == 0, errors
    finally:
        for one in workers:
            if one.poll() is None:
                one.kill()
                one.communicate()
    assert models(tmp_path / "two") == expected
    mine, theirs = (front_.read(tmp_path / name) for name in ("one", "two"))
    assert {one["number"] for one in theirs.points} == {one["number"] for one in mine.points}
    assert theirs.about["host"] == "here" and worker.WAIT < 1
    assert [
        (one["number"], one["value"], one["size_bytes"]) for one in sorted(mine.points, key=lambda one: one["number"])
    ] == [
        (one["number"], one["value"], one["size_bytes"]) for one in sorted(theirs.points, key=lambda one: one["number"])
    ]
