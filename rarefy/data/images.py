"""ImageData: images and what is known of each; batches to learn from, to judge on and to calibrate with.

Where the data comes from is in ``sources.py``. What is done to it here:

* **Files, PIL images** are decoded by ``workers`` processes (``decoding.py``), and sent on as uint8. Files with boxes
  are decoded once where a GPU that trains on them has room for all, and varied there (``boxes/resident.py``).
* **Arrays** stay uint8 in memory, and are augmented on the device, a whole batch at once. Images of another size than
  ``size`` are resized as they are, without cropping. On a GPU they are sent there once where they take no more than a
  quarter of its free memory, and indexed there; else batch by batch, without waiting.
* **Augmentation** (``augmentation.py``) by the text ``augment``: ``crop`` of files is a crop of random area, of arrays
  a shift of so many pixels (without a number an eighth of the image: 4 pixels of 32); ``flip``; ``erase=PIXELS``.
* **Normalisation** (``normalization.py``) is the last thing. Float images must lie in [0, 1]; those that are normalised
  already need ``mean=0, std=1`` to be said, and can't be corrupted.

**Exact resume.** Order and augmentation of step k follow from (shuffle_seed, epoch, k) alone, so ``start=k`` goes on as
if nothing had happened: the order is a permutation drawn from (shuffle_seed, epoch); arrays are augmented from
(shuffle_seed, epoch, k), files each from (shuffle_seed, epoch, index), whatever the number of workers. The global
random state is neither read nor changed. (A user's dataset that draws random numbers of its own is out of reach; pass
it without augmentation.)

``limit`` takes a random subset by a fixed seed (a prefix of a sorted folder would be one class), and a larger limit
contains a smaller one's.

An image that can't be read is an error that names the first and counts the rest; with ``strict=False``, and in shards
and Parquet files unless ``strict``, such images are left out, counted, and told by ``describe()``. In training the next
sound one of the batch stands in for it, so that batches keep their size. Labels that were mended (boxes out of their
picture) are counted likewise, and an error with ``strict=True``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from rarefy.data.augmentation import Augmentation, erased, parse
from rarefy.data.boxes.scenes import Scenes
from rarefy.data.checks import check_labels, check_options, check_source, check_unit
from rarefy.data.decoding import Decoding, generator
from rarefy.data.items import Arrays, Items, Source, Split, relabelled
from rarefy.data.normalization import Normalization, Values, normalization, unit
from rarefy.data.pictures import Found, Labelled, Pictures, Seeds, Varied, faults_of
from rarefy.data.preparation import Preparation, prepared
from rarefy.data.shards import LeftOut
from rarefy.data.sources import load
from rarefy.data.targets import ClassIndices, Targets
from rarefy.errors import DataError

Device = torch.device | str


class Shaping(Protocol):
    """How pictures become inputs."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the input."""
        ...

    @property
    def still(self) -> bool:
        """Is a picture the same input in every epoch?"""
        ...

    @property
    def normalization(self) -> Normalization: ...

    def decoder(self, source: Items) -> Decoding: ...

    def resident(self, source: Items, device: torch.device, most: float) -> Varied | None:
        """The source's pictures on the device, varied there, in at most so many bytes; None where that can't be."""
        ...

    def describe(self) -> dict[str, object]:
        """What a manifest says of it: JSON-able."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Images to train on, images to judge on, and how they are prepared for the model.

    train, val: a source (see ``sources.py``); either may be left out.
    size: side of the model's square input in pixels; None: the images' own (see ``preparation.py``).
    channels: of the model's input: 1 or 3 of files; None: the arrays' own, 3 for files.
    mean, std: one value a channel, or one for all; None: ImageNet's for three channels, 0.5 for any other number.
    crop: fraction of the resized image that evaluation sees (files only); None: what ``preparation.py`` says.
    augment: comma-separated ``crop``, ``crop=PIXELS``, ``flip``, ``scale=LEAST_AREA``, ``erase=PIXELS``; or "none".
    interpolation: nearest, bilinear or bicubic.
    workers: processes that decode files; 0: this one.
    strict: an unreadable image is an error, not left out; None: so it is, but in shards and Parquet files.
    targets: how what the source yields beside the images is read.
    task: whose data this is, for messages.
    shaping: how pictures become inputs, where the options above do not say it.

    Raises DataError where an option makes no sense, and, at first use of the data, for everything wrong with it.
    """

    train: object = None
    val: object = None
    size: int | None = None
    channels: int | None = None
    mean: Values = None
    std: Values = None
    crop: float | None = None
    augment: str = "crop,flip"
    interpolation: str = "bilinear"
    workers: int = 0
    strict: bool | None = None
    targets: Targets = field(default_factory=ClassIndices)
    task: str = "images"
    shaping: Shaping | None = None
    _loaded: dict[Split, Source] = field(default_factory=dict, init=False)
    _fingerprints: dict[Split, str] = field(default_factory=dict, init=False)
    _opened: dict[Split, Pictures] = field(default_factory=dict, init=False)
    _unreadable: dict[Split, dict[int, str]] = field(default_factory=lambda: {"train": {}, "val": {}}, init=False)
    _faults: dict[Split, Found] = field(default_factory=lambda: {"train": {}, "val": {}}, init=False)

    def __post_init__(self) -> None:
        check_options(self)
        _ = self.augmentation

    def __repr__(self) -> str:
        given = {split: _named(getattr(self, split)) for split in self.splits}
        return f"{self.task.capitalize()}({', '.join(f'{split}={source!r}' for split, source in given.items())})"

    @property
    def splits(self) -> list[Split]:
        """Those of "train" and "val" that are given."""
        both: tuple[Split, ...] = ("train", "val")
        return [split for split in both if getattr(self, split) is not None]

    def source(self, split: Split) -> Source:
        """The split's images, opened. Raises DataError for what is wrong with them."""
        if split not in ("train", "val"):
            raise DataError(f"{self.task}: no split {split!r}; have train and val")
        if split not in self._loaded:
            if split == "val" and self.train is not None and (self.shaping is not None or _are_named(self)):
                self.source("train")  # its class folders, or names, give the labels of both
            self._loaded[split] = _loaded(self, split, self._loaded.get("val" if split == "train" else "train"))
        return self._loaded[split]

    @functools.cached_property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what ``batches`` yields."""
        return self.preparation.shape if self.shaping is None else self.shaping.shape

    @functools.cached_property
    def preparation(self) -> Preparation:
        """What size, channels and crop the images get, and who said so."""
        return prepared(self.source(self.splits[0]), self.size, self.channels, self.crop)

    @property
    def notes(self) -> list[str]:
        """What was decided while the data was read, in a line each."""
        notes = [note for split in self.splits for note in getattr(self.source(split), "notes", ())]
        return list(dict.fromkeys([*notes, *(fault for split in self.splits for fault in self.faults(split))]))

    def length(self, split: Split) -> int:
        """Number of images of the split ("train" or "val")."""
        return len(self.source(split))

    def steps(self, split: Split, batch_size: int, *, limit: int | None = None, augment: bool = False) -> int:
        """How many batches an epoch of ``batches`` has."""
        count = min(self.length(split), limit or math.inf)
        return int(count // batch_size if augment else -(-count // batch_size))

    def labelled(self, split: Split) -> bool:
        """Has the split labels? Looks at one item where they are not known beforehand."""
        source = self.source(split)
        return source.labels is not None or (isinstance(source, Items) and source.item_or_none(0)[1] is not None)

    def describe(self) -> dict[str, object]:
        """What a manifest says of the data: JSON-able, without the data."""
        return _described(self)

    def unreadable(self, split: Split) -> dict[str, object]:
        """What was left out so far: ``count``, and ``first``, by name and with why; empty if nothing was."""
        return _left_out(self.source(split), self._unreadable[split])

    def faults(self, split: Split) -> tuple[str, ...]:
        """What is wrong with annotations and was mended or left out, as far as was read, a line a kind."""
        return tuple(fault.text for fault in faults_of(self.source(split), self._faults[split]))

    def fingerprint(self, split: Split) -> str:
        """SHA-256 of the split's files (or pixels) and labels, as hex. Reads all of it, once."""
        source = self.source(split)
        if split not in self._fingerprints:
            self._fingerprints[split] = source.fingerprint()
        return self._fingerprints[split]

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        augment: bool = False,
        epoch: int = 0,
        start: int = 0,
        device: Device = "cpu",
        labelled: bool = True,
    ) -> Iterator[Labelled]:
        """Yield (inputs (N, C, H, W) float32, normalised; targets (N, ...)) on ``device``.

        limit: so many images of the split only, always the same. shuffle_seed: None keeps the order of the data.
        augment: as in training, and the last batch is dropped if it is not full. start: the first step to yield.
        labelled: without labels it is an error; else targets are None.
        Raises DataError for whatever is wrong with the data, at the call where it can be known there.
        """
        source = self.source(split)
        check_labels(source, labelled and source.labels is None and isinstance(source, Arrays))
        chunks = _chunks(source, batch_size, limit, None if shuffle_seed is None else (shuffle_seed, epoch), augment)
        seeds = (0 if shuffle_seed is None else shuffle_seed, epoch) if augment else None
        pictures = self._pictures(split)(chunks, start, seeds, torch.device(device), labelled=labelled)
        return _inputs(self, pictures, start, seeds)

    def images(
        self, split: Split, batch_size: int, *, limit: int | None = None, device: Device = "cpu"
    ) -> Iterator[Labelled]:
        """Yield (images (N, C, H, W) float32 in [0, 1], targets) as for evaluation, before they are normalised.

        Raises DataError where they were normalised before they came.
        """
        source = self.source(split)
        chunks = _indices(source, batch_size, limit).split(batch_size)
        return _unit(self, self._pictures(split)(chunks, 0, None, torch.device(device)))

    def inputs(
        self, split: Split, count: int, batch_size: int, seed: int = 0, device: Device = "cpu"
    ) -> Iterator[Tensor]:
        """Yield ``count`` images (all, if there are fewer), chosen by the seed, prepared as for evaluation.

        In batches (N, C, H, W) float32. Needs no labels.
        """
        source = self.source(split)
        if count < 1:
            raise DataError(f"{source.where}: {count} images asked for; pass at least 1")
        _indices(source, batch_size, None)
        chosen = torch.randperm(len(source), generator=generator(seed, 0))[:count]
        pictures = self._pictures(split)(chosen.split(batch_size), 0, None, torch.device(device), labelled=False)
        return (self.normalize(images) for images, _ in pictures)

    def rows(
        self, split: Split, batch_size: int, *, shuffle_seed: int | None = None, epoch: int = 0
    ) -> Sequence[Tensor] | None:
        """Indices of the images of each batch of ``batches(augment=True)``; None: each is always another picture."""
        if not (self.augmentation if self.shaping is None else self.shaping).still:
            return None
        order = None if shuffle_seed is None else (shuffle_seed, epoch)
        return _chunks(self.source(split), batch_size, None, order, full=True)

    def normalize(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), uint8 or in [0, 1], as the model takes them."""
        return self.normalization(images)

    def denormalize(self, inputs: Tensor) -> Tensor:
        """Back to images in [0, 1]. Raises DataError if the inputs never were that."""
        images = self.normalization.undone(inputs)
        check_unit(images, repr(self))
        return images.clamp(0, 1)

    @functools.cached_property
    def normalization(self) -> Normalization:
        if self.shaping is not None:
            return self.shaping.normalization
        return normalization(self.mean, self.std, self.input_shape[0], repr(self))

    @functools.cached_property
    def augmentation(self) -> Augmentation:
        return parse(self.augment, self.task)

    def _pictures(self, split: Split) -> Pictures:
        if split not in self._opened:
            self._opened[split] = Pictures(self, self.source(split), self._unreadable[split], self._faults[split])
        return self._opened[split]


def share_opened(old: ImageData, new: ImageData) -> None:
    """Files that are open need not be opened again for the same data prepared otherwise."""
    new._loaded.update({split: source for split, source in old._loaded.items() if isinstance(source, Items)})


def _described(data: ImageData) -> dict[str, object]:
    splits: dict[str, object] = {}
    for split in data.splits:
        left_out = data.unreadable(split)
        source = data.source(split)
        faults = list(data.faults(split))
        told = {"source": _named(getattr(data, split)), "images": len(source), **({"faults": faults} if faults else {})}
        splits[str(split)] = {**told, **({"unreadable": left_out} if left_out else {})}
    if data.shaping is not None:
        return {"input": list(data.input_shape), **data.shaping.describe(), **splits}
    return {
        "input": list(data.input_shape),
        "mean": list(data.normalization.mean),
        "std": list(data.normalization.std),
        "crop": data.preparation.crop,
        "augment": data.augment,
        "interpolation": data.interpolation,
        **splits,
    }


def _loaded(data: ImageData, split: Split, other: Source | None) -> Source:
    """The split's source, if it fits the options and the other split, where that is loaded."""
    given = getattr(data, split)
    if given is None:
        raise DataError(f"{data.task}: no {split} data is given; pass {split}= (imagefolder:PATH, ...)")
    shared = isinstance(given, str) and data.train == data.val
    source = load(given, split, shared=shared, targets=data.targets)
    if data.shaping is not None and isinstance(source, Arrays):  # each is shaped by itself
        source = Items(source.where, source.images, torch.arange(len(source)), None, targets=data.targets)
    check_source(data, source, other)
    if source.labels is not None:
        data.targets.check(source.labels, source.where, whole=True)
    if split == "val" and isinstance(source, Items) and isinstance(source.items, Scenes) and other and other.names:
        return dataclasses.replace(source, items=source.items.renamed(other.names, given), names=other.names)
    if split == "val" and _are_named(data) and other is not None and other.names and source.names:
        return relabelled(source, other.names)
    return source


def _inputs(data: ImageData, pictures: Iterator[Labelled], start: int, seeds: Seeds) -> Iterator[Labelled]:
    """Normalised, and without a square of each picture where that is asked for."""
    side = data.augmentation.erase
    for step, (images, targets) in enumerate(pictures, start):
        inputs = data.normalize(images)
        yield (erased(inputs, side, generator(*seeds, step, 1)) if seeds is not None and side else inputs), targets


def _unit(data: ImageData, pictures: Iterator[Labelled]) -> Iterator[Labelled]:
    for images, targets in pictures:
        check_unit(unit(images), repr(data))
        yield unit(images), targets


def _indices(source: Source, batch_size: int, limit: int | None) -> Tensor:
    if batch_size < 1:
        raise DataError(f"{source.where}: batch size {batch_size} is not positive")
    if limit is not None and limit < 1:
        raise DataError(f"{source.where}: limit={limit} leaves no image; pass at least 1")
    if limit is None or limit >= len(source):
        return torch.arange(len(source))
    return torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:limit].sort().values


def _chunks(
    source: Source, batch_size: int, limit: int | None, order: tuple[int, int] | None, full: bool
) -> list[Tensor]:
    """Indices of each batch. order: what a random one is drawn from; full: without a last batch that is not."""
    indices = _indices(source, batch_size, limit)
    if full and len(indices) < batch_size:
        raise DataError(
            f"{source.where}: {len(indices)} images are less than one batch of {batch_size}; pass a smaller batch size"
        )
    if order is not None and isinstance(source, Items):
        indices = source.shuffled(indices, generator(*order))
    elif order is not None:
        indices = indices[torch.randperm(len(indices), generator=generator(*order))]
    return [chunk for chunk in indices.split(batch_size) if not full or len(chunk) == batch_size]


def _left_out(source: Source, met: dict[int, str]) -> dict[str, object]:
    """What the source's files hold that is no sample, and what was met since."""
    beforehand = source.store.left_out if isinstance(source, Items) and source.store is not None else LeftOut()
    names = [*beforehand.first, *(text for _, text in sorted(met.items()))]
    return {"count": beforehand.count + len(met), "first": names[0]} if names else {}


def _named(given: object) -> str:
    return given if isinstance(given, str) else f"<{type(given).__name__}>"


def _are_named(data: ImageData) -> bool:
    """May both splits name their classes, each in an order of its own? Formats that list classes have one order."""
    listed = ("torchvision:", "sklearn:", "tar:")
    both = (data.train, data.val)
    return all(given is not None and not (isinstance(given, str) and given.startswith(listed)) for given in both)
