"""The pictures of which a compressed model says something else: chosen by how far apart, drawn, bounded."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import boxed
import pytest
import torch
from PIL import Image
from torch import Tensor

from rarefy.evaluation.changed import MOST, apart, changed
from rarefy.reports import report
from rarefy.tasks.answers import Answer
from rarefy.tasks.classification import Classification
from rarefy.tasks.detection import Detection
from rarefy.tasks.task import Task

BOX = (0.0, 0.0, 10.0, 10.0)


class Said:
    """A session that answers from a table, picture by picture."""

    threads = 1

    def __init__(self, answers: Tensor):
        self.answers, self.place = answers, 0

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        first, self.place = self.place, self.place + len(inputs[0])
        return [self.answers[first : self.place]]

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.outputs(*inputs)[0]


def opened(found: list[Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(one["jpeg"]))) for one in found]


def test_how_far_apart_by_hand() -> None:
    one, weaker = Answer(0, "a", 0.9, BOX), Answer(0, "a", 0.6, (0.0, 0.0, 9.0, 10.0))
    other, far = Answer(1, "b", 0.5, BOX), Answer(0, "a", 0.4, (50.0, 50.0, 60.0, 60.0))
    assert apart([one], [one]) == 0 and apart([], []) == 0
    assert apart([one], [weaker]) == pytest.approx(0.3)
    assert apart([one], [other]) == pytest.approx(0.9 + 0.5)
    assert apart([one, far], [weaker]) == pytest.approx(0.3 + 0.4)
    assert apart([Answer(0, "a", 0.7), Answer(1, "b", 0.3)], [Answer(1, "b", 0.6), Answer(0, "a", 0.4)]) == (
        pytest.approx(0.6)
    )


def classifier(count: int, side: int = 8, channels: int = 1) -> Task:
    return Classification(val=(torch.rand(count, channels, side, side), torch.zeros(count, dtype=torch.int64)))


def logits(count: int, moved: list[int]) -> tuple[Tensor, Tensor]:
    before = torch.zeros(count, 3)
    before[:, 0] = 5
    after = before.clone()
    after[moved, 1] = torch.linspace(7, 4, len(moved))
    return before, after


@pytest.mark.parametrize("channels", [1, 3])
def test_those_of_a_classifier_that_changed_most_come_first(channels: int) -> None:
    before, after = logits(40, [33, 2, 17])
    models = {"original": Said(before), "pruned": Said(after)}
    found = changed(models, classifier(40, channels=channels))
    assert [one["number"] for one in found] == [33, 2, 17]
    changes = [one["change"] for one in found]
    assert changes == sorted(changes, reverse=True) and changes[0] > 1
    for image in opened(found):
        assert image.size[0] > 2 * 120 and image.size[0] <= 2 * 320 + 8  # small ones are seen, too


def test_at_most_eight_of_a_bounded_size_and_none_where_nothing_changed() -> None:
    before, after = logits(30, list(range(20)))
    found = changed({"a": Said(before), "b": Said(after)}, classifier(30, 600, 3))
    assert len(found) == MOST and all(max(image.size) <= 2 * 320 + 8 for image in opened(found))
    assert sum(len(one["jpeg"]) for one in found) < 1_500_000  # of noise, which no JPEG makes small
    assert changed({"a": Said(before), "b": Said(before)}, classifier(30)) == []


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    text = boxed.coco(tmp_path, {f"{name}.png": [(8, 6, 20, 15, 0)] for name in "abc"}, (64, 64))[0]
    task = Detection(val=text, detector="yolox:classes=3,size=64/64,strides=32")
    said = torch.zeros(3, 4, 8)
    said[:, 0, :4] = torch.tensor([0.5, 0.5, 0.0, 0.0])  # a box of 32 x 32 around (16, 16)
    said[:, 0, 4:6] = 1.0
    lost = said.clone()
    lost[1, 0, 4] = 0.0
    found = changed({"original": Said(said), "small": Said(lost)}, task)
    assert [one["number"] for one in found] == [1] and found[0]["change"] == pytest.approx(1.0)
    (image,) = opened(found)
    colours = [image.getpixel((2 + offset, image.height - 70)) for offset in (0, image.width // 2 + 4)]
    assert colours[0] != colours[1]  # the frame at the left edge is on one side alone


def test_the_page_shows_them_and_nothing_that_is_none() -> None:
    before, after = logits(10, [3])
    good = changed({"a": Said(before), "b": Said(after)}, classifier(10))
    bad = [{"jpeg": text} for text in ("", '" onerror="alert(1)', "PHN2Zz4=", "/9j/" + "A" * 500_000, "/9j/<>")]
    page = report.html({"pictures": [*bad, *good, *({"jpeg": "/9j/AAAA"} for _ in range(9))]})
    assert page.count("<img ") == 1 + 2 and f"data:image/jpeg;base64,{good[0]['jpeg']}" in page
    assert "picture 4 of the judged" in page and "onerror" not in page and "img-src data:" in page
    assert "What changed most" not in report.html({})
