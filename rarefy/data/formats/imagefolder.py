"""``imagefolder:PATH``: one folder a class, sorted by name, images at any depth below.

A folder of images only is unlabelled. A folder that holds ``train`` and ``val`` (or ``validation``, ``valid``,
``test``) is entered at the right one.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rarefy.data.items import Items, Source, Split
from rarefy.data.shards import SPLITS
from rarefy.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def read(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    root = Path(rest).expanduser()
    if not root.is_dir():
        raise DataError(
            f"{text}: {'is a file, not a folder' if root.exists() else 'no such folder'}; "
            "give the folder that holds one folder a class"
        )
    divided = False
    folders = _folders(root)
    by_name = {folder.name: folder for folder in folders}
    if all(any(name in by_name for name in names) for names in SPLITS.values()):
        root = next(by_name[name] for name in SPLITS[split] if name in by_name)
        folders, divided = _folders(root), True
    if not folders:
        files = images_below(root)
        if not files:
            raise DataError(
                f"{text}: {root} has neither class folders nor images ({' '.join(EXTENSIONS)}); "
                "give the folder that holds one folder a class"
            )
        return Items(text, files, torch.arange(len(files)), None), divided
    pairs = [(file, label) for label, folder in enumerate(folders) for file in images_below(folder)]
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    counts = torch.bincount(labels, minlength=len(folders))
    if int(counts.min()) == 0:
        empty = [folder.name for folder, count in zip(folders, counts.tolist(), strict=True) if count == 0]
        raise DataError(
            f"{text}: no images ({' '.join(EXTENSIONS)}) in class folder {root / empty[0]} "
            f"({len(empty)} of {len(folders)} are empty); fill or delete it"
        )
    names = tuple(folder.name for folder in folders)
    return Items(text, [file for file, _ in pairs], torch.arange(len(pairs)), labels, names), divided


def _folders(root: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def images_below(root: Path) -> list[str]:
    """Paths of the images at any depth, sorted, as text (a million Path objects would not be small)."""
    return [
        os.path.join(folder, name)
        for folder, _, names in sorted(os.walk(root, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    ]
