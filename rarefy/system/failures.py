"""What the machine refuses, as a sentence with the way out: no room, memory, files or processes, or a child lost.

Libraries tell it in words of their own (an ``OSError``, a ``RuntimeError`` of torch, an exception of C++), so
it is known by its number where it has one, and else by those words, wherever it stands among the causes.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import NamedTuple


class Refusal(NamedTuple):
    """kind: "disk", "memory", "files", "processes" or "child". what: in words, with how much, where that is known."""

    kind: str
    what: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.what}; {self.way_out}"


# kind, numbers of the system's errors, words of libraries, what to say, and the way out
_ROWS: tuple[tuple[str, set[int], str, str, str], ...] = (
    (
        "disk",
        {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)},
        r"No space left on device|File too large|os error 2[78]\)|PytorchStreamWriter failed writing",
        "the disk is full, or a file may not grow further; what was there before is unchanged",
        "make room",
    ),
    (
        "memory",
        {errno.ENOMEM},
        r"can't allocate memory|[Cc]annot allocate memory|bad_alloc|bad allocation|[Ff]ailed to allocate|"
        r"[Oo]ut of memory|not enough memory|[Uu]nable to (?:allocate|mmap)|failed to map segment",
        "out of memory",
        "end other programs, or take a smaller model",
    ),
    (
        "files",
        {errno.EMFILE, errno.ENFILE},
        r"Too many open files|items of ancdata",
        "too many files are open",
        "raise the limit with `ulimit -n 4096`, or pass fewer workers",
    ),
    (
        "processes",
        {errno.EAGAIN},
        r"can't start new thread|Resource temporarily unavailable",
        "no further process or thread may be started",
        "raise the limit (`ulimit -u`), set OMP_NUM_THREADS=1, or pass fewer workers",
    ),
    (
        "child",
        set(),
        r"killed by signal|exited unexpectedly|terminated abruptly",
        "a process of this run was killed, perhaps for want of memory",
        "end other programs, or pass fewer workers",
    ),
)


def refusal(error: BaseException | None) -> Refusal | None:
    """What the machine refused, somewhere in the chain of causes; None where it is nothing of that kind."""
    for cause in causes(error):
        if isinstance(cause, OSError) and not isinstance(cause, BlockingIOError) and cause.errno is not None:
            row = next((row for row in _ROWS if cause.errno in row[1]), None)
            if row is None:
                continue
        elif isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            row = _ROWS[1]
        else:
            row = next((row for row in _ROWS if re.search(row[2], str(cause))), None)
        if row is not None:
            kind, _, _, what, way_out = row
            return Refusal(kind, what + (_amount(cause) if kind == "memory" else ""), way_out)
    return None


def _amount(error: BaseException) -> str:
    """``, 40 GB were asked for at once``, where the library says how much."""
    found = re.search(r"allocate ([0-9.]+) ?(bytes|[KMGTPE]i?B)?", str(error))
    if found is None:
        return ""
    unit = found[2] or "bytes"
    size = f"{float(found[1]) / 1e9:.1f} GB" if unit == "bytes" else f"{found[1]} {unit}"
    return f", {size} were asked for at once"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from or while handling."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
