"""Intervals of shares: how sure a count of right answers is, and a difference of two on the same images.

**Wilson's interval** of a share p of n (Wilson, JASA 1927), z = 1.96::

    centre (p + z^2/2n) / (1 + z^2/n),   half (z / (1 + z^2/n)) sqrt(p (1-p)/n + z^2/4n^2)

**A paired difference.** With b images only the reference gets right and c only the model, drop = (b - c) / n: positive
is worse. Its interval is Bonett and Price's (J. Educ. Behav. Stat. 37, 2012), recommended by Fagerland et al. (Stat.
Med. 33, 2014): Wald's after one image is added to b and to c, so it stays honest where no image is judged differently
(then +-2.8/n)::

    b' = (b+1)/(n+2),  c' = (c+1)/(n+2):   b' - c'  +-  z sqrt((b' + c' - (b' - c')^2) / (n+2))
"""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson(successes: int, samples: int) -> tuple[float, float]:
    """95 % interval of a share, exactly 0 or 1 at its ends."""
    share, spread = successes / samples, Z95**2 / samples
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
    return (0.0 if successes == 0 else max(0.0, centre - half)), (
        1.0 if successes == samples else min(1.0, centre + half)
    )


def paired_drop(lost: int, gained: int, samples: int) -> tuple[float, tuple[float, float]]:
    """Drop and its 95 % interval. lost: images only the reference gets right; gained: only the model."""
    b, c = (lost + 1) / (samples + 2), (gained + 1) / (samples + 2)
    half = Z95 * math.sqrt((b + c - (b - c) ** 2) / (samples + 2))
    return (lost - gained) / samples, (max(-1.0, b - c - half), min(1.0, b - c + half))
