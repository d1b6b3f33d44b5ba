"""CrossKD (2306.11369): the student's features go through the rest of the teacher's head, and say what the teacher
says.

    cross = teacher's head behind the layer, of the student's features there
    loss = quality(cross, teacher) + distances · LD(cross, teacher)

The labels pull at the student's own answers and the teacher at the crossed ones, so the two never contradict each other
at one output, as they do where the teacher errs. The features are those that go into the last layer but one of each
branch (``rarefy/graph/features.py``); the paper's best is the last but two of five. Where the channels differ, the
student's are projected (1x1, trained along, thrown away). The rest of the head runs a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from rarefy.distillation.losses import _places
from rarefy.distillation.losses._logits import check_temperature, check_weights
from rarefy.distillation.losses._maps import projection
from rarefy.distillation.objective import Features, Shapes


@dataclass(frozen=True)
class Crosskd:
    """The teacher's head on the student's features, to say what the teacher says (CrossKD).

    For detectors of the same family, where labels and teacher pull apart; ``quality`` asks the student's own.

    scores, boxes, distances: the weights, the last where there are distributions. power: of the distance of the scores.
    temperature: of the distances.
    """

    scores: float = 1.0
    boxes: float = 2.0
    distances: float = 0.25
    power: float = 2.0
    temperature: float = 10.0
    on: ClassVar[str] = "cross"

    def __post_init__(self) -> None:
        check_weights("crosskd", scores=self.scores, boxes=self.boxes, distances=self.distances, power=self.power)
        check_temperature("crosskd", self.temperature, "10")

    def adapter(self, shapes: Shapes) -> nn.Module | None:
        return projection(shapes)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        ours, theirs = _places.scores("crosskd", features)
        sure = _places.sureness(theirs)
        loss = self.scores * _places.quality(ours, theirs, self.power)
        loss = loss + self.boxes * _places.boxes_apart(features, sure)
        if "distances" in features:
            loss = loss + self.distances * _places.distances_apart(features, sure, self.temperature)
        return loss
