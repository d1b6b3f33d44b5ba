"""Which weights stay, in one pass: those larger than a threshold, or the n largest of each m that follow one another.

Of equals the first stays. The last m of a row may be fewer, of which n stay too. What is compared is sizes, or, where
``signed``, values (scores, which may be negative).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.kernels.library import define

MOST = 32  # of a block, on a GPU: each is compared with each


def threshold_mask(x: Tensor, threshold: float, signed: bool = False) -> Tensor:
    """bool of the shape of ``x``: |x| > threshold, which is compared as a float32."""
    return (x if signed else x.abs()).float() > threshold


def n_of_m_mask(x: Tensor, n: int, m: int, signed: bool = False) -> Tensor:
    """bool of the shape of ``x``; blocks lie along its last axis. Raises ValueError unless 0 < n < m."""
    _check(n, m)
    size = x.shape[-1]
    blocks = F.pad((x if signed else x.abs()).float(), (0, -size % m), value=-math.inf).unflatten(-1, (-1, m))
    order = blocks.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)[..., :size]


def _check(n: int, m: int) -> None:
    if not 0 < n < m:
        raise ValueError(f"{n} of {m}: choose n from 1 to m - 1")


def _threshold_on_cuda(x: Tensor, threshold: float, signed: bool = False) -> Tensor:
    from rarefy.kernels.cuda import packing

    return packing.threshold_mask(x, threshold, signed)


def _n_of_m_on_cuda(x: Tensor, n: int, m: int, signed: bool = False) -> Tensor:
    from rarefy.kernels.cuda import packing

    _check(n, m)
    return n_of_m_mask(x, n, m, signed) if m > MOST else packing.n_of_m_mask(x, n, m, signed)


THRESHOLD_MASK = define(
    "threshold_mask(Tensor x, float threshold, bool signed=False) -> Tensor",
    threshold_mask,
    lambda x, threshold, signed=False: x.new_empty(x.shape, dtype=torch.bool),
    _threshold_on_cuda,
)
N_OF_M_MASK = define(
    "n_of_m_mask(Tensor x, int n, int m, bool signed=False) -> Tensor",
    n_of_m_mask,
    lambda x, n, m, signed=False: x.new_empty(x.shape, dtype=torch.bool),
    _n_of_m_on_cuda,
)
