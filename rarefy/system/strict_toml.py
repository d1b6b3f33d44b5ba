"""TOML written by strangers: parsed only once it is known to be neither large, nor deep, nor of endless dotted keys.

``tomllib`` recurses into arrays and inline tables, keeps every prefix of a dotted key (50,000 parts take 10 GB), and
hands numbers of any length to ``int``. Whatever is wrong raises FormatError in one line that says where.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from rarefy.errors import FormatError
from rarefy.system.files import content
from rarefy.system.strict_json import Json, expect

# Far above any recipe written by hand or by a program.
MOST_BYTES = 2**18
MOST_VALUES = 20_000
DEEPEST = 16
LARGEST = 2**63 - 1  # of a whole number
# Comments and strings of the four kinds; what is not closed reaches to the end. Linear: nothing is tried twice.
_BESIDE = re.compile(
    r'#[^\n]*+|"""(?:[^"\\]++|\\.|"(?!""))*+(?:"""|\\?\Z)|'
    r"'''(?:[^']++|'(?!''))*+(?:'''|\Z)|"
    r'"(?:[^"\\\n]++|\\.)*+"?|'
    r"'[^'\n]*+'?",
    re.DOTALL,
)
_DOTTED = re.compile(rf"(?:[\w-]++[ \t]*+\.[ \t]*+){{{DEEPEST}}}")


def read(path: str | Path) -> dict[str, Json]:
    """The tables of the file. Raises FormatError."""
    data = content(path, MOST_BYTES)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is no text in UTF-8 (byte {error.start}); a recipe is a TOML file") from error
    return parse(text, path)


def parse(text: str, where: str | Path) -> dict[str, Json]:
    """Raises FormatError."""
    bare = _BESIDE.sub("s", text)
    depth = deepest = 0
    for bracket in re.findall(r"[\[{\]}]", bare):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    expect(deepest <= DEEPEST, where, f"is nested {deepest} deep, {DEEPEST} at most; write it flatter")
    found = _DOTTED.search(bare)
    expect(found is None, where, f"has a key of more than {DEEPEST} dotted parts; write it flatter")
    count = sum(bare.count(sign) for sign in ",=[{")
    expect(count <= MOST_VALUES, where, f"holds {count:,} values, {MOST_VALUES:,} at most; write fewer")
    try:
        value: dict[str, Json] = tomllib.loads(text)
    except (ValueError, RecursionError, OverflowError, ArithmeticError) as error:
        raise FormatError(f"{where}: is no TOML: {str(error)[:200]}; mend that line") from error
    for item in _leaves(value):
        good = not (isinstance(item, int) and abs(item) > LARGEST) and not (
            isinstance(item, float) and not math.isfinite(item)
        )
        if not good:
            told = str(item) if isinstance(item, float) or item.bit_length() < 100 else f"of {item.bit_length()} bits"
            raise FormatError(f"{where}: the number {told} is too large, or none; mend that value")
    return value


def _leaves(value: Json) -> Iterator[Json]:
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value
