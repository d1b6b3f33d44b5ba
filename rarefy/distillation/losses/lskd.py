"""Distillation of standardised logits (2403.01427): the student copies the order of the teacher's logits, not their
size.

    z(x) = (x - mean(x)) / std(x)   over the classes of each sample, std with n - 1
    loss = weight · T² · KL(softmax(z(t)/T) ‖ softmax(z(s)/T)),  mean over the batch

A small student need not reach the range of a large teacher's logits, which plain KL demands of it; each sample gets its
own temperature, std(x) · T. Base temperature 2 and weight 9 beside a cross-entropy of weight 1 are the paper's. The
standard deviation is taken as sqrt(var + eps), not std + 1e-7 as there: the same value, but a finite gradient where all
logits are equal. Of two classes z is (-1, 1) / sqrt(2) or the other way round, which says nothing of how sure the
teacher is: there the logits are compared as they are, with weight 1, as in ``kl``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rarefy.distillation.losses._logits import check_temperature, check_weights, divergence
from rarefy.distillation.objective import Features

EPS = 1e-12


@dataclass(frozen=True)
class Lskd:
    """KL divergence between standardised logits: each sample at its own temperature.

    The default: it needs no tuning and no features, and a small student can reach it. Not ``kl``, which asks for the
    size of the teacher's logits too.

    temperature: beside each sample's own. weight: of the whole.
    """

    temperature: float = 2.0
    weight: float = 9.0
    on: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        check_temperature("lskd", self.temperature, "2")
        check_weights("lskd", weight=self.weight)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        if student.shape[-1] == 2:
            return divergence(student, teacher, self.temperature)
        return self.weight * divergence(_standardised(student), _standardised(teacher), self.temperature)


def _standardised(logits: Tensor) -> Tensor:
    return (logits - logits.mean(-1, keepdim=True)) * (logits.var(-1, keepdim=True) + EPS).rsqrt()
