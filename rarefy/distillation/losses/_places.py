"""What losses on answers at many places share: the few places that the teacher is sure of are those that count.

Answers, as a task compares them (``rarefy/tasks/task.py``): ``scores`` (N, places, classes), probabilities; ``boxes``
(N, places, 4), corners relative to the input; ``distances`` (N, places, sides, bins), logits. Of a classifier there are
scores alone, of one place.

    w = the teacher's best score at a place,  a mean over places is Σ w x / Σ w
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.distillation.objective import Features
from rarefy.errors import InputError

_LEAST = 1e-6


def scores(loss: str, features: Features) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's. Raises InputError where the task knows of none."""
    if "scores" not in features:
        raise InputError(f"{loss}: this task has no scores; compare features (loss='pkd', loss='mse')")
    return features["scores"]


def sureness(probabilities: Tensor) -> Tensor:
    """Of the places, (N, places)."""
    return probabilities.amax(-1)


def weighted(values: Tensor, sure: Tensor) -> Tensor:
    """Mean of values (N, places) by how sure each place is, over the batch."""
    return (values * sure).sum() / sure.sum().clamp_min(_LEAST)


def quality(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """|pᵗ - pˢ|^power times the binary cross-entropy, above the least it can be, by Σ w (2006.04388)."""
    ours, theirs = (one.clamp(_LEAST, 1 - _LEAST) for one in (student, teacher))
    apart = theirs * (theirs / ours).log() + (1 - theirs) * ((1 - theirs) / (1 - ours)).log()
    weight = (theirs - ours).abs().pow(power) if power else torch.ones_like(ours)
    return (weight * apart).sum() / sureness(theirs).sum().clamp_min(_LEAST)


def boxes_apart(features: Features, sure: Tensor) -> Tensor:
    """1 - generalised IoU (1902.09630), by how sure the teacher is; 0 where answers have no boxes."""
    if "boxes" not in features:
        return sure.new_zeros(())
    a, b = (
        torch.stack([one[..., 0:2].minimum(one[..., 2:4]), one[..., 0:2].maximum(one[..., 2:4])], -2)
        for one in features["boxes"]
    )
    shared = (torch.minimum(a[..., 1, :], b[..., 1, :]) - torch.maximum(a[..., 0, :], b[..., 0, :])).clamp_min(0)
    around = torch.maximum(a[..., 1, :], b[..., 1, :]) - torch.minimum(a[..., 0, :], b[..., 0, :])
    inner, outer = shared.prod(-1), around.prod(-1)
    union = sum(((one[..., 1, :] - one[..., 0, :]).prod(-1) for one in (a, b)), -inner)
    overlap = inner / union.clamp_min(_LEAST**2) - (outer - union) / outer.clamp_min(_LEAST**2)
    return weighted(1 - overlap, sure)


def distances_apart(features: Features, sure: Tensor, temperature: float) -> Tensor:
    """T² · KL of each side's distribution, mean over the sides, by how sure the teacher is."""
    ours, theirs = (F.log_softmax(one / temperature, -1) for one in features["distances"])
    apart = (theirs.exp() * (theirs - ours)).sum(-1).mean(-1)
    return temperature**2 * weighted(apart, sure)
