"""The teacher's scores as the qualities that the student is to see (quality focal loss, 2006.04388, as CrossKD,
2306.11369, uses it), and the teacher's boxes where it is sure.

    w = the teacher's best score at a place
    scores  Σ |pᵗ - pˢ|^power · BCE(pᵗ, pˢ) / Σ w,   over places and classes
    boxes   Σ w (1 - GIoU(bᵗ, bˢ)) / Σ w

A detector answers at thousands of places, and at nearly all of them both networks say the same: nothing. In a mean over
the places these drown the few that matter; here a place counts by how far the two are apart, and the whole by how many
things the teacher sees. No labels are needed. Of networks whose boxes have no order, such as DETR, each of the
teacher's is compared with the student's that is matched with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from rarefy.distillation.losses import _places
from rarefy.distillation.losses._logits import check_weights
from rarefy.distillation.objective import Features, Shapes
from rarefy.errors import InputError


@dataclass(frozen=True)
class Quality:
    """The teacher's scores and boxes at every place, by how much they matter (quality focal, GIoU).

    For detectors, in place of ``kl`` and ``lskd``, which their background drowns. Works without labels.

    scores, boxes: the two weights. power: of the distance of the scores; 0: plain cross-entropy.
    """

    scores: float = 1.0
    boxes: float = 2.0
    power: float = 2.0
    on: ClassVar[str] = "answers"

    def __post_init__(self) -> None:
        check_weights("quality", scores=self.scores, boxes=self.boxes)
        if not 0 <= self.power < math.inf:
            raise InputError(f"quality: power={self.power} must not be negative, and finite")

    def adapter(self, shapes: Shapes) -> nn.Module | None:
        return None

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        ours, theirs = _places.scores("quality", features)
        sure = _places.sureness(theirs)
        return self.scores * _places.quality(ours, theirs, self.power) + self.boxes * _places.boxes_apart(
            features, sure
        )
