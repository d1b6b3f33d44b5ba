"""Pictures with boxes as a detector takes them: placed, turned, varied, in batches that begin at any step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import boxed
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rarefy.data.boxes import boxes
from rarefy.data.boxes.augmentation import variation
from rarefy.data.boxes.placement import Feed, placed, placement
from rarefy.errors import DataError
from rarefy.tasks.detection import Detection

NAMED = "yolox:classes=3,size=64/96"  # letterboxed at the top left, blue first, no normalisation


def task(text: str, split: str = "val", **options: Any) -> Detection:
    return Detection(**{split: text, "detector": NAMED, "augment": "none", **options})


def first(given: Detection, split: str = "val", batch_size: int = 4) -> tuple[Tensor, Tensor]:
    inputs, targets = next(iter(given.batches(split, batch_size)))
    return inputs, targets


# ------------------------------------------------------------------ placement


def test_placements_by_hand() -> None:
    corner = placement((30, 40), Feed((64, 96), "letterbox"))
    assert corner[2:] == (0, 0, 85, 64) and corner.across == corner.down == 64 / 30
    middle = placement((30, 40), Feed((64, 96), "letterbox", centred=True))
    assert middle[2:] == (5, 0, 85, 64)
    stretched = placement((30, 40), Feed((64, 96)))
    assert stretched.across == 96 / 40 and stretched.down == 64 / 30 and stretched.factor == 30 * 40 / (64 * 96)
    for one in (corner, middle, stretched):
        there = torch.tensor([[1.0, 2, 30, 20]])
        assert torch.allclose(one.back(one.boxes(there)), there, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_what_a_letterbox_leaves_is_filled(dtype: torch.dtype) -> None:
    picture = torch.full((3, 30, 40), 200.0) if dtype == torch.uint8 else torch.full((3, 30, 40), 200 / 255)
    made, _ = placed(picture.to(dtype), Feed((64, 96), "letterbox", (10.0, 20.0, 30.0)))
    unit = made.float() if dtype == torch.uint8 else made * 255
    assert made.shape == (3, 64, 96) and torch.allclose(unit[:, :, :85], torch.tensor(200.0))
    assert torch.allclose(unit[:, 0, 90], torch.tensor([10.0, 20, 30]), atol=1e-4)


def test_without_antialias_it_is_opencvs_bilinear() -> None:
    row = torch.arange(12, dtype=torch.uint8).reshape(1, 1, 12).expand(3, 4, 12).contiguous()
    made, _ = placed(row, Feed((4, 4), antialias=False))
    assert made[0, 0].tolist() == [1, 4, 7, 10]  # the two neighbours of x = 1, 4, 7, 10


# ------------------------------------------------------------------ what the data yields


def test_boxes_lie_in_the_pixels_of_the_input_and_know_the_pictures(tmp_path: Path) -> None:
    text = boxed.coco(tmp_path, {"a.png": [(8, 6, 20, 15, 2)], "b.png": []})[0]
    inputs, targets = first(task(text))
    ratio = 64 / 30
    assert inputs.shape == (2, 3, 64, 96) and targets.shape == (2, 1, 8)
    expected = [8 * ratio, 6 * ratio, 20 * ratio, 15 * ratio, 2, 0, 12 * 9, 1 / ratio**2]
    assert torch.allclose(targets[0, 0], torch.tensor(expected), rtol=1e-5)
    assert targets[1, 0, boxes.CLASS] == -1 and targets[1, 0, boxes.FACTOR] == targets[0, 0, boxes.FACTOR]
    inside = inputs[0, :, int(10 * ratio), int(14 * ratio)]
    assert inside.round().tolist() == [220, 60, 60]  # blue first, 0 to 255: class 2 is bright in blue
    assert torch.allclose(inputs[0, :, 60, 95], torch.tensor(114.0), atol=1e-3)


def test_images_are_red_first_and_normalised_to_the_same_inputs(tmp_path: Path) -> None:
    given = task(boxed.coco(tmp_path, {"a.png": [(8, 6, 20, 15, 0)]})[0])
    images, _ = next(iter(given.data.images("val", 4)))
    assert images.max() <= 1 and images[0, 0].amax() > images[0, 2].amax()
    assert torch.equal(given.data.normalize(images), first(given)[0])
    assert torch.allclose(given.data.denormalize(first(given)[0]), images, atol=1e-5)
    assert given.data.inputs("val", 1, 1) is not None and given.data.labelled("val")


def test_the_same_boxes_whatever_format_they_come_from(tmp_path: Path) -> None:
    box = (8, 6, 20, 15)
    coco = first(task(boxed.coco(tmp_path / "coco", {"a.png": [(*box, 0)]})[0]))[1]
    yolo = first(task(boxed.yolo(tmp_path / "yolo", {"val/a.png": ["0 0.35 0.35 0.3 0.3"]})))[1]
    voc = first(task(boxed.voc(tmp_path / "voc", {"a.png": boxed.voc_object("x", (9, 7, 20, 15))})))[1]

    class Own:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            return boxed.rectangles(0, 40, 30, []), {"boxes": torch.tensor([box]), "labels": torch.tensor([1])}

    for other in (yolo, voc, first(task(Own()))[1]):  # type: ignore[arg-type]
        assert torch.allclose(other, coco, rtol=1e-4)


# ------------------------------------------------------------------ bad pictures


@pytest.mark.parametrize("mode", ["I;16", "CMYK", "L", "P", "RGBA", "1"])
def test_pictures_of_any_mode_become_three_channels(tmp_path: Path, mode: str) -> None:
    name = "a.tif" if mode == "CMYK" else "a.png"
    _, content = boxed.coco(tmp_path, {name: [(8, 6, 20, 15, 0)]})
    if mode == "I;16":
        Image.fromarray(np.full((30, 40), 40_000, np.uint16)).save(tmp_path / name)
    else:
        boxed.rectangles(0, 40, 30, [(8, 6, 20, 15, 0)]).convert(mode).save(tmp_path / name)
    inputs, _ = first(task(boxed.saved(tmp_path, content)))
    assert inputs.shape[1] == 3 and float(inputs.min()) >= 0 and float(inputs.max()) <= 255
    assert float(inputs[0, :, :60, :80].std()) > 1 or mode == "I;16"
    assert mode != "I;16" or torch.allclose(inputs[0, :, :60, :80], torch.tensor(156.0), atol=0.01)


def turned(root: Path, size: tuple[int, int]) -> str:
    """A picture of 40x30 that is to be turned to 30x40, annotated as of ``size``; its box is class 0 at the top left
    of what the annotation is of."""
    picture = boxed.rectangles(0, 40, 30, [(0, 0, 10, 10, 0)] if size == (40, 30) else [(0, 20, 10, 30, 0)])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise, to be seen
    _, content = boxed.coco(root, {"a.jpg": [(0, 0, 10, 10, 0)]})
    picture.save(root / "a.jpg", exif=exif, quality=95)
    content["images"][0] |= {"width": size[0], "height": size[1]}
    return boxed.saved(root, content)


@pytest.mark.parametrize("size", [(30, 40), (40, 30)])
def test_a_picture_is_turned_unless_its_annotations_are_of_it_unturned(tmp_path: Path, size: tuple[int, int]) -> None:
    inputs, targets = first(task(turned(tmp_path, size)))
    left, top, right, bottom = targets[0, 0, :4].round().int().tolist()
    assert (left, top) == (0, 0) and right == bottom == round(10 * 64 / size[1])
    inside, outside = inputs[0, 2, 2 : bottom - 2, 2 : right - 2], inputs[0, 2, bottom + 3 : 60, 3 : right - 2]
    assert float(inside.mean()) > 180 and float(outside.mean()) < 100


def test_what_is_wrong_with_pictures_is_an_error_or_counted(tmp_path: Path) -> None:
    text, content = boxed.coco(tmp_path, {f"{name}.png": [(8, 6, 20, 15, 0)] for name in "abcd"})
    (tmp_path / "b.png").write_bytes(b"no picture")
    boxed.rectangles(0, 50, 30, []).save(tmp_path / "c.png")  # of another size than its annotations are of
    with pytest.raises(DataError, match=r"b.png.*--skip-unreadable"):
        list(task(text).batches("val", 4))
    lenient = task(text, strict=False)
    assert first(lenient)[0].shape[0] == 2
    left_out = lenient.data.unreadable("val")
    assert left_out["count"] == 2 and "b.png" in str(left_out["first"])
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match="1 pictures are missing.*--skip-unreadable"):
        first(task(text))
    assert task(text, strict=False).length("val") == 3
    text = boxed.saved(tmp_path, {**content, "images": content["images"][2:]})
    with pytest.raises(DataError, match="c.png.*is 50x30, and its annotations are of 40x30"):
        first(task(text))


def test_wrong_boxes_are_counted_or_refused_as_the_user_chose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, content = boxed.coco(tmp_path, {"a.png": [(8, 6, 20, 15, 0), (30, 20, 50, 25, 0)]})
    text = boxed.saved(tmp_path, content)
    given = task(text)
    assert first(given)[1].shape[1] == 2 and "reach out of their picture" in caplog.text
    described: Any = given.describe()["val"]
    assert described["faults"] == ["1 boxes that reach out of their picture, cut at its edge (the first: a.png)"]
    assert any("reach out" in note for note in given.data.notes)
    with pytest.raises(DataError, match="reach out of their picture.*leave strict out") as refusal:
        first(task(text, strict=True))
    assert "\n" not in str(refusal.value)


class Wrong:
    """Pictures of 40x30: the first is sound, each other has a box with something wrong, and a sound one."""

    BOXES = ((8.0, 6, 20, 15), (math.nan, 6, 20, 15), (8, 6, 8, 15), (20, 6, 8, 15), (41, 6, 50, 15), (30, 20, 50, 25))

    def __len__(self) -> int:
        return 2 * len(self.BOXES)

    def __getitem__(self, index: int) -> Any:
        boxes = torch.tensor([self.BOXES[index % len(self.BOXES)], self.BOXES[0]])
        return boxed.rectangles(index, 40, 30, []), {"boxes": boxes, "labels": torch.tensor([1, 2])}


@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_boxes_of_a_dataset_in_python_are_counted_as_those_of_files(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    given = task(Wrong(), workers=workers)  # type: ignore[arg-type]
    batches = [
        targets for _ in range(2) for _, targets in given.batches("val", 3)
    ]  # a second look counts nothing twice
    assert [int(boxes.present(one).sum()) for one in batches[:4]] == [4, 4, 4, 4]
    kinds = (
        "boxes with NaN or infinity, left out",
        "boxes of no area, left out",
        "boxes outside their picture, left out",
        "boxes that reach out of their picture, cut at its edge",
    )
    expected = {
        f"{count} {kind} (the first: item {first})" for count, kind, first in zip((2, 4, 2, 2), kinds, (1, 2, 4, 5))
    }
    described: Any = given.describe()["val"]
    assert set(described["faults"]) == expected <= set(given.data.notes)
    assert all(caplog.text.count(kind) == 1 for kind in kinds) and "so are all that follow" in caplog.text
    strict = task(Wrong(), strict=True)  # type: ignore[arg-type]
    with pytest.raises(
        DataError, match=r"1 boxes with NaN.*item 1.*1 more kinds; mend the annotations, or leave"
    ) as refusal:
        first(strict, batch_size=3)
    assert "\n" not in str(refusal.value)


def test_boxes_without_their_pictures_size_are_counted_when_it_is_seen(tmp_path: Path) -> None:
    _, content = boxed.coco(tmp_path, {"a.png": [(8, 6, 20, 15, 0), (30, 20, 50, 25, 0)]})
    for one in content["images"]:
        del one["width"], one["height"]
    given = task(boxed.saved(tmp_path, content))
    assert given.data.faults("val") == () and int(boxes.present(first(given)[1]).sum()) == 2
    assert given.data.faults("val") == ("1 boxes that reach out of their picture, cut at its edge (the first: item 0)",)


def test_validation_pictures_count_classes_as_the_training_ones_do(tmp_path: Path) -> None:
    train = boxed.voc(
        tmp_path / "a", {"a.png": boxed.voc_object("ant", (1, 1, 9, 9)) + boxed.voc_object("bee", (1, 1, 5, 5))}
    )
    val = boxed.voc(tmp_path / "b", {"a.png": boxed.voc_object("bee", (1, 1, 9, 9))})
    given = Detection(train, val, detector=NAMED)
    assert first(given)[1][0, 0, boxes.CLASS] == 1 and given.class_names == ("ant", "bee")
    other = boxed.voc(tmp_path / "c", {"a.png": boxed.voc_object("wasp", (1, 1, 9, 9))})
    with pytest.raises(DataError, match="class 'wasp' are in val"):
        first(Detection(train, other, detector=NAMED))


# ------------------------------------------------------------------ augmentation

EVERYTHING = "flip,scale=0.5,crop,photometric,mosaic"


def pictures(root: Path, count: int = 12) -> str:
    return boxed.coco(root, {f"{n}.png": [(8 + n, 6, 24 + n, 26, n % 3)] for n in range(count)})[0]


def epoch(given: Detection, **options: Any) -> list[tuple[Tensor, Tensor]]:
    return list(given.batches("train", 4, shuffle_seed=3, augment=True, **options))


def test_a_step_depends_on_seed_epoch_and_place_alone(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    given = task(pictures(tmp_path), "train", augment=EVERYTHING)
    state = torch.get_rng_state()
    whole = epoch(given)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    (rest,) = epoch(given, start=2)
    assert torch.equal(rest[0], whole[2][0]) and torch.equal(rest[1], whole[2][1])
    assert not torch.equal(epoch(given, epoch=1)[0][0], whole[0][0])
    assert given.data.rows("train", 4) is None and task(pictures(tmp_path), "train").data.rows("train", 4) is not None


def test_workers_make_the_same_pictures(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    text = pictures(tmp_path, 8)
    here, there = (epoch(task(text, "train", augment=EVERYTHING, workers=count)) for count in (0, 2))
    assert all(torch.equal(a, b) for one, other in zip(here, there, strict=True) for a, b in zip(one, other))


@pytest.mark.parametrize("augment", ["flip", "scale=0.5", "crop", "mosaic=1", EVERYTHING])
def test_boxes_stay_on_what_they_are_around(tmp_path: Path, augment: str) -> None:
    """Each rectangle is bright in the channel of its class, and dark in the others, inside its box alone."""
    pytest.importorskip("torchvision")
    given = task(pictures(tmp_path), "train", augment=augment.replace("photometric,", ""))
    seen = 0
    for inputs, targets in [one for number in range(3) for one in epoch(given, epoch=number)]:
        assert float(targets[..., :4].min()) >= 0 and float(targets[..., [0, 2]].max()) <= 96
        for picture, rows in zip(inputs.flip(1), targets, strict=True):
            for left, top, right, bottom, kind in rows[rows[:, 4] >= 0, :5].tolist():
                if right - left < 8 or bottom - top < 8:
                    continue
                inner = picture[:, int(top) + 3 : int(bottom) - 3, int(left) + 3 : int(right) - 3]
                means = inner.mean((1, 2))
                assert int(means.argmax()) == int(kind) and float(means.max()) > 190
                seen += 1
    assert seen > 8


def test_augmentations_are_told_in_a_line() -> None:
    for text in ("flip=3", "scale", "scale=0", "scale=2", "mosaic=2", "blur", "crop=4"):
        with pytest.raises(DataError, match="augment="):
            variation(text, "detection")
    assert variation("none", "x").still and not variation("flip, mosaic=0.2", "x").still
