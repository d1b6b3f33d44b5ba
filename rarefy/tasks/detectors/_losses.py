"""Terms that detectors' losses share: overlap of pairs, cross-entropy on probabilities, distributions of distances."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.data.boxes.boxes import area

_LEAST = 1e-7


def paired_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (1902.09630) of boxes (..., 4), pair by pair."""
    shared = (torch.minimum(a[..., 2:4], b[..., 2:4]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    union = area(a) + area(b) - shared
    around = (torch.maximum(a[..., 2:4], b[..., 2:4]) - torch.minimum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    iou = shared / union.clamp_min(_LEAST)
    return iou, iou - (around - union) / around.clamp_min(_LEAST)


def cross_entropy(probability: Tensor, target: Tensor) -> Tensor:
    """Binary, of each probability; a target may lie between 0 and 1."""
    return F.binary_cross_entropy(probability.clamp(0, 1), target, reduction="none")


def quality_focal(probability: Tensor, quality: Tensor, power: float = 2.0) -> Tensor:
    """|y - p|^power times the cross-entropy (2006.04388, eq. 5)."""
    return (quality - probability).abs().pow(power) * cross_entropy(probability, quality)


def focal(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (1708.02002) of each logit; target: 0 or 1."""
    wrong = torch.where(target > 0.5, 1 - logits.sigmoid(), logits.sigmoid())
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return torch.where(target > 0.5, alpha, 1 - alpha) * wrong.pow(gamma) * entropy


def distribution_focal(bins: Tensor, distance: Tensor) -> Tensor:
    """Cross-entropy of logits (..., n) with the two whole numbers beside a distance (...,) (2006.04388, eq. 6)."""
    last = bins.shape[-1] - 1
    distance = distance.clamp(0, last - 0.01)
    low = distance.floor()
    logs = bins.log_softmax(-1)
    near, far = (logs.gather(-1, place.long()[..., None])[..., 0] for place in (low, low + 1))
    return -(near * (low + 1 - distance) + far * (distance - low))


def logit(probability: Tensor) -> Tensor:
    return torch.logit(probability, 1e-6)


def pairs(probability: Tensor) -> Tensor:
    """(probabilities, 2): logits of no and yes, so that a softmax of the two is the sigmoid's."""
    return pairs_of(logit(probability))


def pairs_of(logits: Tensor) -> Tensor:
    """The same of logits."""
    yes = logits.reshape(-1)
    return torch.stack([torch.zeros_like(yes), yes], 1)
