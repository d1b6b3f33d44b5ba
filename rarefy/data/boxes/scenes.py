"""Scenes: pictures and the boxes on each, as the formats read and write them: paths, and one table of numbers.

A row is a box, in the unit that its file has::

    left, top, right, bottom, class, ignored, area, width, height

ignored: 1 of a crowd, or of what is too difficult. area: as the file states it, NaN where it states none. width,
height: of the picture that the coordinates are of: pixels as the file states them, 1 and 1 of shares of the picture, 0
and 0 where nobody says and they are pixels of the picture as it is.

**What is wrong with annotations** is a ``Fault``, counted, with the first case by name: boxes that reach out of their
picture are cut at its edge, what has no area or no class is left out. A picture without boxes stays: nothing is to be
found there. Whether a fault is an error is for who reads the data to say (``strict``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rarefy.errors import DataError

LEFT, TOP, RIGHT, BOTTOM, CLASS, IGNORED, AREA, WIDTH, HEIGHT = range(9)
COLUMNS = 9
_SLACK = 2e-3  # of a side: that far out is rounding, and cut without a word


class Fault(NamedTuple):
    """What is wrong with the annotations, in a line. grave: an error, unless what is wrong may be left out."""

    text: str
    grave: bool = False


@dataclass
class Faults:
    """Counts them while a file is read, and keeps the first of each kind by name."""

    _found: dict[tuple[str, bool], tuple[int, str]] = field(default_factory=dict)

    def add(self, what: str, first: str, count: int = 1, *, grave: bool = False) -> None:
        """what: ``"boxes of no area, left out"``, after the number."""
        if count:
            before, known = self._found.get((what, grave), (0, first))
            self._found[what, grave] = (before + count, known)

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        return {what: count for (what, _), (count, _) in self._found.items()}

    def all(self) -> tuple[Fault, ...]:
        return tuple(
            Fault(f"{count:,} {what} (the first: {first})", grave)
            for (what, grave), (count, first) in sorted(self._found.items(), key=lambda one: not one[0][1])
        )


@dataclass(frozen=True, eq=False, repr=False)
class Scenes:
    """paths: of the pictures. rows: (boxes, 9) float32, those of a picture together, in the pictures' order.

    starts: (pictures + 1,) int64, where each picture's rows begin. names: of the classes.
    """

    paths: Sequence[str]
    rows: np.ndarray
    starts: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, np.ndarray]:
        """Path, and rows (m, 9)."""
        if not 0 <= index < len(self.paths):
            raise IndexError(index)
        return self.paths[index], self.rows[self.starts[index] : self.starts[index + 1]]

    def renamed(self, names: Sequence[str], where: object) -> Scenes:
        """The same boxes, their classes counted as in ``names``. Raises DataError for a box of none of them."""
        used = np.unique(self.rows[:, CLASS]).astype(np.int64).tolist()
        unknown = [self.names[one] for one in used if self.names[one] not in names]
        if unknown:
            raise DataError(
                f"{where}: boxes of class {unknown[0]!r} are in val, and the training data has no such class "
                f"({len(unknown)} such); both need the same names"
            )
        place = np.array([names.index(name) if name in names else 0 for name in self.names], np.float32)
        rows = self.rows.copy()
        rows[:, CLASS] = place[rows[:, CLASS].astype(np.int64)]
        return Scenes(self.paths, rows, self.starts, tuple(names))


def scenes(
    paths: Sequence[str], owners: Sequence[int] | np.ndarray, rows: np.ndarray, names: Sequence[str], faults: Faults
) -> Scenes:
    """Of boxes in any order, what is wrong with them mended and counted.

    owners: (boxes,), the index of each one's picture. rows: (boxes, 9).
    """
    rows = np.asarray(rows, np.float64).reshape(-1, COLUMNS)
    owners = np.asarray(owners, np.int64).reshape(-1)
    order = np.argsort(owners, kind="stable")
    rows, owners = rows[order], owners[order]
    rows, good = mended(rows, lambda wrong: os.path.basename(paths[owners[int(wrong.argmax())]]), faults)
    starts = np.searchsorted(owners[good], np.arange(len(paths) + 1))
    return Scenes(paths, rows[good].astype(np.float32), starts, tuple(names))


def mended(rows: np.ndarray, first: Callable[[np.ndarray], str], faults: Faults) -> tuple[np.ndarray, np.ndarray]:
    """Rows cut at the edges of pictures whose size is stated, and which of them are boxes.

    rows: (boxes, 9) float64, mended in place. first: of rows (boxes,) bool, the name of the first one's picture.
    """
    finite = np.isfinite(rows[:, : BOTTOM + 1]).all(1)
    if not finite.all():
        faults.add("boxes with NaN or infinity, left out", first(~finite), int((~finite).sum()))
    flat = finite & ~((rows[:, RIGHT] > rows[:, LEFT]) & (rows[:, BOTTOM] > rows[:, TOP]))
    if flat.any():
        faults.add("boxes of no area, left out", first(flat), int(flat.sum()))
    good = finite & ~flat
    sides = rows[:, [WIDTH, HEIGHT, WIDTH, HEIGHT]]
    stated = (sides > 0).all(1) & good
    limit = np.where(stated[:, None], sides, np.inf)
    cut = np.where(stated[:, None], rows[:, : BOTTOM + 1].clip(0, None), rows[:, : BOTTOM + 1])
    cut = np.minimum(cut, limit)
    beyond = stated & (np.abs(cut - rows[:, : BOTTOM + 1]) > np.maximum(_SLACK * limit, sides > 1)).any(1)
    gone = stated & ~((cut[:, RIGHT] > cut[:, LEFT]) & (cut[:, BOTTOM] > cut[:, TOP]))
    if gone.any():
        faults.add("boxes outside their picture, left out", first(gone), int(gone.sum()))
    if (beyond & ~gone).any():
        found = beyond & ~gone
        faults.add("boxes that reach out of their picture, cut at its edge", first(found), int(found.sum()))
    rows[stated, : BOTTOM + 1] = cut[stated]
    return rows, good & ~gone


def existing(paths: Iterable[str], faults: Faults) -> np.ndarray:
    """(paths,) bool: which are there. Each folder is listed once. What is not there is a grave fault."""
    listed: dict[str, set[str]] = {}
    there = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        there.append(name in listed[folder])
        if not there[-1]:
            faults.add("pictures are missing", path, grave=True)
    return np.array(there, bool)


def picture_below(root: Path, name: str, index: dict[str, list[str]]) -> str:
    """Where a picture lies that an annotation calls ``name``: never above ``root``, whatever the name says.

    index: file name -> paths below the root, filled at the first one that is not where its name says.
    """
    relative = Path(name.replace("\\", "/"))
    inside = not relative.is_absolute() and ".." not in relative.parts
    path = os.path.join(root, *relative.parts) if inside else os.path.join(root, relative.name)
    if os.path.exists(path):
        return path
    if not index:
        index[""] = []  # filled, if with nothing
        for folder, _, files in os.walk(root):
            for file in files:
                index.setdefault(file, []).append(os.path.join(folder, file))
    found = index.get(relative.name, [])
    return found[0] if len(found) == 1 else path
