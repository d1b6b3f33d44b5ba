"""Preparation: what size, channels and crop a source's images get where nobody says, and who said what.

Pictures (files, bytes, PIL images) that are all of one size were prepared by someone, and are taken as they are:

=============================  ======================================================================================
size not given                 their own, if no side is longer than 224; else 224
size given                     theirs is resized to it; of a crop only what fits without enlarging them first
of several sizes, or larger    the shorter side resized to ``size / 0.875``, then the centre, as for ImageNet
=============================  ======================================================================================

So 28x28 pictures stay 28x28, and 227x227 ones are cropped to 224 and not enlarged to 256 before, which costs
EfficientNet-Lite0 1.9 points. Arrays and tensors have a size and channels of their own. Of a source a few images are
looked at, of pictures their headers alone.

Pictures of cameras that were held upright lie on their side in the file, and a mark (EXIF) says so. They are read as
they lie, which is what torchvision's and timm's folders do, so what the model learned from; that some are is told.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rarefy.data.items import MOST_STORED, Arrays, Items, Picture, Source, channels_first
from rarefy.system.files import opened, plain

SIZE, CROP = 224, 0.875  # of pictures, as for ImageNet
MOST_LOOKED_AT = 256  # files; of a dataset of the user's own, which decodes them, a 16th
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # others run programs (EPS) or are rarely what is meant
_ORIENTATION = 0x0112  # of EXIF; 1: as it lies
_GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Preparation:
    """What becomes of a source's images.

    shape: (C, H, W) of the model's input. crop: share of the resized picture that evaluation sees. size_of, crop_of:
    who said so: "given", "the images", or "usual". pictures: are they decoded, so that they have no size and channels
    of their own? grey: are all of them grey? largest: (H, W) of the largest that was looked at. turned: how many of
    those are marked as to be turned, which is not done.
    """

    shape: tuple[int, int, int]
    crop: float
    size_of: str
    crop_of: str
    pictures: bool = False
    grey: bool = False
    largest: tuple[int, int] | None = None
    turned: int = 0


def prepared(source: Source, size: int | None, channels: int | None, crop: float | None) -> Preparation:
    """size, channels, crop: as given, or None."""
    if isinstance(source, Arrays):
        return _of_arrays(tuple(source.images.shape[1:]), size, channels, crop)
    looks = list(_looks(source))
    arrays = [look for look in looks if look.is_array]
    if arrays:
        return _of_arrays((arrays[0].channels, *arrays[0].size), size, channels, crop)
    sizes = {look.size for look in looks}
    own = next(iter(sizes)) if len(sizes) == 1 else None
    grey = bool(looks) and all(look.channels == 1 for look in looks)
    side: tuple[int, int]
    if size is not None:
        side, size_of = (size, size), "given"
    elif own is not None and max(own) <= SIZE:
        side, size_of = own, "the images"
    else:
        side, size_of = (SIZE, SIZE), "usual"
    fitting, crop_of = (crop, "given") if crop is not None else _crop(own, side)
    largest = max(sizes, key=lambda one: one[0] * one[1], default=None)
    turned = sum(look.turned for look in looks)
    return Preparation((channels or 3, *side), fitting, size_of, crop_of, True, grey, largest, turned)


def _crop(own: tuple[int, int] | None, side: tuple[int, int]) -> tuple[float, str]:
    """The share that needs no picture to be enlarged, of pictures of one size that is small enough."""
    if own is None or min(own) >= max(side) / CROP:
        return CROP, "usual"
    return (1.0 if own == side else min(1.0, max(side) / min(own))), "the images"


def _of_arrays(own: tuple[int, ...], size: int | None, channels: int | None, crop: float | None) -> Preparation:
    side = own[1:] if size is None else (size, size)
    shape = (channels or own[0], side[0], side[1])
    return Preparation(shape, 1.0 if crop is None else crop, "the images" if size is None else "given", "the images")


@dataclass(frozen=True)
class _Look:
    size: tuple[int, int]
    channels: int
    is_array: bool = False
    turned: bool = False


def _looks(source: Items) -> Iterator[_Look]:
    """Of images spread evenly over the source; what can't be read is passed over."""
    files = source.store is not None or isinstance(source.items, list)
    most = min(len(source), MOST_LOOKED_AT if files else MOST_LOOKED_AT // 16)
    for place in np.linspace(0, len(source) - 1, most).round().astype(int).tolist():
        image = source.item_or_none(place)[0]
        try:
            look = None if image is None else _look(image)
        except Exception:  # told when its batch comes
            continue
        if look is not None:
            yield look
            if look.is_array and not isinstance(image, str | Path):
                return  # the first one's shape is theirs


def _look(image: Picture) -> _Look | None:
    if isinstance(image, str | Path) and str(image).lower().endswith(".npy"):
        image = opened_array(image)
    if isinstance(image, str | Path | bytes):
        with file_of(image) as file, Image.open(file, formats=FORMATS) as found:
            grey = found.mode in _GREY
            return _Look(
                (found.height, found.width), 1 if grey else 3, turned=found.getexif().get(_ORIENTATION, 1) != 1
            )
    if isinstance(image, Image.Image):
        return _Look((image.height, image.width), 1 if image.mode in _GREY else 3)
    if not isinstance(image, np.ndarray | Tensor) or image.ndim not in (2, 3):
        return None
    one = torch.empty((1, *image.shape), device="meta")
    _, channels, height, width = channels_first(one, last=isinstance(image, np.ndarray)).shape
    return _Look((height, width), channels, is_array=True)


def opened_array(path: str | Path) -> np.ndarray:
    """The array of a ``.npy`` file, not yet in memory. Raises ValueError for a pickled one."""
    array: np.ndarray = np.load(plain(path), mmap_mode="r", allow_pickle=False)
    return array


def file_of(image: str | Path | bytes) -> BinaryIO:
    """A picture as stored, to be read. Raises FormatError for what is no plain file, or far too large."""
    return io.BytesIO(image) if isinstance(image, bytes) else opened(image, MOST_STORED)
