"""GPTQ (2210.17323): column by column, the error of rounding one column is spread over those still to come.

For H = E x x', damped by 1 % of its mean diagonal, and U the upper Cholesky factor of its inverse,

    q_j = round(w_j),   e = (w_j - q_j) / U_jj,   w_k <- w_k - e U_jk   for k > j

Lazily in blocks of ``block`` columns: within one at once, beyond it as one product. ``order``: columns of larger inputs
first. Convolutions in their unfolded form; the groups of a grouped or depthwise one side by side. An output whose error
is not below nearest rounding's stays with that, so that the loss on H is never above it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.quantization.rounding._quadratic import Moments, Quadratic, by_size, inverse_factor, permuted
from rarefy.quantization.rounding_pass import Layer


@dataclasses.dataclass(frozen=True)
class Gptq:
    """Each column's error spread over the later ones by the inverse Hessian of the inputs.

    Quick. gptaq mends errors of earlier layers too; narrow is this for the layers of few inputs alone.
    """

    block: int = 128
    order: bool = True

    reads = frozenset[str]()

    def __post_init__(self) -> None:
        if self.block < 1:
            raise InputError(f"gptq: block={self.block} must be at least 1")

    def layer_codes(self, layer: Layer, generator: torch.Generator) -> Tensor:
        gram = Moments.of(layer).gram
        return rounded(layer, Quadratic(gram, layer.weight @ gram), None, self.block, self.order)


def rounded(layer: Layer, error: Quadratic, drift: Tensor | None, block: int, order: bool) -> Tensor:
    """Codes (groups, outputs, K).

    drift: (groups, K, K) E (x~ - x) x', weighted: see ``rarefy.quantization.rounding.gptaq``; None: there is none.
    """
    scale = layer.scale.expand_as(layer.weight)
    columns = (
        by_size(error.gram)
        if order
        else torch.arange(layer.weight.shape[2], device=scale.device).expand(len(scale), -1)
    )
    weight, step = (permuted(value, columns, 2) for value in (layer.weight, scale))
    factor = inverse_factor(permuted(error.gram, columns, 1, 2))
    carried = None
    if drift is not None:
        carried = (permuted(drift, columns, 1, 2) @ factor.mT).triu(1) @ factor
    made = torch.empty_like(weight)
    for start in range(0, weight.shape[2], block):
        stop = min(start + block, weight.shape[2])
        now, spread, seen = (
            weight[:, :, start:stop].clone(),
            torch.empty_like(weight[:, :, start:stop]),
            weight[:, :, start:stop].clone(),
        )
        for j in range(stop - start):
            place = start + j
            column = now[:, :, j].clone()
            made[:, :, place] = layer.nearest(column, step[:, :, place]) * step[:, :, place]
            spread[:, :, j] = (column - made[:, :, place]) / factor[:, place, place].unsqueeze(1)
            seen[:, :, j] = column
            change = spread[:, :, j].unsqueeze(2) * factor[:, place, start:stop].unsqueeze(1)
            if carried is not None:
                change = change - column.unsqueeze(2) * carried[:, place, start:stop].unsqueeze(1)
            now[:, :, j + 1 :] -= change[:, :, j + 1 :]
        later = spread @ factor[:, start:stop, stop:]
        if carried is not None:
            later = later - seen @ carried[:, start:stop, stop:]
        weight[:, :, stop:] -= later
    back = columns.argsort(1)
    best = error.better(permuted(made, back, 2), layer.nearest(layer.weight, layer.scale) * layer.scale)
    return layer.nearest(best, layer.scale)
