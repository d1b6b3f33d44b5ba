"""The error of a layer's output as a function of its rounded weights, exact over all samples, and without keeping one.

With x what the layer reads from the rounded layers before it and y what the float layer makes, for each output and in
expectation,

    E (y - q x)^2  =  q A q' - 2 q b' + const        A = E x x' (K, K),  b = E y x' (outputs, K)

so that the sums A and b are all a rule has to know. Where the mean of the error goes into the layer's bias afterwards
(sequential bias correction), it is none of the weights' business: x and y are then taken around their means, which
leaves what only weights can mend.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.quantization.rounding_pass import Layer

_DAMPING = 0.01  # of A's mean diagonal (2210.17323)


@dataclasses.dataclass
class Moments:
    """Sums over samples of x and of another value z that goes with it.

    gram: (groups, K, K) E x x'; cross: (groups, rows of z, K) E z x'.
    """

    gram: Tensor
    cross: Tensor | None
    count: int

    @classmethod
    def of(cls, layer: Layer, other: str | None = None) -> Moments:
        """other: the field of ``Sample`` that z is."""
        around, (sums,) = _summed(layer, other, None)
        return sums.moments(layer, other, around)

    @classmethod
    def halves(cls, layer: Layer, other: str, every: int) -> tuple[Moments, Moments, Moments]:
        """Over the images that fit, over one in ``every`` that judges the fit, and over all."""
        around, (fit, judge) = _summed(layer, other, every)
        whole = fit + judge
        return (
            fit.moments(layer, other, around),
            judge.moments(layer, other, around),
            whole.moments(layer, other, around),
        )


@dataclasses.dataclass
class _Sums:
    """products: (groups, K or K + rows of z, K) around a point; sums: (groups, K or K + rows of z, 1) float64."""

    products: Tensor | None = None
    sums: Tensor | None = None
    count: int = 0

    def __add__(self, other: _Sums) -> _Sums:
        if self.products is None or other.products is None:
            return other if self.products is None else self
        assert self.sums is not None and other.sums is not None
        return _Sums(self.products + other.products, self.sums + other.sums, self.count + other.count)

    def add(self, both: Tensor, inputs: int) -> None:
        """both: (groups, K or K + rows of z, samples), of which the first ``inputs`` rows are x."""
        made = both @ both[:, :inputs].mT
        sums = (both @ both.new_ones(both.shape[2], 1)).double()  # faster than a sum
        self.products = made if self.products is None else self.products.add_(made)
        self.sums = sums if self.sums is None else self.sums.add_(sums)
        self.count += both.shape[2]

    def moments(self, layer: Layer, other: str | None, around: Tensor) -> Moments:
        if self.products is None or self.sums is None:
            return Moments(around.new_zeros(0), None, 0)
        inputs = layer.weight.shape[2]
        products, mean = self.products / self.count, self.sums / self.count
        products -= (mean @ mean[:, :inputs].mT).float()
        if not layer.centered:
            whole = mean + around.double()
            products += (whole @ whole[:, :inputs].mT).float()
        return Moments(products[:, :inputs], None if other is None else products[:, inputs:], self.count)


def _summed(layer: Layer, other: str | None, every: int | None) -> tuple[Tensor, list[_Sums]]:
    """The point around which they are taken, and sums over all images; or over those that fit, and one in ``every``
    that judges."""
    inputs = layer.weight.shape[2]
    around: Tensor | None = None
    found = [_Sums()] if every is None else [_Sums(), _Sums()]
    images = 0
    for sample in layer.samples():
        both = sample.inputs if other is None else torch.cat([sample.inputs, getattr(sample, other)], 1)
        around = (
            both.mean(2, keepdim=True) if around is None else around
        )  # products around it keep what varies in float32
        both = both - around
        if every is None:
            found[0].add(both, inputs)
            continue
        image = images + torch.arange(both.shape[2], device=both.device) // sample.places
        images += both.shape[2] // sample.places
        judges = image % every == every - 1
        for sums, chosen in zip(found, (~judges, judges), strict=True):
            if bool(chosen.any()):
                sums.add(both[:, :, chosen], inputs)
    assert around is not None
    return around, found


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
    """U (groups, K, K), upper triangular, with U'U the inverse of the damped gram matrix; a gram that can't be inverted
    is damped more."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1).clamp_min(1e-30).view(-1, 1, 1)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    for damping in (_DAMPING, 10 * _DAMPING, 1.0, 100.0):
        lower, failed = torch.linalg.cholesky_ex(gram + damping * level * eye)
        if not bool(failed.any()):
            upper: Tensor
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
