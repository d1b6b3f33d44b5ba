"""``images:PATH``: all images below a folder, unlabelled, whatever its folders are called."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rarefy.data.formats.imagefolder import EXTENSIONS, images_below
from rarefy.data.items import Items, Source, Split
from rarefy.errors import DataError


def read(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    root = Path(os.path.expanduser(rest))
    if not root.is_dir():
        kind = "is a file, not a folder" if root.exists() else "no such folder"
        raise DataError(f"{text}: {kind}; give a folder of images")
    files = images_below(root)
    if not files:
        raise DataError(f"{text}: {root} has no images ({' '.join(EXTENSIONS)}); give a folder of images")
    return Items(text, files, torch.arange(len(files)), None), False
