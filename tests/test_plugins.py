"""Choices: every one that comes with rarefy is found, built, described and read back; a user's own works alike."""

from __future__ import annotations

import dataclasses
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest

from rarefy import plugins
from rarefy.errors import InputError

EVERY = [(kind, name) for kind in plugins.KINDS for name in plugins.available(kind)]


@dataclass(frozen=True)
class Mine:
    """Mine, all mine."""

    power: int = 2
    scale: float = 1.0
    on: bool = False
    limit: int | None = None
    text: str = "x"


@pytest.fixture
def mylab(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("mylab.scores")
    module.Mine = Mine  # type: ignore[attr-defined]
    monkeypatch.setattr(Mine, "__module__", "mylab.scores")
    monkeypatch.setitem(sys.modules, "mylab.scores", module)


def test_every_kind_has_choices() -> None:
    assert {kind for kind, _ in EVERY} == set(plugins.KINDS)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_each_choice_is_a_frozen_dataclass_with_defaults(kind: str, name: str) -> None:
    cls = plugins.choice_class(kind, name)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    made = plugins.resolve(kind, name)
    assert type(made) is cls
    assert plugins.resolve(kind, made) is made
    assert made == plugins.resolve(kind, name) and hash(made) == hash(plugins.resolve(kind, name))


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_each_choice_is_described_as_text_that_makes_it_again(kind: str, name: str) -> None:
    made = plugins.resolve(kind, name)
    assert plugins.describe(made) == name
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        try:
            other = dataclasses.replace(
                made, **{field.name: value + 1 if isinstance(value, int) else value * 0.5 or 0.25}
            )
        except (InputError, ValueError, TypeError):  # outside its range
            continue
        text = plugins.describe(other)
        assert text.startswith(f"{name}:") and plugins.resolve(kind, text) == other


def test_a_choice_whose_file_was_renamed_is_written_by_its_old_name_and_read_by_either() -> None:
    made = plugins.resolve("rounding", "gptq_narrow:inputs=9")
    assert made == plugins.resolve("rounding", "narrow:inputs=9")
    assert plugins.describe(made) == "narrow:inputs=9" and type(made).__module__.endswith(".gptq_narrow")
    assert "narrow" in plugins.available("rounding") and "gptq_narrow" not in plugins.available("rounding")


NUMBERS = [
    (kind, name, field.name)
    for kind, name in EVERY
    for field in dataclasses.fields(plugins.choice_class(kind, name))
    if {"int", "float"} & set(str(field.type).replace("|", " ").split())
]
TAKEN = {("criteria", "magnitude", "p", "inf")}  # the largest weight


def test_options_that_are_numbers_are_found() -> None:
    assert len(NUMBERS) > 60 and {kind for kind, _, _ in NUMBERS} >= {"criteria", "losses", "rounding", "calibration"}


@pytest.mark.parametrize(("kind", "name", "option"), NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "-1e300"])
def test_no_option_takes_what_is_out_of_every_range(kind: str, name: str, option: str, value: str) -> None:
    """No option of any choice may be negative or endless, so a new one gets its guard, or a place in TAKEN."""
    text = f"{name}:{option}={value}"
    if (kind, name, option, value) in TAKEN:
        assert plugins.describe(plugins.resolve(kind, text)) == text
        return
    with pytest.raises(InputError, match=option) as raised:
        plugins.resolve(kind, text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("kind", "name", "option"), NUMBERS)
def test_an_object_is_checked_as_its_text(kind: str, name: str, option: str) -> None:
    with pytest.raises((InputError, ValueError), match=option):
        plugins.choice_class(kind, name)(**{option: -1})


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_each_choice_has_one_line_of_summary(kind: str, name: str) -> None:
    line = plugins.summary(kind, name)
    assert 5 < len(line) < 160 and "\n" not in line


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_an_unknown_option_is_told_with_those_there_are(kind: str, name: str) -> None:
    with pytest.raises(InputError, match="unknown option 'frobs=3'; have"):
        plugins.resolve(kind, f"{name}:frobs=3")


def test_an_unknown_choice_is_told_with_those_there_are() -> None:
    with pytest.raises(InputError, match="criteria: unknown choice 'magnitud'; have .*magnitude"):
        plugins.resolve("criteria", "magnitud")


@pytest.mark.usefixtures("mylab")
@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("mylab.scores:Mine", Mine()),
        ("mylab.scores:Mine:power=3,scale=0.5", Mine(power=3, scale=0.5)),
        (" mylab.scores:Mine: on = yes , limit = 7 ", Mine(on=True, limit=7)),
        ("mylab.scores:Mine:limit=none,text=a b", Mine(text="a b")),
    ],
)
def test_a_users_own_choice(text: str, made: Mine) -> None:
    assert plugins.resolve("criteria", text) == made


@pytest.mark.usefixtures("mylab")
@pytest.mark.parametrize("made", [Mine(), Mine(power=9), Mine(on=True, text="q"), Mine(limit=3, scale=1e-3)])
def test_a_users_own_choice_as_text_and_back(made: Any) -> None:
    text = plugins.describe(made)
    assert text.startswith("mylab.scores:Mine")
    assert plugins.resolve("criteria", text) == made


@pytest.mark.usefixtures("mylab")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mylab.scores:Mine:power=many", "power: 'many' is not int"),
        ("mylab.scores:Mine:limit=x", "limit: 'x' is not int or NoneType"),
        ("mylab.scores:Mine:on=perhaps", "on: 'perhaps' is not bool"),
        ("mylab.scores:Mine:power", "unknown option 'power'"),
        ("mylab.scores:Yours", "can't be imported"),
        ("nolab.scores:Mine", "can't be imported"),
    ],
)
def test_wrong_options_are_told(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        plugins.resolve("criteria", text)


def test_an_object_passes_through() -> None:
    mine = object()
    assert plugins.resolve("losses", mine) is mine
