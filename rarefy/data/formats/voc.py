"""``voc:FOLDER``: Pascal VOC: an xml file a picture, beside it or in a folder of their own.

======================================  ==============================================================================
``Annotations/``, ``JPEGImages/``       or ``annotations/`` and ``images/``, or xml files and pictures in one folder
``ImageSets/Main/train.txt``            or ``train.txt`` in the folder: what a split holds, a name a line; ``val``, else
                                        ``test``, to judge on; without such lists all is one split
======================================  ==============================================================================

Classes are the names in all xml files of the folder, sorted, or those of ``voc:FOLDER?names=FILE``, a name a line.
``difficult`` is an ignored box. Coordinates count pixels from 1 to the last one inclusive, as VOC's authors do: 1 to W
is the whole width, 0 to W here (as in Detectron2). They are of the picture whose size the file states: turned as EXIF
says, unless the size says that it was not. A document type (entities) is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl
from xml.parsers import expat
from xml.sax.saxutils import escape

import numpy as np
import torch

from rarefy.data.boxes.scenes import COLUMNS, Faults, Scenes, existing, picture_below, scenes
from rarefy.data.formats.imagefolder import EXTENSIONS
from rarefy.data.items import Items, Source, Split
from rarefy.errors import DataError, FormatError, first_line
from rarefy.system.files import content as bytes_of
from rarefy.system.files import replacing

_LISTS: dict[Split, tuple[str, ...]] = {"train": ("train", "trainval"), "val": ("val", "valid", "test")}
_MOST_BYTES, _DEEPEST = 2**22, 16  # of an xml file: 10,000 boxes


class _Box(NamedTuple):
    name: str
    difficult: bool
    corners: tuple[float, ...]


class _Scene(NamedTuple):
    """What an xml file says. picture: its file name, "" where none is said. size: (width, height), 0 likewise."""

    picture: str
    size: tuple[float, float]
    boxes: tuple[_Box, ...]


def read(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    place, _, query = rest.partition("?")
    options = dict(parse_qsl(query))
    root = Path(os.path.expanduser(place))
    if not root.is_dir():
        raise DataError(
            f"{text}: {root}: {'is a file' if root.exists() else 'no such folder'}; give a folder of xml and pictures"
        )
    xml, pictures = (_inner(root, names) for names in (("annotations", "labels"), ("jpegimages", "images")))
    files = sorted(str(path) for path in xml.rglob("*.xml"))
    if not files:
        raise DataError(f"{text}: no xml files in {xml}; give the folder that holds Annotations/ and JPEGImages/")
    faults = Faults()
    read_files = {file: scene for file in files if (scene := _scene_or_none(file, faults)) is not None}
    names = _names(text, options, read_files.values(), faults)
    listed, divided = _listed(text, root, split)
    if listed is not None:
        wanted = set(listed)
        absent = sorted(wanted - {Path(file).stem for file in files})
        faults.add("listed pictures have no xml, and are left out", absent[0] if absent else "", len(absent))
        read_files = {file: scene for file, scene in read_files.items() if Path(file).stem in wanted}
    index: dict[str, list[str]] = {}
    paths = [_picture(pictures, file, scene, index) for file, scene in read_files.items()]
    there = existing(paths, faults)
    kept = [(path, scene) for path, scene, good in zip(paths, read_files.values(), there.tolist(), strict=True) if good]
    if not kept:
        raise DataError(
            f"{text}: none of the {len(paths)} annotated pictures of {split} is in {pictures}; put them there"
        )
    merged = {path: place for place, path in enumerate(dict.fromkeys(path for path, _ in kept))}
    faults.add("pictures are annotated twice, and taken once, with all boxes", kept[0][0], len(kept) - len(merged))
    owners, rows = [], []
    for path, scene in kept:
        for box in scene.boxes:
            if box.name in names:
                owners.append(merged[path])
                rows.append((*box.corners, names.index(box.name), float(box.difficult), math.nan, *scene.size))
    found = scenes(list(merged), owners, np.array(rows).reshape(-1, COLUMNS), names, faults)
    return Items(text, found, torch.arange(len(found)), None, found.names, faults=faults.all()), divided


def write(found: Scenes, folder: str | Path, sizes: Sequence[tuple[int, int]]) -> None:
    """An xml file for each picture into ``folder``. sizes: (width, height) of each."""
    for index, (width, height) in enumerate(sizes):
        path, rows = found[index]
        objects = []
        for row in rows.astype(np.float64):
            scale = np.array([width, height] * 2) if (row[-2:] == 1).all() else 1.0
            corners = row[:4] * scale + np.array([1, 1, 0, 0])
            inner = "".join(
                f"<{name}>{value:.8g}</{name}>"
                for name, value in zip(("xmin", "ymin", "xmax", "ymax"), corners.tolist(), strict=True)
            )
            name = escape(found.names[int(row[4])])
            difficult = int(row[5] > 0)
            objects.append(
                f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{inner}</bndbox></object>\n"
            )
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        whole = (
            f"<annotation>\n<filename>{escape(Path(path).name)}</filename>\n{size}\n{''.join(objects)}</annotation>\n"
        )
        with replacing(Path(folder) / f"{Path(path).stem}.xml") as partial:
            partial.write_text(whole, encoding="utf-8")


def _inner(root: Path, names: Sequence[str]) -> Path:
    """The folder in ``root`` of one of those names, in any case; else the root."""
    inside = {entry.name.lower(): Path(entry.path) for entry in os.scandir(root) if entry.is_dir()}
    return next((inside[name] for name in names if name in inside), root)


def _listed(text: str, root: Path, split: Split) -> tuple[list[str] | None, bool]:
    """Stems of the split's pictures, and: is there a list of the split?"""
    for place in (root / "ImageSets" / "Main", root / "ImageSets", root):
        have = {name: place / f"{name}.txt" for names in _LISTS.values() for name in names}
        have = {name: file for name, file in have.items() if file.is_file()}
        name = next((name for name in _LISTS[split] if name in have), None)
        if name is None:
            continue
        lines = bytes_of(have[name], _MOST_BYTES).decode("utf-8", "replace").splitlines()
        words = [line.split() for line in lines if line.strip()]
        # "name", "name.jpg", or of one class "name 1" and "name -1"
        stems = [word[0] for word in words if len(word) < 2 or word[1] != "-1"]
        ends = tuple(EXTENSIONS)
        stems = [Path(stem).stem if stem.lower().endswith(ends) else stem.rpartition("/")[2] for stem in stems]
        if not stems:
            raise DataError(f"{text}: {have[name]} lists no picture; fill it, or delete it")
        return stems, True
    return None, False


def _names(text: str, options: dict[str, str], read: Any, faults: Faults) -> list[str]:
    seen = sorted({box.name for scene in read for box in scene.boxes})
    given = options.pop("names", None)
    if options:
        raise DataError(f"{text}: unknown option {min(options)!r}; write voc:FOLDER?names=FILE")
    if given is None:
        if not seen:
            raise DataError(f"{text}: no xml file holds an object; give a folder of labelled pictures")
        return seen
    try:
        held = bytes_of(os.path.expanduser(given), _MOST_BYTES).decode("utf-8")
        names = [line.strip() for line in held.splitlines()]
    except (FormatError, UnicodeDecodeError) as error:
        raise DataError(f"{text}: names={given}: can't be read; give a text file, a class a line") from error
    names = [name for name in names if name]
    for name in seen:
        if name not in names:
            count = sum(box.name == name for scene in read for box in scene.boxes)
            faults.add(f"boxes are of a class that {given} does not name, and are left out", name, count)
    return names


def _picture(root: Path, file: str, scene: _Scene, index: dict[str, list[str]]) -> str:
    """Beside the xml or in the pictures' folder: of its stem, else of the name that it says."""
    stem = Path(file).stem
    for folder in (str(root), os.path.dirname(file)):
        for end in EXTENSIONS:
            for name in (stem + end, stem + end.upper()):
                if os.path.exists(os.path.join(folder, name)):
                    return os.path.join(folder, name)
    return picture_below(root, scene.picture or f"{stem}.jpg", index)


# ------------------------------------------------------------------ an xml file


def _scene_or_none(file: str, faults: Faults) -> _Scene | None:
    try:
        return _scene(bytes_of(file, _MOST_BYTES), os.path.basename(file), faults)
    except (ValueError, FormatError, expat.ExpatError) as error:
        faults.add("xml files can't be read", f"{os.path.basename(file)}: {first_line(error)}", grave=True)
        return None


def _scene(content: bytes, file: str, faults: Faults) -> _Scene:
    picture, size, boxes = "", [0.0, 0.0], []
    current: dict[str, str] = {}
    for path, value in _leaves(content):
        match path:
            case ("annotation", "filename"):
                picture = value
            case ("annotation", "size", "width" | "height" as side):
                number = _number(value)
                size[side == "height"] = number if math.isfinite(number) and number > 0 else 0.0
            case ("annotation", "object", "name" | "difficult" as key):
                current[key] = value
            case ("annotation", "object", "bndbox", key):
                current[key] = value
            case ("annotation", "object"):  # its end
                corners = [_number(current.get(key, "")) for key in ("xmin", "ymin", "xmax", "ymax")]
                if not current.get("name"):
                    faults.add("objects have no name, and are left out", file)
                else:
                    shifted = (corners[0] - 1, corners[1] - 1, corners[2], corners[3])
                    boxes.append(_Box(current["name"], current.get("difficult", "0") == "1", shifted))
                current = {}
    both = (size[0], size[1]) if min(size) > 0 else (0.0, 0.0)
    return _Scene(picture, both, tuple(boxes))


def _leaves(content: bytes) -> Iterator[tuple[tuple[str, ...], str]]:
    """(tags from the root on, text) of each element, at its end."""
    found: list[tuple[tuple[str, ...], str]] = []
    path: list[str] = []
    words: list[str] = []

    def begin(name: str, attributes: dict[str, str]) -> None:
        path.append(name)
        words.clear()
        if len(path) > _DEEPEST:
            raise ValueError(f"is nested more than {_DEEPEST} deep")

    def end(name: str) -> None:
        found.append((tuple(path), "".join(words).strip()))
        path.pop()
        words.clear()

    def refuse(*_: object) -> None:
        raise ValueError("declares a document type, which an annotation has no use for")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = begin, end
    parser.CharacterDataHandler = words.append
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(content, True)
    if not found or found[-1][0] != ("annotation",):
        raise ValueError("holds no annotation")
    yield from found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
