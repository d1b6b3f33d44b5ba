"""Parquet files of images, as Hugging Face datasets are stored: a column of ``{bytes, path}``, or of bytes, and labels.

Labels are read at once, images a row group at a time, when one of its rows is asked for; the last few row groups are
kept, ``CACHE`` bytes of them a process. So an epoch's order keeps to few row groups at a time (``shards.shuffled``,
with a window of what the cache holds), and memory does not grow with what was read. Class names come from the file's
own description, where it has one.

A file says of itself how large it is, and a page of zeros unfolds a thousandfold. So the headers of a row group's pages
are walked before Arrow unpacks one, and what a dictionary repeats is read in parts. Where the pages lie is read here,
too (``_struct``, Thrift's compact protocol): asked for it, pyarrow aborts the process where the file contradicts
itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.data.shards import MOST_BYTES, LeftOut, digest_of, plain
from rarefy.data.targets import MOST_CLASSES
from rarefy.errors import DataError, FormatError, MissingDependency
from rarefy.system import files, strict_json

CACHE = 128 * 2**20  # bytes of row groups kept, a process
MOST_IN_A_GROUP = 2**30
# Bytes that a column of a row group may unfold to: so many, and so many for each stored one; and with what a dictionary
# repeats.
UNFOLDED, FOLD, REPEATED = 2**27, 4, 2**28
A_HEADER, A_FOOTER = 2**20, 2**24  # bytes of a page's header and of the file's description, at most
DEEPEST = 32  # structs and lists in each other

Struct = dict[int, object]  # field -> value, of one that Thrift wrote
MOST_OPEN = 16


class Parquet:
    """The rows of Parquet files.

    labels: (N,) int64 or None; blocks: (N,) int64, the row group of each; window: see ``shards.shuffled``.
    image, label: names of the columns; None: found by type, and by the name "label". Raises DataError for a file that
    has none, or is none.
    """

    def __init__(self, where: str, files: Sequence[str], image: str | None = None, label: str | None = None):
        self.where, self.files, self.left_out = where, list(files), LeftOut()
        self._opened: dict[tuple[int, int], Any] = {}
        self._cached: dict[tuple[int, int], Any] = {}
        self._footers: dict[int, list[Struct]] = {}  # row groups of a file
        groups: list[tuple[int, int, int]] = []  # file, row group in it, first row in it
        counts: list[int] = []
        labels: list[np.ndarray] = []
        self._words: dict[str, int] = {}  # labels in words
        stored = 0
        for index, file in enumerate(self.files):
            opened = self._file(index)
            schema = opened.schema_arrow
            self._image = _image_column(file, schema, image)
            self._label = _label_column(file, schema, label)
            self.names = _names(schema, self._label)
            row = 0
            for group in range(opened.num_row_groups):
                size, rows = (_whole(self._about(index, group), field) for field in (2, 3))
                if not 0 <= rows <= os.path.getsize(file):  # an image takes at least a byte
                    raise DataError(f"{file}: declares {rows:,} rows in fewer bytes; restore it")
                if size > MOST_IN_A_GROUP:
                    raise DataError(
                        f"{file}: row group {group} takes {size:,} bytes; write the file with row_group_size=1000 or so"
                    )
                groups.append((index, group, row))
                counts.append(rows)
                stored += size
                row += rows
                if self._label is not None:
                    labels.append(self._labels(index, group, rows))
        self._groups = torch.tensor(groups, dtype=torch.int64).reshape(-1, 3)
        sizes = torch.tensor(counts, dtype=torch.int64)
        self.blocks = torch.arange(len(counts)).repeat_interleave(sizes)
        self._row = torch.arange(len(self.blocks)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        self.labels: Tensor | None = None
        label_of = torch.from_numpy(np.concatenate(labels)) if labels else torch.zeros(0, dtype=torch.int64)
        if self._words:
            self.names = tuple(sorted(self._words))
            places = {self._words[name]: place for place, name in enumerate(self.names)}
            order = torch.tensor([places[number] for number in range(len(places))])
            label_of = torch.where(label_of >= 0, order[label_of.clamp(min=0)], label_of)
        labelled = label_of >= 0
        if bool(labelled.any()):  # else none has one
            for place in (~labelled).nonzero().flatten().tolist():
                self.left_out.add(self.name(place), "has no class index")
            self.blocks, self._row, self.labels = (one[labelled] for one in (self.blocks, self._row, label_of))
        self.window = max(1, int(CACHE * len(self.blocks) / max(1, stored)))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> bytes:
        """The image as stored. Raises OSError where there is none."""
        value = self._column(int(self.blocks[index]))[int(self._row[index])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise OSError("the row holds no bytes of an image")
        if len(data) > MOST_BYTES:
            raise OSError(f"{len(data):,} bytes are too many for an image")
        return bytes(data)

    def name(self, index: int) -> str:
        file, _, first = self._groups[int(self.blocks[index])].tolist()
        return plain(f"{self.files[file]}: row {first + int(self._row[index])}")

    def fingerprint(self) -> str:
        return digest_of(self.files)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}, "_cached": {}}

    def _file(self, index: int) -> Any:
        """The open file, of this process."""
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise MissingDependency("pyarrow", "parquet") from error
        key = (os.getpid(), index)
        if key not in self._opened:
            while len(self._opened) >= MOST_OPEN:
                del self._opened[next(iter(self._opened))]
            file = files.plain(self.files[index], kind=DataError)
            try:
                self._opened[key] = parquet.ParquetFile(file)
                _ = self._opened[key].schema_arrow  # which may be damaged on its own
            except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
                raise DataError(
                    f"{self.files[index]}: is no Parquet file that can be read ({plain(str(error))}); "
                    "restore it or take it off the list"
                ) from error
        return self._opened[key]

    def _about(self, index: int, group: int) -> Struct:
        """What the file says of a row group. Raises DataError."""
        try:
            if index not in self._footers:
                found = _footer(self.files[index]).get(4)
                self._footers[index] = found if isinstance(found, list) else []
            about = self._footers[index][group]
        except (IndexError, ValueError, OSError) as error:
            raise DataError(
                f"{self.files[index]}: is no Parquet file that can be read; restore it or take it off the list"
            ) from error
        return about if isinstance(about, dict) else {}

    def _labels(self, index: int, group: int, rows: int) -> np.ndarray:
        """Those of a row group, -1 where there is none."""
        file, name = self.files[index], str(self._label)
        column = self._read(index, group, name)
        if len(column) != rows:
            raise DataError(f"{file}: row group {group} holds {len(column):,} labels for {rows:,} rows; restore it")
        values = column.to_pylist()
        if any(isinstance(value, str) for value in values):  # numbered as they come, put in order when all are known
            values = [
                None if value is None else self._words.setdefault(str(value), len(self._words)) for value in values
            ]
            if len(self._words) > MOST_CLASSES:
                raise DataError(f"{file}: {plain(name)!r} holds more than {MOST_CLASSES:,} words, which are no classes")
        try:
            return np.array([-1 if value is None else value for value in values], dtype=np.int64)
        except (OverflowError, ValueError, TypeError) as error:
            raise DataError(f"{file}: a label of {plain(name)!r} is no class index (0, 1, ...); mend it") from error

    def _read(self, index: int, group: int, column: str) -> Any:
        """A column of a row group. Raises DataError for damaged pages."""
        import pyarrow

        file = self._file(index)
        repeated = _check_pages(self.files[index], self._about(index, group), group, column)
        try:
            parts = self._parts(index, group, column, repeated) if repeated else []
            if parts:
                table = pyarrow.Table.from_batches(parts)
            else:
                table = file.read_row_group(group, columns=[column], use_threads=False)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{self.files[index]}: row group {group} can't be read ({plain(str(error))}); restore the file"
            ) from error
        if table.num_columns != 1:
            raise DataError(f"{self.files[index]}: has no column {plain(column)!r} that stands alone; rename it")
        return table.column(0)

    def _parts(self, index: int, group: int, column: str, repeated: int) -> list[Any]:
        """The column in parts, each as large as its dictionary of so many bytes lets it be. Raises DataError."""
        rows, parts, held = max(1, REPEATED // 4 // repeated), [], 0
        for part in self._file(index).iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
            parts.append(part)
            held += part.nbytes
            if held > REPEATED + repeated:
                raise DataError(
                    f"{self.files[index]}: row group {group} repeats its images to more than {REPEATED:,} bytes; "
                    "write the file with row_group_size=100 or so, and without a dictionary"
                )
        return parts

    def _column(self, block: int) -> Any:
        """The images of a row group; the ones used longest ago make room."""
        key = (os.getpid(), block)
        if key in self._cached:
            self._cached[key] = self._cached.pop(key)
            return self._cached[key]
        file, group, _ = self._groups[block].tolist()
        column, rows = self._read(file, group, self._image), _whole(self._about(file, group), 3)
        if len(column) != rows:
            told = f"row group {group} holds {len(column):,} images for {rows:,} rows; restore it"
            raise DataError(f"{self.files[file]}: {told}")
        self._cached = {one: held for one, held in self._cached.items() if one[0] == key[0]}
        while self._cached and sum(held.nbytes for held in self._cached.values()) + column.nbytes > CACHE:
            del self._cached[next(iter(self._cached))]
        self._cached[key] = column
        return column


# --------------------------------------------------------------------------------------------------------------- pages


def _check_pages(file: str, about: Struct, group: int, column: str) -> int:
    """Bytes of the column's dictionary, 0 where it has none. Raises DataError for pages that unfold too far.

    about: the row group, as the file describes it.
    """
    dictionary, chunks = 0, about.get(1)
    for chunk in chunks if isinstance(chunks, list) else ():
        told = chunk.get(3) if isinstance(chunk, dict) else None
        path = told.get(3) if isinstance(told, dict) else None
        if not isinstance(told, dict) or not isinstance(path, list) or path[:1] != [column.encode()]:
            continue
        begin = min(place for place in (_whole(told, 9), _whole(told, 11)) if place > 0 or place == _whole(told, 9))
        end = begin + _whole(told, 7)
        if not 0 <= begin <= end <= os.path.getsize(file):
            raise DataError(f"{file}: row group {group} lies outside of the file; restore it")
        try:
            pages = list(_pages(file, begin, end))
        except (IndexError, ValueError, OSError) as error:
            raise DataError(f"{file}: row group {group} has no pages that can be read; restore the file") from error
        unfolded = sum(one for _, one in pages)
        if unfolded > min(MOST_IN_A_GROUP, max(UNFOLDED, FOLD * (end - begin))):
            raise DataError(
                f"{file}: row group {group} unfolds from {end - begin:,} bytes to {unfolded:,}; "
                "write the file with row_group_size=100 or so"
            )
        dictionary += sum(one for kind, one in pages if kind == 2)
    return dictionary


def _pages(file: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """(kind, unpacked bytes) of each page between two places; raises IndexError or ValueError for what are none."""
    with files.opened(file, kind=DataError) as source:
        while begin < end:
            source.seek(begin)
            told, length = _struct(source.read(min(A_HEADER, end - begin)), 0)
            kind, unfolded, stored = (_whole(told, field, -1) for field in (1, 2, 3))
            if kind < 0 or unfolded < 0 or stored < 0:
                raise ValueError("no page")
            yield kind, unfolded
            begin += length + stored


def _footer(file: str) -> Struct:
    with files.opened(file, kind=DataError) as source:
        size = source.seek(0, os.SEEK_END)
        source.seek(size - 8)
        length = int.from_bytes(source.read(4), "little")
        if not 0 < length <= min(size - 8, A_FOOTER):
            raise ValueError("no footer")
        source.seek(size - 8 - length)
        return _struct(source.read(length), 0)[0]


def _struct(data: bytes, place: int, depth: int = 0) -> tuple[Struct, int]:
    """A struct's fields by number, and where it ends. Raises IndexError or ValueError for what is none."""
    found: Struct = {}
    last = 0
    while True:
        byte = data[place]
        place, kind = place + 1, byte & 0x0F
        if kind == 0:
            return found, place
        if byte >> 4:
            last += byte >> 4
        else:
            last, place = _number(data, place)
        if kind > 2:  # else a flag, which is its kind
            found[last], place = _value(data, place, kind, depth + 1)


def _value(data: bytes, place: int, kind: int, depth: int) -> tuple[object, int]:
    if depth > DEEPEST:
        raise ValueError("too deep")
    match kind:
        case 1 | 2 | 3:
            return data[place], place + 1
        case 4 | 5 | 6:
            return _number(data, place)
        case 7:
            return None, place + 8
        case 8:
            length, place = _varint(data, place)
            return data[place : place + length], place + length
        case 9 | 10:
            head = data[place]
            size, place = (head >> 4, place + 1) if head < 0xF0 else _varint(data, place + 1)
            values = []
            for _ in range(size):  # of which each takes a byte at least
                value, place = _value(data, place, head & 0x0F, depth + 1)
                values.append(value)
            return values, place
        case 12:
            return _struct(data, place, depth + 1)
    raise ValueError("a kind that Parquet has not")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[place]
        place, value, shift = place + 1, value | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            return value, place
    raise ValueError("a number without end")


def _number(data: bytes, place: int) -> tuple[int, int]:
    value, place = _varint(data, place)
    return (value >> 1) ^ -(value & 1), place


def _whole(told: Struct, field: int, missing: int = 0) -> int:
    value = told.get(field, missing)
    return value if isinstance(value, int) else missing


def _image_column(file: str, schema: Any, asked: str | None) -> str:
    import pyarrow.types as kinds

    def holds(kind: Any) -> bool:
        return bool(
            kinds.is_binary(kind)
            or kinds.is_large_binary(kind)
            or (kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0)
        )

    fit = [field.name for field in schema if holds(field.type)]
    if asked is not None and asked not in fit:
        raise DataError(f"{file}: {asked!r} is no column of images; have {', '.join(fit) or 'none'}")
    if asked is None and len(fit) != 1:
        raise DataError(
            f"{file}: has {len(fit)} columns of bytes ({', '.join(fit) or ', '.join(schema.names)}); "
            "name that of the images with ?image=NAME"
        )
    return asked or str(fit[0])


def _label_column(file: str, schema: Any, asked: str | None) -> str | None:
    import pyarrow.types as kinds

    fit = [field.name for field in schema if kinds.is_integer(field.type)]
    words = [field.name for field in schema if kinds.is_string(field.type) or kinds.is_large_string(field.type)]
    if asked in words or (asked is None and not fit and "label" in words):
        return asked or "label"
    if asked is not None and asked not in fit:
        have = ", ".join([*fit, *words]) or "none"
        raise DataError(f"{file}: {asked!r} is no column of whole numbers or words; have {have}")
    if asked is None and len(fit) > 1 and "label" not in fit:
        raise DataError(
            f"{file}: has {len(fit)} columns of whole numbers ({', '.join(fit)}); "
            "name that of the labels with ?label=NAME"
        )
    return asked or ("label" if "label" in fit else fit[0] if fit else None)


def _names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """Class names as ``datasets`` writes them into the file."""
    try:
        about = strict_json.parse((schema.metadata or {})[b"huggingface"], "huggingface")
        names = about["info"]["features"][label]["names"]
    except (KeyError, FormatError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None
