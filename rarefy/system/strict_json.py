"""JSON written by strangers: parsed only once it is known to be neither deep nor long, and the checks of what it says.

A key stands once in its object and numbers are finite, as JSON has it; ``plain`` and ``restore`` carry NaN and infinity
as ``{"$float": "nan"}``. Whatever is wrong raises FormatError in one line that says where and with what value.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from rarefy.errors import FormatError, InputError

Json = Any  # what JSON holds, and Python for it

T = TypeVar("T")
P = ParamSpec("P")

# Far above any real model (the largest of torchvision: 0.5 MB, 1,700 nodes), and what they allow fits 300 MB of memory.
MOST_BYTES = 16 * 2**20
MOST_VALUES = 2_000_000
DEEPEST = 64
# A string, or what stands where one was begun: always matches, never goes back, so a hostile file takes linear time.
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+\\?+(?:"|\Z)', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STEP = np.zeros(256, np.int8)  # what a byte adds to the depth
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1


def parse(
    data: bytes, where: str | Path, *, most_values: int | None = None, without: Collection[str] = ()
) -> dict[str, Json]:
    """Parsed, once it is known to be neither deep nor of many values; a key may stand once, numbers are finite.

    most_values: None: ``MOST_VALUES``. without: keys that are dropped where they stand, with all that is in them. Text
    is Unicode that can be written again: no half of a surrogate pair.
    """
    bare, most = _STRINGS.sub(b"", data), MOST_VALUES if most_values is None else most_values
    expect(bare.count(b",") + bare.count(b"[") + bare.count(b"{") <= most, where, f"holds more than {most} values")
    deepest = _deepest(bare)
    expect(deepest <= DEEPEST, where, f"is nested {deepest} deep")
    del bare
    try:
        value: dict[str, Json] = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=functools.partial(_once, without),
            parse_constant=_refuse,
            parse_float=_finite,
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: holds half of a surrogate pair, which is no text; copy it again") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: is not JSON ({str(error)[:100]!r}); copy it again") from error
    expect(isinstance(value, dict), where, "is not a JSON object")
    return value


def _deepest(bare: bytes) -> int:
    """How deep JSON without its strings is nested; a few MB at a time, so that it takes no memory."""
    deepest = depth = 0
    values, step = np.frombuffer(bare, np.uint8), 2**22
    for begin in range(0, len(values), step):
        depths = np.cumsum(_STEP[values[begin : begin + step]], dtype=np.int32)
        deepest, depth = max(deepest, depth + int(depths.max())), depth + int(depths[-1])
    return deepest


def _once(without: Collection[str], pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    for key in without:
        found.pop(key, None)
    return found


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:40]} is too large")
    return float(text)


def plain(value: object, where: str) -> Json:
    """JSON of JSON values: tuples become lists, NaN and infinity ``{"$float": "nan"}``.

    Raises InputError for anything else.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str or key.startswith("$"):
                raise InputError(
                    f"{where}: the key {key!r} is not text that JSON can hold (and '$' is kept for rarefy)"
                )
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    raise InputError(
        f"{where}: a value of type {type(value).__name__} is not JSON; "
        "convert it to text, numbers, lists and dictionaries"
    )


def restore(value: Json, where: str | Path) -> Json:
    """What ``plain`` was given."""
    if isinstance(value, list):
        return [restore(item, where) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"$float"}:
            return special_float(value["$float"], where)
        return {key: restore(item, where) for key, item in value.items()}
    return value


def special_float(text: object, where: str | Path) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise FormatError(f"{where}: {said(text)} is not nan, inf or -inf")
    return float(str(text))


def expect(good: object, where: str | Path, what: str) -> None:
    if not good:
        raise FormatError(f"{where}: {what}")


def expected(value: object, kind: type[T], at: str, what: str) -> T:
    if not isinstance(value, kind):
        raise FormatError(f"{at}: {what} is not a {kind.__name__}")
    return value


def located(at: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``function(*args)``, whose FormatError then says where."""
    try:
        return function(*args, **kwargs)
    except FormatError as error:
        raise FormatError(f"{at}: {error}") from error


def is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48


def said(value: object) -> str:
    return repr(value)[:80]
