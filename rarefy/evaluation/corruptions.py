"""Ten of the corruptions of ImageNet-C, on whole batches: how a classifier does on images that are not clean.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", arXiv
1903.12261. Each has five severities. The constants are the authors': those of ImageNet-C for images whose shorter side
is at least 64, those of CIFAR-10-C below. With x in [0, 1] and constants c (or c, d), clipped to [0, 1] at the end::

    gaussian_noise   x + c n,              n ~ Normal(0, 1)
    shot_noise       Poisson(c x) / c
    impulse_noise    each value is 0 with probability c/2 and 1 with probability c/2
    gaussian_blur    x * Gaussian(sigma = c), cut at 4 sigma, edges repeated
    brightness       HSV value + c
    contrast         (x - mean) c + mean,  mean of each channel of each image
    saturate         HSV saturation * c + d
    fog              (x + c f) max(x) / (max(x) + c),  f a random cloud in [0, 1] whose octaves shrink by d
    pixelate         averaged down to c times the size, and repeated up again
    jpeg             JPEG at quality c

What differs from ImageNet-C, so that the numbers are comparable with each other and not with published ones: the images
are those the model takes (ImageNet-C corrupts, then saves at 224x224, at JPEG quality 85); the blur's sigma shrinks
with the image above 64 pixels (it is stated for 224); fog is a sum of octaves of noise instead of a diamond-square
fractal; JPEG is the transform, the quantisation and the chroma subsampling in tensors, without the entropy code, which
loses nothing, and without rounding to integers in between. Left out: what needs pictures (frost), loops over pixels
(glass), or an image library (motion, zoom, snow, spatter, elastic).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.errors import InputError

SEVERITIES = (1, 2, 3, 4, 5)
SMALL = 64  # shorter side in pixels, below which CIFAR-10-C's constants are used


class Corruption(NamedTuple):
    """``function(images (N, C, H, W) in [0, 1], constants, generator)``, and the constants of severities 1 to 5."""

    function: Callable[[Tensor, Any, torch.Generator], Tensor]
    small: tuple[Any, ...]
    large: tuple[Any, ...]
    channels: tuple[int, ...] | None = None  # the numbers of channels it is defined for; None: any


def corrupt(images: Tensor, name: str, severity: int, generator: torch.Generator | int = 0) -> Tensor:
    """``images``, corrupted: the same shape, dtype and device.

    images: (N, C, H, W), uint8, or float in [0, 1]. severity: 1 to 5. generator: of the CPU, or a seed; the same one
    gives the same images on every device. Raises InputError for an unknown name or severity, or images it is not
    defined for.
    """
    if name not in CORRUPTIONS:
        raise InputError(f"corruption: unknown name {name!r}; have {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise InputError(f"{name}: severity {severity} is not one of 1 to 5")
    if images.dim() != 4 or images.shape[1] == 0:
        raise InputError(f"{name}: images have shape {tuple(images.shape)}; pass (N, C, H, W)")
    corruption = CORRUPTIONS[name]
    if not fits(name, images.shape[1]):
        allowed = " or ".join(map(str, corruption.channels or ()))
        raise InputError(f"{name}: images have {images.shape[1]} channels, it needs {allowed}; leave it out")
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    constants = (corruption.small if min(images.shape[-2:]) < SMALL else corruption.large)[severity - 1]
    unit = images.float() / 255 if images.dtype == torch.uint8 else images
    done = corruption.function(unit, constants, generator).clamp(0, 1)
    return (done * 255).round().to(torch.uint8) if images.dtype == torch.uint8 else done


def fits(name: str, channels: int) -> bool:
    """Is the corruption defined for images of that many channels?"""
    allowed = CORRUPTIONS[name].channels
    return allowed is None or channels in allowed


def _gaussian_noise(images: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return images + scale * torch.randn(images.shape, generator=generator).to(images)


def _shot_noise(images: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(images.cpu() * photons, generator=generator).to(images) / photons


def _impulse_noise(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    draw = torch.rand(images.shape, generator=generator).to(images)
    return torch.where(draw < amount / 2, 0.0, torch.where(draw < amount, 1.0, images))


def _gaussian_blur(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    height, width = images.shape[-2:]
    if min(height, width) >= SMALL:
        sigma *= min(height, width) / 224
    radius = max(1, math.ceil(4 * sigma))
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.softmax(-(steps**2) / (2 * sigma**2), 0)
    planes = F.pad(images.flatten(0, 1).unsqueeze(1), (radius,) * 4, mode="replicate")
    planes = F.conv2d(F.conv2d(planes, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return planes.view_as(images)


def _brightness(images: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    value = images.amax(1, keepdim=True)
    brighter = (value + shift).clamp(max=1)
    return torch.where(value > 0, images * brighter / value.clamp(min=1e-12), brighter)


def _contrast(images: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * factor + mean


def _saturate(images: Tensor, constants: tuple[float, float], generator: torch.Generator) -> Tensor:
    factor, shift = constants
    value, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = value - least
    # A channel is value * (1 - saturation * part), part in [0, 1] given by the hue alone; a grey pixel counts as red.
    red = images.new_tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1)
    part = torch.where(spread > 0, (value - images) / spread.clamp(min=1e-12), red)
    saturation = (spread / value.clamp(min=1e-12) * factor + shift).clamp(0, 1)
    return value * (1 - saturation * part)


def _fog(images: Tensor, constants: tuple[float, float], generator: torch.Generator) -> Tensor:
    thickness, decay = constants
    batch, _, height, width = images.shape
    cloud = images.new_zeros(batch, 1, height, width)
    for octave in range(1, max(1, math.ceil(math.log2(max(height, width)))) + 1):
        draw = torch.rand((batch, 1, 2**octave, 2**octave), generator=generator).to(images)
        cloud += F.interpolate(draw, size=(height, width), mode="bilinear", align_corners=False) / decay**octave
    low, high = cloud.amin((2, 3), keepdim=True), cloud.amax((2, 3), keepdim=True)
    cloud = (cloud - low) / (high - low).clamp(min=1e-12)
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + thickness * cloud) * brightest / (brightest + thickness)


def _pixelate(images: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    height, width = images.shape[-2:]
    smaller = F.interpolate(images, size=(max(1, int(height * factor)), max(1, int(width * factor))), mode="area")
    return F.interpolate(smaller, size=(height, width), mode="nearest-exact")


# Annex K of the JPEG standard (ITU-T T.81): how coarsely each of the 8x8 frequencies is kept at quality 50.
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def _jpeg(images: Tensor, quality: int, generator: torch.Generator) -> Tensor:
    scaled = images * 255
    if images.shape[1] == 1:
        return (_through_dct(scaled - 128, _LUMA, quality) + 128) / 255
    to_ycbcr = images.new_tensor(_YCBCR)
    luma, chroma = torch.einsum("ij,njhw->nihw", to_ycbcr, scaled).split([1, 2], 1)
    luma = _through_dct(luma - 128, _LUMA, quality) + 128
    height, width = images.shape[-2:]
    halved = F.avg_pool2d(F.pad(chroma, (0, width % 2, 0, height % 2), mode="replicate"), 2)
    halved = _through_dct(halved, _CHROMA, quality)
    chroma = F.interpolate(halved, scale_factor=2.0, mode="bilinear", align_corners=False)[..., :height, :width]
    back = torch.linalg.inv(to_ycbcr)
    return torch.einsum("ij,njhw->nihw", back, torch.cat([luma, chroma], 1)) / 255


def _through_dct(planes: Tensor, table: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """Quantise the 8x8 cosine transform of (N, C, H, W) values around 0."""
    height, width = planes.shape[-2:]
    padded = F.pad(planes, (0, -width % 8, 0, -height % 8), mode="replicate")
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    steps = ((planes.new_tensor(table) * percent + 50) / 100).floor().clamp(1, 255)
    index = torch.arange(8, device=planes.device, dtype=planes.dtype)
    basis = torch.cos((2 * index[None, :] + 1) * index[:, None] * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    blocks = padded.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    kept = (basis @ blocks @ basis.T / steps).round() * steps
    blocks = basis.T @ kept @ basis
    images: Tensor = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)[..., :height, :width]
    return images


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Corruption(_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": Corruption(_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturate": Corruption(
        _saturate,
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        (3,),
    ),
    "fog": Corruption(
        _fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "pixelate": Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": Corruption(_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7), (1, 3)),
}
