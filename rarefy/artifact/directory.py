"""A stranger's folder, held open: its files are regular ones, read through handles that stay when names change.

A name may lead elsewhere, wait or never end: a link out of the folder, a pipe, a device, a file that grows. A file is
opened once, without waiting; what is no regular file is refused before a byte is read, and what is larger than it may
be before memory is taken. A folder is held the same way: the names looked up in a ``Directory`` are those of the folder
that was opened, also while another one takes its place.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Self

from rarefy.errors import FormatError

_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOCTTY"))
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def read_at_most(file: BufferedReader, most: int, where: Path) -> bytes:
    """The rest of an opened file. Raises FormatError where it grew beyond ``most``."""
    data = file.read(most + 1)
    if len(data) > most:
        raise FormatError(f"{where}: is larger than {most} bytes [file-size]")
    return data


class Directory:
    """A folder held open. Its entries are opened without following links. Raises FormatError where there is none."""

    def __init__(self, path: str | os.PathLike[str], within: Directory | None = None) -> None:
        self.path: Path = Path(path) if within is None else within.path / path
        self._descriptor: int | None = None
        if os.open in os.supports_dir_fd:
            parent = None if within is None else within._descriptor
            flags = _FLAGS | os.O_DIRECTORY | (_NO_LINK if within is not None else 0)
            self._descriptor = _opened(path, flags, parent, self.path)
        elif not self.path.is_dir():
            raise FormatError(f"{self.path}: no such folder")

    def names(self, most: int) -> list[str]:
        """Names of its entries, sorted. Raises FormatError for more than ``most``."""
        found: list[str] = []
        with os.scandir(self.path if self._descriptor is None else self._descriptor) as entries:
            for entry in entries:
                found.append(entry.name)
                if len(found) > most:
                    raise FormatError(f"{self.path}: holds more than {most} files [folder-size]")
        return sorted(found)

    def kind(self, name: str) -> str:
        """``file``, ``folder``, ``symbolic link`` or ``device or pipe``."""
        where = self.path / name if self._descriptor is None else name
        mode = os.stat(where, dir_fd=self._descriptor, follow_symlinks=False).st_mode
        kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "symbolic link"}
        return kinds.get(stat.S_IFMT(mode), "device or pipe")

    def open(self, name: str, *, most: int | None = None) -> BufferedReader:
        """A regular file of the folder, not through a link. Raises FormatError."""
        path = self.path / name
        where = path if self._descriptor is None else name
        return _checked(_opened(where, _FLAGS | _NO_LINK, self._descriptor, path), path, most)

    def folder(self, name: str) -> Directory:
        """A folder in it, not through a link. Raises FormatError."""
        return Directory(name, self)

    def was_replaced(self) -> bool:
        """Is another folder, or none, at its path by now?"""
        if self._descriptor is None:
            return False
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            return True

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _opened(name: str | os.PathLike[str], flags: int, parent: int | None, path: Path) -> int:
    try:
        return os.open(name, flags, dir_fd=parent)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError):
            why = "is no name of a file [file-kind]"
        elif error.errno in (errno.ELOOP, errno.EMLINK) or (path.is_symlink() and parent is not None):
            why = "is a symbolic link; copy the file itself [file-kind]"
        elif error.errno in (errno.ENXIO, errno.EOPNOTSUPP):
            why = "is not a file [file-kind]"
        else:
            why = f"can't be read ({error.strerror}) [file-missing]"
        raise FormatError(f"{path}: {why}") from error


def _checked(descriptor: int, path: Path, most: int | None) -> BufferedReader:
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(f"{path}: is not a file [file-kind]")
        if most is not None and found.st_size > most:
            raise FormatError(f"{path}: is larger than {most} bytes [file-size]")
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")
