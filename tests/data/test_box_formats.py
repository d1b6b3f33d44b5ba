"""COCO json, YOLO text files and Pascal VOC xml: the same boxes from each, there and back, and what is wrong with them
told in a line or counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boxed
import numpy as np
import pytest
import torch

from rarefy.data.boxes.scenes import AREA, CLASS, IGNORED, Scenes
from rarefy.data.boxes.targets import BoxTargets
from rarefy.data.formats import coco, voc, yolo
from rarefy.data.items import Items
from rarefy.data.sources import load
from rarefy.errors import DataError
from rarefy.tasks.detection import Detection

BOXES = {"a.png": [(2, 3, 12, 13, 1), (20, 5, 30, 25, 0)], "b.png": [], "c.png": [(0, 0, 40, 30, 2)]}


def opened(text: str, split: str = "train", shared: bool = False) -> Items:
    source = load(text, "train" if split == "train" else "val", shared=shared, targets=BoxTargets())
    assert isinstance(source, Items)
    return source


def rows(source: Items, index: int) -> list[list[float]]:
    return source.items[int(source.indices[index])][1].tolist()


def faults(source: Items) -> str:
    return "; ".join(fault.text for fault in source.faults)


# ------------------------------------------------------------------ coco


def test_coco_counts_classes_by_the_order_of_the_ids_and_keeps_empty_pictures(tmp_path: Path) -> None:
    source = opened(boxed.coco(tmp_path, BOXES)[0])
    assert source.names == ("red", "blue", "green") and len(source) == 3 and not source.faults
    assert [row[:5] for row in rows(source, 0)] == [[2, 3, 12, 13, 1], [20, 5, 30, 25, 0]]
    assert rows(source, 1) == [] and rows(source, 2)[0][:5] == [0, 0, 40, 30, 2]
    assert rows(source, 0)[0][-2:] == [40, 30]
    assert opened(f"coco:{tmp_path}?annotations=instances.json").names == source.names


def test_coco_crowds_are_ignored_and_areas_are_the_files(tmp_path: Path) -> None:
    _, content = boxed.coco(tmp_path, BOXES)
    content["annotations"][0] |= {"iscrowd": 1, "area": 33.5, "segmentation": {"counts": [1, 2], "size": [30, 40]}}
    content["annotations"][1] |= {"ignore": 1, "area": 0}
    source = opened(boxed.saved(tmp_path, content))
    assert [row[IGNORED] for row in rows(source, 0)] == [1, 1]
    assert rows(source, 0)[0][AREA] == 33.5 and np.isnan(rows(source, 0)[1][AREA])


@pytest.mark.parametrize(
    ("change", "left", "told"),
    [
        ({"bbox": [30, 20, 20, 5]}, 3, "1 boxes that reach out of their picture, cut at its edge (the first: a.png)"),
        ({"bbox": [45, 2, 3, 3]}, 2, "1 boxes outside their picture, left out"),
        ({"bbox": [5, 5, 0, 7]}, 2, "1 boxes of no area, left out"),
        ({"bbox": [5, 5, -3, 7]}, 2, "1 boxes of no area, left out"),
        ({"bbox": [5, 5, 7]}, 2, "1 annotations have no bbox of four numbers"),
        ({"bbox": None}, 2, "1 annotations have no bbox of four numbers"),
        ({"bbox": ["a", 5, 7, 2]}, 2, "1 boxes with NaN or infinity, left out"),
        ({"category_id": 4}, 2, "1 boxes have a category_id that is no category's"),
        ({"category_id": None}, 2, "1 boxes have a category_id that is no category's"),
        ({"image_id": 999}, 2, "1 annotations are of an image_id that is no picture's"),
        ({"image_id": [1]}, 2, "1 annotations are of an image_id that is no picture's"),
    ],
)
def test_a_bad_annotation_is_counted_with_the_first_by_name(
    tmp_path: Path, change: dict[str, Any], left: int, told: str
) -> None:
    _, content = boxed.coco(tmp_path, BOXES)
    content["annotations"][0] |= change
    source = opened(boxed.saved(tmp_path, content))
    assert told in faults(source) and len(source) == 3
    assert sum(len(rows(source, index)) for index in range(3)) == left
    assert all(fault.grave is False for fault in source.faults)


def test_a_box_that_reaches_out_is_cut(tmp_path: Path) -> None:
    _, content = boxed.coco(tmp_path, {"a.png": [(30, 20, 50, 25, 0)]})
    assert rows(opened(boxed.saved(tmp_path, content)), 0)[0][:4] == [30, 20, 40, 25]
    content["annotations"][0]["bbox"] = [30, 20, 10.01, 5]  # rounding: cut, without a word
    source = opened(boxed.saved(tmp_path, content))
    assert rows(source, 0)[0][:4] == [30, 20, 40, 25] and not source.faults


def test_missing_and_doubled_pictures(tmp_path: Path) -> None:
    _, content = boxed.coco(tmp_path, BOXES)
    content["images"].append({"id": 99, "file_name": "a.png", "width": 40, "height": 30})
    content["annotations"][2]["image_id"] = 99
    (tmp_path / "c.png").unlink()
    source = opened(boxed.saved(tmp_path, content))
    assert len(source) == 2 and len(rows(source, 0)) == 3  # the boxes of both entries
    assert "1 pictures are listed twice" in faults(source)
    grave = [fault.text for fault in source.faults if fault.grave]
    assert len(grave) == 1 and "1 pictures are missing" in grave[0] and "c.png" in grave[0]


def test_a_name_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    boxed.rectangles(0, 8, 8, []).save(tmp_path / "secret.png")
    _, content = boxed.coco(tmp_path / "in", BOXES)
    for name in ("../secret.png", str(tmp_path / "secret.png"), "..\\secret.png"):
        content["images"][0]["file_name"] = name
        source = opened(boxed.saved(tmp_path / "in", content))
        assert all("secret" not in source.items[index][0] for index in range(len(source)))
    (tmp_path / "in" / "deep").mkdir()
    (tmp_path / "in" / "a.png").rename(tmp_path / "in" / "deep" / "a.png")
    content["images"][0]["file_name"] = "/home/someone/data/a.png"  # of the machine that wrote the file
    assert opened(boxed.saved(tmp_path / "in", content)).items[0][0].endswith("deep/a.png")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"categories": []}, "categories"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "two have the same"),
        ({"images": {}}, "no list 'images'"),
        ({"images": [{"id": 1}]}, "no id or no file_name"),
        ({"images": [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}]}, "two pictures have the id 1"),
        ({"images": [{"id": 1, "file_name": "nowhere.png"}]}, "none is in"),
        ({"annotations": [3]}, "no list 'annotations' of objects"),
    ],
)
def test_a_json_of_another_kind_is_refused_in_a_line(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    _, content = boxed.coco(tmp_path, BOXES)
    with pytest.raises(DataError, match=told) as refusal:
        opened(boxed.saved(tmp_path, content | change))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["[]", "{", "{" * 200, '{"images": NaN}', '{"images": [], "images": []}', ""])
def test_what_is_no_such_json_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "instances.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="annotations in COCO's form"):
        opened(f"coco:{tmp_path}")


def test_coco_says_which_file_it_wants(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="coco:IMAGES\\?annotations=FILE"):
        opened(f"coco:{tmp_path}")
    with pytest.raises(DataError, match="unknown option 'anotations'"):
        opened(f"coco:{tmp_path}?anotations=x.json")
    with pytest.raises(DataError, match="no such folder"):
        opened(f"coco:{tmp_path / 'none'}?annotations=x.json")


def test_coco_without_annotations_is_unlabelled(tmp_path: Path) -> None:
    _, content = boxed.coco(tmp_path, BOXES)
    del content["annotations"], content["categories"]
    source = opened(boxed.saved(tmp_path, content))
    assert len(source) == 3 and source.item(0)[1] is None


# ------------------------------------------------------------------ yolo


def test_yolo_reads_boxes_polygons_and_empty_pictures(tmp_path: Path) -> None:
    text = boxed.yolo(
        tmp_path,
        {
            "train/a.png": ["1 0.5 0.5 0.5 0.2", "0 0.1 0.1 0.3 0.1 0.3 0.4 0.1 0.4", ""],
            "train/b.png": [],
            "val/c.png": ["0 0.25 0.25 0.5 0.5"],
        },
    )
    source = opened(text, shared=True)
    assert source.names == ("cat", "dog") and len(source) == 2 and not source.faults
    assert np.allclose(rows(source, 0)[0][:5], [0.25, 0.4, 0.75, 0.6, 1])
    assert np.allclose(rows(source, 0)[1][:5], [0.1, 0.1, 0.3, 0.4, 0])
    assert rows(source, 0)[0][-2:] == [1, 1] and rows(source, 1) == []
    assert len(opened(text, "val", shared=True)) == 1
    assert len(opened(f"yolo:{tmp_path}")) == 2  # the folder of the yaml


@pytest.mark.parametrize(
    ("lines", "left", "told"),
    [
        (["0 0.9 0.5 0.5 0.2"], 1, "reach out of their picture, cut"),
        (["0 0.5 0.5 0 0.2"], 0, "no area"),
        (["2 0.5 0.5 0.2 0.2"], 0, "of a class above 1"),
        (["-1 0.5 0.5 0.2 0.2"], 0, "of a class above 1"),
        (["0.5 0.5 0.5 0.2 0.2"], 0, "are no boxes"),
        (["0 0.5 0.5 0.2"], 0, "are no boxes"),
        (["0 0.5 0.5 0.2 0.2 0.9"], 0, "are no boxes"),  # a prediction with its score
        (["cat 0.5 0.5 0.2 0.2"], 0, "are no boxes"),
        (["0 nan 0.5 0.2 0.2"], 0, "NaN"),
        (["0 0.5 0.5 0.2 0.2", "0 0.5 0.5 0.2 0.2"], 1, ""),  # the same line twice is one box
    ],
)
def test_a_bad_line_is_counted(tmp_path: Path, lines: list[str], left: int, told: str) -> None:
    good = ["1 0.5 0.5 0.5 0.2", "1 0.5 0.5 0.4 0.2"]
    source = opened(boxed.yolo(tmp_path, {"train/a.png": lines, "train/b.png": good}))
    assert len(rows(source, 0)) == left and told in faults(source) and bool(told) == bool(source.faults)


def test_yolo_without_or_with_stray_text_files(tmp_path: Path) -> None:
    text = boxed.yolo(tmp_path, {"train/a.png": ["0 0.5 0.5 0.2 0.2"], "train/b.png": []})
    (tmp_path / "labels" / "train" / "b.txt").unlink()
    (tmp_path / "labels" / "train" / "stray.txt").write_text("0 0.5 0.5 0.2 0.2")
    (tmp_path / "labels" / "train" / "classes.txt").write_text("cat\ndog")
    boxed.rectangles(3, 8, 8, []).save(tmp_path / "images" / "train" / "a.jpg")
    told = faults(opened(text))
    assert "1 pictures have no text file" in told and "1 text files belong to no picture" in told
    assert "1 pictures share a text file" in told
    for file in (tmp_path / "labels" / "train").glob("*.txt"):
        file.unlink()
    with pytest.raises(DataError, match="none of 3 pictures has a text file"):
        opened(text)


def test_yolo_lists_of_pictures_and_the_layout_of_exports(tmp_path: Path) -> None:
    boxed.yolo(tmp_path, {"train/a.png": ["0 0.5 0.5 0.2 0.2"], "val/c.png": ["1 0.5 0.5 0.2 0.2"]})
    (tmp_path / "some.txt").write_text("./images/train/a.png\nimages/val/gone.png\n")
    (tmp_path / "list.yaml").write_text("train: some.txt\nvalid: ../images/val\nnames: [cat, dog]\nnc: 2\n")
    source = opened(f"yolo:{tmp_path / 'list.yaml'}")
    assert len(source) == 1 and "1 pictures are missing" in faults(source)
    assert len(opened(f"yolo:{tmp_path / 'list.yaml'}", "val")) == 1


def _doubled(form: str) -> str:
    """Thirty lines, each of twice what the one before is."""
    pairs = "1: *a{0}, 2: *a{0}" if form == "{{{0}}}" else "*a{0}, *a{0}"
    lines = [f"a{place + 1}: &a{place + 1} {form.format(pairs.format(place))}" for place in range(30)]
    return "\n".join(["a0: &a0 {x: 1}", *lines, "train: *a30", ""])


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        ("train: images/train\n", "names: None is no list"),
        ("train: images/train\nnames: {1: a, 2: b}\n", "do not count 0, 1"),
        ("names: [a]\n", "names no pictures"),
        ("train: nowhere\nnames: [a]\n", "no such folder"),
        ("- a\n- b\n", "holds no train:"),
        ("train: [\n", "is no YAML"),
        ("train: !!python/object/apply:os.system [echo]\n", "is no YAML"),
        ("[" * 5000, "is no YAML"),
        (_doubled("[{0}]"), "aliases unfold without end"),
        (_doubled("{{{0}}}"), "aliases unfold without end"),
        (_doubled("{{'<<': [{0}]}}"), "aliases unfold without end"),
        ("train: &a [*a]\n", "aliases unfold without end"),
        ("train: images/train\nnames: [" + "a," * 200_000 + "]\n", "is no YAML"),
        (f"train: {'x' * 5000}\nnames: [a]\n", "no such folder"),
    ],
)
def test_a_yaml_that_says_nothing_is_refused_in_a_line(tmp_path: Path, yaml: str, told: str) -> None:
    boxed.yolo(tmp_path, {"train/a.png": []})
    (tmp_path / "data.yaml").write_text(yaml)
    with pytest.raises(DataError, match=told) as refusal:
        opened(f"yolo:{tmp_path / 'data.yaml'}")
    assert "\n" not in str(refusal.value)


def test_an_alias_of_yaml_is_read(tmp_path: Path) -> None:
    boxed.yolo(tmp_path, {"train/a.png": ["1 0.5 0.5 0.2 0.2"]})
    (tmp_path / "data.yaml").write_text("train: &images images/train\nval: *images\nnames: [cat, dog]\n")
    assert len(opened(f"yolo:{tmp_path / 'data.yaml'}", "val")) == 1


def test_a_line_of_keypoints_without_a_box_is_counted(tmp_path: Path) -> None:
    text = boxed.yolo(tmp_path, {"train/a.png": ["1", "1 0.5", "1 0.5 0.5 0.2 0.2 0.5 0.5 2"]})
    with open(tmp_path / "data.yaml", "a") as file:
        file.write("\nkpt_shape: [1, 3]\n")
    source = opened(text)
    assert len(rows(source, 0)) == 1 and "2 lines are no boxes" in faults(source)


def test_yolo_by_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    boxed.yolo(tmp_path, {"train/a.png": ["0 0.5 0.5 0.2 0.2"], "train/b.png": ["1 0.5 0.5 0.4 0.2"]})
    file = next(tmp_path.glob("*.yaml"))
    file.write_text("train: images/train\nval: images/train\nnames: [cat, dog]\n")
    monkeypatch.chdir(tmp_path)
    source = load(f"yolo:{file.name}", "train", targets=BoxTargets())
    assert [source.item(index)[1][0, CLASS] for index in range(2)] == [0, 1]
    assert not caplog.records


def test_yolo_in_pixels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shares of the picture"):
        opened(boxed.yolo(tmp_path, {"train/a.png": ["0 20 15 10 10", "1 30 5 3 3"]}))


# ------------------------------------------------------------------ voc


def test_voc_reads_lists_difficult_boxes_and_pixels_that_count_from_one(tmp_path: Path) -> None:
    first = boxed.voc_object("dog", (1, 1, 40, 30)) + boxed.voc_object("cat", (3, 4, 12, 13), difficult=1)
    text = boxed.voc(tmp_path, {"a.png": first, "b.png": "", "c.png": boxed.voc_object("emu", (2, 2, 9, 9))})
    source = opened(text)
    assert source.names == ("cat", "dog", "emu") and len(source) == 3 and not source.faults
    assert [row[:6] for row in rows(source, 0)] == [[0, 0, 40, 30, 1, 0], [2, 3, 12, 13, 0, 1]]
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("c.png\ngone\n")
    assert len(opened(text, shared=True)) == 2
    val = opened(text, "val", shared=True)
    assert len(val) == 1 and val.names == source.names and "1 listed pictures have no xml" in faults(val)


def test_voc_in_one_folder_and_with_names_of_ones_own(tmp_path: Path) -> None:
    objects = boxed.voc_object("dog", (1, 1, 9, 9)) + boxed.voc_object("cat", (3, 4, 12, 13))
    text = boxed.voc(tmp_path, {"a.png": objects}, flat=True)
    assert opened(text).names == ("cat", "dog")
    (tmp_path / "names.txt").write_text("dog\n\nbird\n")
    source = opened(f"{text}?names={tmp_path / 'names.txt'}")
    assert source.names == ("dog", "bird") and [row[CLASS] for row in rows(source, 0)] == [0]
    assert "1 boxes are of a class that" in faults(source)


@pytest.mark.parametrize(
    ("xml", "told"),
    [
        ("<annotation><object>", "no element found"),
        ("", "no element found"),
        ("<other/>", "holds no annotation"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "declares a document type"),
        ('<?xml version="1.0"?><!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "declares a document type"),
        ("<annotation>" + "<a>" * 50 + "</a>" * 50 + "</annotation>", "nested more than"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_broken_or_hostile_xml_is_a_grave_fault(tmp_path: Path, xml: str, told: str, encoding: str) -> None:
    text = boxed.voc(tmp_path, {"a.png": boxed.voc_object("dog", (1, 1, 9, 9)), "b.png": ""})
    (tmp_path / "Annotations" / "b.xml").write_bytes(xml.encode(encoding))
    source = opened(text)
    assert len(source) == 1 and [fault.grave for fault in source.faults] == [True]
    assert "b.xml" in faults(source) and (told in faults(source) or not xml)


def test_voc_without_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no xml files"):
        opened(f"voc:{tmp_path}")
    with pytest.raises(DataError, match="no xml file holds an object"):
        opened(boxed.voc(tmp_path, {"a.png": ""}))
    boxed.voc(tmp_path, {"a.png": boxed.voc_object("dog", (1, 1, 9, 9))})
    (tmp_path / "JPEGImages" / "a.png").unlink()
    with pytest.raises(DataError, match="none of the 1 annotated pictures"):
        opened(f"voc:{tmp_path}")


# ------------------------------------------------------------------ there and back


def scene(paths: list[str], seed: int) -> Scenes:
    draw = np.random.default_rng(seed)
    counts = draw.integers(0, 5, len(paths))
    corners = draw.integers(0, 15, (int(counts.sum()), 2))
    table = np.zeros((int(counts.sum()), 9), np.float32)
    table[:, :4] = np.concatenate([corners, corners + draw.integers(1, 15, corners.shape)], 1)
    table[:, 4] = draw.integers(0, 2, len(table))
    table[0, 4], table[1, 4] = 0, 1
    table[:, 5], table[:, 6], table[:, 7:] = draw.integers(0, 2, len(table)), np.nan, (40, 30)
    return Scenes(paths, table, np.concatenate([[0], counts.cumsum()]), ("cat & <dog>", "dog"))


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_what_is_written_is_read_back(tmp_path: Path, form: str) -> None:
    names = [f"{index}.png" for index in range(6)]
    paths = [str(tmp_path / name) for name in names]
    for path in paths:
        boxed.rectangles(0, 40, 30, []).save(path)
    given = scene(paths, 3)
    if form == "coco":
        coco.write(given, tmp_path / "instances.json", [(40, 30)] * 6)
        text = f"coco:{tmp_path}"
    elif form == "yolo":
        yolo.write(given, tmp_path, [(40, 30)] * 6)
        (tmp_path / "data.yaml").write_text(f"train: .\nnames: {json.dumps(given.names)}\n")
        text = f"yolo:{tmp_path / 'data.yaml'}"
    else:
        voc.write(given, tmp_path, [(40, 30)] * 6)
        text = f"voc:{tmp_path}"
    source = opened(text)
    assert source.names == given.names and [Path(path).name for path in source.items.paths] == names
    assert source.items.starts.tolist() == given.starts.tolist()
    shares = np.array([40, 30] * 2) if form == "yolo" else 1
    assert np.allclose(source.items.rows[:, :4] * shares, given.rows[:, :4], atol=1e-4)
    assert np.array_equal(source.items.rows[:, 4], given.rows[:, 4])
    if form != "yolo":
        assert np.array_equal(source.items.rows[:, 5], given.rows[:, 5])


# ------------------------------------------------------------------ datasets


class Pictures:
    """As torchvision's detection datasets yield them."""

    def __init__(self, targets: list[Any]):
        self.targets_ = targets

    def __len__(self) -> int:
        return len(self.targets_)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return boxed.rectangles(index, 40, 30, []), self.targets_[index]


def target(labels: list[int], **more: Any) -> dict[str, Any]:
    return {"boxes": torch.tensor([[1.0, 2, 9, 8]] * len(labels)), "labels": torch.tensor(labels), **more}


def classes(targets: list[Any]) -> list[list[float]]:
    source = load(Pictures(targets), "train", targets=BoxTargets())
    assert isinstance(source, Items)
    return [source.item(index)[1][:, CLASS].tolist() for index in range(len(source))]  # type: ignore[index]


def test_labels_of_a_dataset_begin_at_one_as_torchvision_counts_them_or_at_zero() -> None:
    assert classes([target([1, 3]), target([2])]) == [[0, 2], [1]]
    assert classes([target([1, 3]), target([0])]) == [[1, 3], [0]]
    assert classes([target([]), target([1])]) == [[], [0]]


def test_boxes_of_a_dataset_in_their_own_format() -> None:
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    boxes = tv_tensors.BoundingBoxes([[5.0, 6, 8, 4]], format="CXCYWH", canvas_size=(30, 40))
    source = load(Pictures([{"boxes": boxes, "labels": [1], "iscrowd": [1]}]), "train", targets=BoxTargets())
    assert isinstance(source, Items)
    row = source.item(0)[1]
    assert isinstance(row, np.ndarray) and row[0].tolist()[:6] == [1, 4, 9, 8, 0, 1] and row[0, 7:].tolist() == [40, 30]


def test_cocodetection_counts_classes_by_its_categories() -> None:
    given = Pictures([[{"bbox": [1, 2, 8, 6], "category_id": 18, "area": 40, "iscrowd": 0}], []])
    given.coco = SimpleNamespace(cats={18: {"name": "dog"}, 3: {"name": "car"}})  # type: ignore[attr-defined]
    source = load(given, "train", targets=BoxTargets())
    assert isinstance(source, Items)
    row = source.item(0)[1]
    assert isinstance(row, np.ndarray) and row[0].tolist()[:7] == [1, 2, 9, 8, 1, 0, 40]
    assert source.item(1)[1].shape == (0, 9)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (3, "its target is int"),
        ({"boxes": torch.zeros(1, 4)}, "a dictionary of boxes"),
        ({"boxes": torch.zeros(1, 4), "labels": torch.zeros(2)}, "1 boxes and 2 labels"),
        ({"boxes": torch.zeros(1, 5), "labels": torch.zeros(1)}, "can't be read"),
        ({"boxes": torch.zeros(1, 4), "labels": torch.tensor([1.5])}, "label 1.5 is of no class"),
    ],
)
def test_what_are_no_boxes_is_told_in_a_line(given: Any, told: str) -> None:
    source = load(Pictures([given]), "train", targets=BoxTargets())
    assert isinstance(source, Items)
    with pytest.raises(DataError, match=told):
        source.item(0)


def test_boxes_are_not_for_a_classifier(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--task detection"):
        load(boxed.coco(tmp_path, BOXES)[0], "train")


@pytest.mark.parametrize("label", [4, 300, math.nan, math.inf, 1.5, -1])
def test_a_label_that_the_model_does_not_know_is_told_before_anything_learns_it(label: float) -> None:
    class Own:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            labels = torch.tensor([1.0 if index < 3 else label])
            return boxed.rectangles(index, 40, 30, []), {"boxes": torch.tensor([[8, 6, 20, 15.0]]), "labels": labels}

    task = Detection(train=Own(), detector="yolox:classes=3,size=64/96", augment="none")
    with pytest.raises(DataError, match=r"label \S+ is (of no class|class \d+, counted from 0, and the model knows 3)"):
        list(task.batches("train", 2, augment=True))
