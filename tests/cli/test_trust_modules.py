"""A recipe of a stranger runs no module that lies beside it or in the working folder, until the user says so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rarefy.cli import main
from rarefy.compression import recipe
from rarefy.errors import InputError
from rarefy.system.dependencies import asking

MODULE = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\nfrom rarefy.demo import model, data\n"


@pytest.fixture(autouse=True)
def _modules_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    modules, path = dict(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - modules.keys():
        if name.startswith("beside"):
            del sys.modules[name]


def written(place: Path, text: str, module: str = "beside.py") -> Path:
    """A recipe in a folder of its own, with the module beside it."""
    place.mkdir(exist_ok=True)
    (place / module).parent.mkdir(exist_ok=True)
    (place / module).write_text(MODULE)
    (place / "recipe.toml").write_text(f'output = "{place}/out"\n{text}')
    return place / "recipe.toml"


PLACES = {
    "model": 'model = "beside:model"\n[data]\nval = "sklearn:digits"\ntrain = "sklearn:digits"\n',
    "package": 'model = "beside.inner:model"\n[data]\nval = "sklearn:digits"\ntrain = "sklearn:digits"\n',
    "data": 'model = "rarefy.demo:model"\n[data]\nval = "beside:data"\ntrain = "beside:data"\n',
    "task": 'model = "rarefy.demo:model"\ntask = "beside.inner:Mine"\n[data]\nval = "sklearn:digits"\n',
    "criterion": 'model = "rarefy.demo:model"\n[data]\nval = "sklearn:digits"\ntrain = "sklearn:digits"\n'
    '[[step]]\ndo = "prune"\nkeep = 0.5\ncriterion = "beside.inner:Mine"\n',
    "runtime": 'model = "rarefy.demo:model"\nruntime = "beside.inner:Mine"\n[data]\nval = "sklearn:digits"\n',
}


@pytest.mark.parametrize("where", ["beside", "working folder"])
@pytest.mark.parametrize("place", PLACES)
def test_its_modules_are_asked_for(
    place: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "beside/inner.py" if "beside.inner" in PLACES[place] else "beside.py"
    path = written(tmp_path / "theirs", PLACES[place], name)
    if where == "working folder":
        monkeypatch.chdir(tmp_path / "theirs")
        (tmp_path / "recipe.toml").write_bytes(path.read_bytes())
        path = tmp_path / "recipe.toml"
    assert main.run(["run", str(path)]) == 2
    err = capsys.readouterr().err
    assert "and its code would run; read it, and pass --trust-modules if it may" in err, err
    assert len(err.splitlines()) == 1 and str(tmp_path / "theirs") in err
    assert not list((tmp_path / "theirs").rglob("*.ran")) and not (tmp_path / "theirs" / "out").exists()


def test_with_the_users_word_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "theirs", PLACES["model"] + "[[step]]\ndo = 'prune'\nmacs = 2.5\n")
    monkeypatch.chdir(tmp_path / "theirs")
    assert main.run(["run", str(path), "--trust-modules"]) == 2  # for the value of macs, as a later refusal
    assert (tmp_path / "theirs" / "beside.ran").exists()


@pytest.mark.parametrize("name", ["json", "timm", "sklearn", "tomllib", "onnxruntime", "torchvision"])
def test_none_takes_an_installed_package_s_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is searched first, where Python was started with -m or -c."""
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    with asking(tmp_path / "recipe.toml"):
        assert "" not in sys.path and str(tmp_path) not in sys.path
    assert sys.path[:2] == ["", str(tmp_path)]


def test_what_is_installed_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "theirs", PLACES["model"].replace("beside:", "rarefy.demo:"))
    monkeypatch.chdir(tmp_path / "theirs")
    with asking(path):
        assert recipe.read(path).model == "rarefy.demo:model"


def test_a_module_that_is_nowhere_is_told(tmp_path: Path) -> None:
    from rarefy.models import load

    with asking(tmp_path / "recipe.toml"), pytest.raises(InputError, match="nowhere_at_all"):
        load.load("nowhere_at_all:model")
