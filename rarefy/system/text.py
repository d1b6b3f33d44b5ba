"""Text of strangers (names of files, classes and layers, what a report says) as a terminal may be shown it.

A terminal obeys what it is sent: an escape sequence recolours, hides or retitles, a carriage return writes over a line,
and marks of direction turn words round. ``printable`` shows all that Unicode counts as no mark (controls, formats,
surrogates, private use) as its number.
"""

from __future__ import annotations

import re

MOST = 2_000  # characters of one line


def printable(text: object, keep: str = "\n") -> str:
    """``"a\\x1b[31m"`` -> ``"a\\\\x1b[31m"``. keep: characters that stay, of those that are no marks."""
    plain = str(text)
    return (
        plain
        if plain.isprintable()
        else "".join(one if one.isprintable() or one in keep else _number(one) for one in plain)
    )


def one_line(text: object) -> str:
    """``printable``, without line breaks, and no longer than a person reads: the middle is left out."""
    line = printable(" ".join(str(text).split()), "")
    return line if len(line) <= MOST else f"{line[: MOST // 2]} ... {line[-MOST // 2 :]}"


def in_json(text: str) -> str:
    """JSON that says the same, with numbers for what is no mark."""
    return re.sub(r"[^ -~\n]", lambda found: found[0] if found[0].isprintable() else _utf16(found[0]), text)


def _number(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def _utf16(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[place : place + 4]}" for place in range(0, len(units), 4))
