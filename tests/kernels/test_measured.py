"""What measures and checks the kernels: the bench's verdicts, and compute-sanitizer's reports read."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HAZARD = (
    "========= Error: Race reported between Read access at {0}+0xb00\n=========     and Write access at {0}+0x2aa0\n"
)
# Stands for compute-sanitizer: `tool --tool NAME ...`.
TOOL = """#!/bin/sh
test "$2" = racecheck && printf '%b' "{said}" && exit {code}
exit 0
"""
# Stands for Python where there is a GPU.
PYTHON = """#!/bin/sh
case "$*" in *is_available*) exit 0;; esac
exec {python} "$@"
"""


def checked(folder: Path, said: str, code: int) -> tuple[int, str]:
    """Exit status and words of ``.ci/sanitizer.py`` where racecheck says that."""
    for name, text in (
        ("compute-sanitizer", TOOL.format(said=said.replace("\n", "\\n"), code=code)),
        ("python", PYTHON.format(python=sys.executable)),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    command = [sys.executable, str(ROOT / ".ci" / "sanitizer.py"), str(folder / "python")]
    done = subprocess.run(command, env={"PATH": f"{folder}:/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are shell scripts")
def test_races_of_other_libraries_are_told_apart(tmp_path: Path) -> None:
    assert checked(tmp_path, "fine\n", 0)[0] == 0
    theirs, ours = HAZARD.format("nvjet_sm90_tst_64x8"), HAZARD.format("low_bit_linear")
    code, said = checked(tmp_path, theirs, 86)
    assert code == 0 and "libraries alone: nvjet_sm90_tst_64x8" in said
    code, said = checked(tmp_path, theirs + ours, 86)
    assert code == 1 and "racecheck found something low_bit_linear" in said
    assert checked(tmp_path, "no name of a kernel\n", 86)[0] == 1
    assert checked(tmp_path, "1 failed\n", 1)[0] == 1


def test_the_bench_tells_what_falls_short_and_what_it_skipped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    bench = importlib.import_module("bench.gpu_kernels")
    us = {"float16": 13.0, "4 bits": 3.9, "3 bits": 3.5, "2 bits": 3.0, "4 bits, planned": 3.9}
    good = {"us": us, "failed": {}, "errors": {4: 3e-4}}
    assert bench.layer_gaps({"4096x4096, batch 1": good}, "NVIDIA H200") == []
    slow = {**good, "us": {**us, "4 bits": 4.1, "2 bits": 3.9}, "errors": {4: 0.1}}
    told = " ".join(bench.layer_gaps({"4096x4096, batch 1": slow}, "NVIDIA H200"))
    assert "4 bits take 4.10 us" in told and "2 bits are 1.05" in told and "off by 1.0e-01" in told
    assert "4 bits take" not in " ".join(bench.layer_gaps({"4096x4096, batch 1": slow}, "another GPU"))
    many = {**good, "us": {**us, "4 bits, planned": 14.0, "8 and 8 bits": 9.0, "torch._int_mm": 8.0}}
    told = " ".join(bench.layer_gaps({"4096x4096, batch 64": many}, "another GPU"))
    assert "planned 14.0 us, float16 13.0" in told and "_int_mm 8.0" in told
    assert not any("planned" in gap for gap in bench.layer_gaps({"4096x4096, batch 256": many}, "another GPU"))
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "--check"])
        assert bench.main() == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith("skipped: there is no NVIDIA GPU") and json.loads(said[-1])["skipped"]
