"""Multi-level logit distillation (Jin et al., CVPR 2023): samples, batch and classes, at several temperatures.

    instance  T² · KL(pᵗ ‖ pˢ)                      each sample's probabilities
    batch     |pᵗ pᵗᵀ - pˢ pˢᵀ|² / N · (64 / N) (C / 100)       which samples are alike
    class     |pᵗᵀ pᵗ - pˢᵀ pˢ|² / C · (64 / N)² (C / 100)²     which classes are taken for each other
    loss = sum of the three, mean over the temperatures

The paper's sums grow with the batch N, the last one with its square, and as much with 1 / C: at 512 samples, or of 10
classes, they drown the rest, and training diverges at a rate that the rest takes. So they count as at the paper's 64
samples and 100 classes, whatever N and C are. The paper's second view of each picture, strongly augmented, is the
task's ``augment`` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.distillation.losses._logits import divergence
from rarefy.distillation.objective import Features
from rarefy.errors import InputError

PAPER_BATCH, PAPER_CLASSES = 64, 100


@dataclass(frozen=True)
class Mlkd:
    """KL, alike samples and alike classes, at temperatures from ``lowest`` to ``highest``.

    For large batches, whose relations tell something; it costs as many losses as there are temperatures.

    lowest, highest: temperatures, whole numbers, both included.
    """

    lowest: int = 2
    highest: int = 6
    on: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        if not 1 <= self.lowest <= self.highest:
            raise InputError(
                f"mlkd: temperatures from {self.lowest} to {self.highest}: "
                "lowest must be at least 1, and highest no less"
            )

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        return torch.stack(
            [_at(student, teacher, temperature) for temperature in range(self.lowest, self.highest + 1)]
        ).mean()


def _at(student: Tensor, teacher: Tensor, temperature: int) -> Tensor:
    s, t = ((logits / temperature).softmax(-1) for logits in (student, teacher))
    share = PAPER_BATCH / len(s) * s.shape[-1] / PAPER_CLASSES
    batch = (s @ s.mT - t @ t.mT).square().sum() / len(s) * share
    classes = (s.mT @ s - t.mT @ t).square().sum() / s.shape[-1] * share**2
    return divergence(student, teacher, temperature) + batch + classes
