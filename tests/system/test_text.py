"""No text of a stranger commands a terminal, and JSON says the same after as before."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.system.text import MOST, in_json, one_line, printable

SENT = {
    "\x1b[31mred": "\\x1b[31mred",
    "\x9b2J": "\\x9b2J",
    "a\rb": "a\\x0db",
    "\u202etxt.exe": "\\u202etxt.exe",
    "\u2066x\u2069": "\\u2066x\\u2069",
    "a\x00\x07\x7f": "a\\x00\\x07\\x7f",
    "\u200bhidden\ufeff": "\\u200bhidden\\ufeff",
    "\udce9": "\\udce9",
    "\U000e0041": "\\U000e0041",
    "plain äöü 漢字 €": "plain äöü 漢字 €",
    "two\nlines": "two\nlines",
}


@pytest.mark.parametrize("text", SENT)
def test_marks_stay_and_commands_become_numbers(text: str) -> None:
    assert printable(text) == SENT[text]


@given(st.text(st.characters(codec=None)))
def test_nothing_but_marks_is_printed_and_json_is_the_same(text: str) -> None:
    assert all(one.isprintable() or one == "\n" for one in printable(text))
    assert one_line(text).isprintable()
    shown = in_json(json.dumps({text: [text]}, ensure_ascii=False, indent=2))
    assert all(one.isprintable() or one == "\n" for one in shown)
    assert json.loads(shown) == {text: [text]}


def test_a_line_is_as_long_as_a_person_reads() -> None:
    assert len(one_line("x" * 10**6)) < MOST + 10
    assert one_line("what\n where:   x") == "what where: x"
