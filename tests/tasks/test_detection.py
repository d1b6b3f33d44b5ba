"""Detection: a task whose family the model says itself, through the verbs and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import boxed
import pytest
import torch
from torch import fx

import rarefy
from rarefy.cli.main import run
from rarefy.errors import DataError, InputError
from rarefy.models import fitting, load
from rarefy.models.source import Source
from rarefy.tasks.detection import Detection
from rarefy.tasks.task import fitted, settled
from tests.detecting import BinHead, GridHead, torchvision_detector
from tests.networks import ConvNormLinear

SIZE = (64, 96)
YOLOX, NANODET = "yolox:classes=3,size=64/96", "nanodet:classes=3,size=64/96"


def graph(kind: type[torch.nn.Module] = GridHead, **options: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    return rarefy.capture(kind(**options).eval(), (3, *SIZE))


def data(root: Path, count: int = 8) -> str:
    return boxed.coco(root, {f"{n}.png": [(8 + n, 6, 24 + n, 26, n % 3)] for n in range(count)})[0]


def test_a_graph_says_how_it_is_fed_and_read(tmp_path: Path) -> None:
    task = Detection(val=data(tmp_path))
    with pytest.raises(DataError, match="--detector"):
        _ = task.input_shape
    found = rarefy.evaluate(graph(), task, progress=False, batch_size=4)
    assert found.metric == "ap" and found.samples == 8 and 0 <= found.value <= 1
    assert "AP50" in found.text and found.worst_class["name"] in ("red", "blue", "green")
    assert settled(task, graph()).detector == YOLOX and task.detector is None
    assert settled(task, ConvNormLinear()) is task


def test_a_model_without_a_family_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--detector"):
        rarefy.evaluate(rarefy.capture(torch.nn.Conv2d(3, 4, 3).eval(), (3, 16, 16)), Detection(val=data(tmp_path)))


def test_the_answers_of_a_perfect_model_are_worth_one(tmp_path: Path) -> None:
    """Outputs made of the targets: what YOLOX would say, were it always right."""
    task = settled(Detection(val=data(tmp_path)), graph())
    metric = fitted(task, graph()).metric()
    for _, targets in task.batches("val", 4):
        outputs = torch.zeros(len(targets), 8 * 12 + 4 * 6 + 2 * 3, 8)
        for picture, (left, top, right, bottom, kind) in enumerate(targets[:, 0, :5].tolist()):
            place = (int(top) // 8) * 12 + int(left) // 8
            centre = ((left + right) / 16 - int(left) // 8, (top + bottom) / 16 - int(top) // 8)
            sides = torch.tensor([(right - left) / 8, (bottom - top) / 8]).log()
            outputs[picture, place, :4] = torch.tensor([*centre, *sides])
            outputs[picture, place, 4] = outputs[picture, place, 5 + int(kind)] = 1
        metric.add(outputs, targets)
    assert metric.value() == pytest.approx(1)


def test_training_lowers_the_familys_loss_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    task = Detection(train=data(tmp_path), augment="none")
    student = graph()
    done = rarefy.distill(
        student, graph(width=12), task=task, loss="kl", epochs=2, batch_size=4, lr=0.01, device="cpu", progress=False
    )  # fmt: skip
    known = settled(task, student)
    inputs, targets = next(iter(known.batches("train", 8)))
    with torch.no_grad():
        before, after = (float(known.loss(one.train()(inputs), targets)) for one in (student, done))
    assert after < before


def test_boxes_are_not_blended_or_smoothed(tmp_path: Path) -> None:
    task = Detection(train=data(tmp_path), augment="none")
    for options, told in (({"mixup": 0.2}, "mixup=0"), ({"label_smoothing": 0.1}, "label_smoothing=0")):
        with pytest.raises(InputError, match=told):
            rarefy.distill(graph(), graph(), task=task, epochs=1, batch_size=4, device="cpu", progress=False, **options)


def test_a_model_of_another_family_is_read_by_its_own(tmp_path: Path) -> None:
    task = Detection(val=data(tmp_path), detector=NANODET)
    assert type(fitted(task, graph(BinHead)).family).__name__ == "Nanodet"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="fed otherwise"):
        fitted(task, graph())
    told = Detection(val=data(tmp_path), detector=NANODET, mean=0, std=1 / 255)
    assert type(fitted(told, graph()).family).__name__ == "Yolox"  # type: ignore[attr-defined]


def test_boxes_of_a_class_that_the_model_does_not_know(tmp_path: Path) -> None:
    one = graph(classes=1)
    task = settled(Detection(val=data(tmp_path)), one)
    with pytest.raises(DataError, match=r"class 'green' \(2, counted from 0\), the model knows 1"):
        task.check(None)
    warned = rarefy.evaluate(one, task, progress=False).warnings
    assert any("the model knows 1 classes, the data has 3" in line for line in warned)
    settled(Detection(val=data(tmp_path)), graph()).check(None)


def test_proposals_are_of_one_class_whatever_the_data_has(tmp_path: Path) -> None:
    """Faster R-CNN's core: what a second look would say is not its."""
    torch.manual_seed(0)
    core = rarefy.capture(torchvision_detector("faster_rcnn"))
    task = settled(Detection(val=data(tmp_path)), core)
    task.check(None)
    found = rarefy.evaluate(core, task, progress=False, batch_size=4)
    assert found.samples == 8 and not any("the model knows" in line for line in found.warnings)
    assert found.worst_class == {"index": 0, "name": "proposal", "value": found.value, "samples": 8}
    known = fitted(task, core)
    _, targets = next(iter(known.batches("val", 8)))

    class Right:  # what it would find, were it always right
        proposes, boxes = True, staticmethod(lambda outputs, size: outputs)

    object.__setattr__(known, "_family", Right)
    sure = torch.cat([targets[..., :4], torch.zeros_like(targets[..., :1]), torch.ones_like(targets[..., :1])], -1)
    metric = known.metric()
    metric.add(torch.where(targets[..., 4:5] >= 0, sure, torch.tensor([0.0, 0, 0, 0, -1, 0])), targets)
    assert metric.value() == pytest.approx(1) and set(targets[..., 4].unique().tolist()) >= {0.0, 1.0, 2.0}
    assert known.answers(sure, [(30, 40)] * 8, ["red", "green", "blue"], 0.5)[0][0].name == "proposal"


def test_options_of_the_model_are_settled_for_recipes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = Source("mine", GridHead().eval(), (3, *SIZE))
    found = fitting.fit(source, Detection(val=data(tmp_path)), ["val"])
    assert found.options == {"detector": YOLOX} and found.task.data.input_shape == (3, 64, 96)
    assert "letterbox" in str(fitting.told(found)) and "3 classes: red, blue, green" in str(fitting.told(found))
    square = Detection(val=data(tmp_path), detector=YOLOX, size=32)
    assert square.input_shape == (3, 32, 32)


def test_a_detector_of_a_file_is_captured_once_in_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="the file is written first")
    text = data(tmp_path / "data")
    rarefy.export(graph(), tmp_path / "one.onnx", boxes=False, compare=False)
    seen: list[object] = []

    def counted(model: torch.nn.Module, *given: Any, **options: Any) -> fx.GraphModule:
        seen.append(model)
        return rarefy.capture(model, *given, **options)

    monkeypatch.setattr("rarefy.models.load.capture", counted)
    arguments = ["--task", "detection", "--val", text, "--batch-size", "4", "--json"]
    assert run(["evaluate", f"onnx:{tmp_path / 'one.onnx'}", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 8 and len(seen) == 1
    source = load.load(f"onnx:{tmp_path / 'one.onnx'}")
    first = load.looked_at(source, (3, *SIZE))
    assert load.graph_of(source) is first and not source.captured
    assert load.graph_of(source) is not first  # what one caller trains is not another's


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = data(tmp_path / "data")
    rarefy.save(graph(), tmp_path / "model")
    arguments = ["--task", "detection", "--val", text, "--batch-size", "4"]
    assert run(["evaluate", str(tmp_path / "model"), *arguments, "--corruptions", "jpeg", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metric"] == "ap" and told["samples"] == 8 and set(told["robustness"]) == {"jpeg"}
    assert run(["evaluate", str(tmp_path / "model"), *arguments, "--crop", "0.9"]) == 2
    assert "unknown key 'crop'" in capsys.readouterr().err
    assert run(["quantize", str(tmp_path / "model"), "--task", "detection", "--train", text, "--images", "8",
                "-o", str(tmp_path / "int8")]) == 0  # fmt: skip
    capsys.readouterr()
    assert run(["evaluate", str(tmp_path / "int8"), *arguments, "--reference", str(tmp_path / "model"), "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["drop"]["interval"][0] <= both["drop"]["value"] <= both["drop"]["interval"][1]
