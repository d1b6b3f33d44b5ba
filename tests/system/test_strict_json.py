"""What is parsed at all, at the limits."""

from __future__ import annotations

import math

import pytest

from rarefy.errors import FormatError, InputError
from rarefy.system import strict_json
from rarefy.system.strict_json import parse, plain, restore


@pytest.mark.parametrize("item", ["0", "[]", "{}", '{"b":0}', '"[[[{{{,,,"'])
def test_the_number_of_values_is_limited_whatever_they_are(item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted are commas and what opens: strings hold none."""
    monkeypatch.setattr(strict_json, "MOST_VALUES", 1000)
    each = 1 + sum(item.count(one) for one in "[{") * (not item.startswith('"'))
    fits = (1000 - 2 + 1) // each  # one object, one list, a comma less than items
    assert len(parse(f'{{"a":[{",".join([item] * fits)}]}}'.encode(), "x")["a"]) == fits
    with pytest.raises(FormatError, match="^x: holds more than 1000 values$"):
        parse(f'{{"a":[{",".join([item] * (fits + 1))}]}}'.encode(), "x")


def test_the_depth_is_limited_and_strings_have_none() -> None:
    deepest = strict_json.DEEPEST
    text = '{"a":' + "[" * (deepest - 1) + '"[[{{\\""' + "]" * (deepest - 1) + "}"
    assert parse(text.encode(), "x")
    with pytest.raises(FormatError, match=f"^x: is nested {deepest + 1} deep$"):
        parse(text.replace("[", "[[", 1).replace("]", "]]", 1).encode(), "x")


def test_plain_values_come_back() -> None:
    value = {"a": [1, 2.5, None, True, "ü"], "b": {"c": math.inf, "d": -math.inf}, "e": ()}
    assert restore(plain(value, "x"), "x") == {**value, "e": []}
    assert math.isnan(restore(plain([math.nan], "x"), "x")[0])
    for wrong, words in [
        ({"$a": 1}, r"x: the key '\$a'"),
        ({1: 1}, "x: the key 1"),
        ([0, {"k": {1}}], r"x\[1\].k: a value of type set"),
    ]:
        with pytest.raises(InputError, match=words):
            plain(wrong, "x")
