"""BoxTargets: what a data set says of the boxes on a picture, as rows of ``scenes.py``.

===================================================  =================================================================
rows (m, 9)                                          of our formats, as they are
``{"boxes": (m, 4), "labels": (m,)}``                as torchvision's detectors take them: xyxy in pixels (of a
                                                     ``tv_tensors.BoundingBoxes`` in its own format); ``iscrowd``,
                                                     ``difficult``, ``ignore`` and ``area`` if they are there
a list of ``{"bbox": ..., "category_id": ...}``      as ``torchvision.datasets.CocoDetection`` yields it: xywh
===================================================  =================================================================

**Which label is which class.** Of a dataset that knows COCO's categories (``CocoDetection``, also wrapped for
transforms.v2) classes are the categories in the order of their ids. Of others the smallest label among the first 64
pictures says it: torchvision counts classes from 1, 0 being the background; who counts from 0 has one of those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.data.boxes.scenes import COLUMNS, Scenes
from rarefy.data.targets import Target, Targets
from rarefy.errors import DataError, first_line

_LOOKED_AT = 64
_ADVICE = (
    "detection needs boxes: coco:IMAGES?annotations=FILE, yolo:data.yaml, voc:FOLDER, or a dataset of (image, "
    '{"boxes": (m, 4) xyxy, "labels": (m,)})'
)
_IGNORED = ("iscrowd", "difficult", "ignore")
Found = Mapping[str, Any]  # of a dataset: tensors, arrays, lists and numbers by name


@dataclass(frozen=True)
class BoxTargets(Targets):
    """first: the label of class 0. place: label -> class, where a dataset says it. names: of the classes, likewise.

    classes: how many the model knows, where that is known.
    """

    first: int = 0
    place: Mapping[int, int] | None = None
    names: tuple[str, ...] | None = field(default=None, compare=False)
    classes: int | None = field(default=None, compare=False)

    def settled(self, items: object) -> Targets:
        if isinstance(items, Scenes | list | Tensor):
            return self
        for inner in _wrapped(items):
            categories = getattr(getattr(inner, "coco", None), "cats", None)
            if isinstance(categories, dict) and categories:
                ids = sorted(categories)
                names = tuple(str(categories[one].get("name", one)) for one in ids)
                return replace(self, place={one: place for place, one in enumerate(ids)}, names=names)
        return replace(self, first=_first_label(replace(self, classes=None), items))

    def of_all(self, given: object, count: int, where: str) -> Tensor:
        raise DataError(f"{where}: has a label an image, not boxes; {_ADVICE}")

    def of_one(self, given: object, where: str) -> np.ndarray:
        """Rows (m, 9) float32."""
        if isinstance(given, np.ndarray) and given.ndim == 2 and given.shape[1] == COLUMNS:
            return given
        try:
            if isinstance(given, list | tuple) and all(isinstance(one, Mapping) and "bbox" in one for one in given):
                return self._rows(_of_coco(given), where)
            if isinstance(given, Mapping) and {"boxes", "labels"} <= given.keys():
                return self._rows(given, where)
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
            raise DataError(f"{where}: its boxes can't be read ({first_line(error)}); {_ADVICE}") from error
        told = f"a dictionary of {', '.join(map(str, given))}" if isinstance(given, Mapping) else type(given).__name__
        raise DataError(f"{where}: its target is {told}; {_ADVICE}")

    def check(self, targets: Tensor, where: str, *, whole: bool = False) -> None:
        """Each was checked when it was read."""

    def _rows(self, given: Found, where: str) -> np.ndarray:
        corners = _corners(given["boxes"])
        labels = _numbers(given["labels"]).reshape(-1)
        if len(labels) != len(corners):
            raise DataError(f"{where}: {len(corners)} boxes and {len(labels)} labels; give one a box")
        rows = np.full((len(corners), COLUMNS), math.nan, np.float32)
        rows[:, :4], rows[:, 5], rows[:, 7:] = corners, 0, 0
        rows[:, 4] = [self._class(label, where) for label in labels.tolist()]
        for name in _IGNORED:
            if name in given:
                rows[:, 5] = np.maximum(rows[:, 5], _numbers(given[name]).reshape(-1) > 0)
        if "area" in given:
            area = _numbers(given["area"]).reshape(-1)
            rows[:, 6] = np.where(area > 0, area, math.nan)
        canvas = getattr(given["boxes"], "canvas_size", None)
        if canvas is not None:
            rows[:, 7:] = canvas[1], canvas[0]
        return rows

    def _class(self, label: float, where: str) -> int:
        whole = int(label) if math.isfinite(label) else -1
        found = self.place.get(whole, -1) if self.place is not None else whole - self.first
        if label != whole or found < 0:
            known = (
                f"the first pictures' labels begin at {self.first}" if self.place is None else "no category has that id"
            )
            raise DataError(f"{where}: label {label:g} is of no class ({known}); mend it, or leave the box out")
        if self.classes is not None and found >= self.classes:
            raise DataError(
                f"{where}: label {label:g} is class {found}, counted from 0, and the model knows "
                f"{self.classes}; mend it, "
                "leave the box out, or pass a model for these classes"
            )
        return found


def _corners(given: object) -> np.ndarray:
    """(m, 4) xyxy."""
    boxes = _numbers(given).reshape(-1, 4)
    form = str(getattr(given, "format", "XYXY")).rpartition(".")[2]
    if form == "XYWH":
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    if form == "CXCYWH":
        return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    if form != "XYXY":
        raise ValueError(f"boxes of format {form}")
    return boxes


def _of_coco(given: list[Found] | tuple[Found, ...]) -> dict[str, object]:
    boxes = np.array([one["bbox"] for one in given], np.float64).reshape(-1, 4)
    return {
        "boxes": np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        "labels": [one["category_id"] for one in given],
        "area": [float(one.get("area") or 0) for one in given],
        "iscrowd": [float(bool(one.get("iscrowd")) or bool(one.get("ignore"))) for one in given],
    }


def _numbers(given: object) -> np.ndarray:
    plain = given.detach().cpu().as_subclass(torch.Tensor).numpy() if isinstance(given, Tensor) else given
    return np.asarray(plain, np.float64)


def _first_label(targets: BoxTargets, items: Any) -> int:
    """0, or 1 where no label of the first pictures is 0. What can't be read is told when its batch comes."""
    least = math.inf
    for index in range(min(len(items), _LOOKED_AT)):
        try:
            rows = targets.of_one(items[index][1], "")
        except Exception:
            continue
        if len(rows):
            least = min(least, float(rows[:, 4].min()))
            if least <= 0:
                return 0
    return 1 if math.isfinite(least) else 0


def _wrapped(items: Any) -> Iterator[object]:
    """The dataset, and those that it wraps (subsets, torchvision's wrapper for transforms.v2)."""
    for _ in range(8):
        yield items
        items = getattr(items, "dataset", None) or getattr(items, "_dataset", None)
        if items is None:
            return


def rows_of(target: Target | None) -> np.ndarray:
    """(m, 9) of a picture's target; none of an unlabelled one."""
    return target if isinstance(target, np.ndarray) else np.zeros((0, COLUMNS), np.float32)
