"""Every step that writes, on a disk that fills up after so many bytes: a program for a mount namespace of its own.

Run by test_full_disk.py as ``unshare -rm python full_disk.py``; it mounts a file system of 1 MB below a folder that it
is given, leaves so much room on it, and does each step until there is enough. Writes a line of JSON a step: how often
it was refused, and what was wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from rarefy.artifact import folder as folder_
from rarefy.artifact import signing
from rarefy.cli import terminal
from rarefy.compression import run as run_
from rarefy.deployment.export import export
from rarefy.errors import RarefyError
from rarefy.graph.capture import capture
from rarefy.reports import report

SIZE, PAGE = 2**20, 4096
GRAPH = capture(nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4)), torch.zeros(2, 1, 8, 8))
FACTS = {"title": "x", "after": {"name": "x", "size_bytes": 1000, "parameters": 10, "macs": 10}, "goals": []}


def full(disk: Path, free: int) -> Path:
    """What is on the disk already is left; so many bytes are free then."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    room = os.statvfs(disk)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(PAGE, room.f_bavail * room.f_bsize - free))
    return ballast


def tree(disk: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(disk)): path.read_bytes() if path.is_file() else b""
        for path in sorted(disk.rglob("*"))
        if path.name != "ballast"
    }


def until_it_fits(
    disk: Path, begin: Callable[[], object], step: Callable[[], object], again: bool
) -> dict[str, object]:
    """The step with more and more room. begin: what lies there before. again: what it makes takes its place."""
    wrong: list[str] = []
    refused = 0
    for free in range(0, SIZE, PAGE):
        clean(disk)
        begin()
        before = tree(disk)
        ballast = full(disk, free)
        try:
            step()
        except RarefyError as error:
            refused += 1
            text = str(error)
            words = "No space left" in text or "disk is full" in text
            if "\n" in text or not words or error.exit_code != 2:
                wrong.append(f"{free}: says {text!r}")
        except OSError as error:  # told by the command line in a line of its own
            refused += 1
            found = terminal.refusal(error)
            if found is None or found.kind != "disk":
                wrong.append(f"{free}: {error!r}")
        else:
            break
        ballast.unlink()
        after = tree(disk)
        if after != before:
            wrong.append(f"{free}: left {sorted(after.keys() ^ before.keys()) or 'other bytes'}")
    else:
        wrong.append("it never fits")
    return {"refused": refused, "wrong": wrong}


def clean(disk: Path) -> None:
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def main(place: str) -> None:
    disk = Path(place) / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)], check=True)
    outside = Path(place)
    keys = signing.keygen(outside / "me.pem")
    old = folder_.save(GRAPH, outside / "old", files={"notes.txt": b"old"})
    signed = folder_.save(GRAPH, outside / "signed")
    signing.sign(signed, keys[0])
    model, file = disk / "model", disk / "model.onnx"

    def there() -> object:
        return shutil.copytree(old, model)

    def temporary(step: Callable[[], object]) -> Callable[[], object]:
        """With what is temporary on the full disk, too."""

        def done() -> object:
            before, tempfile.tempdir = tempfile.tempdir, str(disk)
            try:
                return step()
            finally:
                tempfile.tempdir = before

        return done

    steps: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "save": (lambda: None, lambda: folder_.save(GRAPH, model)),
        "save again": (there, lambda: folder_.save(GRAPH, model, files={"notes.txt": b"new" * 4000})),
        "export": (lambda: None, lambda: export(GRAPH, file)),
        "export again": (lambda: file.write_bytes(b"old"), lambda: export(GRAPH, file)),
        "report": (lambda: None, lambda: report.report(FACTS, disk / "r.html")),
        "report again": (lambda: (disk / "r.html").write_text("old"), lambda: report.report(FACTS, disk / "r.html")),
        "keygen": (lambda: None, lambda: signing.keygen(disk / "me.pem")),
        "sign": (there, lambda: signing.sign(model, keys[0])),
        "sign again": (lambda: shutil.copytree(signed, model), lambda: signing.sign(model, keys[0])),
        "save, temporary": (lambda: None, temporary(lambda: folder_.save(GRAPH, model))),
        "export, temporary": (lambda: None, temporary(lambda: export(GRAPH, outside / "t.onnx"))),
        "working folder": (lambda: None, lambda: run_.write_json(disk / "run.json", {"a": "b" * 5000})),
    }
    for name, (begin, step) in steps.items():
        print(json.dumps({"step": name, **until_it_fits(disk, begin, step, True)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
