"""``rarefy init``, ``front``, ``worker``, ``compare`` and ``compress --search`` at the command line: they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from rarefy.cli.main import run
from rarefy.compression import recipe


def test_init_writes_a_recipe_that_run_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    asked = ["init", str(file), "--model", "rarefy.demo:model", "--data", "sklearn:digits", "--speedup", "3"]
    assert run(asked) == 0 and "rarefy run" in capsys.readouterr().out
    found = recipe.read(file)
    assert found.model == "rarefy.demo:model" and found.budget == {"max_drop": 0.005, "speedup": 3.0}
    assert found.data == {"train": "sklearn:digits", "val": "sklearn:digits"} and found.runtime == "onnxruntime"
    assert run(asked) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init", "new.toml", "--model", "a.b:c"], "pass --data"),
        (["init", "new.txt"], "ends in .toml"),
        (["front", "nowhere"], "holds no front yet"),
        (["front", "nowhere", "-o", "out"], "say which with --pick"),
        (["worker", "nowhere"], "holds no search"),
        (["compare", "one"], "two folders at least"),
        (["compress", "a.b:c", "--data", "sklearn:digits", "--search", "soon", "-o", "out"], "a number of trials, 40"),
        (["compress", "a.b:c", "--data", "sklearn:digits", "--search", "2.5", "-o", "out"], "a number of trials, 40"),
        (["compress", "a.b:c", "--data", "sklearn:digits", "--epochs", "3", "-o", "out"], "belong to --search"),
        (["compress", "a.b:c", "--search", "3", "--step", "quantize", "-o", "out"], "finds the steps by itself"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
