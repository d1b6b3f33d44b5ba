"""Each check of a saved folder, switched off, is missed by a kind: its words are said by nothing else.

A check is a call of ``expect`` in what reads a folder. It is switched off by its place in the source, in a process of
its own with bounds, since what it keeps out may do harm.
"""

from __future__ import annotations

import ast
import os
import resource
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
from bad_folders import KINDS, good_folder
from bounds import ended
from more_folders import MORE
from smallest_folders import SMALLEST

from rarefy.artifact import folder as folder_
from rarefy.errors import FormatError
from rarefy.system import strict_json

if not hasattr(os, "fork"):
    pytest.skip("no processes are forked here", allow_module_level=True)

ALL = {**KINDS, **MORE, **SMALLEST}
Place = tuple[str, int]  # a file, and the line where the call begins
# What no folder without a signature reaches: the header was compared with the file's size before, so that a tensor ends
# too early only where the file is cut in that moment; ``content`` is asked of signed folders (test_snapshot).
UNREACHED = {"ends too early", "says content"}
REAL = strict_json.expect


def modules() -> list[ModuleType]:
    """That read a folder, and ask ``expect``."""
    read = ("rarefy.artifact", "rarefy.system.strict_json")
    found = [one for name, one in sorted(sys.modules.items()) if name.startswith(read)]
    return [one for one in found if getattr(one, "expect", None) is REAL]


def checks() -> dict[Place, str]:
    """Where each stands -> its source."""
    found = {}
    for module in modules():
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "expect":
                found[str(module.__file__), node.lineno] = ast.get_source_segment(text, node) or ""
    return found


CHECKS = checks()
LINES = {
    (file, line): (file, begin)
    for (file, begin), source in CHECKS.items()
    for line in range(begin, begin + source.count("\n") + 1)
}


class Expect:
    """In place of ``expect``: remembers the check that failed last, and passes over the one at ``off``."""

    def __init__(self, off: Place | None = None):
        self.off, self.failed = off, None

    def __call__(self, good: object, where: str | Path, what: str) -> None:
        if not good:
            frame = sys._getframe(1)
            place = LINES.get((frame.f_code.co_filename, frame.f_lineno))
            if place is not None and place == self.off:
                return
            self.failed = place
        REAL(good, where, what)


def broken(promise: str, good: Path, place: Path) -> Path:
    folder = place / "bad"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    ALL[promise][0](folder)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_folder(tmp_path_factory.mktemp("off") / "good")


@pytest.fixture(scope="module")
def reached(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[Place, list[str]]:
    """The kinds that each check refuses."""
    found = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        expect = Expect()
        for module in modules():
            patch.setattr(module, "expect", expect)
        for promise in ALL:
            expect.failed = None
            with pytest.raises(FormatError):
                folder_.load(broken(promise, good, tmp_path_factory.getbasetemp()))
            if expect.failed is not None:
                found[expect.failed].append(promise)
    return found


def misses(off: Place, promise: str, good: Path, place: Path) -> bool:
    """Is the kind refused otherwise, or not at all, without that check?"""
    folder, words = broken(promise, good, place), ALL[promise][1]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open("/proc/self/statm") as pages:
                mapped = int(pages.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**29, mapped + 2**29))
            signal.alarm(20)
            for module in modules():
                module.expect = Expect(off)  # type: ignore[attr-defined]
            folder_.load(folder)
        except FormatError as error:
            code = 0 if words in str(error) else 1
        finally:
            os._exit(code)
    code, _ = ended(child, 60)
    return code != 0


def test_each_check_refuses_a_kind(reached: Mapping[Place, list[str]]) -> None:
    left = {place: CHECKS[place] for place in CHECKS.keys() - reached.keys()}
    assert not {place: source for place, source in left.items() if not any(one in source for one in UNREACHED)}
    assert len(CHECKS) >= 72 and len(left) == len(UNREACHED)


@pytest.mark.parametrize("part", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_each_check_is_missed_when_it_is_off(
    part: int, reached: Mapping[Place, list[str]], good: Path, tmp_path: Path
) -> None:
    """part: every so-manieth check."""
    unseen = [
        CHECKS[place]
        for place in sorted(reached)[::part]
        if not any(misses(place, promise, good, tmp_path) for promise in reached[place])
    ]
    assert not unseen, "\n".join(unseen)
    print(f"{len(reached) // part} of {len(CHECKS)} checks switched off, each is missed by a kind")
