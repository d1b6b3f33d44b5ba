"""What a source of images becomes: ``Arrays`` in memory, or ``Items`` that are decoded when asked for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from rarefy.data.boxes.scenes import Fault
from rarefy.data.shards import LeftOut, shuffled
from rarefy.data.targets import ClassIndices, Target, Targets, as_tensor, in_words
from rarefy.errors import DataError, FormatError
from rarefy.system.files import opened

Split = Literal["train", "val"]
Picture = str | Path | bytes | Image.Image | np.ndarray | Tensor  # an image, as a dataset yields it
FORMS = (
    "give imagefolder:PATH, csv:FILE, npz:FILE, tar:PATH, parquet:PATH, torchvision:NAME?root=PATH, sklearn:digits, "
    "package.module:function, (images, labels), a map-style dataset or a DataLoader of one"
)
MOST_STORED = 2**29  # bytes of a picture's file
# Datasets of torchvision that lie in memory as uint8: the attributes that hold images and labels.
_IN_MEMORY = {
    "CIFAR10": ("data", "targets"),
    "CIFAR100": ("data", "targets"),
    "MNIST": ("data", "targets"),
    "FashionMNIST": ("data", "targets"),
    "KMNIST": ("data", "targets"),
    "EMNIST": ("data", "targets"),
    "SVHN": ("data", "labels"),
    "STL10": ("data", "labels"),
    "USPS": ("data", "targets"),
}


class Store(Protocol):
    """Items in large files. blocks: (N,) int64, which of them lie together; window: see ``shards.shuffled``."""

    labels: Tensor | None
    names: tuple[str, ...] | None
    blocks: Tensor
    window: int
    left_out: LeftOut

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def name(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True, eq=False, repr=False)
class Arrays:
    """Images in memory. images: (N, C, H, W), uint8 or float32; labels: (N, ...), or None."""

    where: str
    images: Tensor
    labels: Tensor | None
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> Arrays:
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, images=self.images[indices], labels=labels)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.images.dtype} {tuple(self.images.shape)}".encode())
        for tensor in (self.images, self.labels):
            if tensor is not None:
                digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False, repr=False)
class Items:
    """Images that are decoded when asked for. labels: (N, ...) where known without decoding.

    items: what a dataset yields; indices: (N,) int64, which of them. names: of the classes. targets: how labels are
    read.
    store: the items again, where they lie together in large files: it knows their places, and what in the files is no
    item. notes: what was decided while reading, in a line each. faults: what is wrong with the annotations, and was
    mended.
    """

    where: str
    items: Any
    indices: Tensor
    labels: Tensor | None
    names: tuple[str, ...] | None = None
    store: Store | None = None
    targets: Targets = field(default_factory=ClassIndices)
    notes: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def shuffled(self, places: Tensor, generator: torch.Generator) -> Tensor:
        """These places in random order; of a store, what lies together stays near each other."""
        if self.store is None:
            return places[torch.randperm(len(places), generator=generator)]
        return places[shuffled(self.store.blocks[self.indices[places]], self.store.window, generator)]

    def name(self, index: int, image: object = None) -> str:
        """What a message calls the item at ``index``, whose image may be known."""
        if self.store is not None:
            return self.store.name(int(self.indices[index]))
        return str(image) if isinstance(image, str | Path) else f"item {index}"

    def take(self, indices: Tensor) -> Items:
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, indices=self.indices[indices], labels=labels)

    def item(self, index: int) -> tuple[Picture, Target | None]:
        """Image and label of the item at ``index`` of this source."""
        item = _pair(self.items[int(self.indices[index])])
        pair = isinstance(item, tuple | list)
        image, label = (item[0], item[1] if self.labels is None else None) if pair else (item, None)
        if self.labels is not None:
            label = self.labels[index]
        return image, None if label is None else self.targets.of_one(label, f"{self.where}: item {index}")

    def item_or_none(self, index: int) -> tuple[Picture | None, Target | None]:
        """The item, or nothing where it can't be read: that is told when its batch comes."""
        try:
            return self.item(index)
        except DataError:
            raise
        except Exception:
            return None, None

    def fingerprint(self) -> str:
        """Of the files' bytes (of the pixels, where there are none) and the labels; not of where the files lie."""
        if self.store is not None:
            chosen = f"{self.indices.tolist()} {self.labels.tolist() if self.labels is not None else None}"
            return hashlib.sha256(f"{self.store.fingerprint()} {chosen}".encode()).hexdigest()

        def one(index: int) -> bytes:
            image, label = self.item(index)
            try:
                return _digest(image) + f" {label}\n".encode()
            except (OSError, FormatError) as error:
                why = getattr(error, "strerror", None) or str(error).removeprefix(f"{image!s}: ")
                raise DataError(f"{self.where}: {image!s}: {why}; restore the file or take it off the list") from error

        digest = hashlib.sha256()
        if isinstance(self.items, list):  # of paths, mostly
            with ThreadPoolExecutor(8) as pool:
                for piece in pool.map(one, range(len(self)), chunksize=16):
                    digest.update(piece)
        else:
            for index in range(len(self)):
                digest.update(one(index))
        return digest.hexdigest()


Source = Arrays | Items


def of_store(text: str, store: Store) -> Items:
    return Items(text, store, torch.arange(len(store)), store.labels, store.names, store)


def from_object(given: Any, where: str, targets: Targets) -> Source:
    """Of arrays, a pair of them, or any map-style dataset. Raises DataError for anything else.

    A loader's dataset is taken: in what batches and order it is read, who reads it says.
    """
    if isinstance(given, DataLoader):
        given = given.dataset
    if isinstance(given, Tensor | np.ndarray):
        given = (given, None)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], list):
        given = (_stacked(given[0], where), given[1])
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor | np.ndarray):
        images = _as_images(given[0], where)
        labels, names = (None, None) if given[1] is None else _numbered(given[1], len(images), where, targets)
        return Arrays(where, images, labels, names)
    cls = type(given)
    if cls.__module__.startswith("torchvision.") and cls.__name__ in _IN_MEMORY and given.transforms is None:
        images, labels = (getattr(given, name) for name in _IN_MEMORY[cls.__name__])
        names = tuple(map(str, getattr(given, "classes", None) or ())) or None
        images = _as_images(images, where)
        return Arrays(where, images, targets.of_all(labels, len(images), where), names)
    map_style = callable(getattr(given, "__getitem__", None)) and callable(getattr(given, "__len__", None))
    if not map_style or isinstance(given, str | dict):
        raise DataError(f"{where}: {cls.__name__} is not a data source; {FORMS}")
    classes = getattr(given, "classes", None)
    names = tuple(map(str, classes)) if isinstance(classes, list | tuple) and classes else None
    known = _known_labels(given)
    labels, words = (None, None) if known is None else _numbered(known, len(given), where, targets)
    return Items(where, given, torch.arange(len(given)), labels, words or names, targets=targets)


def _stacked(given: list[Any], where: str) -> Any:
    """One array of images in a list; anything else in a list as it is."""
    if not given or not all(isinstance(one, Tensor | np.ndarray) and one.ndim in (2, 3) for one in given):
        return given
    shapes = {tuple(one.shape) for one in given}
    if len(shapes) > 1:
        few = " and ".join(str(shape) for shape in sorted(shapes)[:2])
        raise DataError(f"{where}: a list of images of several shapes, {few}; give a list of (image, label)")
    return np.stack([np.asarray(one.detach().cpu() if isinstance(one, Tensor) else one) for one in given])


def _numbered(given: object, count: int, where: str, targets: Targets) -> tuple[Tensor, tuple[str, ...] | None]:
    """Labels as the targets read them; of words their places in order, and the words."""
    words = in_words(given) if isinstance(targets, ClassIndices) else None
    labels, names = words or (given, None)
    return targets.of_all(labels, count, where), names


_IMAGES, _LABELS = ("image", "img", "pixel_values", "x"), ("label", "labels", "target", "fine_label", "y")


def _pair(item: Any) -> Any:
    """``{"image": ..., "label": ...}``, as datasets of Hugging Face yield it, as (image, label)."""
    if not isinstance(item, dict):
        return item
    image, label = (next((item[name] for name in names if name in item), None) for names in (_IMAGES, _LABELS))
    if image is None:
        raise DataError(
            f"an item is a dictionary of {', '.join(map(str, item)) or 'nothing'}, and none is called "
            f"{', '.join(_IMAGES)}; yield (image, label)"
        )
    return image if label is None else (image, label)


def _known_labels(dataset: Any) -> object | None:
    """Labels without decoding an image: of a list of (path, label), or where torchvision's datasets keep them."""
    if isinstance(dataset, list | tuple):
        pairs = all(isinstance(item, tuple | list) and len(item) == 2 for item in dataset)
        known = pairs and all(isinstance(item[0], str | Path) or isinstance(item[1], str) for item in dataset)
        return [label for _, label in dataset] if known and dataset and dataset[0][1] is not None else None
    for name in ("targets", "labels", "_labels"):
        labels = getattr(dataset, name, None)
        if isinstance(labels, list | tuple | np.ndarray | Tensor) and len(labels) == len(dataset):
            return labels if getattr(dataset, "target_transform", None) is None else None
    return None


def _as_images(given: Tensor | np.ndarray, where: str) -> Tensor:
    """(N, C, H, W), uint8 or float32, sharing memory where it can."""
    if isinstance(given, np.ndarray) and not given.flags.writeable:
        given = given.copy()
    try:
        images = as_tensor(given)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: images of type {given.dtype} can't be read; pass uint8, or float in [0, 1]"
        ) from error
    if images.dim() in (3, 4):
        images = channels_first(images)
    if images.dim() != 4:
        raise DataError(
            f"{where}: images have shape {tuple(images.shape)}; pass (N, C, H, W), (N, H, W, C) or (N, H, W), "
            "such as images.reshape(-1, CHANNELS, HEIGHT, WIDTH)"
        )
    if 0 in images.shape:
        raise DataError(
            f"{where}: images have shape {tuple(images.shape)}, which holds no pixel; pass at least one image"
        )
    if images.dtype == torch.uint8:
        return images
    if images.is_floating_point():
        images = images.float()
        if not bool(torch.isfinite(images).all()):
            bad = int((~torch.isfinite(images).flatten(1).all(1)).sum())
            raise DataError(f"{where}: {bad} of {len(images)} images hold NaN or infinity; leave them out")
        return images
    if images.dtype == torch.bool:
        return images.to(torch.uint8) * 255
    whole = images.to(torch.int64) if not images.is_complex() else None  # of unsigned types torch knows no least
    if whole is None or int(whole.min()) < 0 or int(whole.max()) > 255:
        raise DataError(
            f"{where}: images of type {images.dtype} leave 0..255; pass uint8, or float in [0, 1] "
            "(of 16 bits: images / 65535)"
        )
    return whole.to(torch.uint8)


def channels_first(images: Tensor, last: bool = False) -> Tensor:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) as (N, C, H, W), a view.

    Channels are what there are 1, 3 or 4 of, else what stands beside two equal sides, or is below 17 where the other is
    above 31; where none of it tells, they are first, or last.
    """
    if images.dim() == 3:
        return images.unsqueeze(1)
    _, front, middle, back = images.shape
    few = (1, 3, 4)
    ways = [
        (front in few, back in few),
        (middle == back, front == middle),
        (front < 17 and back > 31, back < 17 and front > 31),
    ]
    decided = next((behind for before, behind in ways if before is not behind), last)
    return images.permute(0, 3, 1, 2) if decided else images


def held_out(labels: Tensor | None, count: int, split: Split) -> Tensor:
    """Indices of a split: a fifth is "val", by a fixed seed; of each class a fifth, where labels are class indices.

    Of two images of a class one is held out.
    """
    key = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    indices = labels is not None and labels.dim() == 1 and not labels.is_floating_point()
    classes = labels if labels is not None and indices else torch.zeros(count, dtype=torch.int64)
    order = torch.from_numpy(np.lexsort((key.numpy(), classes.numpy())))
    sizes = torch.bincount(classes)
    rank = torch.empty(count, dtype=torch.int64)
    rank[order] = torch.arange(count) - (torch.cumsum(sizes, 0) - sizes)[classes[order]]
    held = rank < torch.maximum((sizes.double() / 5).round().long(), (sizes > 1).long())[classes]
    return torch.nonzero(held if split == "val" else ~held).squeeze(1)


def relabelled(source: Source, names: Sequence[str]) -> Source:
    """The source with labels that count these class names. Raises DataError for a class that is not among them."""
    place = {name: label for label, name in enumerate(names)}
    unknown = [name for name in source.names or () if name not in place]
    if unknown:
        raise DataError(
            f"{source.where}: class {unknown[0]!r} is in val and not in train ({len(unknown)} such); "
            "both need the same names"
        )
    labels = torch.tensor([place[name] for name in source.names or ()])[source.labels]
    return dataclasses.replace(source, labels=labels, names=tuple(names))


def _digest(image: Picture) -> bytes:
    if isinstance(image, str | Path):
        with opened(image, MOST_STORED) as file:
            return hashlib.file_digest(file, "sha256").digest()
    return hashlib.sha256(_bytes(image)).digest()


def _bytes(image: bytes | Image.Image | np.ndarray | Tensor) -> bytes:
    if isinstance(image, Image.Image):
        return f"{image.mode} {image.size}".encode() + image.tobytes()
    array = np.ascontiguousarray(image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image))
    return f"{array.dtype} {array.shape}".encode() + array.tobytes()
