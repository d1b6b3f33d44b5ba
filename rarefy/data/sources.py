"""Where images come from: text, arrays or a dataset become ``Arrays`` or ``Items`` (``items.py``).

=================================  ==============================================================================
``FORM:...``                       a file of ``formats/`` reads it: ``imagefolder:PATH``, ``images:PATH``,
                                   ``tar:PATH``, ``parquet:PATH``, ``torchvision:NAME?root=PATH``,
                                   ``csv:FILE``, ``npz:FILE``, ``sklearn:digits``, and with boxes
                                   ``coco:IMAGES?annotations=FILE``,
                                   ``yolo:data.yaml``, ``voc:FOLDER``; each says there what it takes
``package.module:function``        a function without arguments, or with ``split`` ("train" or "val"), that returns
                                   any of:
(images, labels)                   arrays or tensors, (N, C, H, W), (N, H, W, C) or (N, H, W), uint8 or float in
                                   [0, 1]; labels are class indices, or words
{"train": ..., "test": ...}        any of these for each split; or a pair of them
a map-style dataset, or a          items are (image, label), {"image": ..., "label": ...} or image; an image is a
DataLoader of one                  path, a PIL image, an (H, W[, C]) array or a (C, H, W) tensor
=================================  ==============================================================================

A text source that knows no splits and is named for both ``train`` and ``val`` is cut in two: a fifth of each class,
chosen by a fixed seed, is for validation (``sklearn:digits`` always is). Arrays stay as they are (uint8 stays uint8,
nothing is copied); items are decoded when asked for. A folder of shards is divided by its files' names, if they begin
with ``train`` and ``val`` (or a word like it). Hidden files and folders are passed over, which torchvision's
ImageFolder does not.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
from collections.abc import Callable

import torch

from rarefy.data import formats
from rarefy.data.boxes.scenes import Scenes
from rarefy.data.boxes.targets import BoxTargets
from rarefy.data.items import FORMS, Arrays, Items, Source, Split, from_object, held_out
from rarefy.data.targets import ClassIndices, Targets
from rarefy.errors import DataError

_FILES = {".csv": "csv", ".npz": "npz", ".parquet": "parquet", ".tar": "tar", ".yaml": "yolo", ".yml": "yolo"}

Read = Callable[[str, str, Split], tuple[object, bool]]


def load(given: object, split: Split, *, shared: bool = False, targets: Targets | None = None) -> Source:
    """The source for what the user gave.

    shared: the same text was given for both splits. targets: how labels are read; None: as class indices.
    Raises DataError for what is missing, empty or of a kind that can't be read, MissingDependency for a library.
    """
    targets = targets if targets is not None else ClassIndices()
    where = given if isinstance(given, str) else split
    data, divided = given, True
    if isinstance(given, str):
        form, colon, rest = given.partition(":")
        if not colon or not rest:
            raise DataError(f"{given!r}: not a data source; {_meant(given) or FORMS}")
        data, divided = _reader(form)(given, rest, split)
    source = data if isinstance(data, Arrays | Items) else from_object(data, where, targets)
    if len(source) == 0:
        raise DataError(f"{where}: has no images; {FORMS}")
    if isinstance(source, Items):
        if isinstance(source.items, Scenes) and not isinstance(targets, BoxTargets):
            raise DataError(f"{where}: holds boxes, which is for --task detection (Detection); {FORMS}")
        source = dataclasses.replace(source, targets=targets.settled(source.items))
    if isinstance(targets, ClassIndices) and source.labels is not None:
        targets.check(source.labels, where, whole=True)  # before they are counted
    return source if divided or not shared else _part(source, split)


def _part(source: Source, split: Split) -> Source:
    """The split's part of a source that knows none."""
    part = source.take(held_out(source.labels, len(source), split))
    if len(part) == 0:
        raise DataError(
            f"{source.where}: no class has two images of which one could be held out for validation; "
            "pass --train and --val (train=, val=), or more images"
        )
    if isinstance(part, Items) and source.names is not None and source.labels is not None:
        counts = torch.bincount(source.labels, minlength=len(source.names)).tolist()
        names = [*source.names, *map(str, range(len(source.names), len(counts)))]  # a file may name too few
        alone = [name for name, count in zip(names, counts, strict=True) if count == 1]
        if alone:
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            note = f"{', '.join(alone[:3])}{more}: one image each, which is for training; judged on none of these"
            part = dataclasses.replace(part, notes=(*part.notes, note))
    return part


def _reader(form: str) -> Read:
    if form not in {module.name for module in pkgutil.iter_modules(formats.__path__)}:
        form = "function"
    read: Read = importlib.import_module(f"{formats.__name__}.{form}").read
    return read


def _meant(path: str) -> str | None:
    """The source that a path without its form names."""
    if os.path.isdir(path):
        return f"for a folder that holds one folder a class give imagefolder:{path}"
    form = _FILES.get(os.path.splitext(path)[1].lower()) if os.path.isfile(path) else None
    return f"give {form}:{path}" if form else None
