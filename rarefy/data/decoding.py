"""Decoding: the items of a source as tensors of one shape, in a DataLoader's workers.

* **Evaluation.** The shorter side resized to ``size / crop``, then the centre ``size`` x ``size`` (torchvision's Resize
  and CenterCrop, to the pixel). Arrays and tensors that a dataset yields are resized as they are.
* **Training.** ``augmentation.py``, drawn from (shuffle_seed, epoch, index), whatever the number of workers.
* **Unreadable images** are no exception here: a worker tells what is broken and why, and who asked decides.
"""

from __future__ import annotations

import functools
import gc
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from rarefy.data.augmentation import Augmentation, random_box, shifted
from rarefy.data.items import Items, Picture, channels_first
from rarefy.data.preparation import FORMATS, file_of, opened_array
from rarefy.data.targets import Target, as_tensor
from rarefy.errors import DataError, first_line
from rarefy.system.files import why

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_MOST_PIXELS = 2**26  # of one image: a few bytes can declare gigabytes
MOST_SCANNED = 10_000  # images looked at to count the unreadable ones


Key = tuple[int, tuple[int, int] | None]  # of an item, and (shuffle_seed, epoch) to augment from


class Made(NamedTuple):
    """image: uint8 or float (C, H, W). faults: what was mended or left out of the label, and how often."""

    image: Tensor
    label: Target | None = None
    faults: dict[str, int] | None = None


class Decoded(NamedTuple):
    """broken: which file and why. refused: the error the whole source gets."""

    position: int
    made: Made | None = None
    broken: str | None = None
    refused: str | None = None


@dataclass(frozen=True)
class _Keys:
    """What a step's workers are asked for, made when its turn comes: a million tuples would be 200 MB."""

    chunks: Sequence[Tensor]
    seeds: tuple[int, int] | None

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[list[Key]]:
        for chunk in self.chunks:
            yield [(index, self.seeds) for index in chunk.tolist()]


@dataclass(frozen=True)
class Decoder:
    """Items of a source as tensors of one shape (C, H, W), for a DataLoader's workers."""

    source: Items
    shape: tuple[int, int, int]
    crop: float
    resample: Image.Resampling
    augmentation: Augmentation

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Decoded:
        return decoded_item(self.source, key, self._decoded)

    def stacked(self, labels: Sequence[Target]) -> Tensor:
        """Those of a batch's images."""
        if all(isinstance(label, int) for label in labels):
            return torch.tensor(labels, dtype=torch.int64)
        return torch.from_numpy(np.stack(labels))

    def _decoded(self, image: Picture, label: Target | None, draw: np.random.Generator | None) -> Made:
        picture = opened(image, self.source.where, self.shape[0])
        made = self._from_tensor(picture, draw) if isinstance(picture, Tensor) else self._from_pil(picture, draw)
        return Made(made, label)

    def _from_tensor(self, image: Tensor, draw: np.random.Generator | None) -> Tensor:
        size = self.shape[1:]
        if draw is not None:
            if self.augmentation.cropped and self.augmentation.crop is None and image.shape[1:] != size:
                left, top, right, bottom = random_box(image.shape[2], image.shape[1], draw, self.augmentation.scale)
                image = image[:, top:bottom, left:right]
            else:
                seeded = torch.Generator().manual_seed(int(draw.integers(2**63)))
                image = shifted(image.unsqueeze(0), self.augmentation._replace(flip=False), seeded).squeeze(0)
            if self.augmentation.flip and draw.random() < 0.5:
                image = image.flip(2)
        if image.shape[1:] == size:
            return image
        return resized(image.unsqueeze(0), size, self.resample.name.lower()).squeeze(0)

    def _from_pil(self, image: Image.Image, draw: np.random.Generator | None) -> Tensor:
        height, width = self.shape[1:]
        if draw is not None and self.augmentation.cropped:
            image = image.resize(
                (width, height), self.resample, box=random_box(*image.size, draw, self.augmentation.scale)
            )
        else:
            resized = self._resized(image.size)
            image = image if image.size == resized else image.resize(resized, self.resample)
            left, top = round((image.size[0] - width) / 2), round((image.size[1] - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        if draw is not None and self.augmentation.flip and draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        array = np.asarray(image)
        return torch.from_numpy((array[None] if array.ndim == 2 else array.transpose(2, 0, 1)).copy())

    def _resized(self, own: tuple[int, int]) -> tuple[int, int]:
        """(width, height) before the centre is cut out.

        torchvision's rounding: the longer side is cut to a whole number, the crop's corner rounded.
        """
        height, width = self.shape[1:]
        if self.crop == 1 and own == (width, height):
            return own
        short, target = min(own), max(round(max(height, width) / self.crop), height, width)
        return (
            target if own[0] == short else int(target * own[0] / short),
            target if own[1] == short else int(target * own[1] / short),
        )


Making = Callable[[Picture, Target | None, np.random.Generator | None], Made]


def decoded_item(source: Items, key: Key, make: Making) -> Decoded:
    """The item as ``make`` makes it of (image, label, what random numbers are drawn from).

    Never raises: what a worker raises would reach the user as a page of text.
    """
    index, seeds = key
    image: Picture | None = None
    try:
        image, label = source.item(index)
        draw = None if seeds is None else np.random.default_rng([seed % 2**63 for seed in (*seeds, index)])
        return Decoded(index, make(image, label, draw))
    except DataError as error:
        return Decoded(index, refused=str(error))
    except Exception as error:
        name = source.name(index, image)
        no_image = isinstance(error, UnidentifiedImageError)
        reason = f"is no {', '.join(FORMATS)}, or damaged" if no_image else first_line(error)
        return Decoded(index, broken=f"{name} ({reason.removeprefix(f'{name}: ')})")


def opened(
    image: Picture, where: str, channels: int, turned: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image | Tensor:
    """A PIL image of that many channels; of an array or a tensor (C, H, W), uint8 or float32.

    turned: what is done to a file's picture before it is converted, which loses what it says of itself.
    """
    if isinstance(image, str | Path) and str(image).lower().endswith(".npy"):
        image = opened_array(image)
    if isinstance(image, str | Path | bytes):
        with file_of(image) as file, Image.open(file, formats=FORMATS) as stored:
            if stored.width * stored.height > _MOST_PIXELS:
                raise ValueError(f"declares {stored.width} x {stored.height} pixels, more than {_MOST_PIXELS:,}")
            return _converted(stored if turned is None else turned(stored), channels)
    if isinstance(image, Image.Image):
        return _converted(image, channels)
    if isinstance(image, np.ndarray):
        if image.size > 4 * _MOST_PIXELS:
            raise ValueError(f"declares {image.size:,} numbers, more than {4 * _MOST_PIXELS:,}")
        plain = as_tensor(np.array(image))
        image = channels_first(plain.unsqueeze(0), last=True)[0] if plain.dim() in (2, 3) else plain
    elif isinstance(image, Tensor) and image.dim() in (2, 3):
        image = channels_first(image.unsqueeze(0))[0]
    if not isinstance(image, Tensor) or image.dim() != 3:
        raise DataError(
            f"{where}: yields {_kind(image)} for an image; "
            "yield a path, a PIL image, an (H, W[, C]) array or a (C, H, W) tensor"
        )
    if image.shape[0] != channels:
        if image.shape[0] != 1:
            raise DataError(
                f"{where}: yields an image of {image.shape[0]} channels where {channels} are expected; "
                "convert them all, or pass channels="
            )
        image = image.expand(channels, -1, -1)
    return image if image.dtype == torch.uint8 else image.float()


def _converted(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits, which PIL would clip instead of scale
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("holds floats, and nothing says which of them is white; save it in 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    mode = "L" if channels == 1 else "RGB"
    image.load()
    return image if image.mode == mode else image.convert(mode)


def resized(images: Tensor, size: tuple[int, ...], interpolation: str) -> Tensor:
    """(N, C, H, W) to the size, antialiased; uint8 stays uint8."""
    smooth = interpolation != "nearest"
    done = F.interpolate(
        images.float(), size=size, mode=interpolation, antialias=smooth, align_corners=False if smooth else None
    )
    if images.dtype == torch.uint8:
        return done.round().clamp(0, 255).to(torch.uint8)
    return done.clamp(images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True))  # bicubic overshoots


class Decoding(Protocol):
    """Items of a source as tensors of one shape, as ``Decoder`` makes them: copied to a DataLoader's workers."""

    @property
    def source(self) -> Items: ...

    def __len__(self) -> int: ...
    def __getitem__(self, key: Key) -> Decoded: ...
    def stacked(self, labels: Sequence[Target]) -> Tensor: ...


def _collated(decoder: Decoding, full: bool, items: list[Decoded]) -> Batch:
    """full: keep the batch's size."""
    where = decoder.source.where
    broken = {one.position: one.broken for one in items if one.broken is not None}
    refused = next((one.refused for one in items if one.refused is not None), None)
    if refused is not None:
        return Batch(None, None, broken, refused)
    good = [one.made for one in items if one.made is not None]
    if full and good:  # the next sound one stands in, round the end
        places = np.flatnonzero([one.made is not None for one in items])
        good = [good[place % len(good)] for place in np.searchsorted(places, np.arange(len(items))).tolist()]
    images = [one.image for one in good]
    labels = [one.label for one in good if one.label is not None]
    if not images:
        return Batch(None, None, broken)
    faults = {one.position: one.made.faults for one in items if one.made is not None and one.made.faults}
    kinds = sorted({f"{tuple(image.shape)} {image.dtype}" for image in images})
    if len(kinds) > 1:
        text = f"{where}: yields images of different kinds ({kinds[0]} and {kinds[1]}); yield one kind, or pass size="
        return Batch(None, None, broken, text)
    stacked = decoder.stacked(labels) if len(labels) == len(images) else None
    return Batch(torch.stack(images), stacked, broken, faults=faults)


class Batch(NamedTuple):
    """What became of a batch's items.

    images: (N, C, H, W); None where none could be read. broken: index -> which and why. refused: why they can't be one.
    faults: index -> what was wrong with its label, and how often.
    """

    images: Tensor | None
    labels: Tensor | None
    broken: dict[int, str]
    refused: str | None = None
    faults: dict[int, dict[str, int]] | None = None


def decoded(
    decoder: Decoding, chunks: Sequence[Tensor], seeds: tuple[int, int] | None, workers: int, pinned: bool
) -> Iterator[Batch]:
    """The items that each chunk names, as uint8 or float (N, C, H, W), by ``workers`` processes; 0: in this one.

    seeds: (shuffle_seed, epoch) to augment from; None: as for evaluation. pinned: in memory that a GPU copies from
    without waiting.
    """
    where, workers = decoder.source.where, _startable(workers)
    loader: DataLoader[Batch] = DataLoader(
        decoder,  # type: ignore[arg-type]
        batch_sampler=_Keys(chunks, seeds),
        num_workers=workers,
        collate_fn=functools.partial(_posted_batch, decoder, seeds is not None),
        worker_init_fn=_begin_worker,
        pin_memory=pinned,
        generator=torch.Generator().manual_seed(0),  # else it draws a number from the global one
    )
    return _uninterrupted(loader, where)


_FEWER = "pass fewer workers, or workers=0 to decode in this process"


def _uninterrupted(loader: DataLoader[Batch], where: str) -> Iterator[Batch]:
    """The loader's batches; a worker that dies is told of in a line."""
    try:
        batches = iter(loader)
    except OSError as error:
        raise DataError(f"{where}: its workers can't be started ({why(error)}); {_FEWER}") from error
    if getattr(batches, "_worker_pids_set", False):  # else a signal's handler raises in whatever runs when one dies;
        torch._C._remove_worker_pids(id(batches))  # so it is the next batch that tells, within 5 seconds
        batches._worker_pids_set = False  # type: ignore[attr-defined]
    while True:
        try:
            with warnings.catch_warnings():
                _quiet_pictures()
                batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            raise DataError(f"{where}: a worker stopped ({first_line(error)}); {_FEWER}") from error
        yield batch._replace(images=_tensor(batch.images), labels=_tensor(batch.labels))


def _startable(workers: int) -> int:
    """As many, or none where there is no room for their locks, which lie in shared memory (/dev/shm)."""
    try:
        _ = [multiprocessing.Lock() for _ in range(4 * workers + 16 if workers else 0)]
    except OSError as error:
        logging.getLogger("rarefy").warning("no workers can be started (%s): this process decodes", why(error))
        return 0
    return workers


def _posted_batch(decoder: Decoding, full: bool, items: list[Decoded]) -> Batch:
    return _posted(_collated(decoder, full, items))


def _posted(batch: Batch) -> Batch:
    """A worker's batch, in shared memory; where that is full, as arrays, which go through a pipe.

    Left to torch, it is put there when it is sent: what goes wrong then is dropped, and waited for without end.
    """
    if get_worker_info() is None:
        return batch
    try:
        for tensor in (batch.images, batch.labels):
            if tensor is not None:
                tensor.share_memory_()
        return batch
    except (RuntimeError, OSError):
        arrays: Any = [None if tensor is None else tensor.numpy() for tensor in (batch.images, batch.labels)]
        return batch._replace(images=arrays[0], labels=arrays[1])


def _tensor(sent: Tensor | np.ndarray | None) -> Tensor | None:
    return torch.from_numpy(sent) if isinstance(sent, np.ndarray) else sent


def _begin_worker(worker: int) -> None:
    """What was there before the fork stays shared: garbage collection would write to each object, 40 MB a worker."""
    gc.freeze()
    _quiet_pictures()


def _quiet_pictures() -> None:
    """Pillow warns of odd files besides refusing them; what it refuses is told in our own words."""
    warnings.filterwarnings("ignore", module="PIL")


def all_broken(source: Items) -> dict[int, str]:
    """Every unreadable image among the first ten thousand."""
    decoder = Decoder(source, (3, 8, 8), 1.0, Image.Resampling.NEAREST, Augmentation())
    seen = range(min(len(source), MOST_SCANNED))
    if isinstance(source.items, list):
        with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
            _quiet_pictures()
            texts = list(pool.map(lambda index: decoder[index, None].broken, seen))
    else:
        texts = [decoder[index, None].broken for index in seen]
    return {index: text for index, text in enumerate(texts) if text is not None}


def generator(*seeds: int) -> torch.Generator:
    """Seeded from several numbers, so that neighbours do not give related streams."""
    entropy = np.random.SeedSequence([seed % 2**63 for seed in seeds]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy >> np.uint64(1)))


def _kind(value: object) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
    return f"a {type(value).__name__}{shape}"
