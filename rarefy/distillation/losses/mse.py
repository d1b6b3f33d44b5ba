"""FitNets: the student's features are drawn to the teacher's by their squared distance (1412.6550).

    loss = mean over the matched features of  mean((P·s - t)²)

P is a 1x1 projection where the channels differ, trained along and thrown away afterwards. FitNets trains on one hint
layer first and on the logits later; here both run together, as all later work does, and every stage is a hint.
``on="logits"`` compares the logits themselves (Ba and Caruana, 1312.6184): no temperature to choose, at the price that
the least likely classes count as much as the likeliest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.distillation.losses._maps import projection
from rarefy.distillation.objective import Features, Shapes
from rarefy.errors import InputError


@dataclass(frozen=True)
class Mse:
    """Squared distance of matched features (FitNets), or of the logits.

    For networks of the same family, stage by stage, beside a loss on logits: ``"lskd + 50*mse"``. It asks for the very
    values; ``at`` for where they are large, ``wkd`` for their moments.

    on: stages, embedding, logits, or pairs of nodes.
    """

    on: str = "stages"

    def adapter(self, shapes: Shapes) -> nn.Module | None:
        for name, (ours, theirs) in shapes.items():
            if ours[1:] != theirs[1:]:
                raise InputError(
                    f"mse: {name} is {ours} in the student and {theirs} in the teacher; "
                    "match features of equal resolution"
                )
        return projection(shapes)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        if self.on == "logits":
            return F.mse_loss(student, teacher)
        return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in features.values()]).mean()
