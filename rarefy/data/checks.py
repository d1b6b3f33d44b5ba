"""What must hold of the options of image data, and of what was read: every refusal in a line, with the way out."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from rarefy.data.boxes.scenes import Fault
from rarefy.data.decoding import RESAMPLING
from rarefy.data.items import Arrays, Items, Source
from rarefy.data.normalization import check_values, is_identity
from rarefy.errors import DataError

if TYPE_CHECKING:
    from rarefy.data.images import ImageData


MOST_NUMBERS = 2**28  # of one image, as the model takes it
MOST_WORKERS = 64  # where there are few cores


def check_options(data: ImageData) -> None:
    who = data.task
    if data.train is None and data.val is None:
        raise DataError(f"{who}: neither train nor val is given; pass at least one of them")
    for name, value in (("size", data.size), ("channels", data.channels)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise DataError(f"{who}: {name}={value!r} is not a positive whole number")
    if data.crop is not None and not 0 < data.crop <= 1:
        raise DataError(f"{who}: crop={data.crop} is not a fraction above 0 and up to 1")
    if (data.size or 1) ** 2 * (data.channels or 3) > MOST_NUMBERS:
        raise DataError(f"{who}: size={data.size}, channels={data.channels} are too much for an image; pass less")
    if data.workers < 0:
        raise DataError(f"{who}: workers={data.workers} is negative; 0 decodes in this process")
    most = max(MOST_WORKERS, 4 * (os.cpu_count() or 1))
    if data.workers > most:
        raise DataError(f"{who}: workers={data.workers} are more processes than help, {most} at most; pass fewer")
    if data.interpolation not in RESAMPLING:
        raise DataError(f"{who}: interpolation={data.interpolation!r}; have {', '.join(RESAMPLING)}")
    check_values(data.mean, data.std, who)


def check_source(data: ImageData, source: Source, other: Source | None) -> None:
    """Does the source fit the options, and the other split?"""
    if isinstance(source, Items):
        left_out = source.store.left_out if source.store is not None else None
        if data.strict and left_out is not None and left_out.count:
            raise DataError(
                f"{source.where}: {left_out.count} members can't be used, the first is {left_out.first[0]}; "
                "mend the files, or leave strict out to do without them"
            )
        check_faults(source.where, source.faults, data.strict)
        return
    channels = source.images.shape[1]
    if data.channels not in (None, channels) and (channels, data.channels) != (1, 3):
        raise DataError(
            f"{source.where}: images have {channels} channels, channels={data.channels} was asked for; "
            "convert them, or leave it out"
        )
    if not is_identity(data.mean, data.std):
        check_range(source.images, source.where, "pass uint8, divide by 255, or")
    if not isinstance(other, Arrays) or other.images.shape[1:] == source.images.shape[1:]:
        return
    if data.size is None or other.images.shape[1] != channels:
        raise DataError(
            f"{source.where}: images are {tuple(source.images.shape[1:])}, those of {other.where} "
            f"{tuple(other.images.shape[1:])}; make them equal, or pass size="
        )


def check_faults(where: str, faults: Sequence[Fault], strict: bool | None) -> None:
    """Refuse what is wrong with the annotations, or tell it. strict: all of it; False: nothing of it."""
    refused = [fault.text for fault in faults if strict or (fault.grave and strict is None)]
    if refused:
        more = f"; and {len(refused) - 1} more kinds" if len(refused) > 1 else ""
        way = "leave strict out" if strict else "do without them with strict=False (--skip-unreadable)"
        raise DataError(f"{where}: {refused[0]}{more}; mend the annotations, or {way}")
    for fault in faults:
        logging.getLogger("rarefy").warning("%s: %s", where, fault.text)


def check_range(images: Tensor, where: str, advice: str) -> None:
    if not images.is_floating_point():
        return
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise DataError(
            f"{where}: float images leave [0, 1] ({low:.3g} to {high:.3g}); "
            f"{advice} say mean=0, std=1 if they are normalised already"
        )


def check_unit(images: Tensor, who: str) -> None:
    """Are the images in [0, 1], as they are without normalisation? If not, they were normalised before they came."""
    low, high = float(images.min()), float(images.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise DataError(
            f"{who}: images leave [0, 1] ({low:.3g} to {high:.3g}), so they can't be corrupted; "
            "pass them unnormalised, with mean and std"
        )


def check_labels(source: Source, lacking: bool) -> None:
    """lacking: are labels needed, and not there?"""
    if lacking:
        raise DataError(
            f"{source.where}: has no labels, which training and evaluation need; "
            "only calibration and learning from a teacher alone (hard_weight=0) do without"
        )
