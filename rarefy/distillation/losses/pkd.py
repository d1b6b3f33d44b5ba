"""PKD (2207.02039): features that go up and down together, by Pearson's correlation.

    r = correlation of a channel's values in student and teacher, over the pictures of a batch and their positions
    loss = mean over the matched features of  mean over the channels of 1 - r

A correlation does not see a channel's size and offset, so that neither a teacher of other ranges nor one that is much
stronger pulls at what the student has right already, and large channels or levels do not drown the others: what makes
the squared distance a bad teacher of detectors' pyramids. Half the squared distance of features of mean 0 and spread 1
is the same number. Where the channels differ, the student's are projected (1x1, trained along, thrown away).
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
class Pkd:
    """Correlation of each channel of matched features, over batch and positions (PKD).

    For detectors, on what goes into their heads, also between families whose ranges differ; ``mse`` asks for the very
    values, ``cwd`` for where in the picture they lie. It stands beside the labels' loss or ``quality``.

    on: neck, stages, embedding, or pairs of nodes.
    """

    on: str = "neck"

    def __post_init__(self) -> None:
        if self.on == "logits":
            raise InputError("pkd: compares features; on=neck, on=stages, or name the pairs (dist correlates logits)")

    def adapter(self, shapes: Shapes) -> nn.Module | None:
        return projection(shapes)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        return torch.stack([_apart(s, t) for s, t in features.values()]).mean()


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the channels of 1 - Pearson's correlation."""
    a, b = (one.transpose(0, 1).flatten(1) for one in (a, b))
    a, b = (one - one.mean(1, keepdim=True) for one in (a, b))
    return (1 - F.cosine_similarity(a, b, 1, EPS)).mean()
