"""Coordinate descent on the layer's output error (COMQ, 2403.07134; CDQuant, 2406.17542): no gradient, no step size.

Started from what GPTQ gives, each column in turn takes the code that is best given all others: with the error q A q' -
2 q b' (``_quadratic``) and the residual r = b - q A,

    q_j <- nearest code of  q_j + r_j / A_jj,      r <- r - (change of q_j) A_j

which can only lower it. Larger inputs first, in ``sweeps`` rounds over all columns, in blocks as GPTQ does.

**What few images say wrongly.** A few hundred images leave A full of chance correlations, and a descent that can only
lower the error on these raises it on others. So A is taken part of the way to its diagonal, and of what the float layer
makes of the float model's own inputs (y, by which errors of earlier layers are mended) only a share is wanted:

    A' = (1 - shrink) A + shrink diag A,      b' = w A' + share (E y x' - w A)

Both are chosen for each layer by the error on every fourth image, of codes that the others gave; then all images give
the codes. An output that is not better on all of them than with nearest rounding stays with that. Where no image is
left to judge, the middle of the choices.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.quantization.rounding._quadratic import Moments, Quadratic, by_size, permuted
from rarefy.quantization.rounding.gptq import rounded
from rarefy.quantization.rounding_pass import Layer

_BLOCK = 128
_JUDGE = 4  # every so many images, one judges
SHRINKS, SHARES = (0.2, 0.0, 0.05, 0.4, 0.6), (0.5, 0.25, 1.0)  # the middle first


@dataclasses.dataclass(frozen=True)
class Descent:
    """Each weight in turn to the code that is best given the others. shrink, share: None is chosen for each layer on
    images that did not fit it.

    The rule for a CPU below 8 bits (docs/measured.md). Coordinate descent: adaround and brecq take gradients.
    """

    sweeps: int = 3
    shrink: float | None = None
    share: float | None = None

    reads = frozenset({"float_outputs"})

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise InputError(f"descent: sweeps={self.sweeps} must be at least 1")
        for name in ("shrink", "share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"descent: {name}={value} must be from 0 to 1")

    def layer_codes(self, layer: Layer, generator: torch.Generator) -> Tensor:
        fit, judge, every = Moments.halves(layer, "float_outputs", _JUDGE)

        @cache
        def judged(shrink: float, share: float) -> float:
            if not (fit.count and judge.count):
                return 0.0
            return float(_error(judge).loss(self._codes(layer, fit, shrink, share) * layer.scale).sum())

        share = self.share if self.share is not None else SHARES[0]
        shrink = self.shrink if self.shrink is not None else min(SHRINKS, key=lambda one: judged(one, share))
        share = self.share if self.share is not None else min(SHARES, key=lambda one: judged(shrink, one))
        made = self._codes(layer, every, shrink, share) * layer.scale
        nearest = layer.nearest(layer.weight, layer.scale) * layer.scale
        return layer.nearest(_error(every).better(made, nearest), layer.scale)

    def _codes(self, layer: Layer, moments: Moments, shrink: float, share: float) -> Tensor:
        assert moments.cross is not None
        gram = moments.gram + shrink * (torch.diag_embed(moments.gram.diagonal(dim1=1, dim2=2)) - moments.gram)
        error = Quadratic(gram, layer.weight @ gram + share * (moments.cross - layer.weight @ moments.gram))
        return descended(layer, error, rounded(layer, error, None, _BLOCK, True), self.sweeps)


def _error(moments: Moments) -> Quadratic:
    """As it is, nothing shrunk."""
    assert moments.cross is not None
    return Quadratic(moments.gram, moments.cross)


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
