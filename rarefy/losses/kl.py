"""Hinton's distillation: the teacher's softened probabilities are the targets (1503.02531).

    loss = T² · KL(softmax(t/T) ‖ softmax(s/T)),  mean over the batch

The factor T² keeps the gradient's size independent of the temperature T: for large T it tends to (s - t)/classes on centred logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rarefy.errors import InputError
from rarefy.losses import Features


@dataclass(frozen=True)
class Kl:
    """Hinton: KL divergence from the teacher's softened probabilities."""

    temperature: float = 4.0
    on: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"kl: temperature={self.temperature} is not positive; 1 to 10 is usual")

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        T = self.temperature
        divergence = F.kl_div(
            F.log_softmax(student / T, dim=-1), F.log_softmax(teacher / T, dim=-1), reduction="batchmean", log_target=True
        )
        return T**2 * divergence
