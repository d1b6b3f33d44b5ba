"""Who sits at a terminal is told where to read on about an error; logs and programs get its line alone."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from rarefy import errors
from rarefy.cli import terminal

CHECKOUT = Path(__file__).resolve().parents[2] / "docs"


class Derived(errors.DataError):
    """As packages define them: the section is that of the class above."""


def told(error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    def fail(_: list[str]) -> None:
        raise error

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    terminal.guarded(fail, ["list"])
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (errors.GoalMissed("too slow"), "goalmissed"),
        (errors.MissingDependency("onnx", "onnx"), "missingdependency"),
        (Derived("boxes"), "dataerror"),
        (errors.RarefyError("odd"), "rarefyerror"),
    ],
)
def test_a_terminal_is_told_the_section(
    error: errors.RarefyError, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_site", lambda: None)
    line, more = told(error, monkeypatch, capsys)
    assert line == f"rarefy: {error}" and more.split() == ["more:", f"{CHECKOUT}/errors.md#{name}"]
    monkeypatch.setattr(terminal, "_site", lambda: "https://docs.example.org/")
    assert told(error, monkeypatch, capsys)[1].endswith(f" https://docs.example.org/errors/#{name}")


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), KeyboardInterrupt(), OSError(28, "full"), MemoryError()])
def test_what_has_no_section_is_a_line(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(told(error, monkeypatch, capsys)) == 1


def test_an_installed_package_without_an_address_tells_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_site", lambda: None)
    monkeypatch.setattr(terminal, "__file__", str(tmp_path / "rarefy" / "cli" / "terminal.py"))
    assert told(errors.DataError("x"), monkeypatch, capsys) == ["rarefy: x"]


def test_the_address_is_the_package_s(monkeypatch: pytest.MonkeyPatch) -> None:
    class Named:
        def __init__(self, *urls: str):
            self.urls = list(urls)

        def get_all(self, _: str) -> list[str] | None:
            return self.urls or None

    for urls, wanted in (((), None), (("Source, https://a",), None), (("Documentation, https://b/c",), "https://b/c")):
        monkeypatch.setattr(metadata, "metadata", lambda _, urls=urls: Named(*urls))
        assert terminal._site() == wanted

    def missing(_: str) -> None:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "metadata", missing)
    assert terminal._site() is None
