"""What the machine refuses, in any library's words, is one of five kinds, with how much and the way out."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from rarefy.system.failures import refusal

KINDS: dict[str, list[BaseException]] = {
    "memory": [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000000000 bytes."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("Failed to allocate memory for requested buffer of size 99"),
        ImportError("libx.so: failed to map segment from shared object"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        type("OutOfMemoryError", (RuntimeError,), {})("no room"),
    ],
    "disk": [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("PytorchStreamWriter failed writing file data/0"),
        ValueError("I/O error: No space left on device (os error 28)"),
    ],
    "files": [OSError(errno.EMFILE, "Too many open files", "x"), RuntimeError("received 0 items of ancdata")],
    "processes": [RuntimeError("can't start new thread"), OSError(errno.EAGAIN, "x").with_traceback(None)],
    "child": [RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_is_known_wherever_it_stands(kind: str) -> None:
    for error in KINDS[kind]:
        if isinstance(error, BlockingIOError):
            continue  # of a lock or a socket: no limit of the machine's
        found = refusal(error)
        assert found is not None and found.kind == kind, error
        assert "\n" not in str(found) and "; " in str(found)
        outer = RuntimeError("something else")
        outer.__cause__ = error
        inner = refusal(outer)
        assert inner is not None and inner.kind == kind


def test_what_is_none_of_them() -> None:
    assert refusal(None) is None
    for error in (ValueError("x"), FileNotFoundError(2, "No such file", "out of memory.txt"), KeyError("disk")):
        assert refusal(error) is None


def test_how_much_was_asked_for_is_told() -> None:
    for make, words in ((lambda: torch.empty(10**13), "40000.0 GB"), (lambda: np.empty(10**14, np.int64), "728. TiB")):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            make()
        assert words in str(refusal(raised.value))
