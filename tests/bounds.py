"""Bounds of what a piece of a test may take."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

GUARD = 8 * 2**30


def _status(name: str) -> int:
    """bytes: an entry of the process' status."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


@contextlib.contextmanager
def bounded(memory: int, seconds: float) -> Iterator[None]:
    """At most ``memory`` bytes resident beyond what is now, and ``seconds`` on the processor.

    Measured, and not forced by a limit of addresses of that size: threads of native libraries that can't grow their
    stacks or heaps end the process by a signal. The limit there is keeps a bomb from taking the machine.
    """
    gc.freeze()  # what other tests left is not gone through again and again
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + GUARD, limits[1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    resident, begin = _status("VmRSS"), time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        gc.unfreeze()
    grown, took = _status("VmHWM") - resident, time.process_time() - begin
    assert grown < memory, f"{grown / 2**20:.0f} MB more than before"
    assert took < seconds, f"{took:.1f} s on the processor"


def ended(child: int, seconds: float) -> tuple[int, resource.struct_rusage]:
    """(exit code, negative of a signal; what it used) of a forked process, which is killed after so long by the clock.

    A fork copies one thread alone: a lock that another held, of a native library, is never released in the child.
    """
    end = time.monotonic() + seconds
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), used
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            end = math.inf
        time.sleep(0.005)
