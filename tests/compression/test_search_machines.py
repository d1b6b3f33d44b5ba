"""A search on many machines: workers in turns, killed, as if on two hosts, over a journal and Optuna's gRPC proxy; and
one training by torchrun. Digits, a tiny network; the cost is that of the MACs, so that a busy machine plans as a quiet
one does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rarefy import demo
from rarefy.artifact import folder as folder_
from rarefy.compression.run import read_json
from rarefy.compression.search import front as front_
from rarefy.compression.search import journal, worker
from rarefy.compression.search.space import Genome
from rarefy.errors import InputError
from rarefy.graph.capture import capture

ROOT = Path(__file__).resolve().parents[2]
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
       budget=Budget(max_drop=0.5), storage=sys.argv[3] or None)
"""


PROXY = """
import sys
from optuna.storages import RDBStorage, run_grpc_proxy_server

run_grpc_proxy_server(RDBStorage(f"sqlite:///{sys.argv[1]}"), host="127.0.0.1", port=int(sys.argv[2]))
"""
NEEDS_GRPC = pytest.mark.skipif(
    importlib.util.find_spec("grpc") is None, reason="a gRPC proxy needs the extra `grpc`: pip install 'rarefy[grpc]'"
)


@contextlib.contextmanager
def proxy(place: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Optuna's gRPC proxy before a SQLite file, on the loopback, while the block runs: its URL and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-c", PROXY, str(place / "trials.db"), str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield f"grpc://127.0.0.1:{port}", server
    finally:
        server.kill()
        server.communicate(timeout=30)


def asked(known: journal.Journal) -> list[tuple[Genome, str]]:
    """Two trials asked for, of which one is done: what the list says then."""
    from optuna.distributions import FloatDistribution

    space = {"lr": FloatDistribution(0.02, 0.1, log=True)}
    known.ask([Genome((3, 1)), Genome((2, 1), bits=None)], space, {"lr": 0.05})
    known.made(0, Genome((2, 2)), {"drop": 0.01, "cost": 0.5, "size": 100})
    known.done(0, {"original_ms": 2.0}, (0.01, 0.5, 100.0), -0.1)
    known.ask([Genome((1, 1))], space, {})
    return [(one.genome, one.state) for one in known.trials()]


@NEEDS_GRPC
def test_a_proxy_keeps_the_trials_of_a_journal_and_its_end_is_one_line(tmp_path: Path) -> None:
    with proxy(tmp_path) as (url, server):
        found = asked(journal.Journal(tmp_path, url, 3))
        assert found == asked(journal.Journal(tmp_path, None, 3)) and [state for _, state in found] == [
            "done",
            "open",
            "open",
        ]
        joined = journal.Journal(tmp_path, url, 3)
        assert [(one.genome, one.state) for one in joined.trials()] == found
        server.kill()
        server.wait(timeout=30)
        with pytest.raises(InputError, match=r"--storage grpc://127.* does not answer .*; start it") as told:
            joined.trials()
        assert "\n" not in str(told.value)


def test_a_proxy_that_is_none_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="names no port"):
        journal.Journal(tmp_path, "grpc://here", 0)
    monkeypatch.setattr(journal, "find_spec", lambda name: None if name == "grpc" else importlib.util.find_spec(name))
    with pytest.raises(InputError, match=r"grpcio is not installed; pip install 'rarefy\[grpc\]'"):
        journal.Journal(tmp_path, "grpc://127.0.0.1:13000", 0)


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


def start(folder: Path, trials: int, storage: str = "", **environment: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    known = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(trials), storage]
    return subprocess.Popen(command, env=known, stderr=subprocess.PIPE, text=True)


def models(folder: Path) -> dict[int, tuple[str, str]]:
    """Of each trial its choice, and the hash of its model."""
    told = read_json(folder / "search.json")
    url = None if told["storage"] is None else str(told["storage"])
    return {
        one.number: (
            json.dumps(one.genome.to_json(), sort_keys=True),
            hashlib.sha256((folder / str(one.told["result"]) / "weights.safetensors").read_bytes()).hexdigest(),
        )
        for one in journal.Journal(folder, url, int(str(told["seed"]))).trials()
        if one.state == "done"
    }


def compared(found: front_.Front) -> list[tuple[int, float, float, int, str]]:
    """Of each point what does not hang on a clock."""
    points = sorted(found.points, key=lambda one: one["number"])
    return [(one["number"], one["value"], one["drop"], one["size_bytes"], one["name"]) for one in points]


def finished(folder: Path) -> dict[str, int]:
    """Of each model of a trial that is done, when it was written."""
    known = journal.Journal(folder, None, 3).trials()
    return {
        str(one.told["result"]): (folder / str(one.told["result"])).stat().st_mtime_ns
        for one in known
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
    workers, kept = [first], dict[str, int]()
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "two" / "profile.json").exists():
            assert first.poll() is None and time.monotonic() < deadline, first.communicate(timeout=60)[1]
            time.sleep(0.05)
        # As if on another machine: it makes, and never times.
        workers.append(start(tmp_path / "two", 8, RAREFY_HOST="there"))
        for turn, which in enumerate((1, 0, 1)):
            time.sleep(2.5 + turn)
            kept |= finished(tmp_path / "two")
            workers[which].kill()
            workers[which].communicate(timeout=60)
            workers[which] = start(tmp_path / "two", 8, RAREFY_HOST=("here", "there")[which])
        for one in workers:
            _, errors = one.communicate(timeout=600)
            assert one.returncode == 0, errors
    finally:
        _end(workers)
    now = finished(tmp_path / "two")
    assert {name: now[name] for name in kept} == kept  # what was done before a kill was not done again
    assert models(tmp_path / "two") == expected
    mine, theirs = (front_.read(tmp_path / name) for name in ("one", "two"))
    assert compared(mine) == compared(theirs) and theirs.about["host"] == "here" and worker.WAIT < 1


def _end(workers: list[subprocess.Popen[str]]) -> None:
    for one in workers:
        if one.poll() is None:
            one.kill()
            one.communicate(timeout=60)


@pytest.mark.slow
@NEEDS_GRPC
def test_two_hosts_over_a_proxy_do_the_trials_of_one_over_a_journal(tmp_path: Path) -> None:
    alone = start(tmp_path / "one", 6)
    _, errors = alone.communicate(timeout=600)
    assert alone.returncode == 0, errors
    with proxy(tmp_path) as (url, _):
        workers = [start(tmp_path / "two", 6, url, RAREFY_HOST=name) for name in ("here", "there")]
        try:
            for one in workers:
                _, errors = one.communicate(timeout=600)
                assert one.returncode == 0, errors
        finally:
            _end(workers)
        assert models(tmp_path / "two") == models(tmp_path / "one") and len(models(tmp_path / "one")) == 6
    assert compared(front_.read(tmp_path / "two")) == compared(front_.read(tmp_path / "one"))


@pytest.mark.slow
def test_a_distillation_by_torchrun_is_the_same_twice(tmp_path: Path) -> None:
    """Two processes (gloo), as the guide types it; one process gives the same answers but for the order of sums."""
    for name, width in (("teacher", 8), ("small", 4)):
        torch.manual_seed(width)
        folder_.save(capture(demo.model(width=width), torch.zeros(2, 1, 8, 8)), tmp_path / name)
    asked = ["-m", "rarefy", "distill", "small", "--teacher", "teacher", "--data", "sklearn:digits", "--epochs", "2"]
    asked += ["--batch-size", "64", "--device", "cpu", "-o"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, start_by in (("one", []), ("two", torchrun), ("again", torchrun)):
        done = subprocess.run(
            [sys.executable, *start_by, *asked, name],
            cwd=tmp_path, env=known, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    two, again = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("two", "again"))
    assert two == again
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    one, other = (folder_.load(tmp_path / name)(images) for name in ("one", "two"))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-2)
