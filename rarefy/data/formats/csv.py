"""``csv:FILE``: a table of pictures and their labels, as contests hand them out: one row a picture, labels in words or
whole numbers.

=============================  ========================================================================================
the pictures' column           ``?image=NAME``, else the one whose cells name pictures: by path from the table's
                               folder or from above it, or by name below it, with or without its ending
the labels' column             ``?label=NAME``, else the one called label, class, target or the like, else the only
                               other one; else one column a class, of 0 and 1: of several in a row all are true
a column of splits             called split, set or the like, with words such as train and test: it divides the rows
=============================  ========================================================================================

Cells are divided by commas, semicolons or tabs; a first row that names no picture holds the columns' names.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qsl

import torch

from rarefy.data.formats.imagefolder import images_below
from rarefy.data.items import Items, Source, Split
from rarefy.data.shards import SPLITS
from rarefy.data.targets import ClassIndices, in_words
from rarefy.errors import DataError
from rarefy.system.files import content

_LABELS = ("label", "labels", "class", "target", "category", "y", "class_name", "label_name", "classname", "diagnosis",
           "breed", "species")  # fmt: skip
_SPLITS = ("split", "set", "subset", "data set", "dataset", "data_set", "partition", "fold")
_MOST_BYTES = 1 << 28
_LOOKED_AT = 64  # rows, to find the pictures' column

Rows = Sequence[Sequence[str]]


def read(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    given, _, query = rest.partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(options.keys() - {"image", "label"})
    if unknown:
        raise DataError(f"{text}: unknown option {unknown[0]!r}; have image and label, the names of the columns")
    path = Path(os.path.expanduser(given))
    if not path.is_file():
        raise DataError(f"{text}: {'is a folder' if path.is_dir() else 'no such file'}; give a table, csv:labels.csv")
    rows = _rows(text, path)
    places = _places(path.parent)
    names, rows = _headed(rows, places)
    image = _column(text, names, options["image"]) if "image" in options else _pictures(rows, places)
    if image is None:
        raise DataError(
            f"{text}: no column names pictures below {path.parent} (the first row: {', '.join(rows[0])[:100]}); "
            "put the table above them, or say ?image=COLUMN"
        )
    rows, divided = _of_split(names, rows, split)
    label = _labels(text, names, options.get("label"), image, rows)
    files = [_place(row[image], places) for row in rows]
    missing = [row[image] for row, file in zip(rows, files, strict=True) if file is None]
    if missing:
        raise DataError(
            f"{text}: {len(missing)} of {len(rows)} pictures are not below {path.parent}, the first is "
            f"{missing[0][:100]!r}; put them there, or take them off the table"
        )
    paths = [str(one) for one in files]
    if not isinstance(label, int):
        columns = torch.tensor([[float(row[place]) for place in label] for row in rows])
        several = not bool((columns.sum(1) == 1).all())
        indices = ClassIndices().of_all(columns if several else columns.argmax(1), len(rows), text)
        return Items(text, paths, torch.arange(len(rows)), indices, tuple(names[place] for place in label)), divided
    cells = [row[label].strip() for row in rows]
    if not all(cells):
        raise DataError(f"{text}: {cells.count('')} of {len(rows)} rows have no label; take them off the table")
    labels, classes = in_words(cells) or (cells, None)
    indices = ClassIndices().of_all(labels, len(rows), text)
    return Items(text, paths, torch.arange(len(rows)), indices, classes), divided


def _rows(text: str, path: Path) -> Rows:
    try:
        table = content(path, _MOST_BYTES).decode("utf-8-sig")
        first = table.partition("\n")[0]
        divider = max(",;\t", key=first.count)
        found = [row for row in csv.reader(io.StringIO(table, newline=""), delimiter=divider) if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{text}: is no table of text ({error}); save it as CSV in UTF-8") from error
    width = len(found[0]) if found else 0
    short = next((place for place, row in enumerate(found) if len(row) != width), None)
    if width < 2 or short is not None:
        why = "has fewer than two columns" if short is None else f"row {short + 1} has not {width} cells as the first"
        raise DataError(f"{text}: {why}; give one row a picture: its file, its label")
    return found


def _places(root: Path) -> dict[str, str]:
    """What a cell may call a picture -> its path; names that two share are none."""
    found: dict[str, str] = {}
    by_name: dict[str, str | None] = {}
    for file in images_below(root):
        found[Path(os.path.relpath(file, root)).as_posix()] = file
        for name in dict.fromkeys((os.path.basename(file), Path(file).stem)):
            by_name[name] = None if name in by_name else file
    return {name: file for name, file in by_name.items() if file is not None} | found


def _place(cell: str, places: dict[str, str]) -> str | None:
    """The path of the picture that a cell names; as Windows spells it, or from a folder above the table, as well."""
    parts = cell.strip().replace("\\", "/").split("/")
    tried = ("/".join(parts[first:]) for first in range(len(parts)))
    return next((places[name] for name in tried if name in places), None)


def _headed(rows: Rows, places: dict[str, str]) -> tuple[Sequence[str], Rows]:
    """Names of the columns (numbers, where the table has none), and the rows below them."""
    if len(rows) < 2 or any(_place(cell, places) for cell in rows[0]):
        return [str(place) for place in range(len(rows[0]))], rows
    return [cell.strip() for cell in rows[0]], rows[1:]


def _pictures(rows: Rows, places: dict[str, str]) -> int | None:
    """The column most of whose cells name pictures."""
    found = [sum(_place(row[place], places) is not None for row in rows[:_LOOKED_AT]) for place in range(len(rows[0]))]
    return found.index(max(found)) if max(found) else None


def _of_split(names: Sequence[str], rows: Rows, split: Split) -> tuple[Rows, bool]:
    """The split's rows; and: does a column divide them?"""
    for place, name in enumerate(names):
        if name.lower() in _SPLITS:
            words = {row[place].strip().lower() for row in rows}
            asked = {one: [word for word in among if word in words][:1] for one, among in SPLITS.items()}
            if asked["train"] and asked["val"]:
                return [row for row in rows if row[place].strip().lower() in asked[split]], True
    return rows, False


def _column(text: str, names: Sequence[str], asked: str) -> int:
    if asked not in names:
        raise DataError(f"{text}: has no column {asked!r}; have {', '.join(names)}")
    return names.index(asked)


def _labels(text: str, names: Sequence[str], asked: str | None, image: int, rows: Rows) -> int | list[int]:
    """The place of the labels' column; of columns of 0 and 1, one a class, all their places."""
    if asked is not None:
        return _column(text, names, asked)
    passed = ("", "unnamed: 0", *_SPLITS)  # pandas' numbers of the rows have no name
    others = [place for place in range(len(names)) if place != image and names[place].lower() not in passed]
    called = [place for word in _LABELS for place in others if names[place].lower() == word]
    if called or len(others) == 1:
        return (called or others)[0]
    marks = [place for place in others if {row[place].strip() for row in rows} <= {"0", "1", "0.0", "1.0"}]
    if len(marks) > 1 and len(marks) == len(others):
        return marks
    raise DataError(f"{text}: which column holds the labels? Say ?label=COLUMN, of {', '.join(names)}")
