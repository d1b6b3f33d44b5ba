"""Channel-wise distillation (2011.13256): where in the picture each channel is active.

    p = softmax of a channel's values over the positions of a picture, at temperature T
    loss = mean over the matched features of  T² · KL(pᵗ ‖ pˢ),  mean over pictures and channels

Each channel is a map of where its feature is found, and the few positions of things weigh as much as the teacher's
channel says, not as much as there is background. Where the channels differ, the student's are projected (1x1, trained
along, thrown away). The authors' weights: 50 on the pyramid of a detector at T = 1; 5 on the logits of segmentation at
T = 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.distillation.losses._logits import check_temperature
from rarefy.distillation.losses._maps import projection
from rarefy.distillation.objective import Features, Shapes
from rarefy.errors import InputError


@dataclass(frozen=True)
class Cwd:
    """Each channel's distribution over the positions of a picture (channel-wise distillation).

    For detectors and other dense answers, on what goes into their heads. ``pkd`` compares values over the batch, and
    ``at`` one map of all channels.

    on: neck, stages, or pairs of nodes. temperature: of both softmaxes.
    """

    on: str = "neck"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature("cwd", self.temperature, "1")
        if self.on in ("logits", "embedding"):
            raise InputError(f"cwd: {self.on} has no positions; on=neck, on=stages, or name the pairs")

    def adapter(self, shapes: Shapes) -> nn.Module | None:
        for name, (ours, theirs) in shapes.items():
            if len(ours) < 2 or ours[1:] != theirs[1:]:
                raise InputError(
                    f"cwd: {name} is {ours} in the student and {theirs} in the teacher; match maps of equal resolution"
                )
        return projection(shapes)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        return torch.stack([self._apart(s, t) for s, t in features.values()]).mean()

    def _apart(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = (F.log_softmax(one.flatten(2) / self.temperature, -1) for one in (student, teacher))
        return self.temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1).mean()
