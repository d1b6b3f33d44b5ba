"""What a file becomes in a fuzzer's hands: bytes that flip, go and come again, and JSON whose values are others."""

from __future__ import annotations

import io
import json
import random
import re
import zipfile
from typing import Any

TOKENS = [
    b"\xff\xff\xff\xff", b"\xff" * 8, b"\x00" * 8, b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00\x00\x00\x80",
    b"{", b"[", b'"', b"-1", b"1e999", b"9" * 30, b"NaN", b"null", b"../", b"\xed\xa0\x80", b"\x1b[31m",
    b"PK\x03\x04", b"\x80\x02", b"R.", b"IDAT", b"IHDR", b"PAR1", b"ustar",
    b"[[step]]\n", b"a.a.a.a = 1\n", b"=", b"\n", b"'''", b"#",
]  # fmt: skip
WILD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e308,
    "", "x", "../x", "\x00", "\ud800", "\x1b[31m", "x" * 5000, "9**9**9**9", "nan",
    [], {}, [[]], [[[[[[]]]]]], {"a": {}}, [0] * 500, [1, "a", None], {"": 1},
    {"node": "x"}, {"tuple": []}, {"dtype": "float32"}, {"$float": "nan"}, "float32", "aten.add.Tensor", "output",
]  # fmt: skip


def mutated(draw: random.Random, data: bytes) -> bytes:
    """A few changes of the bytes."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(len(content) + 1)
        size = draw.choice((1, 2, 4, 8, 64, 512))
        match draw.randrange(8):
            case 0 if content:
                content[place % len(content)] ^= 1 << draw.randrange(8)
            case 1 if content:
                content[place % len(content)] = draw.randrange(256)
            case 2:
                del content[place : place + size]
            case 3:
                content[place:place] = content[draw.randrange(len(content) + 1) :][:size]
            case 4:
                token = draw.choice(TOKENS)
                content[place : place + len(token)] = token
            case 5:
                content[place:place] = draw.choice(TOKENS)
            case 6:
                content[place : place + size] = bytes(draw.randrange(256) for _ in range(size))
            case 7 if draw.random() < 0.3:
                del content[place:]
    return bytes(content)


def mutated_words(draw: random.Random, data: bytes) -> bytes:
    """Words and numbers of a text are others; sometimes its bytes."""
    if draw.random() < 0.3:
        return mutated(draw, data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        words = [one.span() for one in re.finditer(rb"[\w.+-]+", data)] or [(0, 0)]
        begin, end = draw.choice(words)
        other, other_end = draw.choice(words)
        wild = json.dumps(draw.choice(WILD)).strip('"').encode("utf-8", "surrogatepass")
        word = draw.choice((wild, data[other:other_end], draw.choice(TOKENS), b""))
        data = data[:begin] + word + data[end:]
    return data


def mutated_json(draw: random.Random, data: bytes) -> bytes:
    """A value, a key or an item of it is another; sometimes the text."""
    if draw.random() < 0.15:
        return mutated(draw, data)
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = _changed(draw, value)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _changed(draw: random.Random, value: Any) -> Any:
    """A place of the tree, drawn by going down, changed."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.randrange(12)
        if kind == 0:
            return {one: item for one, item in value.items() if one != key}
        if kind == 1:
            return {(str(draw.choice(WILD))[:40] if one == key else one): item for one, item in value.items()}
        if kind == 2:
            return {**value, str(draw.choice(WILD))[:40]: draw.choice(WILD)}
        return {**value, key: _changed(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        kind = draw.randrange(10)
        if kind == 0:
            return value[:place] + value[place + 1 :]
        if kind == 1:
            return value[:place] + [value[draw.randrange(len(value))]] + value[place:]
        return [*value[:place], _changed(draw, value[place]), *value[place + 1 :]]
    if isinstance(value, str) and draw.random() < 0.3:
        return mutated(draw, value.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    if isinstance(value, int) and draw.random() < 0.3:
        return value + draw.choice((-1, 1, 2**31, -(2**31)))
    return draw.choice(WILD)


def mutated_zip(draw: random.Random, data: bytes) -> bytes:
    """A member of the archive is changed, and it written anew, so that its sums hold; sometimes its bytes are."""
    if draw.random() < 0.2:
        return mutated(draw, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(one.filename, archive.read(one)) for one in archive.infolist()]
    chosen = draw.randrange(len(members))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for place, (name, content) in enumerate(members):
            if place == chosen and draw.random() < 0.05:
                continue
            if place == chosen:
                content = (mutated_json if name.endswith(".json") and content else mutated)(draw, content)
            archive.writestr(zipfile.ZipInfo(name), content)
    return written.getvalue()
