"""Files and folders are put in place whole, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rarefy.system import files
from rarefy.system.files import cache_folder, replacing


def write(path: Path, kind: str, content: str) -> None:
    if kind == "folder":
        (path / "deep").mkdir(parents=True)
        (path / "deep" / content).write_text(content)
    (path / content if kind == "folder" else path).write_text(content)


def read(path: Path) -> str:
    return path.read_text() if path.is_file() else ",".join(sorted(one.name for one in path.iterdir()))


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("exchange", [True, False])
def test_what_was_written_takes_the_place_and_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, there: bool, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    target = tmp_path / "model.onnx"
    if there:
        write(target, kind, "old")
    with replacing(target) as partial:
        assert partial.parent == tmp_path and partial.suffix == ".onnx" and not partial.exists()
        write(partial, kind, "new")
        assert target.exists() == there
    assert read(target) == ("new" if kind == "file" else "deep,new")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("where", ["block", "check", "rename"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_there_stays_where_anything_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    target = tmp_path / "model"
    write(target, kind, "old")
    before = read(target)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    if where == "rename":
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
        monkeypatch.setattr(os, "replace", fail)
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda self, to: fail() if ".part" in self.name else rename(self, to))
    with pytest.raises(KeyboardInterrupt), replacing(target, check=fail if where == "check" else None) as partial:
        write(partial, kind, "new")
        if where == "block":
            fail()
    assert read(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_block_that_writes_nothing_replaces_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write(target, "file", "old")
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert read(target) == "old"


def test_two_writers_of_one_place_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replacing(target) as one, replacing(target) as other:
        one.write_text("1")
        other.write_text("2")
    assert target.read_text() == "1"  # the outer one ends last


@pytest.mark.skipif(sys.platform == "win32", reason="a folder has no handle there")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_durable_write_syncs_files_then_folder_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    done: list[str] = []
    sync, replace, rename = os.fsync, os.replace, Path.rename

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append("parent" if path == tmp_path else "whole" if path.parent == tmp_path else path.name)
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        done.append("rename")
        return rename(self, target)

    def replaced(one: Path, other: Path) -> None:
        done.append("rename")
        replace(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Path, "rename", renamed)
    with replacing(tmp_path / "model", durable=True) as partial:
        write(partial, kind, "new")
    assert done[-3:] == ["whole", "rename", "parent"]
    assert sorted(done[:-3]) == (["deep", "new", "new"] if kind == "folder" else [])
    done.clear()
    with replacing(tmp_path / "quick") as partial:
        write(partial, kind, "new")
    assert done == ["rename"]


def left(place: Path, name: str, age: float = 1000) -> Path:
    """A folder as a process that was killed leaves it."""
    folder = place / name
    folder.mkdir()
    (folder / "graph.json").write_text("half")
    then = time.time() - age
    os.utime(folder, (then, then))
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="a folder has no lock there")
def test_what_killed_processes_left_of_a_target_is_swept(tmp_path: Path) -> None:
    gone = [left(tmp_path, f".model.{word}.part.v2") for word in ("0123abcd", "ffffffff")]
    kept = [
        left(tmp_path, ".model.0123abce.part.v2", age=1),  # perhaps not locked yet
        left(tmp_path, ".model.0123abcd.part"),  # of model, not of model.v2
        left(tmp_path, ".other.0123abcd.part.v2"),
        left(tmp_path, ".model.0123abcx.part.v2"),  # no name of ours
        left(tmp_path, ".model.0123abcd.previous.v2"),
        left(tmp_path, "model.0123abcd.part.v2"),
    ]
    locked = left(tmp_path, ".model.99999999.part.v2")
    lock = files._locked(locked)
    link = tmp_path / ".model.aaaaaaaa.part.v2"
    link.symlink_to(kept[1])
    with replacing(tmp_path / "model.v2", folder=True) as partial:
        (partial / "new").write_text("new")
    assert not any(one.exists() for one in gone)
    assert all((one / "graph.json").exists() for one in [*kept, locked, link])
    assert lock is not None
    os.close(lock)
    with replacing(tmp_path / "model.v2", folder=True) as partial:
        (partial / "new").write_text("newer")
    assert not locked.exists() and (tmp_path / "model.v2" / "new").read_text() == "newer"


@pytest.mark.skipif(sys.platform == "win32", reason="a folder has no lock there")
def test_a_folder_that_is_being_written_is_locked(tmp_path: Path) -> None:
    with replacing(tmp_path / "model", folder=True) as partial:
        assert files._locked(partial) is None
        os.utime(partial, (1, 1))
        with replacing(tmp_path / "model", folder=True) as other:
            (other / "new").write_text("other")
        assert partial.exists()
        (partial / "new").write_text("new")
    assert (tmp_path / "model" / "new").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_save_is_swept_by_the_next(tmp_path: Path) -> None:
    """The real thing: a process that dies while its folder is half written."""
    text = (
        "import os, sys\nfrom rarefy.system.files import replacing\n"
        "with replacing(sys.argv[1], folder=True) as partial:\n"
        " (partial / 'weights').write_text('half')\n os.kill(os.getpid(), 9)\n"
    )
    target = tmp_path / "model"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", text, str(target)], check=False)
    found = sorted(tmp_path.iterdir())
    assert len(found) == 2 and all(".part" in one.name for one in found)
    for one in found:
        os.utime(one, (1, 1))
    with replacing(target, folder=True) as partial:
        (partial / "weights").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("RAREFY_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "rarefy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "rarefy"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "rarefy"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "rarefy" / "Cache"
