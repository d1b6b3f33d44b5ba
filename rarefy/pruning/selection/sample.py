"""Sample: channels are drawn without replacement, likelier the higher their score.

    key = log(score) / temperature + g,   g from a Gumbel distribution

The k largest keys are a draw of k without replacement with probabilities proportional to score^(1 / temperature) (the
Gumbel top-k trick, arXiv 1903.06059): near 0 it is the best, at infinity it is uniform. A criterion's order of near
equals is noise; several draws, each judged on data, look past it. What ``floor`` protects follows the same keys. The
same seed draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rarefy.errors import InputError


@dataclass(frozen=True)
class Sample:
    """Drawn without replacement with probabilities proportional to score^(1 / temperature).

    For several prunings that are judged on data, of which the best is taken; one draw alone proves nothing.

    temperature: near 0 as ``best``, at infinity by chance.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be positive")

    def keys(self, scores: np.ndarray, seed: int) -> np.ndarray:
        """Raises InputError for a negative score, which is no weight to draw by. A score of 0 comes last."""
        if (scores[1:] < 0).any():
            raise InputError(
                "select='sample' draws by scores of 0 or more, and the criterion gives negative ones; use select='best'"
            )
        noise = np.random.default_rng(seed).gumbel(size=len(scores))
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(np.maximum(scores, 0)) / self.temperature + noise)
