"""What losses on logits share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rarefy.errors import InputError


def check_temperature(loss: str, temperature: float, usual: str) -> None:
    """Raises InputError for one that is not above 0."""
    if not temperature > 0:
        raise InputError(f"{loss}: temperature={temperature} is not positive; {usual} is usual")


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(t/T) ‖ softmax(s/T)), mean over the batch; logits (N, classes)."""
    ours, theirs = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
