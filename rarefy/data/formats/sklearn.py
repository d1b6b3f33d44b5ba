"""``sklearn:digits``: 1,797 grey images of 8x8, part of scikit-learn; levels 0..16 become 0..255. Always cut in two."""

from __future__ import annotations

import numpy as np
import torch

from rarefy.data.items import FORMS, Arrays, Source, Split, held_out
from rarefy.errors import DataError, MissingDependency


def read(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    if rest != "digits":
        raise DataError(f"{text}: only sklearn:digits is known; {FORMS}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency("scikit-learn", "demo") from error
    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    source = Arrays(text, images, torch.from_numpy(digits.target.astype(np.int64)), tuple("0123456789"))
    return source.take(held_out(source.labels, len(source), split)), True
