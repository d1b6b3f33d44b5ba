"""A folder's lock: one at a time, told who holds it; what a dead process left is taken over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rarefy.errors import InputError
from rarefy.system import files
from rarefy.system.files import LOCK, locked

fcntl = pytest.importorskip("fcntl")
ROOT = Path(__file__).resolve().parents[2]
HOLD = (
    "import sys; from rarefy.system.files import locked\n"
    "with locked(sys.argv[1], 'wait'):\n print('held', flush=True)\n input()"
)
TRY = (
    "import sys, time\nfrom rarefy.errors import InputError\nfrom rarefy.system.files import locked\n"
    "sys.stdin.readline()\ntry:\n"
    " with locked(sys.argv[1], 'wait'):\n  print('held', flush=True); sys.stdin.readline()\n"
    "except InputError as error: print(error, flush=True)"
)


def program(text: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", text, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_second_is_refused_in_a_line_and_a_killed_one_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    first = program(HOLD, folder)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"another run works there \(process {first.pid} on .*, since 20.*\); wait"):
        with locked(folder, "wait"):
            pytest.fail("two hold it")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (folder / LOCK).exists()
    with locked(folder, "wait"):
        assert f"process {os.getpid()} " in (folder / LOCK).read_text()
        with locked(folder, "wait"):  # the same thread may ask again
            pass
        assert (folder / LOCK).exists()
    assert not (folder / LOCK).exists()


def test_of_ten_at_once_one_works(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    processes = [program(TRY, folder) for _ in range(10)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    lines = [process.stdout.readline() for process in processes if process.stdout is not None]
    for process in processes:
        process.communicate("done\n")
    assert lines.count("held\n") == 1, lines
    assert all("another run works there" in line for line in lines if line != "held\n")
    assert not (folder / LOCK).exists()


def test_another_thread_is_another(tmp_path: Path) -> None:
    said: list[str] = []

    def work() -> None:
        try:
            with locked(tmp_path, "wait"):
                said.append("held")
        except InputError as error:
            said.append(str(error))

    with locked(tmp_path, "wait"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(said) == 1 and "another run works there" in said[0]


def test_a_child_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    text = (
        "import os, sys, time\nfrom rarefy.system.files import locked\n"
        "with locked(sys.argv[1], 'wait'):\n if os.fork() == 0:\n  print(os.getpid(), flush=True); time.sleep(60)\n"
        " time.sleep(60)"
    )
    parent = program(text, tmp_path)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        os.kill(child, 0)
        with locked(tmp_path, "wait"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        parent.communicate()


def test_where_the_file_system_knows_no_locks_the_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    node = files.platform.node()
    for text, refused in {
        f"process {os.getppid()} on {node}, since now": True,
        f"process 999999999 on {node}, since now": False,  # no such process
        f"process {os.getpid()} on {node}, since now": False,  # ours: an older one with the same number
        "nonsense": False,
        "": False,
    }.items():
        (tmp_path / LOCK).write_text(text)
        if refused:
            with pytest.raises(InputError, match=f"process {os.getppid()} on"), locked(tmp_path, "wait"):
                pass
        else:
            with locked(tmp_path, "wait"):
                pass


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_lock_is_told(tmp_path: Path, kind: str) -> None:
    place = tmp_path / LOCK
    {"pipe": lambda: os.mkfifo(place), "folder": place.mkdir, "link": lambda: place.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(InputError, match="is no file.*delete it"), locked(tmp_path, "wait"):
        pass
