"""Which weights stay, in one pass: those larger than a threshold, or the n largest of each m that follow one another.

Of equals the first stays. The last m of a row may be fewer, of which n stay too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.kernels.library import define


def threshold_mask(x: Tensor, threshold: float) -> Tensor:
    """bool of the shape of ``x``: |x| > threshold, which is compared as a float32."""
    return x.abs().float() > threshold


def n_of_m_mask(x: Tensor, n: int, m: int) -> Tensor:
    """bool of the shape of ``x``; blocks lie along its last axis. Raises ValueError unless 0 < n < m <= 32."""
    _check(n, m)
    size = x.shape[-1]
    blocks = F.pad(x.abs().float(), (0, -size % m), value=-1.0).unflatten(-1, (-1, m))
    order = blocks.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)[..., :size]


def _check(n: int, m: int) -> None:
    if not 0 < n < m <= 32:
        raise ValueError(f"{n} of {m}: choose n from 1 to m - 1, and m up to 32")


def _threshold_on_cuda(x: Tensor, threshold: float) -> Tensor:
    from rarefy.kernels.cuda import packing

    return packing.threshold_mask(x, threshold)


def _n_of_m_on_cuda(x: Tensor, n: int, m: int) -> Tensor:
    from rarefy.kernels.cuda import packing

    _check(n, m)
    return packing.n_of_m_mask(x, n, m)


THRESHOLD_MASK = define(
    "threshold_mask(Tensor x, float threshold) -> Tensor",
    threshold_mask,
    lambda x, threshold: x.new_empty(x.shape, dtype=torch.bool),
    _threshold_on_cuda,
)
N_OF_M_MASK = define(
    "n_of_m_mask(Tensor x, int n, int m) -> Tensor",
    n_of_m_mask,
    lambda x, n, m: x.new_empty(x.shape, dtype=torch.bool),
    _n_of_m_on_cuda,
)
