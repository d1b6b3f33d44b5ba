"""The error of a layer's output as a function of its rounded weights, exact over all samples, and without keeping one.

With x what the layer reads from the rounded layers before it and y what the float layer makes, for each output and in expectation,

    E (y - q x)^2  =  q A q' - 2 q b' + const        A = E x x' (K, K),  b = E y x' (outputs, K)

so that the sums A and b are all a rule has to know. Where the mean of the error goes into the layer's bias afterwards (sequential bias correction), it is
none of the weights' business: x and y are then taken around their means, which leaves what only weights can mend.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.rounding import Layer

_DAMPING = 0.01  # of A's mean diagonal (2210.17323)


@dataclasses.dataclass
class Moments:
    """Sums over samples of x and of another value z that goes with it. gram: (groups, K, K) E x x'; cross: (groups, rows of z, K) E z x'."""

    gram: Tensor
    cross: Tensor | None
    count: int

    @classmethod
    def of(cls, layer: Layer, other: str | None = None) -> Moments:
        """other: the field of ``Sample`` that z is."""
        around: Tensor | None = None
        sums: list[Tensor] = []
        count = 0
        for sample in layer.samples():
            both = sample.inputs if other is None else torch.cat([sample.inputs, getattr(sample, other)], 1)
            around = both.mean(2, keepdim=True) if around is None else around  # products around it keep what varies in float32
            both = both - around
            x = both[:, : sample.inputs.shape[1]]
            made = [both @ x.mT, (both @ both.new_ones(both.shape[2], 1)).double()]  # faster than a sum
            sums = [one.add_(more) for one, more in zip(sums, made, strict=True)] if sums else made
            count += both.shape[2]
        assert around is not None
        products, mean = sums[0] / count, sums[1] / count
        inputs = layer.weight.shape[2]
        products -= (mean @ mean[:, :inputs].mT).float()
        if not layer.centered:
            whole = mean + around.double()
            products += (whole @ whole[:, :inputs].mT).float()
        return cls(products[:, :inputs], None if other is None else products[:, inputs:], count)


@dataclasses.dataclass
class Quadratic:
    """gram: (groups, K, K); target: (groups, outputs, K), b above."""

    gram: Tensor
    target: Tensor

    def loss(self, weight: Tensor) -> Tensor:
        """(groups, outputs), up to a constant that does not depend on ``weight`` (groups, outputs, K)."""
        return ((weight @ self.gram - 2 * self.target) * weight).sum(2)

    def better(self, one: Tensor, other: Tensor) -> Tensor:
        """For each output the one of lower loss: a rule that is not sure to lower it is never above nearest."""
        return torch.where((self.loss(one) < self.loss(other)).unsqueeze(2), one, other)


def inverse_factor(gram: Tensor) -> Tensor:
    """U (groups, K, K), upper triangular, with U'U the inverse of the damped gram matrix; a gram that can't be inverted is damped more."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1).clamp_min(1e-30).view(-1, 1, 1)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    for damping in (_DAMPING, 10 * _DAMPING, 1.0, 100.0):
        lower, failed = torch.linalg.cholesky_ex(gram + damping * level * eye)
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed.any()):
                return upper
    return eye.expand_as(gram)


def by_size(gram: Tensor) -> Tensor:
    """(groups, K) order of the inputs, the largest first: what is rounded first is mended best."""
    return gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)


def permuted(matrix: Tensor, order: Tensor, *axes: int) -> Tensor:
    """``matrix`` (groups, ..., ...) with its ``axes`` in ``order`` (groups, K)."""
    for axis in axes:
        shape = list(matrix.shape)
        index = order.unsqueeze(2 if axis == 1 else 1).expand(shape)
        matrix = matrix.gather(axis, index)
    return matrix
