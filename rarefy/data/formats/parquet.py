"""``parquet:PATH``: files of a Hugging Face dataset of images, named as shards are.

``?image=NAME&label=NAME`` where the columns are not plain: a column of ``{bytes, path}``, or of bytes, and labels.
Labels are read at once, images a row group at a time, when one of its rows is asked for; the last few row groups are
kept, ``CACHE`` bytes of them a process. So an epoch's order keeps to few row groups at a time (``shards.shuffled``,
with a window of what the cache holds), and memory does not grow with what was read. Class names come from the file's
own description, where it has one. What a row group unfolds to is known before it is unpacked (``parquet_pages``), and
what a dictionary repeats is read in parts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor

from rarefy.data.items import Source, Split, of_store
from rarefy.data.parquet_pages import MOST_IN_A_GROUP, REPEATED, Struct, check_pages, footer, whole
from rarefy.data.shards import MOST_BYTES, LeftOut, digest_of, files_of, plain
from rarefy.data.targets import MOST_CLASSES
from rarefy.errors import DataError, FormatError, MissingDependency
from rarefy.system import files, strict_json

CACHE = 128 * 2**20  # bytes of row groups kept, a process
MOST_OPEN = 16


def read(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    path, _, query = rest.partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(options.keys() - {"image", "label"})
    if unknown:
        raise DataError(f"{text}: unknown option {unknown[0]!r}; have image and label, the names of the columns")
    files, divided = files_of(text, path, split, ".parquet")
    return of_store(text, Parquet(text, files, **options)), divided


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
                size, rows = (whole(self._about(index, group), field) for field in (2, 3))
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
                found = footer(self.files[index]).get(4)
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
        repeated = check_pages(self.files[index], self._about(index, group), group, column)
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
        column, rows = self._read(file, group, self._image), whole(self._about(file, group), 3)
        if len(column) != rows:
            told = f"row group {group} holds {len(column):,} images for {rows:,} rows; restore it"
            raise DataError(f"{self.files[file]}: {told}")
        self._cached = {one: held for one, held in self._cached.items() if one[0] == key[0]}
        while self._cached and sum(held.nbytes for held in self._cached.values()) + column.nbytes > CACHE:
            del self._cached[next(iter(self._cached))]
        self._cached[key] = column
        return column


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
