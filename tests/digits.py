"""scikit-learn's digits as the tests use them: 1,438 images to train on, 359 to judge on, of (1, 8, 8)."""

from __future__ import annotations

import functools

from rarefy.tasks import Classification


@functools.cache
def digits(augment: str = "none") -> Classification:
    return Classification(train="sklearn:digits", val="sklearn:digits", augment=augment)
