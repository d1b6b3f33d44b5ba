"""``npz:FILE``: arrays of images and labels in one file of NumPy, named as Keras, MedMNIST and others do.

``x_train``, ``y_train``, ``x_test``, ``y_test``; ``train_images``, ``train_labels``, ``val_images``, ``test_images``;
or ``images`` (``x``, ``data``) and ``labels`` (``y``, ``targets``), which are cut in two where both splits are asked
for. Pickled arrays are refused.
"""

from __future__ import annotations

import lzma
import os
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from rarefy.data.items import Split
from rarefy.data.shards import SPLITS
from rarefy.errors import DataError
from rarefy.system.files import plain
from rarefy.system.memory import afford

_IMAGES = ("images", "image", "x", "data", "imgs", "arr_0")
# What zipfile, zlib and NumPy raise of a damaged file: NumPy reads an array's header as words of Python.
_BROKEN = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, ValueError, TypeError, SyntaxError, tokenize.TokenError, OSError,
    EOFError, RuntimeError, MemoryError,
)  # fmt: skip
_LABELS = ("labels", "label", "y", "targets", "target", "arr_1")


def read(text: str, rest: str, split: Split) -> tuple[object, bool]:
    path = Path(os.path.expanduser(rest))
    if not path.is_file():
        raise DataError(f"{text}: {'is a folder' if path.is_dir() else 'no such file'}; give a file of np.savez")
    plain(path)
    try:
        with zipfile.ZipFile(path) as archive:
            afford(sum(one.file_size for one in archive.infolist()), text, "give a smaller file")
        with np.load(path, allow_pickle=False) as file:
            names = {name.lower(): name for name in file.files}
            parts = {one: _pair(names, words) for one, words in SPLITS.items()}
            divided = all(parts.values())
            found = parts[split] if divided else _pair(names, ()) or parts["train"] or parts["val"]
            if found is None:
                raise DataError(
                    f"{text}: holds {', '.join(file.files)[:200] or 'nothing'}, and none is called as images are; "
                    "write np.savez(FILE, x_train=..., y_train=..., x_test=..., y_test=...)"
                )
            images, labels = found
            for name in (images, labels):
                _check_array(path, name, text)
            return (file[images], file[labels] if labels else None), divided
    except _BROKEN as error:
        raise DataError(f"{text}: can't be read ({str(error)[:150]}); write it again by np.savez") from error


def _check_array(path: Path, name: str | None, text: str) -> None:
    """NumPy reads the whole of what does not begin as an array, and hands on its bytes. Raises DataError."""
    with zipfile.ZipFile(path) as archive:
        stored = {one.removesuffix(".npy"): one for one in archive.namelist()}
        if name is not None:
            with archive.open(stored[name]) as file:
                if file.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:
                    raise DataError(f"{text}: {name} is no array; write it again by np.savez")


def _pair(names: dict[str, str], words: tuple[str, ...]) -> tuple[str, str | None] | None:
    """The names of the images and the labels of a split of that word, or of none."""
    for word in words or ("",):
        images, labels = (
            next((names[form] for one in kind for form in _forms(one, word) if form in names), None)
            for kind in (_IMAGES, _LABELS)
        )
        if images is not None:
            return images, labels
    return None


def _forms(name: str, word: str) -> tuple[str, ...]:
    return (f"{name}_{word}", f"{word}_{name}", f"{name}{word}", f"{word}{name}") if word else (name,)
