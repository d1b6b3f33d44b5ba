"""What two detectors of one family say, place by place: what losses of distillation compare (``task.Comparing``)."""

from __future__ import annotations

from torch import Tensor

from rarefy.errors import InputError
from rarefy.tasks.detector import Detector, Spread, Unordered
from rarefy.tasks.metric import Outputs


def answers(family: Detector, outputs: Outputs, size: tuple[int, int]) -> dict[str, Tensor]:
    """ "scores" (N, places, classes), "boxes" (N, places, 4) relative to the input, and, of a family that has them,
    "distances" (N, places, 4, bins). size: (H, W) of the input.
    """
    height, width = size
    boxes, _ = family.scored(outputs, size)
    scores = family.logits(outputs).softmax(-1)[:, 1:].reshape(*boxes.shape[:2], -1)
    parts = {"scores": scores, "boxes": boxes / boxes.new_tensor([width, height] * 2)}
    if isinstance(family, Spread) and family.spreads:
        parts["distances"] = family.distances(outputs)
    return parts


def compared(family: Detector, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (ours, theirs) of answers; where they have no order, ours in theirs. family: ours. Raises InputError."""
    if isinstance(family, Unordered):
        order = family.partners(ours, theirs)
        ours = {name: one.gather(1, order[..., None].expand(-1, -1, one.shape[-1])) for name, one in ours.items()}
    shapes = [tuple(one["scores"].shape[1:]) for one in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"detection: the student says {shapes[0]} scores a picture (places, classes), the teacher {shapes[1]}, "
            "so their answers can't be compared; compare features (loss='pkd')"
        )
    return {name: (ours[name], theirs[name]) for name in ours if name in theirs}
