"""DIST (2205.10536): the student copies how the teacher's probabilities are related, not their values.

    loss = T² · [ β · (1 - r over the classes of a sample)  +  γ · (1 - r over the samples of a class) ]

with r Pearson's correlation.

A correlation does not see shift and scale, so that a small student need not reach a strong teacher's confidence. β = γ
= 2 are the paper's, T = 1 that for ImageNet. T = 4, that for CIFAR-100, makes the first gradients on CIFAR-10 70 times
those of the cross-entropy: give it ``loss_warmup``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rarefy.distillation.losses._logits import check_temperature, check_weights
from rarefy.distillation.objective import Features

EPS = 1e-12


@dataclass(frozen=True)
class Dist:
    """Correlation of probabilities, within each sample and within each class.

    For a teacher much stronger than the student: its confidence need not be reached. Like ``lskd`` blind to shift and
    scale, but of probabilities, and across the batch too: batches must be large enough to correlate.

    beta, gamma: weight within a sample, and within a class. temperature: of both networks' probabilities.
    """

    beta: float = 2.0
    gamma: float = 2.0
    temperature: float = 1.0
    on: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        check_temperature("dist", self.temperature, "1 to 4")
        check_weights("dist", beta=self.beta, gamma=self.gamma)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        ours, theirs = ((logits / self.temperature).softmax(-1) for logits in (student, teacher))
        within, across = _apart(ours, theirs, -1), _apart(ours, theirs, 0)
        return self.temperature**2 * (self.beta * within + self.gamma * across)


def _apart(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Mean of 1 - Pearson's correlation along ``dim``."""
    a, b = (one - one.mean(dim, keepdim=True) for one in (a, b))
    return (1 - F.cosine_similarity(a, b, dim, EPS)).mean()
