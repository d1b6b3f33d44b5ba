"""Attention transfer (1612.03928): where a stage is active, whatever its channels are.

    a = mean over the channels of x²,  flattened and divided by its length |a|
    loss = mean over the matched features of |aˢ - aᵗ|²,  mean over the batch

Needs no projection, so channels may differ. The square, as in the authors' code, not the paper's root: its gradient is
finite at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.distillation.objective import Features, Shapes
from rarefy.errors import InputError


@dataclass(frozen=True)
class At:
    """Maps of where each stage is active (attention transfer).

    For teacher and student of the same resolutions but other channels, where no projection is to be trained. Not the
    attention of a transformer. It stands beside a loss on logits.

    on: stages, or pairs of nodes.
    """

    on: str = "stages"

    def __post_init__(self) -> None:
        if self.on in ("logits", "embedding"):
            raise InputError(f"at: {self.on} has no positions; on=stages, or name the pairs")

    def adapter(self, shapes: Shapes) -> nn.Module | None:
        for name, (ours, theirs) in shapes.items():
            if len(ours) < 2 or ours[1:] != theirs[1:]:
                raise InputError(
                    f"at: {name} is {ours} in the student and {theirs} in the teacher; match maps of equal resolution"
                )
        return None

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        return torch.stack([(_map(s) - _map(t)).square().sum(-1).mean() for s, t in features.values()]).mean()


def _map(x: Tensor) -> Tensor:
    return F.normalize(x.square().mean(1).flatten(1), dim=-1)
