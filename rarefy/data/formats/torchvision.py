"""``torchvision:NAME?root=PATH``: any dataset of ``torchvision.datasets``, as found on disk; nothing is downloaded.

Further options go to it, such as ``&split=letters``; ``train=`` and ``split=`` are filled in where not given.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from urllib.parse import parse_qsl

from rarefy.data.items import Split
from rarefy.errors import DataError, MissingDependency

_WORDS = {"true": True, "false": False}  # options that are truth values


def read(text: str, rest: str, split: Split) -> tuple[object, bool]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MissingDependency("torchvision", "vision") from error
    name, _, query = rest.partition("?")
    options: dict[str, object] = {
        key: _WORDS.get(value.lower(), int(value) if value.isdecimal() else value) for key, value in parse_qsl(query)
    }
    cls = getattr(datasets, name, None)
    if not isinstance(cls, type):
        near = difflib.get_close_matches(name, datasets.__all__, 3)
        advice = "perhaps " + " or ".join(near) if near else "see its documentation"
        raise DataError(f"{text}: torchvision.datasets has no {name!r}; {advice}")
    accepted = inspect.signature(cls).parameters
    if "root" in accepted:
        options.setdefault("root", "data")
    tries, divided = _tries(name, accepted, options, split)
    refusal: Exception | None = None
    for filled in tries:
        try:
            return cls(**options, **filled), divided
        except TypeError as error:
            raise DataError(
                f"{text}: {error}; options after ? go to torchvision.datasets.{name}{inspect.signature(cls)}"
            ) from error
        except (RuntimeError, OSError, ValueError) as error:
            refusal = error if refusal is None or not isinstance(error, ValueError) else refusal
    why = str(refusal).split("\n")[0]
    raise DataError(
        f"{text}: not found or not complete in {options.get('root', '.')} ({why}); "
        "nothing is downloaded here: put it there, or say ?root=PATH"
    ) from refusal


def _tries(
    name: str, accepted: Iterable[str], options: dict[str, object], split: Split
) -> tuple[list[dict[str, object]], bool]:
    """What is filled in, one after the other until one is there; and: is the dataset divided into splits?"""
    # EMNIST hides train= in **kwargs, and has a split= of another meaning
    has_train = "train" in accepted or name == "EMNIST"
    if has_train:
        return [{} if "train" in options else {"train": split == "train"}], True
    if "split" not in accepted:
        return [{}], False
    if "split" in options:
        return [{}], True
    names = ("train", "trainval") if split == "train" else ("val", "valid", "test")
    return [{"split": value} for value in names], True
