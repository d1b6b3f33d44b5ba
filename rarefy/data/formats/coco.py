"""``coco:IMAGES?annotations=FILE``: boxes in COCO's json beside a folder of pictures.

Without ``annotations`` the file is the folder's own ``_annotations.coco.json`` or ``instances.json``. Classes are the
categories in the order of their ids (COCO's own 1 to 90 are 0 to 79), whatever they are called; ``iscrowd`` and
``ignore`` are ignored boxes; ``bbox`` is left, top, width, height in pixels of the picture whose size the file states:
as pycocotools and Detectron2 take it, that is the picture turned as EXIF says, unless the size says that it was not.
Masks and what else the file holds are passed over while it is read, so that memory is that of the boxes.

A file without annotations is of unlabelled pictures.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

import numpy as np
import torch

from rarefy.data.boxes.scenes import AREA, CLASS, COLUMNS, IGNORED, Faults, Scenes, existing, picture_below, scenes
from rarefy.data.items import Items, Source, Split
from rarefy.errors import DataError, FormatError
from rarefy.system.files import content as bytes_of
from rarefy.system.files import replacing
from rarefy.system.memory import available
from rarefy.system.strict_json import Json, parse

_OWN = ("_annotations.coco.json", "instances.json")
_PASSED_OVER = frozenset({"segmentation", "keypoints", "caption", "licenses", "info", "segments_info"})


def read(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    place, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(options.keys() - {"annotations"})
    if unknown:
        raise DataError(f"{text}: unknown option {unknown[0]!r}; write coco:IMAGES?annotations=FILE")
    root = Path(os.path.expanduser(place))
    if not root.is_dir():
        raise DataError(
            f"{text}: {root}: {'is a file' if root.exists() else 'no such folder'}; "
            "give the folder of the pictures: coco:IMAGES?annotations=FILE"
        )
    content = _content(text, _file(text, root, options.get("annotations")))
    faults = Faults()
    pictures = _pictures(text, content, root, faults)
    if "annotations" not in content:
        return Items(text, list(pictures.paths), torch.arange(len(pictures.paths)), None, faults=faults.all()), False
    names, place_of = _categories(text, content)
    owners, rows = _rows(text, content, pictures, place_of, faults)
    found = scenes(pictures.paths, owners, rows, names, faults)
    return Items(text, found, torch.arange(len(found)), None, found.names, faults=faults.all()), False


def write(found: Scenes, file: str | Path, sizes: Sequence[tuple[int, int]], scores: np.ndarray | None = None) -> None:
    """Pictures by the names of their files, and their boxes. sizes: (width, height) of each. scores: one a box."""
    counts = np.diff(found.starts)
    sides = np.repeat(np.array(sizes, np.float64).reshape(-1, 2), counts, 0)
    stated = found.rows[:, -2:].astype(np.float64)
    shares = (stated == 1).all(1)[:, None]
    corners = found.rows[:, :4].astype(np.float64) * np.where(shares, np.tile(sides, 2), 1)
    owners = np.repeat(np.arange(len(found)), counts)
    annotations: list[dict[str, object]] = []
    for index, (owner, (left, top, right, bottom)) in enumerate(zip(owners.tolist(), corners.tolist(), strict=True)):
        row = found.rows[index]
        box = [left, top, right - left, bottom - top]
        annotations.append(
            {
                "id": index + 1, "image_id": owner + 1, "category_id": int(row[CLASS]) + 1, "bbox": box,
                "area": float(row[AREA]) if math.isfinite(row[AREA]) else box[2] * box[3],
                "iscrowd": int(row[IGNORED] > 0),
            }
        )  # fmt: skip
        if scores is not None:
            annotations[-1]["score"] = float(scores[index])
    content = {
        "images": [
            {"id": index + 1, "file_name": Path(path).name, "width": size[0], "height": size[1]}
            for index, (path, size) in enumerate(zip(found.paths, sizes, strict=True))
        ],
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(found.names)],
    }
    with replacing(file) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")


def _file(text: str, root: Path, given: str | None) -> Path:
    tried = [root / name for name in _OWN]
    if given is not None:
        tried = [Path(os.path.expanduser(given)), root / given]
    file = next((one for one in tried if one.is_file()), None)
    if file is None:
        raise DataError(f"{text}: {tried[0]}: no such file; say which one: coco:IMAGES?annotations=FILE")
    return file


def _content(text: str, file: Path) -> dict[str, Json]:
    size, free = file.stat().st_size, available()
    if free is not None and 4 * size > free:
        raise DataError(
            f"{text}: {file} has {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free; "
            "take the masks (segmentation) out of it"
        )
    try:
        return parse(bytes_of(file, size), file, most_values=max(1, size), without=_PASSED_OVER)
    except FormatError as error:
        raise DataError(f"{error}; give a file of annotations in COCO's form (images, annotations, categories)") from (
            error
        )


class _Pictures(NamedTuple):
    """paths: of those that are there; sizes: (width, height) of each, 0 where not stated. place: id -> index."""

    paths: list[str]
    sizes: np.ndarray
    place: dict[object, int]
    missing: frozenset[object]


def _pictures(text: str, content: Mapping[str, Json], root: Path, faults: Faults) -> _Pictures:
    """Two entries of one file are one picture."""
    listed = _listed(text, content, "images")
    index: dict[str, list[str]] = {}
    ids, paths, sizes = [], [], []
    for one in listed:
        name = one.get("file_name")
        if not isinstance(name, str) or not name or not _is_id(one.get("id")):
            raise DataError(f"{text}: the picture {str(one)[:80]} has no id or no file_name; mend the file")
        ids.append(one["id"])
        paths.append(picture_below(root, name, index))
        sizes.append([_number(one.get(side)) for side in ("width", "height")])
    if len(set(ids)) != len(ids):
        twice = next(one for place, one in enumerate(ids) if one in ids[:place])
        raise DataError(f"{text}: two pictures have the id {twice!r}, so whose boxes are whose? mend the file")
    there = existing(paths, faults)
    first: dict[str, int] = {}
    place: dict[object, int] = {}
    for one, path, good in zip(ids, paths, there.tolist(), strict=True):
        if good and path in first:
            faults.add("pictures are listed twice, and taken once, with the boxes of both", path)
        if good:
            place[one] = first.setdefault(path, len(first))
    kept = np.array([place[one] for one in ids if one in place], np.int64)
    stated = np.zeros((len(first), 2))
    stated[kept] = np.array(sizes, np.float64).reshape(-1, 2)[there]
    if not first:
        raise DataError(
            f"{text}: of its {len(ids)} pictures none is in {root}"
            f"{f' ({paths[0]} is not there)' if paths else ''}; give the folder that they lie in"
        )
    return _Pictures(list(first), stated, place, frozenset(set(ids) - place.keys()))


def _categories(text: str, content: Mapping[str, Json]) -> tuple[list[str], dict[object, int]]:
    """Names in the order of the ids; id -> class."""
    listed = _listed(text, content, "categories")
    ids = [one.get("id") for one in listed]
    if not ids or not all(map(_is_id, ids)) or len(set(ids)) != len(ids):
        raise DataError(f"{text}: its categories have no id each, or two have the same; mend the file")
    ordered = sorted(listed, key=lambda one: (isinstance(one["id"], str), one["id"]))
    names = [str(one.get("name", one["id"])) for one in ordered]
    return names, {one["id"]: place for place, one in enumerate(ordered)}


def _rows(
    text: str, content: Mapping[str, Json], pictures: _Pictures, place_of: Mapping[object, int], faults: Faults
) -> tuple[list[int], np.ndarray]:
    owners: list[int] = []
    rows: list[tuple[float, ...]] = []
    for one in _listed(text, content, "annotations"):
        picture, category, box = one.get("image_id"), one.get("category_id"), one.get("bbox")
        called = f"annotation {one.get('id')}"
        index = pictures.place.get(picture) if _is_id(picture) else None
        if index is None:
            if not _is_id(picture) or picture not in pictures.missing:
                faults.add("annotations are of an image_id that is no picture's, and left out", f"{called}: {picture}")
            continue
        if not _is_id(category) or category not in place_of:
            faults.add("boxes have a category_id that is no category's, and are left out", f"{called}: {category}")
            continue
        numbers = [_number(value, math.nan) for value in box] if isinstance(box, list) else []
        if len(numbers) != 4:
            faults.add("annotations have no bbox of four numbers, and are left out", called)
            continue
        left, top, width, height = numbers
        ignored = float(bool(one.get("iscrowd")) or bool(one.get("ignore")))
        area = _number(one.get("area"), math.nan)
        owners.append(index)
        rows.append((left, top, left + width, top + height, place_of[category], ignored, area, 0.0, 0.0))
    table = np.array(rows, np.float64).reshape(-1, COLUMNS)
    table[:, -2:] = pictures.sizes[owners] if owners else table[:, -2:]
    table[table[:, AREA] <= 0, AREA] = math.nan
    return owners, table


def _listed(text: str, content: Mapping[str, Json], key: str) -> list[dict[str, Json]]:
    listed = content.get(key)
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise DataError(
            f"{text}: its annotations have no list {key!r} of objects; give a file in COCO's form "
            "(images, annotations, categories)"
        )
    return listed


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _number(value: object, other: float = 0.0) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else other
