"""Decoupled distillation (2203.08679): "how sure of the label" and "what else it might be" are weighed apart.

    p_y = probability of the label,  q = softmax over the other classes,  both at temperature T
    loss = T² · [ α · KL((p_y, 1-p_y)ᵗ ‖ (p_y, 1-p_y)ˢ)  +  β · KL(qᵗ ‖ qˢ) ],  mean over the batch

Plain KL is the case α = 1, β = 1 - p_yᵗ: where the teacher is sure of the label, it hardly hands on what it knows of
the other classes. β = 2 is the authors' for ResNet-56 and ResNet-20 on CIFAR-100 (8 for wider students); they raise the
whole from 0 in the first 20 of 240 epochs (``loss_warmup=0.08``), and with ten classes β weighs ten times as much as
with a hundred. Soft labels (mixup) count by their largest entry; without labels, the teacher's answer is the label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.distillation.losses._logits import check_temperature, check_weights
from rarefy.distillation.objective import Features


@dataclass(frozen=True)
class Dkd:
    """Decoupled KL: the label's probability (alpha) and the other classes' (beta) weighed apart.

    For a teacher that is nearly always sure, of which ``kl`` hands on little; with many classes rather than ten.

    alpha, beta: the two weights. temperature: of both networks' probabilities.
    """

    alpha: float = 1.0
    beta: float = 2.0
    temperature: float = 4.0
    on: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        check_temperature("dkd", self.temperature, "4")
        check_weights("dkd", alpha=self.alpha, beta=self.beta)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        label = teacher.argmax(-1) if targets is None else targets.argmax(-1) if targets.dim() == 2 else targets
        (ours, our_rest), (theirs, their_rest) = (
            _split(logits / self.temperature, label) for logits in (student, teacher)
        )
        sure = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        rest = F.kl_div(our_rest, their_rest, reduction="batchmean", log_target=True)
        return self.temperature**2 * (self.alpha * sure + self.beta * rest)


def _split(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (label, not the label): (N, 2), and of the other classes among themselves: (N, classes - 1)."""
    other = torch.arange(logits.shape[-1] - 1, device=logits.device)
    others = logits.gather(-1, other + (other >= label[:, None]))
    both = torch.cat([logits.gather(-1, label[:, None]), others.logsumexp(-1, keepdim=True)], dim=-1)
    return F.log_softmax(both, dim=-1), F.log_softmax(others, dim=-1)
