"""``yolo:data.yaml``: the layout of YOLO: a folder of pictures, and beside it one of text files, a box a line.

``train``, ``val`` and ``test`` of the yaml are a folder, a file that lists pictures, or several of these, below
``path`` (else below the yaml's own folder); to judge on, ``val`` is taken, else ``valid``, else ``test``. ``names`` is
a list, or a dictionary by number. The text file of ``images/a.jpg`` is ``labels/a.txt``, or ``a.txt`` beside it. A line
is ``class cx cy width height``, in shares of the picture turned as EXIF says, which is how Ultralytics reads it. A
polygon, or a turned box of four corners (class, then x and y of each point), is the box around it; of keypoints
(``kpt_shape``) only the box is taken. A picture without a text file, or with an empty one, shows nothing that is to be
found.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from rarefy.data.boxes.scenes import COLUMNS, Faults, Scenes, existing, scenes
from rarefy.data.formats.imagefolder import EXTENSIONS, images_below
from rarefy.data.items import Items, Source, Split
from rarefy.errors import DataError, FormatError, first_line
from rarefy.system.dependencies import needs
from rarefy.system.files import content as bytes_of
from rarefy.system.files import replacing

_KEYS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
_LISTS = ("classes.txt", "train.txt", "val.txt", "test.txt")  # which tools leave among the text files
_MOST_YAML = 400_000  # bytes, some 20,000 names: PyYAML takes 8 s a megabyte
_MOST_BYTES = 2**22  # of a text file: 60,000 boxes
_MOST_LISTED = 2**28  # of a list of pictures


def read(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    file = Path(os.path.expanduser(rest))
    if file.is_dir():
        file = next((one for one in (file / "data.yaml", *sorted(file.glob("*.yaml"))) if one.is_file()), file)
    content = _content(text, file)
    names = _names(text, content)
    key = next((key for key in _KEYS[split] if content.get(key)), None)
    divided = key is not None
    key = key or next((key for keys in _KEYS.values() for key in keys if content.get(key)), None)
    if key is None:
        raise DataError(f"{text}: {file} names no pictures; give it train: and val:")
    paths = list(dict.fromkeys(_pictures(text, file, content, key)))
    faults = Faults()
    there = existing(paths, faults)
    paths = [path for path, good in zip(paths, there.tolist(), strict=True) if good]
    if not paths:
        raise DataError(f"{text}: no pictures ({' '.join(EXTENSIONS)}) in {key}: {content[key]}; mend the path")
    labels = [_label_file(path) for path in paths]
    _check_labels(text, paths, labels, faults)
    keypoints = "kpt_shape" in content
    owners, rows = [], []
    for index, label in enumerate(labels):
        for row in _boxes(label, len(names), keypoints, faults):
            owners.append(index)
            rows.append(row)
    found = scenes(paths, owners, np.array(rows).reshape(-1, COLUMNS), names, faults)
    if len(rows) > 2 * len(found.rows):
        raise DataError(
            f"{text}: {len(rows) - len(found.rows)} of {len(rows)} boxes lie outside their pictures; coordinates are "
            "shares of the picture (0 to 1), centre and size: are these pixels, or corners?"
        )
    return Items(text, found, torch.arange(len(found)), None, found.names, faults=faults.all()), divided


def write(found: Scenes, folder: str | Path, sizes: Sequence[tuple[int, int]]) -> None:
    """A text file for each picture into ``folder``. sizes: (width, height) of each."""
    for index, size in enumerate(sizes):
        path, rows = found[index]
        sides = np.where(rows[:, -2:] == 1, 1.0, np.array(size, np.float64))
        corners = rows[:, :4].astype(np.float64) / np.tile(sides, 2)
        boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
        lines = [
            f"{int(row[4])} {' '.join(f'{value:.8g}' for value in box)}\n" for row, box in zip(rows, boxes.tolist())
        ]
        with replacing(Path(folder) / f"{Path(path).stem}.txt") as partial:
            partial.write_text("".join(lines), encoding="utf-8")


def _content(text: str, file: Path) -> dict[str, object]:
    yaml = needs("yaml", "vision")
    if not file.is_file():
        raise DataError(f"{text}: {file}: no such file; give the data.yaml of a data set in YOLO's layout")
    try:
        held = _unfolded(yaml, bytes_of(file, _MOST_YAML).decode("utf-8"))
    except (FormatError, ValueError, RecursionError, OSError, yaml.YAMLError) as error:
        raise DataError(f"{text}: {file}: is no YAML ({first_line(error)}); mend it") from error
    if not isinstance(held, dict):
        raise DataError(f"{text}: {file}: holds no train:, val: and names:; give the data.yaml of a data set")
    return {str(key): value for key, value in held.items()}


def _unfolded(yaml: ModuleType, text: str) -> object:
    """What the yaml holds; an alias (``*a``) counts for all that it stands for, which may be anything at all."""
    loader = yaml.SafeLoader(text)  # not the one in C, which deep lists kill
    try:
        root = loader.get_single_node()
        if _size(root, {}) > _MOST_YAML:
            raise ValueError("its aliases unfold without end")
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _size(node: object, known: dict[int, float]) -> float:
    """Values below a node, those of aliases counted each time; known: of nodes that were met, infinite within one."""
    if id(node) not in known:
        known[id(node)] = math.inf
        value = getattr(node, "value", None)
        inner = value if isinstance(value, list) else []
        parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _names(text: str, content: Mapping[str, object]) -> tuple[str, ...]:
    given, count = content.get("names"), content.get("nc")
    if isinstance(given, dict):
        try:
            places = {int(key): str(name) for key, name in given.items()}
        except (TypeError, ValueError):
            places = {}
        if sorted(places) != list(range(len(places))) or not places:
            raise DataError(f"{text}: names: {str(given)[:80]} do not count 0, 1, ...; give each class its number")
        return tuple(places[place] for place in range(len(places)))
    if isinstance(given, list) and given:
        return tuple(map(str, given))
    if given is None and isinstance(count, int) and 0 < count <= 100_000:
        return tuple(map(str, range(count)))
    raise DataError(f"{text}: names: {str(given)[:80]} is no list of class names; add names: [first, second, ...]")


def _pictures(text: str, file: Path, content: Mapping[str, object], key: str) -> Iterator[str]:
    base = file.parent
    stated = content.get("path")
    if isinstance(stated, str) and stated:
        given = Path(os.path.expanduser(stated))
        base = next((one for one in (given, base / given) if os.path.isdir(one)), base)
    listed = content[key]
    for one in listed if isinstance(listed, list) else [listed]:
        relative = str(one)
        tries = [base / Path(os.path.expanduser(relative))]
        if relative.startswith("../"):  # as some exports write it, beside the yaml all the same
            tries.append(base / relative[3:])
        place = next((path for path in tries if os.path.exists(path)), None)  # unlike path.exists(), it raises for none
        if place is None:
            raise DataError(f"{text}: {key}: {str(tries[0])[:300]}: no such folder; mend {key}: or path: in {file}")
        if place.is_dir():
            yield from images_below(place)
            continue
        try:
            lines = bytes_of(place, _MOST_LISTED).decode("utf-8").split("\n")
        except (UnicodeDecodeError, FormatError) as error:
            raise DataError(f"{text}: {key}: {place}: is no list of pictures; give a folder or a text file") from error
        for line in filter(None, map(str.strip, lines)):
            yield os.path.normpath(place.parent / line if line.startswith("./") else base / line)


def _label_file(path: str) -> str:
    """Of the picture: in the folder ``labels`` beside the last ``images`` of its path, else beside it."""
    stem = os.path.splitext(path)[0]
    other = f"{_beside(stem, 'images', 'labels')}.txt"
    return other if os.path.isfile(other) else f"{stem}.txt"


def _beside(path: str, folder: str, other: str) -> str | None:
    """The path with the last ``folder`` that it goes through replaced; None where it goes through none."""
    parts = path.split(os.sep)
    place = next((place for place in range(len(parts) - 1, -1, -1) if parts[place] == folder), None)
    return None if place is None else os.sep.join([*parts[:place], other, *parts[place + 1 :]])


def _check_labels(text: str, paths: Sequence[str], labels: Sequence[str], faults: Faults) -> None:
    """Are there any, has each one picture, and each a picture?"""
    there = [os.path.isfile(label) for label in labels]
    if not any(there):
        raise DataError(
            f"{text}: none of {len(paths)} pictures has a text file of its boxes (for {paths[0]} that would be "
            f"{labels[0]}); put them into a folder labels beside images"
        )
    owner: dict[str, str] = {}
    for path, label, good in zip(paths, labels, there, strict=True):
        if good and owner.setdefault(label, path) != path:
            faults.add("pictures share a text file with another, and its boxes", path)
    lone = there.count(False)
    if lone:
        faults.add("pictures have no text file: nothing is to be found there", paths[there.index(False)], lone)
    for folder in sorted({os.path.dirname(label) for label in owner}):
        pictures = [folder, *filter(None, [_beside(folder, "labels", "images")])]
        stems = {os.path.splitext(name)[0] for place in pictures if os.path.isdir(place) for name in os.listdir(place)
                 if name.lower().endswith(EXTENSIONS)}  # fmt: skip
        for name in sorted(os.listdir(folder)):
            if name.endswith(".txt") and name[:-4] not in stems and name not in _LISTS:
                faults.add("text files belong to no picture, and are passed over", os.path.join(folder, name))


def _boxes(file: str, classes: int, keypoints: bool, faults: Faults) -> Iterator[tuple[float, ...]]:
    name = os.path.basename(file)
    if not os.path.exists(file):
        return
    try:
        held = bytes_of(file, _MOST_BYTES).decode("utf-8")
        lines = list(dict.fromkeys(filter(None, map(str.strip, held.split("\n")))))
    except (ValueError, FormatError) as error:
        faults.add("text files can't be read", f"{name}: {first_line(error)}", grave=True)
        return
    for line in lines:
        try:
            kind, *numbers = map(float, line.split())
        except ValueError:
            kind, numbers = math.nan, []
        polygon = len(numbers) >= 6 and len(numbers) % 2 == 0
        if kind != kind // 1 or not (len(numbers) == 4 or polygon or (keypoints and len(numbers) > 4)):
            faults.add("lines are no boxes (class cx cy width height), and are left out", f"{name}: {line[:40]}")
        elif not 0 <= kind < classes:
            faults.add(f"boxes are of a class above {classes - 1}, and are left out", f"{name}: class {kind:g}")
        else:
            yield (*_corners(numbers[:4] if keypoints else numbers), kind, 0.0, math.nan, 1.0, 1.0)


def _corners(numbers: Sequence[float]) -> tuple[float, float, float, float]:
    if len(numbers) == 4:
        cx, cy, width, height = numbers
        return cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
    return min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
