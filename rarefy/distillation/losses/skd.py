"""Spherical distillation (SKD, CVPR 2026): beside KL, logits point to where the teacher's do, seen from one another.

    z = logits / |logits|,  G = z zᵀ over the batch,  D = Gˢ - Gᵗ,  Σ = cov(rows of D) + ridge · I
    loss = T² · KL(pᵗ ‖ pˢ)  +  direction · mean over i of sqrt(Dᵢ Σ⁻¹ Dᵢᵀ)

The directions of a fresh network's small logits turn fast, so the first gradients are 40 to 90 times those of the
cross-entropy: give it ``loss_warmup``. The distance is Mahalanobis': a deviation that all rows share counts less than
one of its own. The root is taken as sqrt(x + eps) - sqrt(eps), which has a gradient at 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.distillation.losses._logits import check_temperature, check_weights, divergence
from rarefy.distillation.objective import Features
from rarefy.errors import InputError

EPS = 1e-8


@dataclass(frozen=True)
class Skd:
    """KL, and the angles between the logits of a batch by Mahalanobis' distance.

    For when it counts which samples are alike, beside what each is. Not ``rkd``, which takes features, and the angles
    of all triples.

    temperature: of KL. direction: weight of the angles. ridge: added to their covariance.
    """

    temperature: float = 4.0
    direction: float = 1.0
    ridge: float = 0.1
    on: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        check_temperature("skd", self.temperature, "4")
        check_weights("skd", direction=self.direction)
        if not 0 < self.ridge < math.inf:
            raise InputError(f"skd: ridge={self.ridge} is not positive; 0.1 is usual")

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        s, t = (F.normalize(logits, dim=-1) for logits in (student, teacher))
        apart = s @ s.mT - t @ t.mT
        centred = apart - apart.mean(0)
        ridge = self.ridge * torch.eye(len(apart), device=apart.device, dtype=apart.dtype)
        spread = centred.mT @ centred / max(len(apart) - 1, 1) + ridge
        factor = torch.linalg.cholesky_ex(spread).L
        squares: Tensor = torch.linalg.solve_triangular(factor, apart.mT, upper=False).square().sum(0)
        directions = ((squares + EPS).sqrt() - math.sqrt(EPS)).mean()
        return divergence(student, teacher, self.temperature) + self.direction * directions
