"""Normalisation: ``(x - mean) / std`` of images x in [0, 1], a value a channel; the last thing before the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rarefy.errors import DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Values = Sequence[float] | float | None  # one a channel, one for all, or the default


@dataclass(frozen=True, eq=False)
class Normalization:
    """mean, std: a value a channel. reversed: does the model take the channels in reverse (blue, green, red)?"""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    reversed: bool = False
    _placed: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), uint8 or in [0, 1], as the model takes them."""
        mean, std = self._constants(images.device)
        images = images.flip(1) if self.reversed else images
        return (unit(images) - mean) / std

    def undone(self, inputs: Tensor) -> Tensor:
        mean, std = self._constants(inputs.device)
        images = inputs * std + mean
        return images.flip(1) if self.reversed else images

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._placed:  # made anew in each step, they would make the host wait for the device
            mean, std = (
                torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
                for values in (self.mean, self.std)
            )
            self._placed[device] = (mean, std)
        return self._placed[device]


def unit(images: Tensor) -> Tensor:
    """Images in [0, 1], float32 where they were uint8."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def normalization(mean: Values, std: Values, channels: int, who: str) -> Normalization:
    """For images of that many channels; the defaults are ImageNet's for three, 0.5 for any other number.

    who: begins the message of the DataError for a number of values that is not the channels'.
    """
    defaults = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    sides = []
    for name, given, default in (("mean", mean, defaults[0]), ("std", std, defaults[1])):
        values = default if given is None else tuple(np.atleast_1d(np.asarray(given, dtype=np.float64)).tolist())
        values = values * channels if len(values) == 1 else values
        if len(values) != channels:
            raise DataError(
                f"{who}: {name} has {len(values)} values, images have {channels} channels; pass one value a channel"
            )
        sides.append(values)
    return Normalization(sides[0], sides[1])


def check_values(mean: Values, std: Values, who: str) -> None:
    """Raises DataError for what are no means, or no standard deviations."""
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        numbers = np.asarray(values, dtype=np.float64)
        if numbers.ndim > 1 or not np.isfinite(numbers).all() or (name == "std" and (numbers <= 0).any()):
            positive = " positive" if name == "std" else ""
            raise DataError(f"{who}: {name}={values!r}; give one{positive} number a channel, of images in [0, 1]")


def is_identity(mean: Values, std: Values) -> bool:
    """Does ``mean=0, std=1`` say that images are normalised already?"""
    return mean is not None and std is not None and not np.any(mean) and bool(np.all(np.asarray(std) == 1))
