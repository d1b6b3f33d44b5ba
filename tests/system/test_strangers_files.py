"""Files of strangers: what is no plain file is refused before it is opened, in a line, and folders are walked once."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from rarefy.errors import DataError, FormatError, InputError
from rarefy.system import files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and links are of other systems")


def kinds(folder: Path) -> dict[str, Path]:
    """A path of each kind that is no plain file."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "linked").symlink_to(folder / "pipe")
    (folder / "nowhere").symlink_to(folder / "none")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "zero").symlink_to("/dev/zero")
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(folder)  # a socket's path is short
    listener.bind("socket")
    os.chdir(here)
    listener.close()
    return {name: folder / name for name in "pipe folder linked nowhere loop zero socket none".split()} | {
        "null": Path("/dev/null"),
        "nul": Path("a\0b"),
        "long": folder / ("x" * 300),
    }


def test_what_is_no_plain_file_is_refused_in_a_line_and_never_waited_for(tmp_path: Path) -> None:
    said = {
        "pipe": "is a named pipe", "linked": "is a named pipe", "folder": "is a folder", "zero": "is a device",
        "null": "is a device", "socket": "is a socket", "none": "can't be read", "nowhere": "can't be read",
        "loop": "can't be read", "nul": "can't be read", "long": "can't be read",
    }  # fmt: skip
    for name, path in kinds(tmp_path).items():
        for open_it in (files.opened, files.plain, lambda path: files.content(path, 10)):
            with pytest.raises(FormatError, match=said[name]) as raised:
                open_it(path)
            assert "\n" not in str(raised.value) and "; give " in str(raised.value)
    with pytest.raises(DataError, match="named pipe"):
        files.opened(tmp_path / "pipe", kind=DataError)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 11)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    paths = [*kinds(tmp_path).values(), tmp_path / "large"]
    for _ in range(20):
        for path in paths:
            with pytest.raises(FormatError):
                files.opened(path, 10)
    assert (len(os.listdir("/proc/self/fd")) if before else 0) == before


def test_sizes_are_bounded_and_a_file_without_a_size_too(tmp_path: Path) -> None:
    (tmp_path / "ten").write_bytes(b"0123456789")
    assert files.content(tmp_path / "ten", 10) == b"0123456789"
    (tmp_path / "link").symlink_to(tmp_path / "ten")
    assert files.content(tmp_path / "link", 10) == b"0123456789"
    with pytest.raises(FormatError, match="has 10 bytes, 9 at most"):
        files.content(tmp_path / "ten", 9)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(FormatError, match="1,000,000,000,000 bytes"):
        files.opened(tmp_path / "sparse", 10**9)
    if os.path.exists("/proc/self/maps"):  # says that it has no bytes, and has many
        with pytest.raises(FormatError, match="larger than 9 bytes"):
            files.content("/proc/self/maps", 9)


def test_too_many_files_are_told_with_the_way_out(tmp_path: Path) -> None:
    import resource

    (tmp_path / "one").write_bytes(b"1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with pytest.raises(FormatError, match="ulimit -n"):
            files.opened(tmp_path / "one")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_folder_is_walked_once_and_never_upward(tmp_path: Path) -> None:
    root, other = tmp_path / "data", tmp_path / "other"
    for place in (root / "a" / "deep", root / "b", other / "more"):
        place.mkdir(parents=True)
        (place / "x.png").write_bytes(b"")
    (root / "linked").symlink_to(other)  # a data folder of links
    plain = sorted(os.path.join(folder, name) for folder, _, names in files.walk(root) for name in names)
    assert [os.path.relpath(one, root) for one in plain] == ["a/deep/x.png", "b/x.png", "linked/more/x.png"]
    for name, target in {
        "here": ".", "up": "..", "root": "/", "home": str(tmp_path), "itself": "itself", "none": "nowhere", "a2": "a",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
        (root / "a" / "deep" / name).symlink_to(target)
    (other / "more" / "back").symlink_to(root)
    (other / "more" / "sibling").symlink_to(other)
    again = sorted(os.path.join(folder, name) for folder, _, names in files.walk(root) for name in names)
    assert [one for one in again if one.endswith(".png")] == plain


def test_a_tree_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        (tmp_path / str(number)).mkdir()
    monkeypatch.setattr(files, "MOST_FOLDERS", 10)
    with pytest.raises(InputError, match="more than 10 folders"):
        list(files.walk(tmp_path))
