"""``imagefolder:PATH``: one folder a class, sorted by name, images at any depth below.

A folder of images only is unlabelled. What people call the folders above the classes is no class:

=================================  ==================================================================================
``Train/``, ``test_set/``          of the split asked for, in any case and with ``_set``, ``data`` and the like behind
                                   it (or the same word before both, ``seg_train/``); ``val`` goes before ``test``
``images/train/``, ``PetImages/``  entered, where it is the only folder with images
``train/`` alone                   entered; given for both splits, a fifth of each class is held out, as always
``cats/train/``, ``dogs/train/``   the split's folders in every class
=================================  ==================================================================================

Hidden files and folders, and what other systems leave in folders (``__MACOSX``), are passed over.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from rarefy.data.items import Items, Source, Split
from rarefy.errors import DataError
from rarefy.system.files import walk

EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".npy",
)  # fmt: skip
# Pictures of other forms: told where they are left out.
_OTHERS = (
    ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".tga", ".ico", ".exr", ".hdr", ".pcx", ".eps",
    ".dng", ".cr2", ".nef", ".arw", ".raw", ".dcm", ".nii", ".mat", ".npz", ".pt",
)  # fmt: skip
_JUNK = {"__MACOSX", "@eaDir", "__pycache__", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
# What a split's folder is called; of several the first is taken.
_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "validate", "dev", "eval", "evaluation", "test", "testing"),
}
_BEHIND = r"(?:[ _.-]?(?:set|data|dataset|images?|imgs?|split|folder|dir|files))?"
_MOST_ENTERED = 4  # folders in folders, above those of the classes


def read(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    given = Path(os.path.expanduser(rest))
    if not given.is_dir():
        raise DataError(
            f"{text}: {'is a file, not a folder' if given.exists() else 'no such folder'}; "
            "give the folder that holds one folder a class"
        )
    root, divided = _entered(given, split)
    notes = () if root == given else (f"{split}: the folder {root}",)
    folders = _folders(root)
    if not folders:
        files = images_below(root)
        if not files:
            raise DataError(
                f"{text}: {root} has neither class folders nor images ({' '.join(EXTENSIONS)}); "
                "give the folder that holds one folder a class"
            )
        return Items(text, files, torch.arange(len(files)), None, notes=notes), divided
    places = folders
    inside = [_splits(folder) for folder in folders]
    if not divided and len(folders) > 1 and all(len(found) == 2 for found in inside):
        places, divided = [found[split] for found in inside], True
    if len(folders) == 1:
        notes = (*notes, _alone(text, folders[0]))
    others: Counter[str] = Counter()
    pairs = [(file, label) for label, place in enumerate(places) for file in images_below(place, others)]
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    counts = torch.bincount(labels, minlength=len(folders))
    if int(counts.min()) == 0:
        empty = [place for place, count in zip(places, counts.tolist(), strict=True) if count == 0]
        raise DataError(
            f"{text}: no images ({' '.join(EXTENSIONS)}) in class folder {empty[0]} "
            f"({len(empty)} of {len(folders)} are empty); {_way_out(empty[0])}"
        )
    if others:
        kinds = ", ".join(sorted(others))
        notes = (*notes, f"{split}: {others.total()} files of forms that are not read ({kinds}) are left out")
    names = tuple(folder.name for folder in folders)
    return Items(text, [file for file, _ in pairs], torch.arange(len(pairs)), labels, names, notes=notes), divided


def _entered(root: Path, split: Split) -> tuple[Path, bool]:
    """The folder that holds those of the classes; and: is it the asked split's own?"""
    best, divided = root, False
    for _ in range(_MOST_ENTERED):
        found = _splits(root)
        if len(found) == 2 and not divided:
            best = root = found[split]
            divided = True
            continue
        filled = [folder for folder in _folders(root) if next(_images(folder), None) is not None]
        called = [folder for folder in filled if _split_of(folder.name) is not None]
        if len(filled) > 1:
            best = root
            filled = list(found.values()) if len(called) == len(filled) else []  # a class may be called train, too
        if len(filled) != 1 or any(_is_image(entry.name) for entry in os.scandir(root)):
            break
        root = filled[0]
        best = root if called else best
    return best, divided


def _splits(root: Path) -> dict[Split, Path]:
    """The folders in ``root`` that are called a split; both, or one alone.

    A folder to judge on that has no classes, where the one to train on has some, is a contest's: it does not count.
    """
    called = [(*role, folder) for folder in _folders(root) if (role := _split_of(folder.name)) is not None]
    groups = sorted({before for before, _, _, _ in called})
    lone: dict[Split, Path] = {}
    for group in groups:
        found: dict[Split, Path] = {}
        for before, split, _, folder in sorted(called, key=lambda one: one[2]):
            contest = split == "val" and "train" in found and _folders(found["train"]) and not _folders(folder)
            if before == group and not contest:
                found.setdefault(split, folder)
        if len(found) == 2:
            return found
        lone = lone or (found if not group else {})
    return lone


def _split_of(name: str) -> tuple[str, Split, int] | None:
    """``seg_train`` -> what stands before the word, the split, and the word's place among all of them."""
    words = [(split, word) for split, words in _WORDS.items() for word in words]
    for place, (split, word) in enumerate(words):
        match = re.fullmatch(rf"(|\w+[_-]){word}{_BEHIND}", name, re.IGNORECASE)
        if match is not None:
            return match[1].lower(), split, place
    return None


def _folders(root: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir() and not _is_junk(entry.name))


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name in _JUNK


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _images(root: Path, others: Counter[str] | None = None) -> Iterator[str]:
    """Paths of the images at any depth, folder by folder. others: endings of pictures that are none to us, counted."""
    for folder, inner, names in walk(root):
        inner[:] = [name for name in inner if not _is_junk(name)]
        if others is not None:
            ends = (os.path.splitext(name)[1].lower() for name in names if not name.startswith("."))
            others.update(end for end in ends if end in _OTHERS)
        yield from (os.path.join(folder, name) for name in names if _is_image(name))


def images_below(root: Path, others: Counter[str] | None = None) -> list[str]:
    """Paths of the images at any depth, sorted, as text (a million Path objects would not be small)."""
    return sorted(_images(root, others), key=os.path.split)


def _alone(text: str, folder: Path) -> str:
    """What is told of one class, which leaves nothing to tell apart. Raises DataError where its labels lie beside."""
    table = next((one for one in sorted(folder.parent.glob("*.csv"))), None)
    if table is not None:
        raise DataError(
            f"{text}: {folder} is the only folder of images, and their labels may be in {table}; give csv:{table}, or "
            f"images:{folder} without labels"
        )
    return f"only one class, {folder.name}: give the folder above the classes, or images:{folder} for none"


def _way_out(folder: Path) -> str:
    """Of a class folder without images."""
    ends = Counter(os.path.splitext(name)[1].lower() for _, _, names in walk(folder) for name in names)
    for end, form in ((".parquet", "parquet"), (".tar", "tar")):
        if end in ends:
            return f"it holds {end} files: give {form}:{folder}"
    if set(ends) == {""}:
        return "its files have no ending: add that of their form (.jpg, .png)"
    held = [f"{count} of {end or 'no ending'}" for end, count in sorted(ends.items())]
    return f"it holds {', '.join(held[:4])}: save them as .png, or delete it" if held else "fill or delete it"
