from __future__ import annotations

import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rarefy.data.parquet import Parquet
from rarefy.data.shards import Shards, shuffled
from rarefy.errors import DataError

Split = Literal["train", "val"]
_FORMS = "give imagefolder:PATH, tar:PATH, parquet:PATH, torchvision:NAME?root=PATH, sklearn:digits, package.module:function, (images, labels) or a map-style dataset"
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
# Options of torchvision's datasets that are truth values or numbers: which text stands for which value.
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True, eq=False, repr=False)
class Arrays:
    """Images in memory. images: (N, C, H, W), uint8 or float32; labels: (N,) int64, or None."""

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
    """Images that are decoded when asked for. items: what a dataset yields; labels: (N,) int64 where known without decoding.

    store: the same, where the items lie together in large files: it knows their places, and what in the files is no item.
    """

    where: str
    items: Any
    indices: Tensor
    labels: Tensor | None
    names: tuple[str, ...] | None = None
    store: Shards | Parquet | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def shuffled(self, places: Tensor, generator: torch.Generator) -> Tensor:
        """These places in random order; of a store, what lies together stays near each other."""
        if self.store is None:
            return places[torch.randperm(len(places), generator=generator)]
        return places[shuffled(self.store.blocks[self.indices[places]], self.store.window, generator)]

    def name(self, index: int, image: Any = None) -> str:
        """What a message calls the item at ``index``, whose image may be known."""
        if self.store is not None:
            return self.store.name(int(self.indices[index]))
        return str(image) if isinstance(image, str | Path) else f"item {index}"

    def take(self, indices: Tensor) -> Items:
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, indices=self.indices[indices], labels=labels)

    def item(self, index: int) -> tuple[Any, int | None]:
        """Image (a path, a PIL image, an array or a tensor) and label of the item at ``index`` of this source."""
        item = self.items[int(self.indices[index])]
        if not isinstance(item, tuple | list):
            return item, None if self.labels is None else int(self.labels[index])
        image, label = item[0], item[1] if self.labels is None else self.labels[index]
        return image, None if label is None else as_label(label, f"{self.where}: item {index}")

    def fingerprint(self) -> str:
        """Of the files' bytes (or the decoded pixels, where there are no files) and the labels; not of where the files lie."""
        if self.store is not None:
            chosen = f"{self.indices.tolist()} {self.labels.tolist() if self.labels is not None else None}"
            return hashlib.sha256(f"{self.store.fingerprint()} {chosen}".encode()).hexdigest()
        on_disk = isinstance(self.items, list)

        def one(index: int) -> bytes:
            image, label = self.item(index)
            try:
                return hashlib.sha256(_bytes(image)).digest() + f" {label}\n".encode()
            except OSError as error:
                raise DataError(
                    f"{self.where}: {image}: {error.strerror or error}; restore the file or take it off the list"
                ) from error

        digest = hashlib.sha256()
        if on_disk:
            with ThreadPoolExecutor(8) as pool:
                for piece in pool.map(one, range(len(self)), chunksize=16):
                    digest.update(piece)
        else:
            for index in range(len(self)):
                digest.update(one(index))
        return digest.hexdigest()


Source = Arrays | Items


def as_label(label: Any, where: str) -> int:
    """A class index from whatever a dataset yields as label."""
    array = np.asarray(label)
    if array.size != 1:
        raise DataError(
            f"{where}: its label has shape {array.shape}; labels are class indices (one-hot: pass labels.argmax(1))"
        )
    try:
        value = int(array.reshape(()).item())
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: its label {label!r} is not a class index (0, 1, ...)") from error
    if value < 0 or value != array.reshape(()).item():
        raise DataError(f"{where}: its label {value} is not a class index (0, 1, ...)")
    return value


def _from_object(given: Any, where: str) -> Source:
    if isinstance(given, Tensor | np.ndarray):
        given = (given, None)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor | np.ndarray):
        images = _as_images(given[0], where)
        return Arrays(where, images, None if given[1] is None else _as_labels(given[1], len(images), where))
    cls = type(given)
    if cls.__module__.startswith("torchvision.") and cls.__name__ in _IN_MEMORY and given.transforms is None:
        images, labels = (getattr(given, name) for name in _IN_MEMORY[cls.__name__])
        names = tuple(map(str, getattr(given, "classes", None) or ())) or None
        images = _as_images(images, where)
        return Arrays(where, images, _as_labels(labels, len(images), where), names)
    if not (callable(getattr(given, "__getitem__", None)) and callable(getattr(given, "__len__", None))) or isinstance(
        given, str | dict
    ):
        raise DataError(f"{where}: {cls.__name__} is not a data source; {_FORMS}")
    names = getattr(given, "classes", None)
    return Items(
        where,
        given,
        torch.arange(len(given)),
        _known_labels(given, where),
        tuple(map(str, names)) if isinstance(names, list | tuple) and names else None,
    )


def _known_labels(dataset: Any, where: str) -> Tensor | None:
    """Labels of a dataset, without decoding an image: of a list of (path, label), or where torchvision's datasets keep them."""
    if isinstance(dataset, list | tuple):
        if not all(
            isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str | Path) for item in dataset
        ):
            return None
        return (
            _as_labels([label for _, label in dataset], len(dataset), where)
            if dataset and dataset[0][1] is not None
            else None
        )
    for name in ("targets", "labels", "_labels"):
        found = getattr(dataset, name, None)
        if isinstance(found, list | tuple | np.ndarray | Tensor) and len(found) == len(dataset):
            return (
                _as_labels(found, len(dataset), where) if getattr(dataset, "target_transform", None) is None else None
            )
    return None


def _as_images(given: Any, where: str) -> Tensor:
    """(N, C, H, W), uint8 or float32, sharing memory where it can."""
    if isinstance(given, np.ndarray) and not given.flags.writeable:
        given = given.copy()
    try:
        images = torch.as_tensor(given).detach().cpu()
    except TypeError as error:
        raise DataError(
            f"{where}: images of type {given.dtype} can't be read; pass uint8, or float in [0, 1]"
        ) from error
    if images.dim() == 3:
        images = images.unsqueeze(1)
    if images.dim() != 4:
        raise DataError(
            f"{where}: images have shape {tuple(images.shape)}; pass (N, C, H, W), (N, H, W, C) or (N, H, W)"
        )
    if images.shape[3] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        images = images.permute(0, 3, 1, 2)
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
    if images.is_complex() or int(images.min()) < 0 or int(images.max()) > 255:
        raise DataError(f"{where}: images of type {images.dtype} leave 0..255; pass uint8, or float in [0, 1]")
    return images.to(torch.uint8)


def _as_labels(given: Any, count: int, where: str) -> Tensor:
    try:
        labels = torch.as_tensor(np.asarray(given) if isinstance(given, list | tuple) else given).detach().cpu()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: labels can't be read ({_first_line(error)}); pass class indices (0, 1, ...), one an image"
        ) from error
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.dim() != 1:
        raise DataError(
            f"{where}: labels have shape {tuple(labels.shape)}; pass class indices (N,) (one-hot: labels.argmax(1))"
        )
    if len(labels) != count:
        raise DataError(f"{where}: {count} images but {len(labels)} labels; pass one label an image")
    whole = labels.to(torch.int64)
    wrong = (whole != labels) | (whole < 0)
    if bool(wrong.any()):
        first = int(wrong.int().argmax())
        raise DataError(
            f"{where}: label {labels[first].item()} of image {first} is not a class index (0, 1, ...); {int(wrong.sum())} of {count} are not"
        )
    return whole


def _held_out(labels: Tensor | None, count: int, split: Split) -> Tensor:
    """Indices of a split: of each class (of all, where labels are unknown) a fifth is "val", by a fixed seed."""
    key = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    classes = torch.zeros(count, dtype=torch.int64) if labels is None else labels
    order = torch.from_numpy(np.lexsort((key.numpy(), classes.numpy())))
    sizes = torch.bincount(classes)
    rank = torch.empty(count, dtype=torch.int64)
    rank[order] = torch.arange(count) - (torch.cumsum(sizes, 0) - sizes)[classes[order]]
    held = rank < (sizes.double() / 5).round().long()[classes]
    return torch.nonzero(held if split == "val" else ~held).squeeze(1)


def _bytes(image: Any) -> bytes:
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    if isinstance(image, Image.Image):
        return f"{image.mode} {image.size}".encode() + image.tobytes()
    array = np.ascontiguousarray(image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image))
    return f"{array.dtype} {array.shape}".encode() + array.tobytes()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
