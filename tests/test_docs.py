"""The commands of the README and the tutorial are those there are, and the tutorial runs from end to end."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from rarefy import errors, plugins
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


@pytest.mark.parametrize("file", ["README.md", "docs/tutorial.md", "docs/guides.md", "docs/recipes.md", "docs/methods"])
def test_every_command_is_one_that_there_is(file: str) -> None:
    group = typer.main.get_command(main.app)
    pages = sorted((ROOT / file).glob("*.md")) if (ROOT / file).is_dir() else [ROOT / file]
    found = [one for page in pages for one in commands(str(page.relative_to(ROOT)), "sh")]
    assert len(found) >= 5
    for name, *arguments in found:
        group.commands[name].make_context(name, list(arguments))  # type: ignore[attr-defined]


def test_the_readme_tells_every_command_and_runtime() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    told = {name.split()[0] for name in re.findall(r"`([^`]+)`", first)}
    assert set(typer.main.get_command(main.app).commands) <= told  # type: ignore[attr-defined]
    assert all(f"`{name}`" in text for name in plugins.available("runtimes"))


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
    assert run["found"].shape == (1, 300, 6) and list(run["finder"]([images[:1, 0].expand(3, 8, 8)])[0]) == [
        "boxes", "scores", "labels"
    ]  # fmt: skip


def test_every_recipe_is_one(tmp_path: Path) -> None:
    for file in ("README.md", "docs/tutorial.md"):
        for block in blocks(file, "toml"):
            (tmp_path / "recipe.toml").write_text(block, encoding="utf-8")
            assert recipe.read(tmp_path / "recipe.toml").steps


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", *(str(one.relative_to(ROOT)) for one in ROOT.glob("docs/**/*.md"))]
)
def test_every_link_leads_somewhere(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or ((ROOT / file).parent / target).exists(), target


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"], check=False, cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "rarefy.compress" in page and "rarefy.pull" in page
    docs = ROOT / "docs"
    written = [*docs.glob("**/*.md"), *docs.glob("notebooks/*.ipynb")]
    pages = {one.relative_to(docs).with_suffix("").as_posix() for one in written} - {"index"}
    assert all((tmp_path / "site" / one / "index.html").is_file() for one in pages)
    named = re.findall(r": ([a-z_/]+)\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {*named} == pages | {"index", "api"}  # each page is found from every other
    told = (tmp_path / "site" / "errors" / "index.html").read_text(encoding="utf-8")
    assert all(f'id="{name.lower()}"' in told for name in raised())  # where error messages point to


METHODS = sorted(path.stem for path in (ROOT / "docs" / "methods").glob("*.md"))


def test_the_pictures_are_as_drawn(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / ".ci" / "pictures.py", tmp_path], check=True)
    drawn = {path.stem: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert sorted(drawn) == METHODS
    for name, picture in drawn.items():
        assert picture == (ROOT / "docs" / "methods" / f"{name}.svg").read_bytes(), f"{name}: python .ci/pictures.py"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_s_page_has_all_that_it_should(name: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert f"]({name}.svg)" in text and "https://" in text + ("https://" if name in ("stochastic", "verdict") else "")
    told = text.partition("## Measured here")[2]
    known = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    figures = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\))", told)
    assert told or name == "signing"
    assert all(re.search(rf"(?<![\d.]){re.escape(one)}(?!\d)", known) for one in figures), figures  # measured, not said


def test_other_tools_stand_with_measured_figures() -> None:
    told = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    known = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    figures = re.findall(r"(?<![\w.])\d+\.\d+", told)
    assert len(figures) >= 25
    assert all(re.search(rf"(?<![\d.]){re.escape(one)}(?!\d)", known) for one in figures), figures


def raised() -> list[str]:
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.RarefyError)]
    assert len(kinds) >= 12
    return [kind.__name__ for kind in kinds]


def test_every_error_has_a_section() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+)\n\n(\S.{40})", text, flags=re.MULTILINE)
    assert [name for name, _ in sections] == raised()  # in the order of the tree


def test_every_make_target_is_one_that_there_is() -> None:
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    typed = [
        part.strip()
        for file in ("README.md", "CONTRIBUTING.md")
        for block in blocks(file, "")
        for line in block.splitlines()
        for part in line.split("#")[0].split(";")
        if part.strip().startswith("make ")
    ]
    assert len(typed) >= 4
    for line in typed:
        dry = [*shlex.split(line), "--dry-run"]
        done = subprocess.run(dry, check=False, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, f"{line}: {done.stderr}"


def typed_in(folder: Path, block: str) -> None:
    """A block as it is typed, by a shell. A budget may be missed on a busy machine; anything else must go well."""
    (folder / "bin").mkdir(exist_ok=True)
    command = folder / "bin" / "rarefy"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m rarefy "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    path = os.pathsep.join((str(folder / "bin"), os.environ["PATH"]))
    python = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    for line in block.splitlines():
        done = subprocess.run(
            ["sh", "-ec", line], check=False, cwd=folder, env={**os.environ, "PATH": path, "PYTHONPATH": python},
            capture_output=True, text=True,
        )  # fmt: skip
        missed = (
            done.returncode == 1 and line.startswith(("rarefy compress", "rarefy run")) and "best model" in done.stderr
        )
        assert done.returncode == 0 or missed, f"{line}: {done.stderr}"
        assert done.stdout, line


def pictures(folder: Path, classes: int, side: int = 64, each: int = 4) -> None:
    for split in ("train", "val"):
        for label in range(classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(each):
                made = torch.Generator().manual_seed(100 * label + index + 50 * (split == "val"))
                pixels = (torch.rand(side, side, 3, generator=made) * 60 + 50 * label).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / f"class{label}" / f"{index}.png")


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path) -> None:
    """Its command line, on eight small pictures."""
    timm = pytest.importorskip("timm", reason="the README compresses a network of timm")
    pictures(tmp_path / "data", 2)
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "best.safetensors")
    (commands_of,) = [block for block in blocks("README.md", "") if "rarefy compress" in block]
    typed_in(tmp_path, commands_of)


@pytest.mark.slow
def test_a_network_and_pictures_of_ones_own(tmp_path: Path) -> None:
    """Section 8 of the tutorial, which starts from files of the reader's."""
    torchvision = pytest.importorskip("torchvision", reason="the tutorial compresses a network of torchvision")
    pictures(tmp_path / "photos", 4)
    save_file(torchvision.models.resnet18(num_classes=4).state_dict(), tmp_path / "mine.safetensors")
    (own,) = [block for block in blocks("docs/tutorial.md", "sh") if "photos" in block]
    typed_in(tmp_path, own)


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(blocks("docs/tutorial.md", "python")[0], encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(blocks("docs/tutorial.md", "toml")[0], encoding="utf-8")
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "scores.py").write_text(SCORES, encoding="utf-8")
    for block in blocks("docs/tutorial.md", ""):
        typed_in(tmp_path, block)
