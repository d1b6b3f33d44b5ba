"""Localisation distillation (2102.12252): how far each side of a box may be, as the teacher sees it.

    p = softmax of the bins of a side's distance, at temperature T;  w = the teacher's best score at a place
    loss = T² · Σ w · mean over the sides of KL(pᵗ ‖ pˢ) / Σ w

For heads that give each side's distance as a distribution (generalised focal loss: NanoDet, YOLO since v8), which says
where an edge is blurred. The paper chooses places by the overlap of their boxes with the labels (where things are, and
a little around); here the teacher's scores choose, and no labels are needed. T = 10 and weight 0.25 are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from rarefy.distillation.losses import _places
from rarefy.distillation.losses._logits import check_temperature, check_weights
from rarefy.distillation.objective import Features, Shapes
from rarefy.errors import InputError


@dataclass(frozen=True)
class Ld:
    """Distributions of the sides' distances where the teacher is sure (localisation distillation).

    For detectors that have them (nanodet, yolo), beside ``quality`` or ``pkd``; it says nothing of classes.

    temperature: of both softmaxes. weight: of the whole.
    """

    temperature: float = 10.0
    weight: float = 0.25
    on: ClassVar[str] = "answers"

    def __post_init__(self) -> None:
        check_temperature("ld", self.temperature, "10")
        check_weights("ld", weight=self.weight)

    def adapter(self, shapes: Shapes) -> nn.Module | None:
        return None

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        if "distances" not in features:
            raise InputError(
                "ld: these answers have no distributions of distances (nanodet and yolo with bins have); "
                "compare boxes (loss='quality') or features (loss='pkd')"
            )
        sure = _places.sureness(_places.scores("ld", features)[1])
        return self.weight * _places.distances_apart(features, sure, self.temperature)
