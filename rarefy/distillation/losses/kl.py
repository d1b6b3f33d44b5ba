"""Hinton's distillation: the teacher's softened probabilities are the targets (1503.02531).

    loss = T² · KL(softmax(t/T) ‖ softmax(s/T)),  mean over the batch

The factor T² keeps the gradient's size independent of the temperature T: for large T it tends to (s - t)/classes on
centred logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rarefy.distillation.losses._logits import check_temperature, divergence
from rarefy.distillation.objective import Features


@dataclass(frozen=True)
class Kl:
    """Hinton: KL divergence from the teacher's softened probabilities.

    The one that is compared with. It asks for the teacher's very logits; ``lskd`` for their order and relations.

    temperature: of both networks' probabilities.
    """

    temperature: float = 4.0
    on: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        check_temperature("kl", self.temperature, "1 to 10")

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        return divergence(student, teacher, self.temperature)
