"""Rounding that can be learned: h in [0, 1] is how far up from the floor, driven to one end while it trains
(2004.10568, eq. 23 and 24)."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE, _OVER = 1.2, 0.1  # the sigmoid is stretched to -0.1 .. 1.1 and clipped, so that 0 and 1 are reached
_WARM = 0.2  # share of the steps in which nothing is driven
_BETA = (20.0, 2.0)


def initial(share: Tensor) -> Tensor:
    """V for which h is ``share``, the part of w / s above its floor."""
    inner = (share.clamp(1e-4, 1 - 1e-4) + _OVER) / _WIDE
    return torch.log(inner / (1 - inner))


def opened(free: Tensor) -> Tensor:
    """h of V."""
    return (torch.sigmoid(free) * _WIDE - _OVER).clamp(0, 1)


def undecided(h: Tensor, beta: float) -> Tensor:
    """1 - |2 h - 1|^beta: 0 at either end."""
    return 1 - (2 * h - 1).abs().pow(beta)


def beta_at(share: float) -> float | None:
    """beta when that share of the steps is done; None: not yet."""
    if share < _WARM:
        return None
    return _BETA[0] + (_BETA[1] - _BETA[0]) * (share - _WARM) / (1 - _WARM)
