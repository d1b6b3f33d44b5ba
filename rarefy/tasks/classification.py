"""Classification: images and labels in, batches, loss and calibration images out.

Where the data comes from is in ``sources.py``. What is done to it here:

* **Files, PIL images.** Evaluation: the shorter side resized to ``size / crop``, then the centre ``size`` x ``size`` (torchvision's
  Resize and CenterCrop, to the pixel). Training, by ``augment``: ``crop`` is a crop of random area (from ``scale`` to 1) and aspect (3/4 to 4/3),
  resized to ``size`` (GoogLeNet's, arXiv 1409.4842), ``flip`` mirrors half of them. Decoded by ``workers`` processes, and sent on as uint8.
* **Arrays.** They stay uint8 in memory. Of a batch, ``crop=4`` shifts each image by -4..4 pixels both ways, black where it came from outside,
  and ``flip`` mirrors half, on the device, for the whole batch at once (He et al., arXiv 1512.03385). Without a number it is an eighth of
  the image: 4 pixels of 32. Images of another size than ``size`` are resized as they are, without cropping. On a GPU they are sent there once
  where they take no more than a quarter of its free memory, and indexed there; else batch by batch, without waiting.
* **Both.** ``erase=PIXELS`` leaves a square of that side, around a random point, without content, zero after normalisation (cutout, arXiv 1708.04552).
* **Normalisation.** ``(x - mean) / std`` with x in [0, 1]. Defaults: ImageNet's for three channels, 0.5 and 0.5 for any other number. Float images must
  lie in [0, 1]; those that are normalised already need ``mean=0, std=1`` to be said, and can't be corrupted.

**Exact resume.** Order and augmentation of step k follow from (shuffle_seed, epoch, k) alone, so ``start=k`` goes on as if nothing had happened:
the order is a permutation drawn from (shuffle_seed, epoch); arrays are augmented from (shuffle_seed, epoch, k), files each from
(shuffle_seed, epoch, index), whatever the number of workers. The global random state is neither read nor changed. (A user's dataset
that draws random numbers of its own is out of reach; pass it without augmentation.)

``limit`` takes a random subset by a fixed seed (a prefix of a sorted folder would be one class), and a larger limit contains a smaller one's.

An image that can't be read is an error that names the first and counts the rest; with ``strict=False``, and in shards and Parquet files unless ``strict``,
such images are left out, counted, and told by ``describe()``. In training the next sound one of the batch stands in for it, so that batches keep their size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from rarefy.data.augmentation import Augmentation, _shifted
from rarefy.data.decoding import (
    _FILE_SIZE,
    _MOST_SCANNED,
    _RESAMPLING,
    _UNLABELLED,
    _all_broken,
    _begin_worker,
    _collated,
    _Decoder,
    _generator,
    _item_or_none,
    _Keys,
    _label_or_none,
    _resized,
    _said,
    _uninterrupted,
)
from rarefy.data.items import Arrays, Items, Source, Split
from rarefy.data.sources import load
from rarefy.data.transfer import sent
from rarefy.errors import DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False, repr=False)
class Classification:
    """A data set to train on, one to judge on, and how images are prepared for the model.

    train, val: a source (see ``rarefy/data/sources.py``); either may be left out.
    size: side of the model's square input in pixels; None: the arrays' own, 224 for files.
    channels: 1 or 3; None: the arrays' own, 3 for files.
    class_count: number of classes, where it is not the number of folders or the largest label + 1.
    mean, std: one value a channel, or one for all.
    crop: fraction of the resized image that evaluation sees (files only), 0.875 as usual.
    augment: comma-separated ``crop``, ``crop=PIXELS``, ``flip``, ``scale=LEAST_AREA``, ``erase=PIXELS``; or "none".
    interpolation: nearest, bilinear or bicubic.
    workers: processes that decode files; 0: this one.
    strict: an unreadable image is an error, not left out; None: so it is, but in shards and Parquet files.

    Raises DataError where an option makes no sense, and, at first use of the data, for everything wrong with it.
    """

    train: Any = None
    val: Any = None
    size: int | None = None
    channels: int | None = None
    class_count: int | None = None
    mean: Sequence[float] | float | None = None
    std: Sequence[float] | float | None = None
    crop: float = 0.875
    augment: str = "crop,flip"
    interpolation: str = "bilinear"
    workers: int = 0
    strict: bool | None = None

    def __post_init__(self) -> None:
        if self.train is None and self.val is None:
            raise DataError("classification: neither train nor val is given; pass at least one of them")
        for name, value in (("size", self.size), ("channels", self.channels), ("class_count", self.class_count)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise DataError(f"classification: {name}={value!r} is not a positive whole number")
        if self.channels not in (None, 1, 3):
            raise DataError(
                f"classification: channels={self.channels} is not 1 or 3; leave it out to keep the images' own"
            )
        if not 0 < self.crop <= 1:
            raise DataError(f"classification: crop={self.crop} is not a fraction above 0 and up to 1")
        if self.workers < 0:
            raise DataError(f"classification: workers={self.workers} is negative; 0 decodes in this process")
        if self.interpolation not in _RESAMPLING:
            raise DataError(f"classification: interpolation={self.interpolation!r}; have {', '.join(_RESAMPLING)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is None:
                continue
            numbers = np.asarray(values, dtype=np.float64)
            if numbers.ndim > 1 or not np.isfinite(numbers).all() or (name == "std" and (numbers <= 0).any()):
                raise DataError(
                    f"classification: {name}={values!r}; give one{' positive' if name == 'std' else ''} number a channel, of images in [0, 1]"
                )
        _ = self._augmentation

    name = "classification"

    def __repr__(self) -> str:
        shown = {split: _said(getattr(self, split)) for split in ("train", "val") if getattr(self, split) is not None}
        return f"Classification({', '.join(f'{split}={said!r}' for split, said in shown.items())})"

    # -- what there is

    @functools.cached_property
    def classes(self) -> int:
        """Number of classes: as given, or of the folders, or the largest label + 1. Raises DataError where no split has labels."""
        if self.class_count is not None:
            return self.class_count
        known = [source for source in self._sources() if source.names is not None]
        if known:
            return max(len(source.names or ()) for source in known)
        return self._highest_label + 1

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, where the data has them."""
        names = [source.names for source in self._sources() if source.names is not None]
        return max(names, key=len) if names else None

    @functools.cached_property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what ``batches`` yields."""
        source = self._sources()[0]
        if isinstance(source, Arrays):
            channels, height, width = source.images.shape[1:]
        else:
            channels, height, width = 3, _FILE_SIZE, _FILE_SIZE
            first = next(
                (
                    image
                    for image in map(functools.partial(_item_or_none, source), range(min(len(source), 16)))
                    if image is not None
                ),
                None,
            )
            if isinstance(first, Tensor) and first.dim() == 3:
                channels, height, width = first.shape
            elif isinstance(first, np.ndarray):
                height, width = first.shape[:2]
                channels = 1 if first.ndim == 2 else first.shape[2]
        if self.size is not None:
            height = width = self.size
        return self.channels or channels, height, width

    def length(self, split: Split) -> int:
        """Number of images of the split ("train" or "val")."""
        return len(self._source(split))

    def steps(self, split: Split, batch_size: int, *, limit: int | None = None, augment: bool = False) -> int:
        """How many batches an epoch of ``batches`` has."""
        count = min(self.length(split), limit or math.inf)
        return int(count // batch_size if augment else -(-count // batch_size))

    def check(self, outputs: int) -> None:
        """Do the labels fit a model with that many outputs? Raises DataError if a label has no output."""
        highest = self._highest_label
        if highest >= outputs:
            raise DataError(
                f"{self!r}: label {highest} needs a model with at least {highest + 1} outputs, this one has {outputs}; pass a model for these classes"
            )

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the task: JSON-able, without the data."""
        mean, std = self._mean_std
        said: dict[str, Any] = {
            "task": self.name,
            "input": list(self.input_shape),
            "mean": list(mean),
            "std": list(std),
            "crop": self.crop,
            "augment": self.augment,
            "interpolation": self.interpolation,
        }
        with contextlib.suppress(DataError):  # unlabelled
            said["classes"] = self.classes
        for split in ("train", "val"):
            if getattr(self, split) is not None:
                said[split] = {"source": _said(getattr(self, split)), "images": self.length(split)}
                if self.unreadable(split):
                    said[split]["unreadable"] = self.unreadable(split)
        return said

    def unreadable(self, split: Split) -> dict[str, Any]:
        """What was left out so far: ``count``, and ``first``, by name and with why; empty if nothing was."""
        source, met = self._source(split), self._unreadable.get(split, {})
        left_out = source.store.left_out if isinstance(source, Items) and source.store is not None else None
        names = [*(left_out.first if left_out else []), *(text for _, text in sorted(met.items()))]
        return {"count": (left_out.count if left_out else 0) + len(met), "first": names[0]} if names else {}

    def fingerprint(self, split: Split) -> str:
        """SHA-256 of the split's files (or pixels) and labels, as hex. Reads all of it, once."""
        self._source(split)
        if split not in self._fingerprints:
            self._fingerprints[split] = self._source(split).fingerprint()
        return self._fingerprints[split]

    # -- what a step needs

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
        device: torch.device | str = "cpu",
        labelled: bool = True,
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yield (inputs (N, C, H, W) float32, normalised; targets (N,) int64) on ``device``.

        limit: so many images of the split only, always the same. shuffle_seed: None keeps the order of the data. augment: as in training,
        and the last batch is dropped if it is not full. start: the first step to yield. labelled: without labels it is an error; else targets are None.
        Raises DataError for whatever is wrong with the data, at the call where it can be known there.
        """
        source = self._source(split)
        if labelled and source.labels is None and isinstance(source, Arrays):
            raise DataError(_UNLABELLED.format(source.where))
        indices = self._indices(source, batch_size, limit)
        if augment and len(indices) < batch_size:
            raise DataError(
                f"{source.where}: {len(indices)} images are less than one batch of {batch_size}; pass a smaller batch size"
            )
        if shuffle_seed is not None:
            draw = _generator(shuffle_seed, epoch)
            indices = (
                source.shuffled(indices, draw)
                if isinstance(source, Items)
                else indices[torch.randperm(len(indices), generator=draw)]
            )
        chunks = [chunk for chunk in indices.split(batch_size) if not augment or len(chunk) == batch_size]
        seeds = (0 if shuffle_seed is None else shuffle_seed, epoch) if augment else None
        if not labelled:
            return self._prepared(source, split, chunks, start, seeds, torch.device(device))
        return self._labelled(source, split, chunks, start, seeds, torch.device(device))

    def rows(
        self, split: Split, batch_size: int, *, shuffle_seed: int | None = None, epoch: int = 0
    ) -> Sequence[Tensor] | None:
        """Indices of the images in each batch that ``batches(augment=True)`` yields; None where augmentation makes each image another picture every time."""
        if self._augmentation._replace(scale=Augmentation().scale) != Augmentation():
            return None
        indices = torch.arange(self.length(split))
        if shuffle_seed is not None:
            indices = torch.randperm(len(indices), generator=_generator(shuffle_seed, epoch))
        return [chunk for chunk in indices.split(batch_size) if len(chunk) == batch_size]

    def labelled(self, split: Split) -> bool:
        """Has the split labels? Looks at one item where they are not known beforehand."""
        source = self._source(split)
        return source.labels is not None or (isinstance(source, Items) and _label_or_none(source, 0) is not None)

    def inputs(
        self, split: Split, count: int, batch_size: int, seed: int = 0, device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """Yield ``count`` images (all, if there are fewer), chosen by the seed, as (N, C, H, W) float32, prepared as for evaluation. Needs no labels."""
        source = self._source(split)
        if count < 1:
            raise DataError(f"{source.where}: {count} images asked for; pass at least 1")
        self._indices(source, batch_size, None)
        chosen = torch.randperm(len(source), generator=_generator(seed, 0))[:count]
        return (
            inputs
            for inputs, _ in self._prepared(
                source, split, list(chosen.split(batch_size)), 0, None, torch.device(device)
            )
        )

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy. outputs: logits (N, classes); targets: int64 (N,), or probabilities (N, classes). Raises DataError for what are no logits."""
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise DataError(
                f"classification: the model returns {got}; a classifier returns logits (N, classes): name the part that does with core="
            )
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    def normalize(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), uint8 or in [0, 1], as the model takes them."""
        mean, std = self._constants(images.device)
        unit = images.float() / 255 if images.dtype == torch.uint8 else images
        return (unit - mean) / std

    def denormalize(self, inputs: Tensor) -> Tensor:
        """Back to images in [0, 1]. Raises DataError if the inputs never were that."""
        mean, std = self._constants(inputs.device)
        images = inputs * std + mean
        low, high = float(images.min()), float(images.max())
        if low < -1e-3 or high > 1 + 1e-3:
            raise DataError(
                f"{self!r}: images leave [0, 1] ({low:.3g} to {high:.3g}), so they can't be corrupted; pass them unnormalised, with mean and std"
            )
        return images.clamp(0, 1)

    # -- inside

    @functools.cached_property
    def _augmentation(self) -> Augmentation:
        found = Augmentation()
        for part in filter(None, (part.strip() for part in self.augment.split(","))):
            key, equals, value = part.partition("=")
            try:
                if key == "crop":
                    found = found._replace(cropped=True, crop=int(value) if equals else None)
                elif key == "flip" and not equals:
                    found = found._replace(flip=True)
                elif key == "scale":
                    found = found._replace(scale=float(value))
                elif key == "erase" and int(value) > 0:
                    found = found._replace(erase=int(value))
                elif part != "none":
                    raise ValueError
            except ValueError as error:
                raise DataError(
                    f"classification: augment={self.augment!r}: {part!r} is not crop, crop=PIXELS, flip, scale=LEAST_AREA, erase=PIXELS or none"
                ) from error
        if not 0 < found.scale <= 1 or (found.crop or 0) < 0:
            raise DataError(
                f"classification: augment={self.augment!r}: scale is an area above 0 and up to 1, crop a number of pixels"
            )
        return found

    @functools.cached_property
    def _fingerprints(self) -> dict[str, str]:
        return {}

    @functools.cached_property
    def _unreadable(self) -> dict[str, dict[int, str]]:
        """Of each split, index -> what and why, of the images found unreadable so far."""
        return {}

    @functools.cached_property
    def _loaded(self) -> dict[str, Source]:
        return {}

    def _source(self, split: Split) -> Source:
        if split not in ("train", "val"):
            raise DataError(f"classification: no split {split!r}; have train and val")
        given = getattr(self, split)
        if given is None:
            raise DataError(f"classification: no {split} data is given; pass {split}= (imagefolder:PATH, ...)")
        if split not in self._loaded:
            if split == "val" and _is_folder(self.train) and _is_folder(given):
                self._source("train")  # its class folders give the labels of both
            shared = isinstance(given, str) and self.train == self.val
            self._loaded[split] = self._checked(load(given, split, shared=shared), split)
        return self._loaded[split]

    def _sources(self) -> list[Source]:
        return [self._source(split) for split in ("train", "val") if getattr(self, split) is not None]

    def _checked(self, source: Source, split: Split) -> Source:
        """The source, if it fits the other split and the options."""
        other = self._loaded.get("val" if split == "train" else "train")
        if isinstance(source, Items) and source.store is not None and self.strict and source.store.left_out.count:
            left_out = source.store.left_out
            raise DataError(
                f"{source.where}: {left_out.count} members can't be used, the first is {left_out.first[0]}; mend the files, or leave strict out to do without them"
            )
        if isinstance(source, Arrays):
            channels = source.images.shape[1]
            if self.channels not in (None, channels) and (channels, self.channels) != (1, 3):
                raise DataError(
                    f"{source.where}: images have {channels} channels, channels={self.channels} was asked for; convert them, or leave it out"
                )
            if source.images.is_floating_point() and not self._normalised_already:
                low, high = float(source.images.min()), float(source.images.max())
                if low < 0 or high > 1:
                    raise DataError(
                        f"{source.where}: float images leave [0, 1] ({low:.3g} to {high:.3g}); pass uint8, divide by 255, or say mean=0, std=1 if they are normalised already"
                    )
            if (
                isinstance(other, Arrays)
                and other.images.shape[1:] != source.images.shape[1:]
                and (self.size is None or other.images.shape[1] != channels)
            ):
                raise DataError(
                    f"{source.where}: images are {tuple(source.images.shape[1:])}, those of {other.where} {tuple(other.images.shape[1:])}; make them equal, or pass size="
                )
        if source.labels is not None and self.class_count is not None and int(source.labels.max()) >= self.class_count:
            first = int(source.labels.argmax())
            raise DataError(
                f"{source.where}: label {int(source.labels[first])} of image {first} is out of range for class_count={self.class_count}"
            )
        if (
            split == "val"
            and _is_folder(self.train)
            and _is_folder(self.val)
            and source.labels is not None
            and source.names
            and other is not None
            and other.names
        ):
            place = {name: label for label, name in enumerate(other.names)}
            unknown = [name for name in source.names if name not in place]
            if unknown:
                raise DataError(
                    f"{source.where}: class folder {unknown[0]!r} is in val and not in train ({len(unknown)} such); both need the same names"
                )
            labels = torch.tensor([place[name] for name in source.names])[source.labels]
            return dataclasses.replace(source, labels=labels, names=other.names)
        return source

    @property
    def _normalised_already(self) -> bool:
        return (
            self.mean is not None
            and self.std is not None
            and not np.any(self.mean)
            and bool(np.all(np.asarray(self.std) == 1))
        )

    @functools.cached_property
    def _highest_label(self) -> int:
        highest = []
        for split in ("train", "val"):
            if getattr(self, split) is None:
                continue
            source = self._source(split)
            if source.labels is not None:
                highest.append(int(source.labels.max()))
            elif isinstance(source, Items) and source.store is None:
                labels = [
                    label
                    for label in (_label_or_none(source, index) for index in range(len(source)))
                    if label is not None
                ]
                highest.extend([max(labels)] if labels else [])
        if not highest:
            raise DataError(
                f"{self!r}: has no labels, so the number of classes is unknown; pass labelled data, or class_count="
            )
        return max(highest)

    @functools.cached_property
    def _mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        channels = self.input_shape[0]
        defaults = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
        found = []
        for name, given, default in (("mean", self.mean, defaults[0]), ("std", self.std, defaults[1])):
            values = default if given is None else tuple(np.atleast_1d(np.asarray(given, dtype=np.float64)).tolist())
            if len(values) == 1:
                values = values * channels
            if len(values) != channels:
                raise DataError(
                    f"{self!r}: {name} has {len(values)} values, images have {channels} channels; pass one value a channel"
                )
            found.append(values)
        return found[0], found[1]

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._constants_on:  # made anew in each step, they would make the host wait for the device
            mean, std = (
                torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1) for values in self._mean_std
            )
            self._constants_on[device] = (mean, std)
        return self._constants_on[device]

    @functools.cached_property
    def _constants_on(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    @functools.cached_property
    def _arrays_on(self) -> dict[tuple[str, torch.device], tuple[Tensor, Tensor | None]]:
        return {}

    def _arrays(self, source: Arrays, split: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The split's images and labels, on the device if they fit there well."""
        key = (split, device)
        if (
            device.type == "cuda"
            and key not in self._arrays_on
            and source.images.nbytes <= torch.cuda.mem_get_info(device)[0] / 4
        ):
            self._arrays_on[key] = (
                source.images.to(device),
                None if source.labels is None else source.labels.to(device),
            )
        return self._arrays_on.get(key, (source.images, source.labels))

    def _indices(self, source: Source, batch_size: int, limit: int | None) -> Tensor:
        if batch_size < 1:
            raise DataError(f"{source.where}: batch size {batch_size} is not positive")
        if limit is not None and limit < 1:
            raise DataError(f"{source.where}: limit={limit} leaves no image; pass at least 1")
        if limit is None or limit >= len(source):
            return torch.arange(len(source))
        return torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:limit].sort().values

    def _labelled(
        self,
        source: Source,
        split: str,
        chunks: list[Tensor],
        start: int,
        seeds: tuple[int, int] | None,
        device: torch.device,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in self._prepared(source, split, chunks, start, seeds, device):
            if targets is None:
                raise DataError(_UNLABELLED.format(source.where))
            yield inputs, targets

    def _prepared(
        self,
        source: Source,
        split: str,
        chunks: list[Tensor],
        start: int,
        seeds: tuple[int, int] | None,
        device: torch.device,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        if isinstance(source, Arrays):
            all_images, all_labels = self._arrays(source, split, device)
            for step, chunk in enumerate(chunks[start:], start):
                places = sent(chunk, all_images.device)
                images = sent(all_images[places].contiguous(), device)
                labels = None if all_labels is None else sent(all_labels[places], device)
                if seeds is not None:
                    images = _shifted(images, self._augmentation, _generator(*seeds, step)).contiguous()
                yield self._erased(self.normalize(self._fitted(images)), seeds, step), labels
            return
        decoder = _Decoder(source, self.input_shape, self.crop, _RESAMPLING[self.interpolation], self._augmentation)
        loader: DataLoader[Any] = DataLoader(
            decoder,  # type: ignore[arg-type]
            batch_sampler=_Keys(chunks[start:], seeds),  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=functools.partial(_collated, source.where, seeds is not None),
            worker_init_fn=_begin_worker,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # else it draws a number from the global one
        )
        for step, (images, labels, broken) in enumerate(_uninterrupted(loader, source.where), start):
            if broken:
                self._tell(source, split, broken)
            if images is None:
                if seeds is not None:  # a step less would end the epoch before it was announced to
                    raise DataError(
                        f"{source.where}: none of the images of step {step} can be read, the first is {min(broken.items())[1]}; mend the data"
                    )
                continue
            if isinstance(images, str):
                raise DataError(images)
            if labels is not None and self.class_count is not None and int(labels.max()) >= self.class_count:
                raise DataError(
                    f"{source.where}: label {int(labels.max())} is out of range for class_count={self.class_count}"
                )
            if (
                images.is_floating_point()
                and not self._normalised_already
                and (float(images.min()) < 0 or float(images.max()) > 1)
            ):
                raise DataError(
                    f"{source.where}: float images leave [0, 1] ({float(images.min()):.3g} to {float(images.max()):.3g}); yield uint8 or [0, 1], or say mean=0, std=1 if they are normalised already"
                )
            inputs = self._erased(self.normalize(images.to(device, non_blocking=True)), seeds, step)
            yield inputs, None if labels is None else labels.to(device, non_blocking=True)

    def _erased(self, inputs: Tensor, seeds: tuple[int, int] | None, step: int) -> Tensor:
        """Without a square of each picture, where that is asked for."""
        side = self._augmentation.erase
        if seeds is None or not side:
            return inputs
        count, _, height, width = inputs.shape
        centre = torch.rand(2, count, 1, generator=_generator(*seeds, step, 1))
        down, across = sent((centre * torch.tensor([height, width]).view(2, 1, 1)).floor() - side // 2, inputs.device)
        rows = torch.arange(height, device=inputs.device) - down
        columns = torch.arange(width, device=inputs.device) - across
        inside = ((rows >= 0) & (rows < side)).unsqueeze(2) & ((columns >= 0) & (columns < side)).unsqueeze(1)
        return inputs.masked_fill(inside.unsqueeze(1), 0.0)

    def _fitted(self, images: Tensor) -> Tensor:
        """Of the model's size and channels."""
        channels, height, width = self.input_shape
        if images.shape[1] != channels:
            images = images.expand(-1, channels, -1, -1)
        return images if images.shape[2:] == (height, width) else _resized(images, (height, width), self.interpolation)

    def _tell(self, source: Items, split: str, broken: dict[int, str]) -> None:
        if self.strict or (self.strict is None and source.store is None):
            broken = _all_broken(source) or broken
            seen = min(len(source), _MOST_SCANNED)
            first = min(broken.items())[1]
            raise DataError(
                f"{source.where}: {len(broken)} of {seen} images can't be read, the first is {first}; delete or replace them, or leave them out with strict=False (--skip-unreadable)"
            )
        known = self._unreadable.setdefault(split, {})
        if not known:
            logging.getLogger("rarefy").warning(
                "%s: %s; left out, as all that can't be read", source.where, min(broken.items())[1]
            )
        known.update(broken)


def _is_folder(given: Any) -> bool:
    return isinstance(given, str) and given.startswith("imagefolder:")
