"""evaluate(): every number against its definition, pairs, models that misbehave; what is passed in stays as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Lookup
from torch import Tensor, nn

from rarefy.errors import DataError, InputError
from rarefy.evaluation.corruptions import CORRUPTIONS
from rarefy.evaluation.evaluate import evaluate
from rarefy.evaluation.evaluation import Evaluation
from rarefy.tasks.classification import Classification

CLASSES = 7


def made_task(samples: int = 40, seed: int = 0, classes: int = CLASSES) -> Classification:
    """Images whose first pixel says which image it is, so that a lookup can answer with any logits."""
    draw = np.random.default_rng(seed)
    images = np.zeros((samples, 1, 8, 8), np.uint8)
    images[:, 0, 0, 0] = np.arange(samples)
    return Classification(val=(images, draw.integers(0, classes, samples)), mean=0.0, std=1.0)


def targets_of(task: Classification) -> Tensor:
    return torch.cat([targets for _, targets in task.batches("val", 9)])


def test_numbers_equal_their_definitions() -> None:
    task = made_task()
    logits = torch.randn(40, CLASSES, generator=torch.Generator().manual_seed(1))
    other = logits + 0.7 * torch.randn(40, CLASSES, generator=torch.Generator().manual_seed(2))
    targets = targets_of(task)
    found = evaluate(Lookup(other), task, reference=Lookup(logits), batch_size=7, progress=False)
    right, theirs = other.argmax(1) == targets, logits.argmax(1) == targets
    assert found.value == int(right.sum()) / 40 and found.samples == 40 and found.metric == "top1"
    assert found.top5 == int((other.topk(5).indices == targets[:, None]).any(1).sum()) / 40
    assert found.agreement == pytest.approx(int((other.argmax(1) == logits.argmax(1)).sum()) / 40, abs=1e-12)
    assert found.drop is not None and found.reference is not None
    assert (found.drop["lost"], found.drop["gained"]) == (int((theirs & ~right).sum()), int((right & ~theirs).sum()))
    assert found.drop["value"] == pytest.approx(found.reference.value - found.value, abs=1e-12)
    per_class = {label: float(right[targets == label].double().mean()) for label in set(targets.tolist())}
    worst = found.worst_class
    assert worst["value"] == min(per_class.values()) == per_class[worst["index"]]
    assert worst["samples"] == int((targets == worst["index"]).sum())
    lost = {label: float((theirs.double() - right.double())[targets == label].mean()) for label in per_class}
    assert found.drop["worst_class"]["value"] == pytest.approx(max(lost.values()), abs=1e-12)
    alone = evaluate(Lookup(logits), task, batch_size=40, progress=False)
    assert (alone.value, alone.top5, alone.interval, alone.worst_class) == (
        found.reference.value,
        found.reference.top5,
        found.reference.interval,
        found.reference.worst_class,
    )
    assert alone.calibration_error == pytest.approx(found.reference.calibration_error, abs=1e-9)


def test_a_model_against_itself_agrees_and_drops_nothing() -> None:
    task = made_task()
    model = Lookup(torch.randn(40, CLASSES))
    found = evaluate(model, task, reference=model, progress=False)
    assert found.agreement == 1.0 and found.drop is not None
    assert (found.drop["value"], found.drop["lost"], found.drop["gained"]) == (0.0, 0, 0)


def test_constant_outputs_are_the_first_class_and_not_right_by_chance() -> None:
    task = made_task()
    targets = targets_of(task)
    found = evaluate(Lookup(torch.zeros(40, CLASSES)), task, progress=False)
    assert found.value == int((targets == 0).sum()) / 40
    assert found.top5 == int((targets < 5).sum()) / 40
    assert evaluate(Lookup(torch.zeros(40, CLASSES + 3)), task, progress=False).top5 == found.top5


def test_fewer_than_five_classes() -> None:
    task = made_task(classes=3)
    assert evaluate(Lookup(torch.randn(40, 3)), task, progress=False).top5 == 1.0


def test_outputs_that_are_not_finite_count_as_wrong_and_are_told() -> None:
    task = made_task()
    logits = 9.0 * torch.nn.functional.one_hot(targets_of(task), CLASSES)
    broken = logits.clone()
    broken[3, 2] = math.nan
    broken[5, int(targets_of(task)[5])] = math.inf
    found = evaluate(Lookup(broken), task, reference=Lookup(logits), progress=False)
    assert found.value == found.agreement == found.top5 == 38 / 40 and found.nonfinite == 2
    assert "2 images with NaN or infinity" in str(found)
    nothing = evaluate(
        Lookup(torch.full((40, CLASSES), math.nan)),
        task,
        reference=Lookup(torch.full((40, CLASSES), math.nan)),
        progress=False,
    )
    assert (nothing.value, nothing.agreement, nothing.calibration_error, nothing.nonfinite) == (0.0, 0.0, 1.0, 40)
    assert json.loads(json.dumps(nothing.to_json(), allow_nan=False))["value"] == 0.0


def test_callables_and_one_decoding_for_all_models() -> None:
    decoded: list[int] = []

    class Counted(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            decoded.append(index)
            return torch.full((1, 8, 8), index, dtype=torch.uint8), index % CLASSES

    task = Classification(val=Counted(), size=8, mean=0.0, std=1.0)
    shape = task.input_shape
    decoded.clear()
    seen: list[tuple[int, ...]] = []

    def session(inputs: Tensor) -> Tensor:
        seen.append(tuple(inputs.shape))
        return torch.eye(CLASSES)[(inputs[:, 0, 0, 0] * 255).round().long() % CLASSES]

    found = evaluate(
        session,
        task,
        reference=Lookup(torch.eye(CLASSES).repeat(2, 1)[:12]),
        batch_size=5,
        corruptions=["contrast"],
        progress=False,
    )
    assert found.value == found.agreement == 1.0
    assert sorted(decoded) == list(range(12))
    assert seen[0] == (5, *shape) and len(seen) == 3 * (1 + 3)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    task = made_task()
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, CLASSES)).train(training)
    model[2].train(not training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again = (evaluate(model, task, progress=False) for _ in range(2))
    assert [module.training for module in model] == [training, training, not training, training]
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (first.value, first.calibration_error) == (again.value, again.calibration_error)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_another_device_gets_a_copy() -> None:
    model = Lookup(torch.randn(40, CLASSES)).to("meta")
    with pytest.raises(
        NotImplementedError
    ):  # a copy on the meta device can't be filled, so what runs is not the caller's
        evaluate(model, made_task(), device="cpu", progress=False)
    assert model.logits.device.type == "meta"


def test_robustness_is_by_name_and_severity_and_reproducible() -> None:
    task = Classification(train="sklearn:digits", val="sklearn:digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images, targets = next(task.batches("train", 1438))
    with torch.no_grad():  # class means make a fair classifier of digits
        means = torch.stack([images[targets == label].flatten(1).mean(0) for label in range(10)])
        model[1].weight.copy_(means)
        model[1].bias.copy_(-(means**2).sum(1) / 2)
    found = evaluate(model, task, corruptions="all", limit=120, progress=False)
    assert found.samples == 120 and found.value > 0.8
    assert set(found.robustness) == {name for name in CORRUPTIONS if name != "saturate"}
    assert all(
        list(of) == [1, 3, 5] and all(0 <= value <= 1 for value in of.values()) for of in found.robustness.values()
    )
    assert found.robustness["contrast"][5] < found.value
    again = evaluate(
        model, task, reference=model, corruptions=["fog", "shot_noise"], severities=(3,), limit=120, progress=False
    )
    assert again.robustness == {name: {3: found.robustness[name][3]} for name in ("fog", "shot_noise")}
    assert again.reference is not None and again.reference.robustness == again.robustness
    said = json.loads(json.dumps(again.to_json(), allow_nan=False))
    assert said["robustness"]["fog"] == {"3": found.robustness["fog"][3]} and said["reference"]["drop"] is None


def test_text_says_the_numbers_with_their_samples() -> None:
    task = made_task()
    known = 0.1 * torch.randn(40, CLASSES) + torch.nn.functional.one_hot(targets_of(task), CLASSES)
    text = str(evaluate(Lookup(known), task, progress=False))
    assert "40 images" in text and "\n" not in text
    both = str(evaluate(Lookup(known), task, reference=Lookup(torch.randn(40, CLASSES)), progress=False))
    assert both.count("\n") == 1 and "lost" in both
    assert isinstance(evaluate(Lookup(torch.randn(40, CLASSES)), made_task(), progress=False), Evaluation)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (Lookup(torch.randn(40, 3)), {}, DataError, "needs a model with at least"),
        (nn.Conv2d(3, 4, 3), {}, DataError, "Conv2d: can't be run on inputs of shape"),
        (lambda x: x, {}, DataError, "returns shape"),
        (lambda x: (x, x), {}, DataError, "returns a tuple"),
        (lambda x: x.mean((2, 3))[:-1], {}, DataError, "returns shape"),
        (Lookup(torch.randn(40, CLASSES)), {"split": "test"}, DataError, "no split"),
        (Lookup(torch.randn(40, CLASSES)), {"split": "train"}, DataError, "no train data"),
        (Lookup(torch.randn(40, CLASSES)), {"batch_size": 0}, DataError, "batch size 0"),
        (Lookup(torch.randn(40, CLASSES)), {"corruptions": ["frost"]}, InputError, "unknown name 'frost'"),
        (Lookup(torch.randn(40, CLASSES)), {"corruptions": ["saturate"]}, InputError, "1 channels"),
        (Lookup(torch.randn(40, CLASSES)), {"corruptions": "fog", "severities": (9,)}, InputError, "have 1 to 5"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    model: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        evaluate(model, made_task(), progress=False, **options)
    assert "\n" not in str(caught.value)


def test_more_outputs_than_classes_and_chance_are_told() -> None:
    task = made_task()
    right = torch.nn.functional.one_hot(targets_of(task), CLASSES + 3).float()
    found = evaluate(Lookup(right[:, :CLASSES]), task, progress=False)
    assert found.warnings == () and "warnings" not in found.to_json()
    found = evaluate(Lookup(right), task, reference=Lookup(right.roll(1, 1)), progress=False)
    assert found.warnings == (
        f"{CLASSES + 3} outputs, the data has {CLASSES} classes: label i is compared with output i; "
        "is that their order?",
    )
    assert found.reference is not None and found.reference.warnings[0].startswith(
        "no better than chance (top-1 0.00% of 40 images"
    )
    assert f"warning: {found.warnings[0]}" in str(found) and found.to_json()["warnings"] == list(found.warnings)


def test_images_that_are_normalised_already_can_not_be_corrupted() -> None:
    task = Classification(val=(torch.randn(8, 1, 8, 8), torch.arange(8) % CLASSES), mean=0.0, std=1.0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    assert evaluate(model, task, progress=False).samples == 8
    with pytest.raises(DataError, match="can't be corrupted"):
        evaluate(model, task, corruptions=["fog"], progress=False)


def test_nothing_readable_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"no image")
    task = Classification(val=f"imagefolder:{tmp_path}", size=8, strict=False)
    with pytest.raises(DataError, match="no image of val could be read"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), task, progress=False)


def test_resnet20_on_cifar_gives_its_published_accuracy(real_data: Path) -> None:
    from bench.real_data import resnet_cifar

    model, task = resnet_cifar(20), Classification(val="bench.real_data:cifar10")
    found = evaluate(model, task, limit=500, batch_size=100, progress=False)
    # 91.73 % on all 10,000: five standard deviations of 500 drawn from them
    assert abs(found.value - 0.9173) < 5 * math.sqrt(0.9173 * 0.0827 / 500)


@pytest.mark.slow
def test_efficientnet_lite0_on_imagenet(real_data: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    from bench.real_data import LITE_MEAN, LITE_STD, efficientnet_lite, imagenet_val

    task = Classification(val=imagenet_val(), size=224, crop=224 / 227, mean=LITE_MEAN, std=LITE_STD, class_count=1000)
    found = evaluate(efficientnet_lite(0), task, batch_size=50, progress=False)
    assert found.samples == 650
    assert found.value == pytest.approx(
        542 / 650, abs=2.5 / 650
    )  # 83.38 % as measured; float sums may turn an image or two
