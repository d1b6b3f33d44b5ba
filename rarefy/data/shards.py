"""Tar shards: ``key.jpg`` and ``key.cls`` side by side in ``train-000000.tar`` ..., read where they lie.

A ``key.json`` that holds a whole number as ``label`` or ``cls`` names the class as well.

The layout is webdataset's. Each shard's headers are walked once, which gives place, size and label of every sample: 24
bytes a sample. From then on an image is one read at a known place. So the number of images is exact, an epoch's order
is a permutation computed before anything is read, step k begins without the steps before it, and memory does not grow
with what was read. The order keeps to the shards (``shuffled``): a slow or far disk is read nearly in sequence.

    shards in random order  ─▶  cut into windows of WINDOW samples  ─▶  random order in each

Nothing is extracted: names only pair image with label, so links, devices and paths that lead elsewhere do nothing.
Every size is checked against the file's before it is believed. What is no sample (a damaged header, a link, an image
without a label) is left out, counted, and the first are named; after damage, reading goes on at the next sound header.
The headers are parsed by ``tarfile`` of the standard library; the ``webdataset`` package would give a stream, whose
length is unknown, whose resume reads again what was read, and which unpickles members called ``.pkl`` or ``.pyd``.

Given up: compressed tars (a place in them can't be read alone), and the seconds of the walk: about 10 microseconds a
member.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rarefy.errors import DataError, FormatError
from rarefy.system.files import descriptor_of, opened, walk, why
from rarefy.system.strict_json import parse

WINDOW = 10_000  # samples in random order among themselves
MOST_BYTES = 64 * 2**20  # of one image as stored
MOST_JSON = 2**16  # bytes of what is said beside an image
MOST_NAMED = 100  # of what is left out, by name
MOST_OPEN = 64  # shards open at a time
MOST_FILES = 100_000  # that a pattern may name
BLOCK = 512
IMAGES = {"jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp", "gif"}
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}


@dataclass
class LeftOut:
    """What was no sample: how many, and the first of them with why."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, what: str, why: str) -> None:
        self.count += 1
        if len(self.first) < MOST_NAMED:
            self.first.append(f"{plain(what)} ({why})")


class Shards:
    """The samples of tar files.

    labels: (N,) int64 or None; blocks: (N,) int64, the shard of each; window: see ``shuffled``.
    """

    window = WINDOW

    def __init__(self, where: str, files: Sequence[str]):
        self.where, self.files, self.left_out = where, list(files), LeftOut()
        numbers = array("q")  # a list of tuples would be ten times as large
        for index, file in enumerate(self.files):
            for sample in _samples(file, self.left_out):
                numbers.extend((index, *sample))
        table = torch.from_numpy(np.array(numbers, dtype=np.int64).reshape(-1, 4).T.copy())
        labelled = table[3] >= 0
        self.labels: Tensor | None = None
        self.names: tuple[str, ...] | None = None
        if bool(labelled.any()):  # else none has one
            bare = (~labelled).nonzero().flatten()
            for place in bare[: MOST_NAMED + 1].tolist():
                shard, offset = table[:2, place].tolist()
                self.left_out.add(_name_at(self.files[shard], offset), "has no label in a .cls or .json beside it")
            self.left_out.count += max(0, len(bare) - MOST_NAMED - 1)
            table = table[:, labelled]
            self.labels = table[3]
        self.blocks, self._offset, self._size = (row.clone() for row in table[:3])
        self._open: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> bytes:
        """The image as stored. Raises OSError where the shard has become shorter."""
        size = int(self._size[index])
        data = os.pread(self._handle(int(self.blocks[index])), size, int(self._offset[index]))
        if len(data) != size:
            raise OSError(f"the shard ends after {len(data)} of its {size} bytes")
        return data

    def name(self, index: int) -> str:
        return plain(_name_at(self.files[int(self.blocks[index])], int(self._offset[index])))

    def fingerprint(self) -> str:
        return digest_of(self.files)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    def _handle(self, shard: int) -> int:
        """A file descriptor of this process: the oldest is closed when there are many."""
        key = (os.getpid(), shard)
        if key not in self._open:
            while len(self._open) >= MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[key] = descriptor_of(self.files[shard], kind=DataError)
        return self._open[key]


def shuffled(blocks: Tensor, window: int, generator: torch.Generator) -> Tensor:
    """A permutation of samples that lie in these blocks.

    Blocks in random order, then samples within windows of that order. blocks: (N,) int64. Each epoch's windows begin
    elsewhere, so that neighbours change.
    """
    _, block = blocks.unique(return_inverse=True)
    turn = torch.randperm(int(block.max()) + 1 if len(block) else 0, generator=generator)[block]
    order = turn.argsort(stable=True)
    shift = int(torch.randint(0, window, (1,), generator=generator))
    windows = (torch.arange(len(blocks)) + shift) // window
    draw = torch.rand(len(blocks), generator=generator, dtype=torch.float64)
    return order[torch.from_numpy(np.lexsort((draw.numpy(), windows.numpy())))]


def files_of(text: str, rest: str, split: str, suffix: str) -> tuple[list[str], bool]:
    """The files that ``rest`` names; and: were they chosen by the split's name?

    One, a folder's, ``a-{000..099}.tar``, or ``a-*.tar``. Raises DataError where there is none.
    """
    path = Path(os.path.expanduser(rest))
    divided = False
    if path.is_dir():
        found = (Path(folder, name) for folder, _, names in walk(path) for name in names)
        files = sorted(str(one) for one in found if one.name.endswith(suffix) and not one.name.startswith("."))
        of_split = {one: _named(files, words) for one, words in SPLITS.items()}
        if of_split["train"] and of_split["val"]:
            files, divided = of_split[split], True
    else:
        files = [one for part in _braces(str(path), text) for one in _matching(part, text)]
    missing = next((one for one in files if not os.path.exists(one)), None)
    if missing is not None or not files:
        what = f"{missing}: no such file" if missing else f"no *{suffix} in that folder"
        raise DataError(f"{text}: {what}; give a folder, a-{{000..099}}{suffix}, or a-*{suffix}")
    return files, divided


def _named(files: Sequence[str], words: Sequence[str]) -> list[str]:
    """The files whose names begin with the first of these words that any begins with."""
    by_word = ([one for one in files if re.match(rf"{word}(?![a-zA-Z])", Path(one).name)] for word in words)
    return next(filter(None, by_word), [])


def digest_of(files: Sequence[str]) -> str:
    """sha256 of the files' bytes, in this order; not of their names."""

    def one(file: str) -> bytes:
        with opened(file, kind=DataError) as content:
            return hashlib.file_digest(content, "sha256").digest()

    with ThreadPoolExecutor(4) as pool:
        return hashlib.sha256(b"".join(pool.map(one, files))).hexdigest()


def plain(text: str) -> str:
    """As it may be shown on a terminal."""
    return repr(text)[1:-1][:200]


class _Sample(NamedTuple):
    offset: int
    size: int
    label: int  # -1: none


class _Member(NamedTuple):
    name: str
    kind: bytes
    offset: int
    size: int


def _samples(file: str, left_out: LeftOut) -> Iterator[_Sample]:
    """Image and label of each key, of members that follow one another."""
    try:
        with opened(file, kind=DataError, buffering=2**20) as content:
            length = os.fstat(content.fileno()).st_size
            start = content.read(BLOCK)
            if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")):
                raise DataError(
                    f"{file}: is compressed, so no place in it can be read alone; "
                    "unpack it to a plain .tar (images are compressed already)"
                )
            read = _reader(content)
            for key, members in itertools.groupby(
                _members(file, length, read, left_out), key=lambda member: _key(member.name)[0]
            ):
                sample = _sample(f"{file}: {key}", list(itertools.islice(members, 64)), read, left_out)
                if sample is not None:
                    yield sample
    except OSError as error:
        raise DataError(f"{file}: can't be read ({why(error)}); restore it or take it off the list") from error


def _sample(
    what: str, members: Sequence[_Member], read: Callable[[int, int], bytes], left_out: LeftOut
) -> _Sample | None:
    image: _Member | None = None
    label, wrong = -1, ""
    for member in members:
        extension = _key(member.name)[1]
        if extension not in ("cls", "json") and extension not in IMAGES:
            continue
        if member.kind not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            wrong = "is a link or no plain file"
        elif extension == "cls":
            text = read(member.offset, min(member.size, 32)).strip()
            label = int(text) if member.size <= 32 and re.fullmatch(rb"[0-9]{1,9}", text) else -2
        elif extension == "json":
            label = _of_json(read(member.offset, min(member.size, MOST_JSON)), label)
        elif member.size > MOST_BYTES:
            wrong = f"{member.size:,} bytes are too many for an image"
        else:
            image = member
    if label == -2:
        wrong = wrong or "its .cls is no class index (0, 1, ...)"
    elif image is None and label >= 0:
        wrong = wrong or "has a label and no image"
    if wrong:
        left_out.add(what, wrong)
    return None if wrong or image is None else _Sample(image.offset, image.size, label)


def _of_json(content: bytes, label: int) -> int:
    """The class that a description beside the picture names; ``label`` where it names none."""
    try:
        about = parse(content, "json")
    except FormatError:
        return label
    found = next((about[name] for name in ("label", "cls") if name in about), None) if isinstance(about, dict) else None
    return found if label == -1 and type(found) is int and 0 <= found < 10**9 else label


def _members(file: str, length: int, read: Callable[[int, int], bytes], left_out: LeftOut) -> Iterator[_Member]:
    """The members, by their headers; after a damaged one, from the next that is sound."""
    place, name, sound = 0, "", True
    while place + BLOCK <= length:
        header = read(place, BLOCK)
        place += BLOCK
        try:
            info = _parsed(header)
            if not 0 <= info.size <= length - place:
                raise tarfile.HeaderError(f"declares {info.size:,} bytes where {length - place:,} follow")
        except (tarfile.HeaderError, ValueError) as error:
            if not header.strip(b"\0"):  # the end, or padding
                continue
            if sound:
                left_out.add(f"{file}: at byte {place - BLOCK:,}", f"damaged header: {error}")
            sound = False
            continue
        sound = True
        if info.kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE) and info.size <= 2**16:
            text = read(place, info.size)
            name = (
                _pax_path(text)
                if info.kind == tarfile.XHDTYPE
                else text.rstrip(b"\0").decode("utf-8", "surrogateescape")
            )
        elif info.kind not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            yield _Member(name or info.name, info.kind, place, info.size)
            name = ""
        stored = info.size if info.kind not in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE) else 0
        place += -(-stored // BLOCK) * BLOCK


def _parsed(header: bytes) -> _Member:
    """Name, kind and size as a header says.

    tarfile is asked where it is not of the plainest kind, because it takes five times as long.
    """
    checked = header[148:154]
    simple = len(header) == BLOCK and header[345] == 0 and checked.isdigit() and header[124:135].isdigit()
    if simple and int(checked, 8) == sum(header) - sum(header[148:156]) + 256:
        return _Member(
            header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"),
            header[156:157],
            0,
            int(header[124:135], 8),
        )
    info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    return _Member(info.name, info.type, 0, info.size)


def _pax_path(text: bytes) -> str:
    """``"27 path=a/long/name.jpg\\n"``."""
    path = re.search(rb"(?:^|\n)[0-9]{1,8} path=([^\n\0]*)\n", text)
    return path[1].decode("utf-8", "surrogateescape") if path else ""


def _key(name: str) -> tuple[str, str]:
    """``("a/0001", "jpg")``: the folder counts, and the extension begins at the first dot of the name."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def _reader(content: BinaryIO) -> Callable[[int, int], bytes]:
    def read(place: int, size: int) -> bytes:
        content.seek(place)
        return content.read(size)

    return read


def _name_at(file: str, offset: int) -> str:
    """What a message calls the member whose content begins there."""
    try:
        with opened(file, kind=DataError) as content:
            content.seek(offset - BLOCK)
            return f"{file}: {_parsed(content.read(BLOCK)).name}"
    except (tarfile.HeaderError, ValueError, OSError, DataError):
        return f"{file}: at byte {offset:,}"


def _braces(pattern: str, text: str) -> list[str]:
    """``a-{000..002}.tar`` -> three names. Raises DataError where they would be more than ``MOST_FILES``."""
    head, *pieces = re.split(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}", pattern)  # first, last and what follows, in turn
    spans = [(first, int(first), int(last)) for first, last in zip(pieces[::3], pieces[1::3])]
    count = math.prod(max(0, last - first + 1) for _, first, last in spans)
    if count > MOST_FILES:
        raise DataError(f"{text[:80]}: names {count:,} files, {MOST_FILES:,} at most; name fewer, or a folder")
    found = [head]
    for (written, first, last), behind in zip(spans, pieces[2::3]):
        width = len(written) if written.startswith("0") else 0
        numbers = [f"{number:0{width}d}" for number in range(first, last + 1)]
        found = [f"{one}{number}{behind}" for one in found for number in numbers]
    return found


def _matching(pattern: str, text: str) -> list[str]:
    """The files of a pattern with ``*``; itself, where there are none."""
    found = sorted(itertools.islice(glob.iglob(pattern), MOST_FILES + 1))
    if len(found) > MOST_FILES:
        raise DataError(f"{text[:80]}: names more than {MOST_FILES:,} files; name fewer, or a folder")
    return found or [pattern]
