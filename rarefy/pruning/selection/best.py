"""Best: the highest scores are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Best:
    """The highest scores are kept.

    The default; the same scores always keep the same.
    """

    def keys(self, scores: np.ndarray, seed: int) -> np.ndarray:
        return scores
