"""Files and folders put in place whole, strangers' files opened, a folder's lock, and the user's cache.

``opened`` is how a file of somebody else's is read: a picture, weights, a recipe, a shard, a model. What is no plain
file (a named pipe, a device, a socket, a folder) is refused before it is opened, for a pipe waits for a writer and a
device
never ends; so is one larger than it may be. Links are followed: data folders are often made of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

from rarefy.errors import FormatError, InputError

JUST_NOW = 60.0  # seconds in which a folder may have been made and not yet locked


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str],
    *,
    durable: bool = False,
    folder: bool = False,
    check: Callable[[], None] | None = None,
) -> Iterator[Path]:
    """A name beside ``path``, for a file or a folder to write, which takes its place when all went well.

    Where the block, ``check`` or the writing raises, what is at ``path`` is as it was, and what was written is gone.

    path: a file or a folder, there or not; its parent must be there. The name beside it has its suffix.
    durable: what was written, and its new name, are on the disk when this ends, not in a cache of the system.
    folder: the name is made a folder at once. It is locked while this process writes it, and what processes that were
        killed left of the same target is removed.
    check: called last before the place is taken; what it raises keeps what is there.
    """
    target = Path(path)
    partial, previous = (
        target.with_name(f".{target.stem}.{secrets.token_hex(4)}.{word}{target.suffix}")
        for word in ("part", "previous")
    )
    lock = None
    try:
        if folder:
            _sweep(target)
            partial.mkdir()
            lock = _locked(partial)
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
        if lock is not None:
            os.close(lock)


def check_room(path: str | os.PathLike[str], count: int, what: str, way_out: str) -> None:
    """Asked before it is written. count: bytes, at ``path``, there or not. Raises InputError where fewer are free."""
    there = next((one for one in (Path(path), *Path(path).absolute().parents) if one.exists()), None)
    try:
        usage = shutil.disk_usage(there or os.curdir)
    except OSError:
        return
    if count > usage.free and usage.total:  # some file systems say 0 of everything
        raise InputError(f"{path}: {what} takes {_size(count)} of disk, {_size(usage.free)} are free; {way_out}")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _sweep(target: Path) -> None:
    """Remove what was written for the target by processes that live no more, or by none that can be asked."""
    with contextlib.suppress(OSError):
        left = re.compile(rf"\.{re.escape(target.stem)}\.[0-9a-f]{{8}}\.part{re.escape(target.suffix)}")
        for path in target.parent.iterdir():
            if not left.fullmatch(path.name) or path.is_symlink() or time.time() - path.stat().st_mtime < JUST_NOW:
                continue
            lock = _locked(path)
            if lock is not None:
                _remove(path)
                os.close(lock)


def _locked(path: Path) -> int | None:
    """A lock on the folder, which ends with the process at the latest; None where another has it, or there is none."""
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


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


# ----------------------------------------------------------------------------------------------------- strangers' files

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def opened(
    path: str | os.PathLike[str], most: int | None = None, *, kind: type[InputError] = FormatError, buffering: int = -1
) -> BufferedReader:
    """The file, open to be read: a plain one, of at most ``most`` bytes. Raises ``kind`` for any other; never waits."""
    descriptor = descriptor_of(path, most, kind=kind)
    return os.fdopen(descriptor, "rb", buffering)  # type: ignore[return-value]  # buffering is not 0


def descriptor_of(
    path: str | os.PathLike[str], most: int | None = None, *, kind: type[InputError] = FormatError
) -> int:
    """``opened`` as a file descriptor, which is the caller's to close."""
    descriptor = -1
    try:
        _check_plain(os.stat(path), path, most, kind)  # before it is opened: that alone may wait, or do something
        descriptor = os.open(path, _FLAGS)
        _check_plain(os.fstat(descriptor), path, most, kind)  # what was opened, should it be another by now
        return descriptor
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise kind(f"{os.fspath(path)!s}: can't be read ({why(error)}); give a file that can") from error
    except InputError:
        if descriptor >= 0:
            os.close(descriptor)
        raise


def plain(path: str | os.PathLike[str], most: int | None = None, *, kind: type[InputError] = FormatError) -> str:
    """The path, if ``opened`` would open it: for a library that opens by name. Raises ``kind``."""
    os.close(descriptor_of(path, most, kind=kind))
    return os.fspath(path)


def content(path: str | os.PathLike[str], most: int, *, kind: type[InputError] = FormatError) -> bytes:
    """All of a stranger's file, of at most ``most`` bytes. Raises ``kind``."""
    try:
        with opened(path, most, kind=kind) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise kind(f"{os.fspath(path)!s}: can't be read ({why(error)}); copy it again") from error
    if len(data) > most:  # it grew, or is one of the system's, which have no size
        raise kind(f"{os.fspath(path)!s}: is larger than {most:,} bytes; is it the right file?")
    return data


def why(error: Exception) -> str:
    """What the system says, without the name, which stands before it."""
    said = getattr(error, "strerror", None) or str(error)
    return f"{said}: raise the limit with `ulimit -n`" if getattr(error, "errno", None) in _TOO_MANY else str(said)


_TOO_MANY = (errno.EMFILE, errno.ENFILE)


def _check_plain(
    status: os.stat_result, path: str | os.PathLike[str], most: int | None, kind: type[InputError]
) -> None:
    if not stat.S_ISREG(status.st_mode):
        found = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise kind(f"{os.fspath(path)!s}: is {found}, not a plain file; give a file")
    if most is not None and status.st_size > most:
        raise kind(f"{os.fspath(path)!s}: has {status.st_size:,} bytes, {most:,} at most; is it the right file?")


def walk(root: str | os.PathLike[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` through links to folders too, but no folder twice, and never up: (folder, folders in it, files).

    A link to a folder above, or to one that was walked, would repeat what is there, or never end. Sorted by name.
    Raises InputError where there are more than ``MOST_FOLDERS``.
    """
    seen = {_place(os.stat(root))}
    above = os.path.realpath(root)
    for count, (folder, inner, names) in enumerate(os.walk(root, followlinks=True)):
        if count > MOST_FOLDERS:
            raise InputError(
                f"{os.fspath(root)!s}: has more than {MOST_FOLDERS:,} folders in it; give the one of the data"
            )
        kept = []
        for name in sorted(inner):
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):  # a link that leads nowhere
                place = _place(os.stat(path))
                upward = os.path.islink(path) and _is_above(os.path.realpath(path), above)
                if place not in seen and not upward:
                    seen.add(place)
                    kept.append(name)
        inner[:] = kept
        yield folder, inner, sorted(names)


MOST_FOLDERS = 1_000_000


def _place(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_above(one: str, other: str) -> bool:
    return os.path.commonpath([one, other]) == one


# ----------------------------------------------------------------------------------------------------------------- lock

LOCK = ".lock"
_held: dict[str, int] = {}  # lock file -> the thread of this process that holds it


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], way_out: str) -> Iterator[None]:
    """Nobody else works in the folder meanwhile, which is made where it is not there.

    The system drops the lock with the process, however it ends, so one that a dead process left is taken over. The same
    thread may ask again. Raises InputError, which says who holds it and since when, with ``way_out``.
    """
    new = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    file = os.path.join(os.path.realpath(folder), LOCK)
    if _held.get(file) == threading.get_ident():
        yield
        return
    descriptor = _taken(file, f"{os.fspath(folder)!s}", way_out)
    _held[file] = threading.get_ident()
    _descriptors.add(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file)
        if new:
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # nothing was done there
        del _held[file]
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _taken(file: str, folder: str, way_out: str) -> int:
    while True:
        if os.path.lexists(file) and not stat.S_ISREG(os.lstat(file).st_mode):
            raise InputError(f"{file}: is no file, and the lock of that folder should lie there; delete it")
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            if not _alone(descriptor):
                who = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "it has not said its name"
                raise InputError(f"{folder}: another run works there ({who}); {way_out}")
            with contextlib.suppress(FileNotFoundError):
                if _place(os.stat(file)) == _place(os.fstat(descriptor)):  # else who had it has just put it away
                    now = time.strftime("%Y-%m-%d %H:%M:%S")
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}, since {now}\n".encode(), 0)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _alone(descriptor: int) -> bool:
    """Is the lock ours now? Where the file system knows no locks, by the process that the file names."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        found = re.match(rb"process ([0-9]{1,9}) on (.*), since", os.pread(descriptor, 200, 0))
        if found is None or found[2] != platform.node().encode() or int(found[1]) == os.getpid():
            return True
        try:
            os.kill(int(found[1]), 0)
        except OSError:
            return True
        return False


_descriptors: set[int] = set()


def _forget() -> None:
    """A child that outlives its killed parent must not hold what the parent held."""
    for descriptor in _descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


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
