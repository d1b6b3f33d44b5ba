"""Files and folders put in place whole, and the user's cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], *, durable: bool = False, check: Callable[[], None] | None = None
) -> Iterator[Path]:
    """A name beside ``path``, for a file or a folder to write, which takes its place when all went well.

    Where the block, ``check`` or the writing raises, what is at ``path`` is as it was, and what was written is gone.

    path: a file or a folder, there or not; its parent must be there. The name beside it has its suffix.
    durable: what was written, and its new name, are on the disk when this ends, not in a cache of the system.
    check: called last before the place is taken; what it raises keeps what is there.
    """
    target = Path(path)
    partial, previous = (
        target.with_name(f".{target.stem}.{secrets.token_hex(4)}.{word}{target.suffix}")
        for word in ("part", "previous")
    )
    try:
        yield partial
        if durable:
            _sync(partial)
        if check is not None:
            check()
        if partial.is_dir():
            _replace_folder(partial, target, previous)
        else:
            os.replace(partial, target)
        if durable:
            _sync_one(target.parent)
    finally:
        _remove(partial)
        if target.is_dir():
            _remove(previous)


def _replace_folder(partial: Path, target: Path, previous: Path) -> None:
    if target.is_dir() and _exchanged(partial, target):
        return
    try:
        if target.is_dir():
            target.rename(previous)
        partial.rename(target)
    except BaseException:
        if previous.exists() and not target.exists():
            previous.rename(target)
        raise


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that a kill always leaves one of them there; False where the system can't."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _sync(path: Path) -> None:
    """A file, or a folder after the files in it."""
    if path.is_dir():
        for file in path.iterdir():
            _sync(file)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle of a folder to sync
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------- cache


def cache_folder() -> Path:
    """``$RAREFY_CACHE``, else rarefy's place in the user's cache folder."""
    named, home = os.environ.get("RAREFY_CACHE"), Path.home()
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "rarefy"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "rarefy" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "rarefy"
