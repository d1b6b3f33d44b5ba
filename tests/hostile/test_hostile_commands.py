"""The kinds of bad folders as a user meets them: real commands, which end with 2, in a line, fast and in little memory.

Each command is a process of its own, forked from this one once that has imported all that commands import: with 5 s of
time and 512 MB more addresses than it has, and whatever it writes to its two streams caught.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_folders import KINDS, good_folder
from bounds import ended
from more_folders import MORE
from PIL import Image
from smallest_folders import SMALLEST

from rarefy.cli import main

if not hasattr(os, "fork"):
    pytest.skip("no processes are forked here", allow_module_level=True)

ALL = {**KINDS, **MORE, **SMALLEST}
SECONDS, ADDRESSES = 5, 512 * 2**20
BUSY = 6  # times as long a command may take on a machine that does other things; what hangs never ends
COMMANDS = {
    "evaluate": ("evaluate", "{}", "--data", "sklearn:digits", "--batch-size", "256"),
    "verify": ("verify", "{}", "--claims"),
    "report": ("report", "{}", "--data", "sklearn:digits", "-o", "{}-report.html"),
    "export": ("export", "{}", "-o", "{}.onnx"),
    "measure": ("measure", "{}", "--repeats", "1"),
    "prune": ("prune", "{}", "--data", "sklearn:digits", "--macs", "0.5", "-o", "{}-out"),
    "mask": ("mask", "{}", "--sparsity", "2:4", "-o", "{}-out"),
    "distill": ("distill", "{}", "--data", "sklearn:digits", "--epochs", "1", "-o", "{}-out"),
    "compress": ("compress", "{}", "--data", "sklearn:digits", "--step", "prune macs=0.5", "-o", "{}-out"),
    "predict": ("predict", "{}", "{}.png"),
    "card": ("card", "{}"),
    "push": ("push", "{}", "me/net"),
    "quantize": ("quantize", "{}", "--data", "sklearn:digits", "--images", "8", "-o", "{}-out"),
}


def ends(place: Path, *arguments: str) -> tuple[int, str, float, int]:
    """Exit code (negative: of a signal), what it wrote, seconds of the processor, and bytes resident beyond ours."""
    out = place / "output"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with open(out, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest's catch no child
            with open("/proc/self/statm") as pages:
                mapped = int(pages.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
            signal.alarm(BUSY * SECONDS)
            code = main.run(list(arguments))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    code, used = ended(child, 2 * BUSY * SECONDS)
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return code, out.read_text(errors="replace"), used.ru_utime + used.ru_stime, 1024 * (used.ru_maxrss - here)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With its commands run once here, so that children import nothing."""
    folder = good_folder(tmp_path_factory.mktemp("commands") / "good")
    assert main.run([part.format(folder) for part in COMMANDS["verify"]]) == 0
    for name in ("evaluate", "report"):  # digits are of ten classes, it knows five
        assert main.run([part.format(folder) for part in COMMANDS[name]]) == 2, name
    yield folder
    for left in folder.parent.glob("good?*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@pytest.fixture(scope="module")
def all_imported(good: Path) -> None:
    for name in ("export", "measure", "quantize"):
        assert main.run([part.format(good) for part in COMMANDS[name]]) == 0, name
    for name in COMMANDS.keys() - {"export", "measure", "quantize", "push", "card"}:
        picture(good)
        assert main.run([part.format(good) for part in COMMANDS[name]]) in (0, 2), name


def picture(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(f"{folder}.png")


def refused(command: str, promise: str, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    change, words = ALL[promise]
    change(folder)
    picture(folder)
    begin = time.monotonic()
    code, said, seconds, resident = ends(tmp_path, *(part.format(folder) for part in COMMANDS[command]))
    what = f"{command}, {promise}: exit {code} after {time.monotonic() - begin:.1f} s: {said[-500:]}"
    lines = [line for line in said.splitlines() if line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("rarefy: "), what
    assert words in lines[0] or repr(words)[1:-1] in lines[0], what
    assert lines[0].isprintable() and len(lines[0]) < 1000, what
    assert seconds < SECONDS and resident < ADDRESSES, f"{what}; {seconds:.1f} s, {resident / 2**20:.0f} MB"
    assert {path.name for path in tmp_path.iterdir()} - {"bad", "bad.png", "output"} <= {
        name for name in os.listdir(tmp_path) if name.startswith("moved-")
    }, what


def test_the_good_folder_ends_well(good: Path, tmp_path: Path) -> None:
    code, said, seconds, _ = ends(tmp_path, *(part.format(good) for part in COMMANDS["verify"]))
    assert code == 0 and seconds < SECONDS, said


@pytest.mark.parametrize("place", range(0, len(ALL), len(ALL) // 12))
def test_some_kinds_end_a_command(place: int, good: Path, tmp_path: Path) -> None:
    command = ("evaluate", "verify", "report")[place // (len(ALL) // 12) % 3]
    refused(command, list(ALL)[place], good, tmp_path)


# Of commands that read a folder by the same door, every eighth kind each, others each time.
PAIRS = [
    (command, promise)
    for turn, command in enumerate(COMMANDS)
    for place, promise in enumerate(ALL)
    if command in ("evaluate", "verify") or place % 8 == turn % 8
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "promise"), PAIRS)
@pytest.mark.usefixtures("all_imported")
def test_every_kind_ends_each_command(command: str, promise: str, good: Path, tmp_path: Path) -> None:
    refused(command, promise, good, tmp_path)
