"""Where images come from: text, arrays or a dataset become ``Arrays`` or ``Items``, and nothing else goes on from here.

=================================  ==============================================================================================
``imagefolder:PATH``               one folder a class, sorted by name, images at any depth below; a folder of images only is
                                   unlabelled. A folder that holds ``train`` and ``val`` (or ``validation``, ``valid``, ``test``)
                                   is entered at the right one
``images:PATH``                    all images below a folder, unlabelled, whatever its folders are called
``tar:PATH``                       shards of ``key.jpg`` with ``key.cls``, as webdataset lays them out: a folder of them, ``train-{000..099}.tar``, or
                                   ``train-*.tar`` (``shards.py``)
``parquet:PATH``                   files of a Hugging Face dataset of images, named likewise; ``?image=NAME&label=NAME`` where the columns are not
                                   plain (``parquet.py``)
``torchvision:NAME?root=PATH``     any dataset of ``torchvision.datasets``, as found on disk (nothing is downloaded); further options
                                   go to it, such as ``&split=letters``; ``train=`` and ``split=`` are filled in where not given
``sklearn:digits``                 1,797 grey images of 8x8, part of scikit-learn; levels 0..16 become 0..255
``package.module:function``        a function without arguments, or with ``split`` ("train" or "val"), that returns any of:
(images, labels)                   arrays or tensors, (N, C, H, W), (N, H, W, C) or (N, H, W), uint8 or float in [0, 1]
a map-style dataset                items are (image, label) or image; an image is a path, a PIL image, an (H, W[, C]) array or a
                                   (C, H, W) tensor
=================================  ==============================================================================================

A text source that knows no splits and is named for both ``train`` and ``val`` is cut in two: a fifth of each class, chosen by a fixed
seed, is for validation (``sklearn:digits`` always is). Arrays stay as they are (uint8 stays uint8, nothing is copied);
items are decoded when asked for. A folder of shards is divided by its files' names, if they begin with ``train`` and ``val`` (or a word like it). Hidden files and folders are passed over, which torchvision's ImageFolder does not.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

import torch

from rarefy.data.folders import _imagefolder, _unlabelled
from rarefy.data.items import _FORMS, Arrays, Items, Source, Split, _first_line, _from_object, _held_out
from rarefy.data.libraries import _sklearn, _torchvision
from rarefy.data.parquet import Parquet
from rarefy.data.shards import Shards, files_of
from rarefy.errors import DataError


def load(given: Any, split: Split, *, shared: bool = False) -> Source:
    """The source for what the user gave. shared: the same text was given for both splits.

    Raises DataError for what is missing, empty or of a kind that can't be read, MissingDependency for a library.
    """
    where = given if isinstance(given, str) else split
    if isinstance(given, str):
        kind, colon, rest = given.partition(":")
        reader = _READERS.get(kind, _function)
        if not colon or not rest:
            raise DataError(f"{given!r}: not a data source; {_FORMS}")
        found, divided = reader(given, rest, split)
    else:
        found, divided = given, True
    source = found if isinstance(found, Arrays | Items) else _from_object(found, where)
    if len(source) == 0:
        raise DataError(f"{where}: has no images; {_FORMS}")
    return source if divided or not shared else source.take(_held_out(source.labels, len(source), split))


def _tar(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    files, divided = files_of(text, rest, split, ".tar")
    return _of_store(text, Shards(text, files)), divided


def _parquet(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    path, _, query = rest.partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(options.keys() - {"image", "label"})
    if unknown:
        raise DataError(f"{text}: unknown option {unknown[0]!r}; have image and label, the names of the columns")
    files, divided = files_of(text, path, split, ".parquet")
    return _of_store(text, Parquet(text, files, **options)), divided


def _of_store(text: str, store: Shards | Parquet) -> Items:
    return Items(text, store, torch.arange(len(store)), store.labels, store.names, store)


def _function(text: str, rest: str, split: Split) -> tuple[Any, bool]:
    module = text.partition(":")[0]
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), rest)
        takes_split = "split" in inspect.signature(function).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{text}: can't be imported ({error}); {_FORMS}") from error
    try:
        return (function(split=split) if takes_split else function()), takes_split
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{text}: the function failed with {type(error).__name__}: {_first_line(error)}") from error


_READERS: dict[str, Callable[[str, str, Split], tuple[Any, bool]]] = {
    "imagefolder": _imagefolder,
    "images": _unlabelled,
    "tar": _tar,
    "parquet": _parquet,
    "torchvision": _torchvision,
    "sklearn": _sklearn,
}
