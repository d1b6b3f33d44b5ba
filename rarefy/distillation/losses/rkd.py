"""Relational distillation (1904.05068): distances and angles between the samples of a batch, not the features.

    distances  |xᵢ - xⱼ| divided by the batch's mean distance
    angles     cosine at j between xᵢ and xₖ, for all triples
    loss = distance · huber(distances) + angle · huber(angles),  mean over the matched features

Features of different widths compare as they are. Both come from one Gram matrix, so memory is N³ numbers, not N² times
the width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.distillation.losses._logits import check_weights
from rarefy.distillation.objective import Features, Shapes

NEAR = 1e-6  # squared distances below this share of the mean are rounding
EPS = 1e-12


@dataclass(frozen=True)
class Rkd:
    """Distances and angles between the samples of a batch.

    For embeddings, as in retrieval, where only what is near to what counts; they may differ in width. Memory grows with
    the cube of the batch.

    distance, angle: the two weights. on: embedding, stages, logits, or pairs of nodes.
    """

    distance: float = 25.0
    angle: float = 50.0
    on: str = "embedding"

    def __post_init__(self) -> None:
        check_weights("rkd", distance=self.distance, angle=self.angle)

    def adapter(self, shapes: Shapes) -> nn.Module | None:
        return None

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        pairs = [(student, teacher)] if self.on == "logits" else list(features.values())
        return torch.stack([self._one(s, t) for s, t in pairs]).mean()

    def _one(self, student: Tensor, teacher: Tensor) -> Tensor:
        (our_distances, our_angles), (their_distances, their_angles) = map(_relations, (student, teacher))
        return self.distance * F.smooth_l1_loss(our_distances, their_distances) + self.angle * F.smooth_l1_loss(
            our_angles, their_angles
        )


def _relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised distances (N, N), and cosines at j of (i, k), as (j, i, k)."""
    x = x.flatten(1)
    x = x - x.mean(0)
    gram = x @ x.mT
    norms = gram.diagonal()
    squares = norms[:, None] + norms[None] - 2 * gram
    apart = squares > NEAR * norms.mean()  # a sample and itself, or its double, have no direction
    distances = torch.where(apart, squares, 1).sqrt() * apart
    inverse = torch.where(apart, squares, 1).rsqrt() * apart
    inner = gram - gram[:, :, None] - gram[:, None, :] + norms[:, None, None]  # (xᵢ - xⱼ)·(xₖ - xⱼ)
    mean = distances.sum() / max(len(x) * (len(x) - 1), 1)
    return distances / mean.clamp(min=EPS), inner * inverse[:, :, None] * inverse[:, None, :]
