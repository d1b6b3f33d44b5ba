"""Mixing: a batch blended with itself, pictures and labels alike. What is drawn depends on (seed, step) alone."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.data.transfer import sent
from rarefy.distillation.options import Training


class Augmentation(NamedTuple):
    """``"crop=4,flip"``: crop: pixels of shift (None: an eighth of the image); scale: least area of a random crop of a file; erase: side of a square."""

    cropped: bool = False
    crop: int | None = None
    flip: bool = False
    scale: float = 0.35
    erase: int = 0


def _random_box(width: int, height: int, draw: np.random.Generator, scale: float) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a crop of random area and aspect; the whole image's centre where ten tries do not fit."""
    area = width * height * draw.uniform(scale, 1, 10)
    ratio = np.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3), 10))
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
    across, down = draw.random(2)
    if fits.any():
        crop_width, crop_height = int(widths[fits.argmax()]), int(heights[fits.argmax()])
    else:
        crop_width, crop_height = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        across = down = 0.5
    left, top = round(across * (width - crop_width)), round(down * (height - crop_height))
    return left, top, left + crop_width, top + crop_height


def _shifted(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """(N, C, H, W), each shifted and mirrored at random: one gather for the whole batch."""
    count, _, height, width = images.shape
    pad = 0
    if augmentation.cropped:
        pad = augmentation.crop if augmentation.crop is not None else max(1, height // 8)
    down, across = sent(torch.randint(0, 2 * pad + 1, (2, count), generator=generator), images.device).unsqueeze(2)
    mirror = sent(torch.rand(count, 1, generator=generator) < (0.5 if augmentation.flip else 0.0), images.device)
    rows = torch.arange(height, device=images.device) + down
    straight = torch.arange(width, device=images.device)
    columns = torch.where(mirror, width - 1 - straight, straight) + across
    batch = torch.arange(count, device=images.device).view(-1, 1, 1)
    padded = F.pad(images, (pad,) * 4)
    return padded.permute(0, 2, 3, 1)[batch, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def mix(
    inputs: Tensor, targets: Tensor | None, training: Training, classes: int, step: int
) -> tuple[Tensor, Tensor | None]:
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
