"""Where images come from: text, arrays or a dataset become ``Arrays`` or ``Items``, and nothing else goes on from here.

=================================  ==============================================================================================
``imagefolder:PATH``               one folder a class, sorted by name, images at any depth below; a folder of images only is
                                   unlabelled. A folder that holds ``train`` and ``val`` (or ``validation``, ``valid``, ``test``)
                                   is entered at the right one
``images:PATH``                    all images below a folder, unlabelled, whatever its folders are called
``tar:PATH``                       shards of ``key.jpg`` with ``key.cls``, as webdataset lays them out: a folder of them, ``train-{000..099}.tar``, or
                                   ``train-*.tar`` (``shards.py``)
``parquet:PATH``                   files of a Hugging Face dataset of images, named likewise; ``?image=NAME&label=NAME`` where the columns are not
                                   plain (``parquet.py``)
``torchvision:NAME?root=PATH``     any dataset of ``torchvision.datasets``, as found on disk (nothing is downloaded); further options
                                   go to it, such as ``&split=letters``; ``train=`` and ``split=`` are filled in where not given
``sklearn:digits``                 1,797 grey images of 8x8, part of scikit-learn; levels 0..16 become 0..255
``package.module:function``        a function without arguments, or with ``split`` ("train" or "val"), that returns any of:
(images, labels)                   arrays or tensors, (N, C, H, W), (N, H, W, C) or (N, H, W), uint8 or float in [0, 1]
a map-style dataset                items are (image, label) or image; an image is a path, a PIL image, an (H, W[, C]) array or a
                                   (C, H, W) tensor
=================================  ==============================================================================================

A text source that knows no splits and is named for both ``train`` and ``val`` is cut in two: a fifth of each class, chosen by a fixed
seed, is for validation (``sklearn:digits`` always is). Arrays stay as they are (uint8 stays uint8, nothing is copied);
items are decoded when asked for. A folder of shards is divided by its files' names, if they begin with ``train`` and ``val`` (or a word like it). Hidden files and folders are passed over, which torchvision's ImageFolder does not.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rarefy.data.parquet import Parquet
from rarefy.data.shards import Shards, files_of, shuffled
from rarefy.errors import DataError, MissingDependency

Split = Literal["train", "val"]
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
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
                raise DataError(f"{self.where}: {image}: {error.strerror or error}; restore the file or take it off the list") from error

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


def load(given: Any, split: Split, *, shared: bool = False) -> Source:
    """The source for what the user gave. shared: the same text was given for both splits.

    Raises DataError for what is missing, empty or of a kind that can't be read, MissingDependency for a library.
    """
    where = given if isinstance(given, str) else split
    if isinstance(given, str):
        kind, colon, rest = given.partition(":")
        reader = _READERS.get(kind, _function)
        if not colon or not rest:
            raise DataError(f"{given!r}: not a data source; {_FORMS}")
        found, divided = reader(given, rest, split)
    else:
        found, divided = given, True
    source = found if isinstance(found, Arrays | Items) else _from_object(found, where)
    if len(source) == 0:
        raise DataError(f"{where}: has no images; {_FORMS}")
    return source if divided or not shared else source.take(_held_out(source.labels, len(source), split))


def as_label(label: Any, where: str) -> int:
    """A class index from whatever a dataset yields as label."""
    array = np.asarray(label)
    if array.size != 1:
        raise DataError(f"{where}: its label has shape {array.shape}; labels are class indices (one-hot: pass labels.argmax(1))")
    try:
        value = int(array.reshape(()).item())
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: its label {label!r} is not a class index (0, 1, ...)") from error
    if value < 0 or value != array.reshape(()).item():
        raise DataError(f"{where}: its label {value} is not a class index (0, 1, ...)")
    return value


def _imagefolder(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    root = Path(rest).expanduser()
    if not root.is_dir():
        raise DataError(
            f"{text}: {'is a file, not a folder' if root.exists() else 'no such folder'}; give the folder that holds one folder a class"
        )
    divided = False
    folders = _folders(root)
    if {folder.name for folder in folders} & set(_SPLIT_FOLDERS["train"]) and {folder.name for folder in folders} & set(
        _SPLIT_FOLDERS["val"]
    ):
        by_name = {folder.name: folder for folder in folders}
        root = next(by_name[name] for name in _SPLIT_FOLDERS[split] if name in by_name)
        folders, divided = _folders(root), True
    if not folders:
        files = _images(root)
        if not files:
            raise DataError(
                f"{text}: {root} has neither class folders nor images ({' '.join(EXTENSIONS)}); give the folder that holds one folder a class"
            )
        return Items(text, files, torch.arange(len(files)), None), divided
    found = [(file, label) for label, folder in enumerate(folders) for file in _images(folder)]
    labels = torch.tensor([label for _, label in found], dtype=torch.int64)
    counts = torch.bincount(labels, minlength=len(folders))
    if int(counts.min()) == 0:
        empty = [folder.name for folder, count in zip(folders, counts.tolist(), strict=True) if count == 0]
        raise DataError(
            f"{text}: no images ({' '.join(EXTENSIONS)}) in class folder {root / empty[0]} ({len(empty)} of {len(folders)} are empty); fill or delete it"
        )
    names = tuple(folder.name for folder in folders)
    return Items(text, [file for file, _ in found], torch.arange(len(found)), labels, names), divided


def _unlabelled(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    root = Path(rest).expanduser()
    if not root.is_dir():
        raise DataError(f"{text}: {'is a file, not a folder' if root.exists() else 'no such folder'}; give a folder of images")
    files = _images(root)
    if not files:
        raise DataError(f"{text}: {root} has no images ({' '.join(EXTENSIONS)}); give a folder of images")
    return Items(text, files, torch.arange(len(files)), None), False


def _folders(root: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _images(root: Path) -> list[str]:
    """Paths of the images at any depth, sorted, as text (a million Path objects would not be small)."""
    return [
        os.path.join(folder, name)
        for folder, _, names in sorted(os.walk(root, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    ]


def _tar(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    files, divided = files_of(text, rest, split, ".tar")
    return _of_store(text, Shards(text, files)), divided


def _parquet(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    path, _, query = rest.partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(options.keys() - {"image", "label"})
    if unknown:
        raise DataError(f"{text}: unknown option {unknown[0]!r}; have image and label, the names of the columns")
    files, divided = files_of(text, path, split, ".parquet")
    return _of_store(text, Parquet(text, files, **options)), divided


def _of_store(text: str, store: Shards | Parquet) -> Items:
    return Items(text, store, torch.arange(len(store)), store.labels, store.names, store)


def _torchvision(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MissingDependency("torchvision", "vision") from error
    name, _, query = rest.partition("?")
    options: dict[str, Any] = {
        key: _WORDS.get(value.lower(), int(value) if value.isdecimal() else value) for key, value in parse_qsl(query)
    }
    cls = getattr(datasets, name, None)
    if not isinstance(cls, type):
        near = difflib.get_close_matches(name, datasets.__all__, 3)
        raise DataError(
            f"{text}: torchvision.datasets has no {name!r}; {'perhaps ' + ' or '.join(near) if near else 'see its documentation'}"
        )
    accepted = inspect.signature(cls).parameters
    if "root" in accepted:
        options.setdefault("root", "data")
    has_train = "train" in accepted or name == "EMNIST"  # which hides it in **kwargs, and has a split of another meaning
    tries: list[dict[str, Any]] = [{}]
    divided = True
    if has_train and "train" not in options:
        tries = [{"train": split == "train"}]
    elif "split" in accepted and "split" not in options and not has_train:
        tries = [{"split": value} for value in (("train", "trainval") if split == "train" else ("val", "valid", "test"))]
    elif not has_train and "split" not in accepted:
        divided = False
    refusal: Exception | None = None
    for filled in tries:
        try:
            return _from_object(cls(**options, **filled), text), divided
        except DataError:
            raise
        except TypeError as error:
            raise DataError(f"{text}: {error}; options after ? go to torchvision.datasets.{name}{inspect.signature(cls)}") from error
        except (RuntimeError, OSError, ValueError) as error:
            refusal = error if refusal is None or not isinstance(error, ValueError) else refusal
    why = str(refusal).split("\n")[0]
    raise DataError(
        f"{text}: not found or not complete in {options.get('root', '.')} ({why}); nothing is downloaded here: put it there, or say ?root=PATH"
    ) from refusal


def _sklearn(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    if rest != "digits":
        raise DataError(f"{text}: only sklearn:digits is known; {_FORMS}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency("scikit-learn", "demo") from error
    found = load_digits()
    images = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    source = Arrays(text, images, torch.from_numpy(found.target.astype(np.int64)), tuple("0123456789"))
    return source.take(_held_out(source.labels, len(source), split)), True


def _function(text: str, rest: str, split: Split) -> tuple[Any, bool]:
    module = text.partition(":")[0]
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), rest)
        takes_split = "split" in inspect.signature(function).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{text}: can't be imported ({error}); {_FORMS}") from error
    try:
        return (function(split=split) if takes_split else function()), takes_split
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{text}: the function failed with {type(error).__name__}: {_first_line(error)}") from error


_READERS: dict[str, Callable[[str, str, Split], tuple[Any, bool]]] = {
    "imagefolder": _imagefolder,
    "images": _unlabelled,
    "tar": _tar,
    "parquet": _parquet,
    "torchvision": _torchvision,
    "sklearn": _sklearn,
}


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
    if not (callable(getattr(given, "__getitem__", None)) and callable(getattr(given, "__len__", None))) or isinstance(given, str | dict):
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
        if not all(isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str | Path) for item in dataset):
            return None
        return _as_labels([label for _, label in dataset], len(dataset), where) if dataset and dataset[0][1] is not None else None
    for name in ("targets", "labels", "_labels"):
        found = getattr(dataset, name, None)
        if isinstance(found, list | tuple | np.ndarray | Tensor) and len(found) == len(dataset):
            return _as_labels(found, len(dataset), where) if getattr(dataset, "target_transform", None) is None else None
    return None


def _as_images(given: Any, where: str) -> Tensor:
    """(N, C, H, W), uint8 or float32, sharing memory where it can."""
    if isinstance(given, np.ndarray) and not given.flags.writeable:
        given = given.copy()
    try:
        images = torch.as_tensor(given).detach().cpu()
    except TypeError as error:
        raise DataError(f"{where}: images of type {given.dtype} can't be read; pass uint8, or float in [0, 1]") from error
    if images.dim() == 3:
        images = images.unsqueeze(1)
    if images.dim() != 4:
        raise DataError(f"{where}: images have shape {tuple(images.shape)}; pass (N, C, H, W), (N, H, W, C) or (N, H, W)")
    if images.shape[3] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        images = images.permute(0, 3, 1, 2)
    if 0 in images.shape:
        raise DataError(f"{where}: images have shape {tuple(images.shape)}, which holds no pixel; pass at least one image")
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
        raise DataError(f"{where}: labels can't be read ({_first_line(error)}); pass class indices (0, 1, ...), one an image") from error
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.dim() != 1:
        raise DataError(f"{where}: labels have shape {tuple(labels.shape)}; pass class indices (N,) (one-hot: labels.argmax(1))")
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
