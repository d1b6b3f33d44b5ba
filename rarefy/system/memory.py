"""release(): memory that was freed goes back to the system, which the C library puts off.

glibc keeps blocks below 32 MB for the next request, and where small ones lie between them they stay for good: half a
gigabyte after a large network was cut twice. Asked, it gives back whole pages (10 ms). Elsewhere than on glibc nothing
happens.

``samples_at_once`` and ``available`` bound a batch before memory does: a batch of large images is run in parts.

``Level`` asks when the process holds more than ever after it asked, so that a run over many small tensors stays near
what it needs, and the less readily the more came back, so that one whose large tensors come and go does not map them
anew each time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable

from rarefy.errors import InputError

SLACK = 32 << 20  # bytes
HELD = 512 << 20  # bytes of activations that a run of a model may hold at once, where it can be run in parts


def release() -> None:
    trim = _trim()
    if trim is not None:
        trim(0)


def samples_at_once(bytes_each: int, most: int = HELD) -> int:
    """How many samples may be in memory together, each of which takes so many bytes; at least one."""
    return max(1, most // max(1, bytes_each))


def available() -> int | None:
    """Bytes that can be had without swapping, by system, control group and the process's limit; None: none says."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo", encoding="ascii") as file:
            found.append(1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as most,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as held,
        ):
            found.append(max(0, int(most.read()) - int(held.read())))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            with open("/proc/self/statm", "rb") as pages:
                found.append(max(0, limit - int(pages.read().split()[0]) * _PAGE))
    return min(found) if found else None


def afford(count: int, what: str, way_out: str) -> None:
    """Asked before it is taken. count: bytes. Raises InputError where there are not as many free."""
    free = available()
    if free is not None and count > free:
        raise InputError(f"{what}: takes {count / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; {way_out}")


class Level:
    """The most memory (bytes) held after giving back, so far; slack: how much more is let be.

    What is given back has to be mapped anew: it adds an 8th.
    """

    def __init__(self) -> None:
        self.bytes, self.slack = _resident(), SLACK

    def hold(self) -> None:
        """Give back what was freed, if much more is held now."""
        held = _resident()
        if held > self.bytes + self.slack:
            release()
            left = _resident()
            self.bytes, self.slack = max(self.bytes, left), self.slack + max(0, held - left) // 8


def _resident() -> int:
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read().split()[1]) * _PAGE


_PAGE = os.sysconf("SC_PAGE_SIZE") if sys.platform.startswith("linux") else 0


@functools.cache
def _trim() -> Callable[[int], object] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
