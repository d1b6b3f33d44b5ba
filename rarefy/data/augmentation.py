"""Mixing: a batch blended with itself, pictures and labels alike. What is drawn depends on (seed, step) alone."""

from __future__ import annotations

import math
import random

from torch import Tensor, nn

from rarefy.distillation.options import Training


def mix(inputs: Tensor, targets: Tensor | None, training: Training, classes: int, step: int) -> tuple[Tensor, Tensor | None]:
    """Mixup (1710.09412) or cutmix (1905.04899) of the batch with itself backwards; targets become probabilities (N, classes).

    inputs: (N, channels, H, W); what is drawn depends on (seed, step) alone. Cutmix's share is that of the rectangle as cut.
    """
    alphas = [("mixup", training.mixup)] * bool(training.mixup) + [("cutmix", training.cutmix)] * bool(training.cutmix)
    if not alphas:
        return inputs, targets
    draw = random.Random(f"{training.seed}/{step}")
    kind, alpha = draw.choice(alphas)
    share = draw.betavariate(alpha, alpha)
    if kind == "mixup":
        inputs = inputs.lerp(inputs.flip(0), 1 - share)
    else:
        height, width = inputs.shape[-2:]
        rows, columns = (_span(size, math.sqrt(1 - share), draw) for size in (height, width))
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        inputs, other = inputs.clone(), inputs.flip(0)
        inputs[..., rows, columns] = other[..., rows, columns]
    if targets is None:
        return inputs, None
    certain = nn.functional.one_hot(targets, classes).to(inputs.dtype) if targets.dim() == 1 else targets
    return inputs, certain.lerp(certain.flip(0), 1 - share)


def _span(size: int, share: float, draw: random.Random) -> slice:
    """That share of an edge around a random point of it, cut off at the ends."""
    length = round(share * size)
    first = draw.randrange(size) - length // 2
    return slice(max(0, first), min(size, first + length))
