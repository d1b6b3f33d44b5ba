"""Augmentation: another picture of the same thing in every epoch, drawn from seeds, never from the global state.

* Of files, ``crop`` is a crop of random area (from ``scale`` to 1) and aspect (3/4 to 4/3), resized (GoogLeNet's, arXiv
  1409.4842); of arrays, a shift of so many pixels both ways, black where it came from outside (He et al., arXiv
  1512.03385). ``flip`` mirrors half of them.
* ``erase`` leaves a square of that side, around a random point, without content: zero after normalisation (cutout,
  arXiv 1708.04552).
* ``mix`` blends a batch with itself, pictures and targets alike: mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899).
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.errors import DataError


class Augmentation(NamedTuple):
    """``"crop=4,flip"``.

    crop: pixels of shift (None: an eighth of the image). scale: least area of a random crop of a file. erase: side of a
    square.
    """

    cropped: bool = False
    crop: int | None = None
    flip: bool = False
    scale: float = 0.35
    erase: int = 0

    @property
    def still(self) -> bool:
        """Is an image the same picture in every epoch?"""
        return self._replace(scale=Augmentation().scale) == Augmentation()


def parse(text: str, who: str) -> Augmentation:
    """``"crop,flip"`` as values. Raises DataError, which begins with ``who``, for anything else than it knows."""
    parsed = Augmentation()
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        try:
            if key == "crop":
                parsed = parsed._replace(cropped=True, crop=int(value) if equals else None)
            elif key == "flip" and not equals:
                parsed = parsed._replace(flip=True)
            elif key == "scale":
                parsed = parsed._replace(scale=float(value))
            elif key == "erase" and int(value) > 0:
                parsed = parsed._replace(erase=int(value))
            elif part != "none":
                raise ValueError
        except ValueError as error:
            raise DataError(
                f"{who}: augment={text!r}: {part!r} is not crop, crop=PIXELS, flip, scale=LEAST_AREA, "
                "erase=PIXELS or none"
            ) from error
    if not 0 < parsed.scale <= 1 or (parsed.crop or 0) < 0:
        raise DataError(f"{who}: augment={text!r}: scale is an area above 0 and up to 1, crop a number of pixels")
    return parsed


def random_box(width: int, height: int, draw: np.random.Generator, scale: float) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop of random area and aspect; the image's centre where ten tries do not fit."""
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


def shifted(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
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


def erased(inputs: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Normalised (N, C, H, W), each without a square around a random point."""
    count, _, height, width = inputs.shape
    centre = torch.rand(2, count, 1, generator=generator)
    down, across = sent((centre * torch.tensor([height, width]).view(2, 1, 1)).floor() - side // 2, inputs.device)
    rows = torch.arange(height, device=inputs.device) - down
    columns = torch.arange(width, device=inputs.device) - across
    inside = ((rows >= 0) & (rows < side)).unsqueeze(2) & ((columns >= 0) & (columns < side)).unsqueeze(1)
    return inputs.masked_fill(inside.unsqueeze(1), 0.0)


def mix(
    inputs: Tensor, targets: Tensor | None, *, mixup: float, cutmix: float, seed: int, step: int
) -> tuple[Tensor, Tensor | None]:
    """Mixup or cutmix of the batch with itself backwards; of both, one is drawn anew in each step.

    inputs: (N, channels, H, W). targets: (N, ...) float32, as ``Task.soft`` makes them, or None.
    mixup, cutmix: alpha of the Beta distribution that the share is drawn from; 0: not this one. What is drawn depends
    on (seed, step) alone. Cutmix's share is that of the rectangle as cut.
    """
    alphas = [("mixup", mixup)] * bool(mixup) + [("cutmix", cutmix)] * bool(cutmix)
    if not alphas:
        return inputs, targets
    draw = random.Random(f"{seed}/{step}")
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
    return inputs, None if targets is None else targets.lerp(targets.flip(0), 1 - share)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; a GPU takes it when it gets there, and the host goes on.

    (From pageable memory a copy waits for all that the GPU has to do before.)
    """
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and tensor.device.type == "cpu"
        else tensor.to(device)
    )


def _span(size: int, share: float, draw: random.Random) -> slice:
    """That share of an edge around a random point of it, cut off at the ends."""
    length = round(share * size)
    first = draw.randrange(size) - length // 2
    return slice(max(0, first), min(size, first + length))
