"""Average precision of boxes: cases by hand, and COCO's 12 figures against the tools that everybody compares by."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rarefy.data.boxes import boxes
from rarefy.tasks.metrics.box_precision import BoxPrecision

FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium",
           "ar_large")  # fmt: skip


def targets(*pictures: list[list[float]], factor: float = 1.0) -> Tensor:
    """Of (left, top, right, bottom, class, ignored) each, or with the area behind."""
    made = []
    for picture in pictures:
        rows = torch.tensor(picture).reshape(len(picture), -1) if picture else torch.zeros(0, 6)
        area = rows[:, 6:] if rows.shape[1] > 6 else factor * boxes.area(rows)[:, None]
        made.append(torch.cat([rows[:, :6], area, torch.full((len(rows), 1), factor)], 1))
    batch = boxes.padded(made, boxes.TARGET_COLUMNS)
    batch[..., boxes.FACTOR] = factor
    return batch


def found(*pictures: list[list[float]]) -> Tensor:
    """Of (left, top, right, bottom, class, score) each."""
    return boxes.padded([torch.tensor(one).reshape(-1, 6) for one in pictures], boxes.FOUND_COLUMNS)


def judged(answers: Tensor, wanted: Tensor, batch: int = 3) -> BoxPrecision:
    metric = BoxPrecision(("cat", "dog", "emu"))
    for one, other in zip(answers.split(batch), wanted.split(batch), strict=True):
        metric.add(one, other)
    return metric


BOX = [10.0, 10, 50, 50]


def test_all_found_is_one_and_nothing_found_is_zero() -> None:
    wanted = targets([[*BOX, 0, 0]], [[*BOX, 1, 0], [60, 60, 80, 90, 1, 0]])
    whole = judged(found([[*BOX, 0, 0.9]], [[*BOX, 1, 0.8], [60, 60, 80, 90, 1, 0.3]]), wanted)
    assert whole.value() == 1 and whole.interval() == (1, 1) and whole.samples == 2 and not whole.warnings(True)
    nothing = judged(found([], []), wanted)
    assert nothing.value() == 0 and "next to nothing" in nothing.warnings(True)[0]
    assert whole.paired(nothing).value == -1 and nothing.paired(whole).interval == (1, 1)
    assert whole.details()["ap_large"] is None  # there is no large box


def test_precision_and_recall_by_hand() -> None:
    wanted = targets([[*BOX, 0, 0], [100, 100, 150, 150, 0, 0]])
    half = judged(found([[*BOX, 0, 0.9], [300, 300, 350, 350, 0, 0.8], [300, 200, 350, 250, 0, 0.7]]), wanted)
    assert half.value() == pytest.approx(51 / 101)  # recall 0 to 0.5 at precision 1
    late = judged(found([[*BOX, 0, 0.7], [300, 300, 350, 350, 0, 0.8]]), wanted)
    assert late.value() == pytest.approx(51 / 101 / 2)
    assert late.details()["ar1"] == 0 and late.details()["ar10"] == 0.5
    shifted = judged(found([[10, 10, 50, 40, 0, 0.9], [100, 100, 150, 150, 0, 0.8]]), wanted)  # IoU 0.75, and 1
    assert shifted.details()["ap50"] == 1 and shifted.details()["ap75"] == 1
    assert shifted.value() == pytest.approx((6 + 4 * 51 / 101 / 2) / 10)


def test_a_box_is_taken_once_and_the_best_first() -> None:
    twice = judged(found([[*BOX, 0, 0.9], [*BOX, 0, 0.8]]), targets([[*BOX, 0, 0]]))
    assert twice.value() == 1  # the second is wrong, behind the whole recall
    other = judged(found([[*BOX, 1, 0.95], [*BOX, 0, 0.8]]), targets([[*BOX, 0, 0]]))
    assert other.value() == 1  # what is of no class that is to be found is not counted


def test_ignored_boxes_are_neither_right_nor_wrong() -> None:
    wanted = targets([[*BOX, 0, 0], [100, 100, 200, 200, 0, 1]])
    inside = [[100, 100, 120, 120, 0, 0.95], [150, 150, 170, 170, 0, 0.94], [110, 100, 200, 200, 0, 0.93]]
    metric = judged(found([*inside, [*BOX, 0, 0.5]]), wanted)
    assert metric.value() == 1 and metric.details()["classes"][0]["samples"] == 1  # type: ignore[index]


def test_sizes_go_by_the_pixels_of_the_picture() -> None:
    small = [[10.0, 10, 30, 30, 0, 0]]
    metric = judged(found([[10, 10, 30, 30, 0, 0.9]]), targets(small))
    assert metric.details()["ap_small"] == 1 and metric.details()["ap_large"] is None
    metric = judged(found([[10, 10, 30, 30, 0, 0.9]]), targets(small, factor=100.0))
    assert metric.details()["ap_large"] == 1 and metric.details()["ap_small"] is None


def test_nan_and_infinity_are_no_box_and_pictures_without_boxes_count() -> None:
    bad = found([[*BOX, 0, float("nan")], [float("inf"), 0, 1, 1, 0, 0.9], [*BOX, 0, 0.4]], [])
    assert judged(bad, targets([[*BOX, 0, 0]], [])).value() == 1
    alarm = judged(found([[*BOX, 0, 0.4]], [[*BOX, 0, 0.9]]), targets([[*BOX, 0, 0]], []))
    assert alarm.value() == pytest.approx(0.5)
    assert judged(found([], []), targets([], [])).warnings(True)[0].startswith("no picture has a box")


def test_the_text_names_the_worst_class_and_the_difference_what_lost_most() -> None:
    wanted = targets([[*BOX, 0, 0], [100, 100, 150, 150, 1, 0]])
    good, bad = (
        judged(found([[*BOX, 0, 0.9], [100, 100, 150, 150, kind, 0.8]]), wanted) for kind in (1, 2)
    )  # fmt: skip
    assert "AP 50.00%" in bad.text() and "worst class dog 0.0% of 1 images" in bad.text()
    drop = bad.paired(good)
    assert drop.value == 0.5 and drop.to_json()["worst_class"] == {
        "index": 1,
        "name": "dog",
        "value": 1.0,
        "samples": 1,
    }


def test_the_interval_is_that_of_whole_evaluations_of_drawn_pictures() -> None:
    wanted, answers = random_boxes(3, pictures=12, classes=2)
    answers[..., boxes.SCORE] += 1e-3 * torch.rand(answers.shape[:2], generator=torch.Generator().manual_seed(1))
    metric = judged(answers, wanted)  # without ties, which go by the order of the pictures
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(12, (200, 12), generator=generator)[:10]
    slow = [judged(answers[one], wanted[one], 12).value() for one in drawn]
    assert np.allclose(metric._all.draws[:10], slow)
    low, high = metric.interval()
    assert low < metric.value() < high


# ------------------------------------------------------------------ against others


def random_boxes(seed: int, pictures: int = 30, classes: int = 4, crowds: bool = True) -> tuple[Tensor, Tensor]:
    """Targets, and answers around some of them: with crowds, ties of scores and of overlaps, and classes that are empty
    on one side."""
    draw = np.random.default_rng(seed)
    wanted, answers = [], []
    for _ in range(pictures):
        count = int(draw.integers(0, 8))
        corner, size = draw.integers(0, 200, (count, 2)), draw.integers(4, 160, (count, 2))
        kind = draw.integers(0, classes, count)
        crowd = (draw.random(count) < 0.15) & crowds
        area = size.prod(1) * draw.uniform(0.5, 1, count)
        wanted.append([[*a, *(a + b), k, c, s] for a, b, k, c, s in zip(corner, size, kind, crowd, area, strict=True)])
        mine = []
        for _ in range(int(draw.integers(0, 30))):
            if count and draw.random() < 0.7:
                which = int(draw.integers(count))
                low = corner[which] + draw.integers(-6, 7, 2)
                high = np.maximum(corner[which] + size[which] + draw.integers(-6, 7, 2), low + 1)
                label = kind[which] if draw.random() < 0.8 else int(draw.integers(0, classes + 1))
            else:
                low = draw.integers(0, 200, 2)
                high = low + draw.integers(1, 160, 2)
                label = int(draw.integers(0, classes + 1))
            mine.append([*low, *high, label, float(draw.integers(1, 20)) / 32])
        answers.append(mine)
    plain = [[[float(value) for value in row] for row in picture] for picture in wanted]
    return targets(*plain), found(*[[[float(value) for value in row] for row in one] for one in answers])


def as_coco(wanted: Tensor, answers: Tensor, classes: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    truth: dict[str, Any] = {
        "images": [{"id": index + 1, "width": 400, "height": 400} for index in range(len(wanted))],
        "categories": [{"id": index + 1, "name": str(index)} for index in range(classes)],
        "annotations": [],
        "info": {},
    }
    results = []
    for index, (own, mine) in enumerate(zip(wanted.tolist(), answers.tolist(), strict=True)):
        for left, top, right, bottom, kind, ignored, area, _ in (row for row in own if row[4] >= 0):
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1, "image_id": index + 1, "category_id": int(kind) + 1,
                    "bbox": [left, top, right - left, bottom - top], "area": area, "iscrowd": int(ignored),
                }
            )  # fmt: skip
        for left, top, right, bottom, kind, score in (row for row in mine if row[4] >= 0):
            box = [left, top, right - left, bottom - top]
            results.append({"image_id": index + 1, "category_id": int(kind) + 1, "bbox": box, "score": score})
    return truth, results


def theirs(tool: str, truth: dict[str, Any], results: list[dict[str, Any]]) -> list[float]:
    if tool == "pycocotools":
        COCO = pytest.importorskip("pycocotools.coco", reason="compared with pycocotools").COCO
        Evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval
    else:
        module = pytest.importorskip("faster_coco_eval", reason="compared with faster-coco-eval")
        COCO, Evaluation = module.COCO, module.COCOeval_faster
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = Evaluation(coco, coco.loadRes(results), "bbox")
        for step in ("evaluate", "accumulate", "summarize"):
            getattr(evaluation, step)()
    return [float(value) for value in evaluation.stats[:12]]


@pytest.mark.parametrize("tool", ["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_twelve_figures_are_those_of_other_tools(tool: str, seed: int) -> None:
    wanted, answers = random_boxes(seed)
    ours = judged(answers, wanted, 7)
    figures = {"ap": ours.value(), **ours.details()}
    expected = theirs(tool, *as_coco(wanted, answers, 5))
    assert np.allclose([figures[name] for name in FIGURES], expected, atol=1e-6), (figures, expected)


def test_more_boxes_than_are_judged() -> None:
    generator = torch.Generator().manual_seed(1)
    corner = torch.randint(0, 300, (1, 250, 2), generator=generator).float()
    answers = torch.cat([corner, corner + 40, torch.zeros(1, 250, 1), torch.rand(1, 250, 1, generator=generator)], 2)
    wanted = targets([[*map(float, (*at, at[0] + 42, at[1] + 39)), 0, 0] for at in corner[0, ::5].tolist()])
    ours = judged(answers, wanted)
    expected = theirs("pycocotools", *as_coco(wanted, answers, 1))
    assert ours.value() == pytest.approx(expected[0], abs=1e-6) and ours.value() > 0.01
