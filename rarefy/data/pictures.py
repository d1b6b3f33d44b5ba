"""Pictures: a split's images, batch by batch, of the model's size and channels, augmented, not yet normalised."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rarefy.data.augmentation import sent, shifted
from rarefy.data.boxes.scenes import Fault, Faults
from rarefy.data.checks import check_faults, check_labels, check_range
from rarefy.data.decoding import MOST_SCANNED, RESAMPLING, Decoder, Decoding, all_broken, decoded, generator, resized
from rarefy.data.items import Arrays, Items, Source
from rarefy.data.normalization import is_identity
from rarefy.errors import DataError

if TYPE_CHECKING:
    from rarefy.data.images import ImageData

Labelled = tuple[Tensor, Any]  # images, and their targets; None where the data has none
Found = dict[int, dict[str, int]]  # of an item: what was wrong with its label, and how often
Seeds = tuple[int, int] | None  # (shuffle_seed, epoch) to augment from; None: as for evaluation


class Varied(Protocol):
    """Pictures that lie on a device, and are varied there."""

    def batch(self, chunk: Tensor, seeds: tuple[int, int]) -> Labelled:
        """Images (N, C, H, W), not yet normalised, and targets of the pictures ``chunk`` (N,)."""
        ...


def decoder_of(data: ImageData, source: Items) -> Decoding:
    """What makes inputs of the source's items, not yet normalised."""
    if data.shaping is not None:
        return data.shaping.decoder(source)
    return Decoder(source, data.input_shape, data.preparation.crop, RESAMPLING[data.interpolation], data.augmentation)


@dataclass(frozen=True, eq=False)
class Pictures:
    """A split's source, and whose options say what to do.

    unreadable: index -> which and why, filled in here. faults: index -> what was mended or left out of its label, and
    how often, likewise.
    """

    data: ImageData
    source: Source
    unreadable: dict[int, str] = field(default_factory=dict)
    faults: Found = field(default_factory=dict)
    _placed: dict[torch.device, Arrays] = field(default_factory=dict, init=False)
    _varied: dict[torch.device, Varied | None] = field(default_factory=dict, init=False)

    def __call__(
        self, chunks: Sequence[Tensor], start: int, seeds: Seeds, device: torch.device, *, labelled: bool = True
    ) -> Iterator[Labelled]:
        """Images (N, C, H, W), uint8 or float, and targets of each chunk of indices from ``start`` on."""
        if isinstance(self.source, Arrays):
            batches = self._of_arrays(self._resident(self.source, device), chunks, start, seeds, device)
        else:
            batches = self._of_items(self.source, chunks, start, seeds, device)
        for images, targets in batches:
            check_labels(self.source, labelled and targets is None)
            yield images, targets

    def _of_arrays(
        self, source: Arrays, chunks: Sequence[Tensor], start: int, seeds: Seeds, device: torch.device
    ) -> Iterator[Labelled]:
        channels, height, width = self.data.input_shape
        for step, chunk in enumerate(chunks[start:], start):
            places = sent(chunk, source.images.device)
            images = sent(source.images[places].contiguous(), device)
            targets = None if source.labels is None else sent(source.labels[places], device)
            if seeds is not None:
                images = shifted(images, self.data.augmentation, generator(*seeds, step)).contiguous()
            if images.shape[1] != channels:
                images = images.expand(-1, channels, -1, -1)
            if images.shape[2:] != (height, width):
                images = resized(images, (height, width), self.data.interpolation)
            yield images, targets

    def _resident(self, source: Arrays, device: torch.device) -> Arrays:
        """The images and labels, on the device if they fit there well."""
        if device.type != "cuda":
            return source
        if device not in self._placed and source.images.nbytes <= torch.cuda.mem_get_info(device)[0] / 4:
            labels = None if source.labels is None else source.labels.to(device)
            self._placed[device] = Arrays(source.where, source.images.to(device), labels, source.names)
        return self._placed.get(device, source)

    def _of_items(
        self, source: Items, chunks: Sequence[Tensor], start: int, seeds: Seeds, device: torch.device
    ) -> Iterator[Labelled]:
        data, varied = self.data, None if seeds is None else self._on_device(source, device)
        if varied is not None and seeds is not None:
            yield from (varied.batch(chunk, seeds) for chunk in chunks[start:])
            return
        batches = decoded(decoder_of(data, source), chunks[start:], seeds, data.workers, device.type == "cuda")
        for step, batch in enumerate(batches, start):
            if batch.broken:
                self._tell(source, batch.broken)
            if batch.refused is not None:
                raise DataError(batch.refused)
            if batch.faults:
                self._tell_faults(source, batch.faults)
            if batch.images is not None:
                yield self._checked(source, batch.images, batch.labels, device)
            elif seeds is not None:  # a step less would end the epoch before it was announced to
                first = min(batch.broken.items())[1]
                raise DataError(
                    f"{source.where}: none of the images of step {step} can be read, the first is {first}; "
                    "mend the data"
                )

    def _on_device(self, source: Items, device: torch.device) -> Varied | None:
        """The pictures there, where they fit well and can be varied there."""
        shaping = self.data.shaping
        if device.type != "cuda" or shaping is None:
            return None
        if device not in self._varied:
            self._varied[device] = shaping.resident(source, device, torch.cuda.mem_get_info(device)[0] / 4)
        return self._varied[device]

    def _checked(self, source: Items, images: Tensor, labels: Tensor | None, device: torch.device) -> Labelled:
        """A batch on the device, if it is what it should be."""
        if labels is not None:
            self.data.targets.check(labels, source.where)
        if not is_identity(self.data.mean, self.data.std):
            check_range(images, source.where, "yield uint8 or [0, 1], or")
        targets = None if labels is None else labels.to(device, non_blocking=True)
        return images.to(device, non_blocking=True), targets

    def _tell_faults(self, source: Items, found: Found) -> None:
        """Refuse labels that had to be mended, or tell the first of each kind: how many there are ``describe`` says."""
        check_faults(source.where, told_faults(source, found) if self.data.strict else (), self.data.strict)
        known = {what for one in self.faults.values() for what in one}
        new = {index: {what: count for what, count in one.items() if what not in known} for index, one in found.items()}
        for fault in told_faults(source, new):
            logging.getLogger("rarefy").warning("%s: %s; so are all that follow", source.where, fault.text)
        self.faults.update(found)

    def _tell(self, source: Items, broken: dict[int, str]) -> None:
        """Refuse what can't be read, or note that it is left out."""
        if self.data.strict or (self.data.strict is None and source.store is None):
            broken = all_broken(source) or broken
            seen, first = min(len(source), MOST_SCANNED), min(broken.items())[1]
            raise DataError(
                f"{source.where}: {len(broken)} of {seen} images can't be read, the first is {first}; "
                "delete or replace them, or leave them out with strict=False (--skip-unreadable)"
            )
        if not self.unreadable:
            logging.getLogger("rarefy").warning(
                "%s: %s; left out, as all that can't be read", source.where, min(broken.items())[1]
            )
        self.unreadable.update(broken)


def faults_of(source: Source, found: Found) -> tuple[Fault, ...]:
    """What is wrong with a source's annotations, as they were read and as items were met."""
    return (*source.faults, *told_faults(source, found)) if isinstance(source, Items) else ()


def told_faults(source: Items, found: Found) -> tuple[Fault, ...]:
    """What was wrong with the labels of items, a line a kind, with the first of each by name."""
    faults = Faults()
    for index, one in sorted(found.items()):
        for what, count in one.items():
            faults.add(what, source.name(index), count)
    return faults.all()
