"""What losses on logits share."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from rarefy.errors import InputError


def check_temperature(loss: str, temperature: float, usual: str) -> None:
    """Raises InputError for one that is not above 0, or no number."""
    if not 0 < temperature < math.inf:
        raise InputError(f"{loss}: temperature={temperature} is not positive; {usual} is usual")


def check_weights(loss: str, **weights: float) -> None:
    """Raises InputError for a weight below 0, or one that is no number."""
    if not all(0 <= weight < math.inf for weight in weights.values()):
        told = ", ".join(f"{name}={weight}" for name, weight in weights.items())
        raise InputError(f"{loss}: {told} must not be negative, and finite")


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(t/T) ‖ softmax(s/T)), mean over the batch; logits (N, classes)."""
    ours, theirs = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
