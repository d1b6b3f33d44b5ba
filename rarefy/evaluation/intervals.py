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
    """Drop and its 95 % interval: ``lost`` images only the reference gets right, ``gained`` only the model, of ``samples``."""
    b, c = (lost + 1) / (samples + 2), (gained + 1) / (samples + 2)
    half = Z95 * math.sqrt((b + c - (b - c) ** 2) / (samples + 2))
    return (lost - gained) / samples, (max(-1.0, b - c - half), min(1.0, b - c + half))
