"""release(): memory that was freed goes back to the system, which the C library puts off.

glibc keeps blocks below 32 MB for the next request, and where small ones lie between them they stay for good: half a gigabyte after a large network was cut
twice. Asked, it gives back whole pages (10 ms). Elsewhere than on glibc nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any


def release() -> None:
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], Any] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
