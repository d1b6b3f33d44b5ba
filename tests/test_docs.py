"""The commands of the README and the tutorial are those there are, and the tutorial runs from end to end."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from rarefy.cli import main
from rarefy.compression import recipe

ROOT = Path(__file__).resolve().parents[1]
SCORES = """
from dataclasses import dataclass
from rarefy.pruning.criteria.magnitude import Magnitude

@dataclass(frozen=True)
class MyScore:
    power: int = 1

    def scores(self, *arguments):
        return Magnitude(p=self.power).scores(*arguments)
"""


def blocks(file: str, language: str) -> list[str]:
    fences = re.findall(
        r"^```(\w*)\n(.*?)^```$", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    return [block for named, block in fences if named == language]


def commands(file: str, *languages: str) -> list[list[str]]:
    """Of blocks without a language, which run as they stand; those of "sh" need files of the reader's."""
    lines = [
        part.strip()
        for language in ("", *languages)
        for block in blocks(file, language)
        for line in block.splitlines()
        for part in line.split(";")
    ]
    return [shlex.split(line)[1:] for line in lines if line.startswith("rarefy ")]


@pytest.mark.parametrize("file", ["README.md", "docs/tutorial.md"])
def test_every_command_is_one_that_there_is(file: str) -> None:
    group = typer.main.get_command(main.app)
    found = commands(file, "sh")
    assert len(found) >= 5
    for name, *arguments in found:
        group.commands[name].make_context(name, list(arguments))  # type: ignore[attr-defined]


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the pages, in one folder: the tutorial loads what the README saved, and has to find the same."""
    pytest.importorskip("torchvision", reason="the tutorial prunes a detector of torchvision")
    monkeypatch.chdir(tmp_path)
    run: dict[str, Any] = {}
    for file in ("README.md", "docs/tutorial.md"):
        assert blocks(file, "python")
        for block in blocks(file, "python"):
            exec(compile(block, file, "exec"), run)  # noqa: S102 (our own pages)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(run["small"](images), run["model"](images)) and len(run["digits"]()(images)) == 3
    assert run["result"].report["before"]["evaluation"]["value"] > 0.9
    assert run["parity"]["passed"] and (tmp_path / "backbone.onnx").exists()


def test_every_recipe_is_one(tmp_path: Path) -> None:
    for file in ("README.md", "docs/tutorial.md"):
        for block in blocks(file, "toml"):
            (tmp_path / "recipe.toml").write_text(block, encoding="utf-8")
            assert recipe.read(tmp_path / "recipe.toml").steps


@pytest.mark.parametrize("file", ["README.md", "docs/tutorial.md", "CONTRIBUTING.md"])
def test_every_link_leads_somewhere(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or ((ROOT / file).parent / target).exists(), target


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "nets.py").write_text(blocks("docs/tutorial.md", "python")[0], encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(blocks("docs/tutorial.md", "toml")[0], encoding="utf-8")
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "scores.py").write_text(SCORES, encoding="utf-8")
    for arguments in commands("docs/tutorial.md"):
        code = main.run(arguments)
        out, err = capsys.readouterr()
        # A budget may be missed on a busy machine; anything else must go well.
        assert code == 0 or (code == 1 and arguments[0] in ("compress", "run")), (
            f"rarefy {shlex.join(arguments)}: {err}"
        )
        assert out
