"""The notebooks of docs/notebooks: each is one, and each runs from its first cell to its last (``make examples``)."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# Runs the cells as a kernel does: one namespace, and what a cell ends in is shown.
KERNEL = """
import ast, json, sys
import torch
torch.set_num_threads(1)
names, shown = {"__name__": "__main__"}, []
for number, code in enumerate(json.load(sys.stdin)):
    body = ast.parse(code, f"cell {number}").body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
    value = None if last is None else eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    rich = next((getattr(value, way)() for way in ("_repr_html_", "_repr_svg_") if hasattr(value, way)), repr(value))
    shown.append(None if value is None else rich)
json.dump(shown, open("shown.json", "w"))
"""


def cells(notebook: Path, kind: str = "code") -> list[str]:
    told = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in told["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_one(notebook: Path) -> None:
    told = json.loads(notebook.read_text(encoding="utf-8"))
    assert (told["nbformat"], told["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in told["cells"]}) == len(told["cells"])
    for cell in told["cells"]:  # nobody's outputs, which no test would look at
        own = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        assert cell == {**own, **{key: cell[key] for key in ("cell_type", "id", "metadata", "source")}}
    first, *_ = text = cells(notebook, "markdown")
    assert first.startswith("# ") and all(map(ast.parse, cells(notebook)))
    for target in re.findall(r"\]\(([^)#]+)\)", "\n".join(text)):
        assert (notebook.parent / target).exists(), target


def shown(notebook: Path, folder: Path) -> list[Any]:
    """What each cell of code ends in, as a notebook shows it; None where that is nothing."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], check=False, cwd=folder, input=json.dumps(cells(notebook)), timeout=900,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    told: list[Any] = json.loads((folder / "shown.json").read_text())
    return told


@pytest.mark.slow
def test_the_first_model(tmp_path: Path) -> None:
    *_, result, picture, files = shown(ROOT / "docs" / "notebooks" / "first_model.ipynb", tmp_path)
    assert "<table>" in result and "top-1" in result and picture.startswith("<svg")
    assert {"model.onnx", "report.html", "graph.json"} <= {*ast.literal_eval(files)}


@pytest.mark.slow
def test_the_search(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="a search needs the extra `search`")
    _, front, picture, picked = shown(ROOT / "docs" / "notebooks" / "search.ipynb", tmp_path)
    assert "3 points are beaten by none" in front and "<td>#" in front and picture.startswith("<svg")
    assert ast.literal_eval(picked)[1] > 0 and (tmp_path / "found" / "report.html").exists()


@pytest.mark.slow
def test_own_pictures(tmp_path: Path) -> None:
    *_, costs, files = shown(ROOT / "docs" / "notebooks" / "own_pictures.ipynb", tmp_path)
    sizes = {name: one[0] for name, one in ast.literal_eval(costs).items()}
    assert sizes["before"] > 3 * sizes["after"] and "manifest.json" in ast.literal_eval(files)
    assert (tmp_path / "small.onnx").exists()
