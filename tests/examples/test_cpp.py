"""The C++ programs, built with what is in the runtimes' wheels, say what ``predict.py`` says."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLES, Exported, lines_of, same

CPP = EXAMPLES / "cpp"
FILES = {"onnxruntime": "model.onnx", "openvino": "model.xml", "executorch": "model.pte"}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in ("g++", "cmake"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    folder = tmp_path_factory.mktemp("built")
    for command in (
        ["cmake", "-S", CPP, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_CXX_FLAGS=-O1 -Wall"],
        ["cmake", "--build", folder],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr
    return folder


def said_by(program: Path, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    if not program.exists():
        pytest.skip(f"{program.name} was not built: its wheel is not installed")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", FILES)
def test_it_says_what_python_says(runtime: str, built: Path, exported: Exported) -> None:
    model = exported.onnx.with_name(FILES[runtime])
    if importlib.util.find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    if not model.exists():
        pytest.skip(f"{runtime} has no file of a detector with its boxes")
    done = said_by(built / f"with_{runtime}", model, *exported.pictures)
    assert done.returncode == 0, done.stderr
    assert same(lines_of(done.stdout), exported.said)


@pytest.mark.slow
def test_what_it_cannot_do_is_one_line(built: Path, exported: Exported, tmp_path: Path) -> None:
    program = built / "with_onnxruntime"
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for arguments, words in {
        (): "usage",
        (tmp_path / "none.onnx", exported.pictures[0]): "none.onnx",
        (exported.onnx, tmp_path / "bad.png"): "can't be read as a picture",
    }.items():
        done = said_by(program, *arguments)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_program_is_short_and_says_whose_files_it_uses() -> None:
    for file in CPP.glob("*.[ch]pp"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 120, file.name
    for file in (CPP / "third_party").iterdir():
        assert "MIT License" in file.read_text(encoding="utf-8"), file.name
