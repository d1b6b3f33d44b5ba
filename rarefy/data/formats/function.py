"""``package.module:function``: a function of the user's own, for both splits or with ``split``.

It returns a source (``rarefy/data/sources.py``), or one for each split: ``{"train": ..., "test": ...}``, or a pair.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from rarefy.data.items import FORMS, Split
from rarefy.data.shards import SPLITS
from rarefy.errors import DataError, first_line
from rarefy.system.dependencies import own_module


def read(text: str, rest: str, split: Split) -> tuple[object, bool]:
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
