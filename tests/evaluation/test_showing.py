"""``rarefy predict``: what models say of pictures, in words and drawn, one beside the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import boxed
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import rarefy
from rarefy.cli.main import run
from rarefy.reports.drawing import Mark, drawn, side_by_side
from rarefy.tasks.classification import Classification
from rarefy.tasks.detection import Detection
from tests.detecting import GridHead

YOLOX = "yolox:classes=3,size=64/96"


class Fixed(nn.Module):
    """Logits (N, 6) that no picture changes."""

    def __init__(self, logits: list[float]):
        super().__init__()
        self.conv = nn.Conv2d(3, len(logits), 1)
        nn.init.zeros_(self.conv.weight)
        self.conv.bias = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


def classifier(folder: Path, logits: list[float], names: list[str] | None = None) -> str:
    graph = rarefy.capture(Fixed(logits).eval(), (3, 16, 16))
    if names is not None:
        graph.meta["task"] = {"task": "classification", "class_names": names}
    rarefy.save(graph, folder)
    return str(folder)


def picture(path: Path, size: tuple[int, int] = (40, 30), **options: Any) -> str:
    boxed.rectangles(0, *size, [(0, 0, 10, 10, 0)]).save(path, **options)
    return str(path)


def predicted(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    code = run(["predict", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    told: list[dict[str, Any]] = json.loads(out)
    return told


def test_the_likeliest_classes_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = list("abcdef")
    small = classifier(tmp_path / "small", [0.0, 1, 2, 3, 4, 9], names)
    big = classifier(tmp_path / "big", [9.0, 1, 2, 3, 4, 5])
    files = [picture(tmp_path / "one.png"), picture(tmp_path / "two.jpg")]
    (told, other) = predicted(small, *files, "--reference", big, "-o", str(tmp_path / "out"), capsys=capsys)
    assert [one["name"] for one in told[small]] == ["f", "e", "d", "c", "b"] and told[big][0]["name"] == "a"
    shares = torch.tensor([0.0, 1, 2, 3, 4, 9]).softmax(0)
    assert told[small][0]["score"] == pytest.approx(float(shares[5])) and "box" not in told[small][0]
    assert Path(told["drawn"]).parent == tmp_path / "out" and Path(other["drawn"]).name == "two.png"
    with Image.open(told["drawn"]) as made:
        assert made.width == 2 * 40 + 8 and made.height > 30


def test_pictures_of_one_name_do_not_replace_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier(tmp_path / "model", [0.0, 1])
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        picture(tmp_path / folder / "same.png")
    rows = predicted(model, str(tmp_path / "x"), str(tmp_path / "y" / "same.png"), "-o", str(tmp_path / "out"),
                     capsys=capsys)  # fmt: skip
    assert [Path(row["drawn"]).name for row in rows] == ["same.png", "same-2.png"]
    assert [one["name"] for one in rows[0][model]] == ["1", "0"]  # nobody named the classes


def test_boxes_in_the_pixels_of_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    graph = rarefy.capture(GridHead().eval(), (3, 64, 96))
    rarefy.save(graph, tmp_path / "model")
    text, _ = boxed.coco(tmp_path / "data", {"a.png": [(8, 6, 20, 15, 0)]})
    (row,) = predicted(
        str(tmp_path / "model"), str(tmp_path / "data" / "a.png"), "--least", "0", "--data", text,
        "-o", str(tmp_path / "out"), capsys=capsys,
    )  # fmt: skip
    found = row[str(tmp_path / "model")]
    assert found and {one["name"] for one in found} <= {"red", "blue", "green"}
    assert all(0 <= left <= right <= 40 and 0 <= top <= bottom <= 30 for left, top, right, bottom in (
        one["box"] for one in found))  # fmt: skip
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    (row,) = predicted(str(tmp_path / "model"), str(tmp_path / "data" / "a.png"), "--least", "1",
                       "-o", str(tmp_path / "out"), capsys=capsys)  # fmt: skip
    assert row[str(tmp_path / "model")] == []


def test_answers_of_a_detector_lie_where_the_outputs_say(tmp_path: Path) -> None:
    task = Detection(val=[picture(tmp_path / "a.png", (80, 60))], detector=YOLOX)
    outputs = torch.zeros(1, 8 * 12 + 4 * 6 + 2 * 3, 8)
    outputs[0, 12 + 1, :6] = torch.tensor([0.0, 0, 0, 0, 1, 0.75])  # centre (8, 8), sides 8
    outputs[0, 0, :7] = torch.tensor([0.0, 0, 2, 2, 1, 0, 0.5])  # reaches out at the top left
    (said,) = task.answers(outputs, [(60, 80)], ("x", "y"), 0.3)
    ratio = 64 / 60
    assert [one.text for one in said] == ["x 0.75", "y 0.50"]
    assert said[0].corners == pytest.approx((4 / ratio, 4 / ratio, 12 / ratio, 12 / ratio), rel=1e-4)
    assert said[1].corners is not None and said[1].corners[:2] == (0, 0)


def test_several_sigmoids_are_sure_of_each_class_by_itself() -> None:
    class Several(Fixed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid()

    graph = rarefy.capture(Several([0.0, 3, 3]).eval(), (3, 8, 8))
    from rarefy.tasks.task import fitted

    task: Any = fitted(Classification(val=torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), graph)
    (said,) = task.answers(graph(torch.zeros(1, 3, 8, 8)), [(8, 8)], None, 0.0)
    assert [round(one.score, 3) for one in said] == [0.953, 0.953, 0.5]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.png"], "none.png: no such picture"),
        (["broken.png"], "broken.png"),
        (["empty"], "holds no pictures"),
        (["a.png", "-o", "a.png"], "is a file; --output names a folder"),
        (["a.png", "-o", "model"], "is a saved folder"),
        (["a.png", "--reference", "nowhere"], "no such model"),
    ],
)
def test_what_can_not_be_shown_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    classifier(Path("model"), [0.0, 1])
    picture(Path("a.png"))
    Path("broken.png").write_bytes(b"no picture")
    Path("empty").mkdir()
    assert run(["predict", "model", *arguments]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


# ------------------------------------------------------------------ drawing


def test_frames_are_drawn_where_the_boxes_are_and_the_picture_stays() -> None:
    plain = Image.new("L", (200, 100), 7)
    made = np.asarray(drawn(plain, [Mark("a \n b\u200b", 0, (50.0, 40.0, 150.0, 90.0)), Mark("all", 1)]))
    assert made.shape == (100, 200, 3) and plain.getpixel((50, 40)) == 7
    assert made[89, 100].tolist() == [230, 159, 0] and made[65, 149].tolist() == [230, 159, 0]
    assert made[65, 100].tolist() == [7, 7, 7] and made[0, 0].tolist() == [255, 255, 255]
    drawn(plain, [Mark("x" * 500, 3, (-10.0, -10.0, 500.0, 0.0)), Mark("", 9, (5.0, 5.0, 5.0, 5.0))])


def test_large_pictures_are_drawn_smaller_and_several_stand_in_a_row() -> None:
    large = drawn(Image.new("RGB", (3200, 100)), [Mark("a", 0, (3000.0, 0.0, 3200.0, 100.0))])
    assert large.size == (1600, 50)
    row = side_by_side([large, Image.new("RGB", (10, 80))], ["before", "after"])
    assert row.width == 1600 + 8 + 10 and row.height > 80
    assert side_by_side([large], ["alone"]) is large
