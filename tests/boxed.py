"""Pictures with boxes, in each format, for the tests of detection."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pictures import picture
from PIL import Image


def rectangles(seed: int, width: int, height: int, boxes: Sequence[Sequence[float]]) -> Image.Image:
    """Grey noise with a bright rectangle for each (left, top, right, bottom, class), a colour a class."""
    pixels = np.random.default_rng(seed).integers(40, 90, (height, width, 3), dtype=np.uint8)
    for left, top, right, bottom, kind in boxes:
        pixels[int(top) : int(bottom), int(left) : int(right)] = 60
        pixels[int(top) : int(bottom), int(left) : int(right), int(kind) % 3] = 220
    return Image.fromarray(pixels)


def coco(
    root: Path, boxes: Mapping[str, Sequence[Sequence[float]]], size: tuple[int, int] = (40, 30), **more: Any
) -> tuple[str, dict[str, Any]]:
    """Pictures by name, with (left, top, right, bottom, class) each; the source's text, and what the json says.

    Category ids are 3, 5, 7 for classes 0, 1, 2, listed backwards. more: further keys of the json.
    """
    root.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for number, name in enumerate(("green", "blue", "red")):
        content["categories"].append({"id": 7 - 2 * number, "name": name})
    for index, (name, own) in enumerate(boxes.items()):
        rectangles(index, *size, own).save(root / name)
        content["images"].append({"id": 10 + index, "file_name": name, "width": size[0], "height": size[1]})
        for left, top, right, bottom, kind in own:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 10 + index,
                    "category_id": 3 + 2 * int(kind),
                    "bbox": [left, top, right - left, bottom - top],
                    "iscrowd": 0,
                }
            )
    content |= more
    return saved(root, content), content


def saved(root: Path, content: Mapping[str, Any]) -> str:
    (root / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    return f"coco:{root}"


def yolo(root: Path, boxes: Mapping[str, Sequence[str]], size: tuple[int, int] = (40, 30)) -> str:
    """Pictures ``train/a.png`` by their path below images/, and the lines of each text file."""
    for index, (name, lines) in enumerate(boxes.items()):
        file, label = root / "images" / name, (root / "labels" / name).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        label.parent.mkdir(parents=True, exist_ok=True)
        picture(index, *size).save(file)
        label.write_text("\n".join(lines), encoding="utf-8")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n")
    return f"yolo:{root / 'data.yaml'}"


def voc(root: Path, boxes: Mapping[str, str], flat: bool = False) -> str:
    """Pictures of 40x30 by name, and the objects of each xml."""
    annotations, pictures = (root, root) if flat else (root / "Annotations", root / "JPEGImages")
    for folder in (annotations, pictures):
        folder.mkdir(parents=True, exist_ok=True)
    for index, (name, objects) in enumerate(boxes.items()):
        picture(index, 40, 30).save(pictures / name)
        size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"
        (annotations / name).with_suffix(".xml").write_text(text, encoding="utf-8")
    return f"voc:{root}"


def voc_object(name: str, corners: Sequence[float], difficult: int = 0) -> str:
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{inner}</bndbox></object>"
