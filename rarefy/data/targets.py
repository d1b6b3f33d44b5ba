"""Targets: what a data set says of each image, as the task wants it: class indices (0, 1, ...), or numbers.

Rows of 0 and 1, of which several are 1 or none is, are labels that are true at once, one a column.

Shards, Parquet files and class folders hold class indices. Arrays and datasets hold what their author put there, and
are read by what is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rarefy.errors import DataError, first_line

MOST_CLASSES = 2**20  # each takes a place where they are counted
Target = int | np.ndarray  # of one image


class Targets(Protocol):
    """How what a data set yields beside the images is read."""

    def settled(self, items: object) -> Targets:
        """The same, that knows what ``items`` (a dataset) says of itself."""
        return self

    def of_all(self, given: object, count: int, where: str) -> Tensor:
        """(N, ...), one an image. Raises DataError for what are no such targets."""
        ...

    def of_one(self, given: object, where: str) -> Target:
        """That of a single image; where: which."""
        ...

    def check(self, targets: Tensor, where: str, *, whole: bool = False) -> None:
        """Raises DataError where one is out of range. whole: are these the targets of all images, in order?"""
        ...


@dataclass(frozen=True)
class ClassIndices(Targets):
    """Whole numbers from 0, or rows of 0 and 1; class_count: how many classes there are, where that is known."""

    class_count: int | None = None

    def of_all(self, given: object, count: int, where: str) -> Tensor:
        try:
            labels = as_tensor(given)
        except (TypeError, ValueError) as error:
            why = first_line(error, None)
            raise DataError(
                f"{where}: labels can't be read ({why}); pass class indices (0, 1, ...), one an image"
            ) from error
        if labels.dim() == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        if labels.dim() == 2 and _several(labels):
            _one_an_image(labels, count, where)
            return labels.float()
        if labels.dim() != 1:
            shape = tuple(labels.shape)
            raise DataError(f"{where}: labels have shape {shape}; pass class indices (N,) (one-hot: labels.argmax(1))")
        _one_an_image(labels, count, where)
        whole = labels.to(torch.int64)  # 2^63 and more become negative
        unsigned = labels.dtype in (torch.uint16, torch.uint32, torch.uint64)  # which torch does not compare
        wrong = (whole < 0) if unsigned else (whole != labels) | (whole < 0)
        if bool(wrong.any()):
            first = int(wrong.int().argmax())
            raise DataError(
                f"{where}: label {labels[first].item()} of image {first} is not a class index (0, 1, ...); "
                f"{int(wrong.sum())} of {count} are not"
            )
        return whole

    def of_one(self, given: object, where: str) -> Target:
        array = np.asarray(given)
        if array.ndim == 1 and array.size > 1 and bool(np.isin(array, (0, 1)).all()):
            return array.astype(np.float32)
        if array.size != 1:
            raise DataError(
                f"{where}: its label has shape {array.shape}; labels are class indices (one-hot: pass labels.argmax(1))"
            )
        try:
            value = int(array.reshape(()).item())
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where}: its label {given!r} is not a class index (0, 1, ...); number the classes, or keep the words "
                "of all items in an attribute `targets` of the data set"
            ) from error
        if value < 0 or value != array.reshape(()).item():
            raise DataError(f"{where}: its label {value} is not a class index (0, 1, ...)")
        return value

    def check(self, targets: Tensor, where: str, *, whole: bool = False) -> None:
        if targets.dim() == 2:
            if self.class_count not in (None, targets.shape[1]):
                raise DataError(f"{where}: rows of {targets.shape[1]} labels, class_count={self.class_count}")
            return
        most = MOST_CLASSES if self.class_count is None else self.class_count
        if not len(targets) or int(targets.max()) < most:
            return
        which = f" of image {int(targets.argmax())}" if whole else ""
        raise DataError(
            f"{where}: label {int(targets.max())}{which} is out of range for "
            + (f"{most:,} classes, the most there may be" if self.class_count is None else f"class_count={most}")
        )


@dataclass(frozen=True)
class Numbers(Targets):
    """Finite numbers, one or several an image, as float32; 0 and 1 where several things may be true at once."""

    def of_all(self, given: object, count: int, where: str) -> Tensor:
        try:
            numbers = as_tensor(given)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: targets can't be read ({first_line(error, None)}); pass numbers") from error
        _one_an_image(numbers, count, where)
        self.check(numbers, where)
        return numbers.float()

    def of_one(self, given: object, where: str) -> np.ndarray:
        try:
            numbers = np.asarray(given, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: its target {given!r} is no number") from error
        self.check(torch.from_numpy(numbers), where)
        return numbers

    def check(self, targets: Tensor, where: str, *, whole: bool = False) -> None:
        if not bool(torch.isfinite(targets).all()):
            raise DataError(f"{where}: a target is NaN or infinity; leave its image out")


def in_words(given: object) -> tuple[list[int], tuple[str, ...] | None] | None:
    """Labels in words as class indices, and the words in order, as those of folders are; None of any other labels.

    Words that are numbers throughout ("0", "1", ...) are these numbers.
    """
    words = given.tolist() if isinstance(given, np.ndarray) and given.dtype.kind in "UO" else given
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        return None
    if all(word.isascii() and word.isdecimal() and str(int(word)) == word for word in set(words)):
        return list(map(int, words)), None
    place = {word: index for index, word in enumerate(sorted(set(words)))}
    return [place[word] for word in words], tuple(place)


def as_tensor(given: object) -> Tensor:
    """On the CPU, sharing memory where it can; of arrays in the other order of bytes, which files may hold, and of
    turned ones (``x[::-1]``), a copy."""
    if isinstance(given, list | tuple):
        given = np.asarray(given)
    if isinstance(given, np.ndarray) and not given.dtype.isnative:
        given = given.astype(given.dtype.newbyteorder("="))
    if isinstance(given, np.ndarray) and min(given.strides, default=0) < 0:
        given = np.ascontiguousarray(given)
    return torch.as_tensor(given).detach().cpu()


def _several(labels: Tensor) -> bool:
    """Are these rows of 0 and 1, other than one-hot?"""
    good = not labels.is_complex() and bool(((labels == 0) | (labels == 1)).all())
    return good and not bool((labels.float().sum(1) == 1).all())


def _one_an_image(targets: Tensor, count: int, where: str) -> None:
    if targets.dim() == 0 or len(targets) != count:
        given = len(targets) if targets.dim() else 1
        raise DataError(f"{where}: {count} images but {given} labels; pass one label an image")
