"""Pictures that lie on a GPU are varied there as the decoder varies them (here on the CPU, as the operators are)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boxed
import pytest
import torch
from torch import Tensor

from rarefy.data.boxes import boxes
from rarefy.data.boxes.resident import Resident
from rarefy.tasks.detection import Detection

FAMILIES = {
    "letterbox at the top left": "yolox:classes=3,size=64/96",
    "letterbox in the middle": "yolo:classes=3,size=64/96",
    "stretched": "nanodet:classes=3,size=64/64",
}
BOXES = {
    "a.png": [(8, 6, 20, 15, 0), (0, 0, 12, 12, 1)],
    "b.png": [],
    "c.png": [(30, 20, 40, 30, 2), (2, 2, 38, 28, 0), (10, 3, 11, 29, 1)],
    "d.png": [(5, 5, 25, 25, 2)],
}
SIZE = (150, 110)


def task(root: Path, family: str, augment: str, size: tuple[int, int] = SIZE) -> Detection:
    scaled = {
        name: [(*(side * size[0] / 40 for side in box[:4]), box[4]) for box in own] for name, own in BOXES.items()
    }
    text = boxed.coco(root, scaled, size)[0]
    return Detection(train=text, detector=family, augment=augment)


def on_device(given: Detection, most: float = 1e9) -> Resident | None:
    shaping: Any = given.data.shaping
    return shaping.resident(given.data.source("train"), torch.device("cpu"), most)


def there(targets: Tensor) -> list[list[float]]:
    return sorted(targets[boxes.present(targets)].tolist())


@pytest.mark.parametrize("augment", ["none", "flip", "flip,scale=0.3", "scale=0.9,photometric"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_inputs_and_boxes_are_those_of_the_decoder(tmp_path: Path, family: str, augment: str) -> None:
    given = task(tmp_path, family, augment)
    lying = on_device(given)
    assert lying is not None
    for epoch in range(3):
        chunk = torch.arange(4)
        inputs, targets = lying.batch(chunk, (5, epoch))
        images = next(given.data._pictures("train")([chunk], 0, (5, epoch), torch.device("cpu")))
        assert inputs.dtype == torch.uint8 and inputs.shape == images[0].shape
        apart = (inputs.int() - images[0].int()).abs().float()
        # colours are rounded to whole numbers after each of six steps there, and once here
        assert float(apart.max()) <= (1 if "photometric" not in augment else 8), apart.max()
        assert float(apart.mean()) < (0.02 if "photometric" not in augment else 1.0)
        for ours, theirs in zip(targets, images[1], strict=True):
            assert torch.allclose(torch.tensor(there(ours)), torch.tensor(there(theirs)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(20, 15), (96, 64), (400, 30)])
def test_enlarged_as_they_are_and_shrunk(tmp_path: Path, size: tuple[int, int]) -> None:
    given = task(tmp_path, FAMILIES["letterbox in the middle"], "flip,scale=0.2", size)
    lying, chunk = on_device(given), torch.tensor([3, 0, 2])
    assert lying is not None
    images = next(given.data._pictures("train")([chunk], 0, (1, 1), torch.device("cpu")))[0]
    assert float((lying.batch(chunk, (1, 1))[0].int() - images.int()).abs().max()) <= 1


def test_the_number_of_boxes_is_the_same_in_every_batch(tmp_path: Path) -> None:
    lying = on_device(task(tmp_path, FAMILIES["stretched"], "flip,scale=0.5"))
    assert lying is not None
    shapes = {tuple(lying.batch(torch.tensor([one]), (0, one))[1].shape) for one in range(4)}
    assert shapes == {(1, 3, 8)}  # so that nothing is compiled anew


def test_what_does_not_fit_or_can_not_be_read_stays_with_the_decoder(tmp_path: Path) -> None:
    family = FAMILIES["stretched"]
    given = task(tmp_path, family, "flip")
    whole = 4 * 3 * SIZE[0] * SIZE[1]
    assert on_device(given, whole) is not None and on_device(given, whole - 1) is None
    for augment in ("crop", "mosaic", "flip,mosaic=0.1"):
        assert on_device(task(tmp_path, family, augment)) is None
    again = task(tmp_path, family, "flip")
    (tmp_path / "c.png").write_bytes(b"no picture")
    assert on_device(again) is None
