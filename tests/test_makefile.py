"""``make`` finds a Python that fits, and says what is missing where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
TOOLS = ("sh", "rm", "touch", "mkdir", "cat", "chmod")
# A Python that notes its name in the environment that it makes.
FITTING = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; echo {name} > "$3/made-by"; printf '#!/bin/sh\\nexit 0\\n' > "$3/bin/python"
             chmod +x "$3/bin/python";;
esac
exit 0
"""
OLD = "#!/bin/sh\nexit 1\n"


def made(folder: Path, pythons: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """``make .venv/.ready`` where these are all the Pythons that there are."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    for tool in TOOLS:
        found = shutil.which(tool)
        if found is not None and not (programs / tool).exists():
            (programs / tool).symlink_to(found)
    for name, text in pythons.items():
        (programs / name).write_text(text.format(name=name) if text == FITTING else text)
        (programs / name).chmod(0o755)
    make = shutil.which("make")
    assert make is not None
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "MAKEFLAGS", "VENV")}
    return subprocess.run(
        [make, ".venv/.ready", *arguments], check=False, cwd=folder, env={**environment, "PATH": str(programs)},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3.11": FITTING, "python3.12": FITTING, "python3": FITTING}, "python3.11"),
        ({"python3.12": FITTING, "python3.13": FITTING}, "python3.12"),
        ({"python3.11": OLD, "python3.13": FITTING, "python3": FITTING}, "python3.13"),
        ({"python3": FITTING}, "python3"),
        ({"python3.11": OLD, "python3.12": OLD, "python3": FITTING}, "python3"),
    ],
)
def test_the_first_python_that_fits_is_taken(tmp_path: Path, pythons: dict[str, str], chosen: str) -> None:
    done = made(tmp_path, pythons)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".venv" / "made-by").read_text().strip() == chosen
    assert f"{chosen} -m venv .venv" in done.stdout
    again = made(tmp_path, {})
    assert again.returncode == 0 and "-m venv" not in again.stdout


@pytest.mark.parametrize("pythons", [{}, {"python3": OLD}, {"python3.11": OLD, "python3.13": OLD}])
def test_none_is_told_with_what_to_do(tmp_path: Path, pythons: dict[str, str]) -> None:
    done = made(tmp_path, pythons)
    assert done.returncode == 2 and not (tmp_path / ".venv").exists()
    assert "none of python3.11 python3.12 python3.13 python3 is Python 3.11 to 3.13 with venv and pip" in done.stderr
    assert "apt install python3.12 python3.12-venv" in done.stderr and "make PYTHON=/path/to/python" in done.stderr


def test_one_can_be_named(tmp_path: Path) -> None:
    pythons = {"python3.11": FITTING, "mine": FITTING}
    assert made(tmp_path, pythons, "PYTHON=mine").returncode == 0
    assert (tmp_path / ".venv" / "made-by").read_text().strip() == "mine"


def test_what_fits_is_what_the_package_says() -> None:
    """The line that make asks a Python is true of this one, and its bounds are those of pyproject.toml."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("FITS")).partition(":=")[2].strip()
    assert subprocess.run([sys.executable, "-c", line], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", line.replace("3, 11", "9, 9")], check=False).returncode == 1
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in line
    assert 'requires-python = ">=3.11,<3.14"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
