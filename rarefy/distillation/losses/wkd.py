"""Wasserstein distillation, the Gaussian form (2412.08139, sec. 3.2): a sample's channels as normal distributions.

    μ, σ = mean and standard deviation of a channel over the positions of one sample
    loss = mean over the matched features of  mean over samples and channels of (μˢ - μᵗ)² + (σˢ - σᵗ)²

the squared Wasserstein distance of two normal distributions with diagonal covariance. Resolutions may differ: only
moments are compared. Where the channels differ, the student's are projected (1x1, trained along, thrown away).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.distillation.losses._maps import projection
from rarefy.distillation.objective import Features, Shapes
from rarefy.errors import InputError

EPS = 1e-12


@dataclass(frozen=True)
class Wkd:
    """Mean and spread of each channel of matched features (Gaussian Wasserstein distance).

    For features whose resolutions differ, or whose positions say little; ``mse`` compares position by position.

    on: stages, embedding, or pairs of nodes.
    """

    on: str = "stages"

    def __post_init__(self) -> None:
        if self.on == "logits":
            raise InputError("wkd: logits have no positions to take a spread over; on=stages, or name the pairs")

    def adapter(self, shapes: Shapes) -> nn.Module | None:
        return projection(shapes)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        return torch.stack([F.mse_loss(_moments(s), _moments(t)) * 2 for s, t in features.values()]).mean()


def _moments(x: Tensor) -> Tensor:
    """(N, channels, ...) -> (N, 2, channels)."""
    x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(-1)
    return torch.stack([x.mean(-1), (x.var(-1, correction=0) + EPS).sqrt()], dim=1)
