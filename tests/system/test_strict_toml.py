"""TOML of strangers: bounded before it is parsed, and otherwise what tomllib says."""

from __future__ import annotations

import time
import tomllib
from pathlib import Path

import pytest

from rarefy.errors import FormatError
from rarefy.system import strict_toml

BAD = {
    "deep arrays": ("a=" + "[" * 17 + "]" * 17, "nested 17 deep"),
    "very deep arrays": ("a=" + "[" * 100_000, "nested 100000 deep"),
    "deep tables": ("a=" + "{a=" * 5000 + "1" + "}" * 5000, "nested 5000 deep"),
    "deep behind a string": ('b="[[[" # [[\na=' + "[" * 20, "nested 20 deep"),
    "deep in a multi-line string's shadow": ('b="""]]]"""\na=' + "[" * 20, "nested 20 deep"),
    "dots": ("a" + ".a" * 50_000 + "=1", "dotted"),
    "dots in a header": ("[" + "a." * 20 + "a]", "dotted"),
    "dots with spaces": ("a" + " . a" * 20 + "=1", "dotted"),
    "quoted dots": ('"a"' + '."a"' * 20 + "=1", "dotted"),
    "many values": ("a=[" + "1," * 30_000 + "]", "holds 30,002 values"),
    "many steps": ("[[step]]\n" * 15_000, "holds 30,000 values"),
    "digits": ("seed=" + "9" * 5000, "no TOML"),
    "digits that fit a string": ("seed=" + "9" * 4000, "too large"),
    "seed": (f"seed={2**64}", "too large"),
    "seed in hexadecimal": ("seed=0x" + "f" * 30_000, "too large"),
    "negative": (f"seed={-(2**64)}", "too large"),
    "in a list": (f"a=[1, {{b={2**64}}}]", "too large"),
    "infinity": ("a=inf", "too large, or none"),
    "nan": ("a=-nan", "too large, or none"),
    "exponent": ("a=1e999", "too large, or none"),
    "twice": ("a=1\na=2", "no TOML"),
    "open string": ('a="', "no TOML"),
    "open long string": ('a="""', "no TOML"),
    "dates": ("a=2024-99-99", "no TOML"),
    "escape": ('a="\\uD800"', "no TOML"),
    "control": ("a='\x00'", "no TOML"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_taken_is_told_in_a_line_at_once(kind: str) -> None:
    text, words = BAD[kind]
    begin = time.process_time()
    with pytest.raises(FormatError, match=words) as raised:
        strict_toml.parse(text, "x.toml")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert time.process_time() - begin < 2


def test_what_people_write_is_taken() -> None:
    text = (
        "# it's a comment with 'quotes and [[[[[[[[[[[[[[[[[[ and a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.r.s\n"
        'model = "a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.r.s.t:Net" # "\n'
        "mean = [0.1, 0.2, 0.3]\nsteps = [[1, 2], [3]]\n"
        'text = """\n[[[[[[[[[[[[[[[[[[[[ "" \\" \n"""\nraw = \'\'\'\n{{{{{{{{{{{{{{{{{{{{ \' \'\'\'\n'
        "[a.b.c]\nd.e = 1\n[[step]]\ndo = 'prune'\n"
    )
    assert strict_toml.parse(text, "x") == tomllib.loads(text)


def test_a_file_is_bounded_and_must_be_text(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(b"a='" + b"x" * strict_toml.MOST_BYTES)
    with pytest.raises(FormatError, match="bytes, 262,144 at most"):
        strict_toml.read(path)
    path.write_bytes(b"a='\xff'")
    with pytest.raises(FormatError, match="no text in UTF-8"):
        strict_toml.read(path)
