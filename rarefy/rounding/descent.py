"""Coordinate descent on the layer's output error (COMQ, 2403.07134; CDQuant, 2406.17542): no gradient, no step size.

Started from what GPTQ gives, each column in turn takes the code that is best given all others: with the error q A q' - 2 q b' (``_quadratic``) and the residual
r = b - q A,

    q_j <- nearest code of  q_j + r_j / A_jj,      r <- r - (change of q_j) A_j

which can only lower it. Larger inputs first, in ``sweeps`` rounds over all columns, in blocks as GPTQ does. The target is what the float layer makes
of the float model's inputs, so that errors of earlier layers are mended too.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.rounding import Layer
from rarefy.rounding._quadratic import Moments, Quadratic, by_size, permuted
from rarefy.rounding.gptq import rounded

_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Descent:
    """Each weight in turn to the code that is best given the others."""

    sweeps: int = 3

    reads = frozenset({"float_outputs"})

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise InputError(f"descent: sweeps={self.sweeps} must be at least 1")

    def layer_codes(self, layer: Layer, generator: torch.Generator) -> Tensor:
        moments = Moments.of(layer, "float_outputs")
        assert moments.cross is not None
        error = Quadratic(moments.gram, moments.cross)
        return descended(layer, error, rounded(layer, error, None, _BLOCK, True), self.sweeps)


def descended(layer: Layer, error: Quadratic, codes: Tensor, sweeps: int) -> Tensor:
    """Codes (groups, outputs, K) of no more error than ``codes``."""
    columns = by_size(error.gram)
    step = permuted(layer.scale.expand_as(layer.weight), columns, 2)
    gram = permuted(error.gram, columns, 1, 2)
    pull = 1 / gram.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
    pull = torch.where(gram.diagonal(dim1=1, dim2=2) > 0, pull, 0)
    now = permuted(codes * layer.scale, columns, 2)
    target = permuted(error.target, columns, 2)
    for _ in range(sweeps):
        residual = target - now @ gram
        before = now.clone()
        for start in range(0, now.shape[2], _BLOCK):
            stop = min(start + _BLOCK, now.shape[2])
            inside, near = residual[:, :, start:stop].clone(), gram[:, start:stop, start:stop]
            for j in range(stop - start):
                place = start + j
                wanted = now[:, :, place] + inside[:, :, j] * pull[:, place].unsqueeze(1)
                best = layer.nearest(wanted, step[:, :, place]) * step[:, :, place]
                inside -= (best - now[:, :, place]).unsqueeze(2) * near[:, j].unsqueeze(1)
                now[:, :, place] = best
            residual[:, :, stop:] -= (now - before)[:, :, start:stop] @ gram[:, start:stop, stop:]
        if torch.equal(now, before):
            break
    return layer.nearest(permuted(now, columns.argsort(1), 2), layer.scale)
