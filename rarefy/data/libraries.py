from __future__ import annotations

import difflib
import inspect
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch

from rarefy.data.items import _FORMS, _WORDS, Arrays, Source, Split, _from_object, _held_out
from rarefy.errors import DataError, MissingDependency


def _torchvision(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MissingDependency("torchvision", "vision") from error
    name, _, query = rest.partition("?")
    options: dict[str, Any] = {
        key: _WORDS.get(value.lower(), int(value) if value.isdecimal() else value) for key, value in parse_qsl(query)
    }
    cls = getattr(datasets, name, None)
    if not isinstance(cls, type):
        near = difflib.get_close_matches(name, datasets.__all__, 3)
        raise DataError(
            f"{text}: torchvision.datasets has no {name!r}; {'perhaps ' + ' or '.join(near) if near else 'see its documentation'}"
        )
    accepted = inspect.signature(cls).parameters
    if "root" in accepted:
        options.setdefault("root", "data")
    has_train = (
        "train" in accepted or name == "EMNIST"
    )  # which hides it in **kwargs, and has a split of another meaning
    tries: list[dict[str, Any]] = [{}]
    divided = True
    if has_train and "train" not in options:
        tries = [{"train": split == "train"}]
    elif "split" in accepted and "split" not in options and not has_train:
        tries = [
            {"split": value} for value in (("train", "trainval") if split == "train" else ("val", "valid", "test"))
        ]
    elif not has_train and "split" not in accepted:
        divided = False
    refusal: Exception | None = None
    for filled in tries:
        try:
            return _from_object(cls(**options, **filled), text), divided
        except DataError:
            raise
        except TypeError as error:
            raise DataError(
                f"{text}: {error}; options after ? go to torchvision.datasets.{name}{inspect.signature(cls)}"
            ) from error
        except (RuntimeError, OSError, ValueError) as error:
            refusal = error if refusal is None or not isinstance(error, ValueError) else refusal
    why = str(refusal).split("\n")[0]
    raise DataError(
        f"{text}: not found or not complete in {options.get('root', '.')} ({why}); nothing is downloaded here: put it there, or say ?root=PATH"
    ) from refusal


def _sklearn(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    if rest != "digits":
        raise DataError(f"{text}: only sklearn:digits is known; {_FORMS}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency("scikit-learn", "demo") from error
    found = load_digits()
    images = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    source = Arrays(text, images, torch.from_numpy(found.target.astype(np.int64)), tuple("0123456789"))
    return source.take(_held_out(source.labels, len(source), split)), True
