"""The demo of detection: pictures by number, a detector that is known by its outputs, and the whole run (slow)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import rarefy
from rarefy.demo import demonstrate, shapes
from rarefy.errors import InputError
from rarefy.tasks.detector import detector_of


def test_a_picture_is_drawn_by_its_number_alone() -> None:
    train, val = shapes.pictures("train"), shapes.pictures("val")
    assert (len(train), len(val)) == (shapes.TRAINED_ON, shapes.JUDGED_ON)
    for one, other in ((train[7], shapes.pictures("train")[7]), (val[0], val[0])):
        assert np.array_equal(one[0], other[0]) and torch.equal(one[1]["boxes"], other[1]["boxes"])
    assert not np.array_equal(train[0][0], val[0][0])
    with pytest.raises(IndexError):
        val[len(val)]


def test_boxes_are_where_the_shapes_are() -> None:
    seen: set[int] = set()
    for index in range(40):
        picture, about = shapes.pictures("val")[index]
        assert picture.shape == (shapes.SIDE, shapes.SIDE, 3) and len(about["boxes"]) >= 1
        ground = np.median(picture.reshape(-1, 3), 0)
        for (left, top, right, bottom), label in zip(about["boxes"].int().tolist(), about["labels"].tolist()):
            assert 0 <= left < right <= shapes.SIDE and 0 <= top < bottom <= shapes.SIDE
            middle = picture[(top + bottom) // 2, (left + right) // 2].astype(int)
            colours = np.abs(picture[top:bottom, left:right].astype(int) - middle).sum(-1) == 0
            share = colours.mean()  # circle: pi / 4, square: 1, triangle: 1 / 2; noise has its colour once
            if np.abs(middle - ground).sum() > 90:
                assert abs(share - (np.pi / 4, 1.0, 0.5)[label]) < 0.06
                seen.add(label)
    assert seen == {0, 1, 2}


def test_the_detector_is_known_by_its_outputs() -> None:
    graph = rarefy.capture(shapes.model(), (3, shapes.SIDE, shapes.SIDE))
    family = detector_of(graph)
    assert family == rarefy.plugins.resolve("detectors", shapes.demo().task.detector)
    assert family.classes == len(shapes.NAMES) and family.strides == (8, 16)


def test_no_demo_of_what_there_is_none_of(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no demo of 'speech'; have classification, detection"):
        demonstrate(tmp_path, task="speech")


@pytest.mark.slow
def test_it_is_smaller_faster_and_no_worse(tmp_path: Path) -> None:
    facts = demonstrate(tmp_path, task="detection")
    assert facts["after"]["evaluation"]["value"] > 0.6
    rarefy.verify(tmp_path / "small", tmp_path / "demo.key.pub")
    small = rarefy.load(tmp_path / "small")
    assert detector_of(small) is not None
    assert rarefy.export(small, tmp_path / "seen.onnx")["passed"]
