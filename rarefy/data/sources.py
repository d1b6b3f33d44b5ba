"""Where images come from: text, arrays or a dataset become ``Arrays`` or ``Items`` (``items.py``).

=================================  ==============================================================================
``FORM:...``                       a file of ``formats/`` reads it: ``imagefolder:PATH``, ``images:PATH``,
                                   ``tar:PATH``, ``parquet:PATH``, ``torchvision:NAME?root=PATH``,
                                   ``csv:FILE``, ``npz:FILE``, ``sklearn:digits``, and with boxes ``coco:IMAGES?annotations=FILE``,
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
import inspect
import os
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rarefy.data import formats
from rarefy.data.boxes.scenes import Scenes
from rarefy.data.boxes.targets import BoxTargets
from rarefy.data.items import FORMS, Arrays, Items, Source, Split, from_object, held_out
from rarefy.data.shards import SPLITS
from rarefy.data.targets import ClassIndices, Targets
from rarefy.errors import DataError, first_line
from rarefy.system.dependencies import own_module

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
        return _function
    read: Read = importlib.import_module(f"{formats.__name__}.{form}").read
    return read


def _meant(path: str) -> str | None:
    """The source that a path without its form names."""
    if os.path.isdir(path):
        return f"for a folder that holds one folder a class give imagefolder:{path}"
    form = _FILES.get(os.path.splitext(path)[1].lower()) if os.path.isfile(path) else None
    return f"give {form}:{path}" if form else None


def _of_split(returned: Any, split: Split) -> object | None:
    """The split's part of what a function returns for all: {"train": ..., "test": ...}, or a pair of data sets."""
    if isinstance(returned, Mapping):
        called = {one: next((word for word in words if word in returned), None) for one, words in SPLITS.items()}
        part: object = returned[called[split]] if all(called.values()) else None
        return part
    if isinstance(returned, tuple) and len(returned) == 2 and all(map(_is_whole, returned)):
        return returned[int(split == "val")]  # type: ignore[no-any-return]
    return None


def _is_whole(part: object) -> bool:
    """Is it a data set, rather than an image, labels or (image, label)?"""
    if isinstance(part, tuple):
        many = len(part) == 2 and all(getattr(one, "shape", ()) for one in part)
        return many and len(part[0].shape) > 2 and len(part[0]) == len(part[1])
    if isinstance(part, str | bytes | list | dict | np.ndarray | Tensor):
        return False
    return isinstance(part, DataLoader) or (hasattr(part, "__getitem__") and hasattr(part, "__len__"))


def _function(text: str, rest: str, split: Split) -> tuple[object, bool]:
    """``package.module:function``."""
    module = text.partition(":")[0]
    try:
        function = getattr(own_module(module), rest)
        takes_split = "split" in inspect.signature(function).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{text}: can't be imported ({error}); {FORMS}") from error
    try:
        if takes_split:
            return function(split=split), True
        returned = function()
        part = _of_split(returned, split)
        return (returned, False) if part is None else (part, True)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{text}: the function failed with {type(error).__name__}: {first_line(error, None)}"
        ) from error
