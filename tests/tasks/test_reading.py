"""A task reads the output that is meant, whatever the model returns and whatever it ends in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy
from rarefy.errors import DataError
from rarefy.graph.capture import capture
from rarefy.graph.signature import Makers, last_operators
from rarefy.tasks import Classification
from rarefy.tasks.metrics.label_precision import LabelPrecision, average_precision

IMAGES = torch.randint(0, 256, (48, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
Answer = Callable[[Tensor, Tensor], Any]


class Net(nn.Module):
    """answer: of logits and features, what the network returns."""

    def __init__(self, classes: int, answer: Answer = lambda logits, features: logits):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.body, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, classes)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        features = self.body(self.conv(x).relu()).relu().mean((2, 3))
        return self.answer(8 * self.head(features), features)


def task_of(labels: Any, **options: Any) -> Classification:
    return Classification(train=(IMAGES, labels), val=(IMAGES, labels), **options)


@dataclasses.dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


LABELS = torch.arange(48) % 4
WRAPPED: dict[str, tuple[Answer, str | None]] = {
    "dict": (lambda logits, features: {"logits": logits}, None),
    "dict of several": (lambda logits, features: {"features": features, "logits": logits}, None),
    "only tensor": (lambda logits, features: {"scores": logits, "step": 3, "loss": None}, None),
    "dataclass": (lambda logits, features: Output(logits), None),
    "by name": (lambda logits, features: {"features": features, "scores": logits}, "scores"),
    "by place": (lambda logits, features: (features, [logits, features]), "output_1_0"),
    "by path": (lambda logits, features: {"out": {"aux": features, "main": logits}}, "out.main"),
    "plane of one": (lambda logits, features: logits[:, :, None, None], None),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_output_that_is_meant_is_read(kind: str) -> None:
    answer, name = WRAPPED[kind]
    task, plain = task_of(LABELS, output=name), Net(4).eval()
    images, labels = next(iter(task.data.batches("val", 48)))
    wanted = float((plain(images).argmax(1) == labels).double().mean())
    for model in (Net(4, answer).eval(), capture(Net(4, answer), (1, 8, 8))):
        found = rarefy.evaluate(model, task, reference=plain, progress=False)
        assert found.value == wanted and found.drop is not None and found.drop["value"] == 0
        assert torch.allclose(task.loss(model(images), labels), F.cross_entropy(plain(images), labels))


@pytest.mark.parametrize(
    ("answer", "name", "words"),
    [
        (
            lambda logits, features: (features, logits),
            None,
            r"several outputs \(output_0, output_1\).*output='output_0'",
        ),
        (lambda logits, features: {"a": logits}, "b", "has no output 'b'; it has a"),
        (lambda logits, features: {"logits": logits[:, :, None].expand(-1, -1, 3)}, None, r"shape \(48, 4, 3\)"),
    ],
)
def test_what_is_not_clear_is_refused_with_the_names(answer: Answer, name: str | None, words: str) -> None:
    with pytest.raises(DataError, match=words):
        rarefy.evaluate(Net(4, answer), task_of(LABELS, output=name), progress=False)


def verbs(graph: Any, task: Classification) -> dict[str, Any]:
    """What reads answers, in every verb."""
    small = rarefy.prune(graph, keep=0.5, criterion="taylor:batches=1,batch_size=16", task=task)
    rarefy.prune(graph, keep=0.5, criterion="hessian:batches=1,batch_size=16", task=task)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 16, "progress": False}
    return {
        "distill": rarefy.distill(small, graph, task, **options),
        "kl": rarefy.distill(small, graph, task, loss="kl", mixup=0.2, **options),
        "train": rarefy.train(small, task, label_smoothing=0.1, **options),
        "quantize": rarefy.quantize(graph, task, images=16, progress=False),
    }


@pytest.mark.parametrize("answer", [WRAPPED["dict of several"][0], WRAPPED["dataclass"][0]])
def test_every_verb_reads_it(answer: Answer) -> None:
    task = task_of(LABELS)
    for name, graph in verbs(capture(Net(4, answer), (1, 8, 8)), task).items():
        found = rarefy.evaluate(graph, task, corruptions="gaussian_noise", severities=(1,), progress=False)
        assert found.samples == 48 and found.robustness, name


ENDINGS: dict[str, tuple[int, Answer]] = {
    "logits": (4, lambda logits, features: logits),
    "softmax": (4, lambda logits, features: {"probabilities": logits.softmax(1)}),
    "log softmax": (4, lambda logits, features: logits.log_softmax(1)),
    "one logit": (1, lambda logits, features: logits),
    "one logit without its axis": (1, lambda logits, features: logits.squeeze(1)),
    "sigmoid": (1, lambda logits, features: logits.sigmoid()),
    "sigmoid without its axis": (1, lambda logits, features: logits.sigmoid()[:, 0]),
}


@pytest.mark.parametrize("kind", ENDINGS)
def test_whatever_a_classifier_ends_in_its_loss_and_its_answers_are_the_same(kind: str) -> None:
    outputs, answer = ENDINGS[kind]
    labels = torch.arange(48) % (4 if outputs == 4 else 2)
    task, plain = task_of(labels), Net(outputs).eval()
    images, targets = next(iter(task.data.batches("val", 48)))
    logits = plain(images)
    wanted = (
        F.cross_entropy(logits, targets)
        if outputs == 4
        else F.binary_cross_entropy_with_logits(logits[:, 0], targets.float())
    )
    answers = logits.argmax(1) if outputs == 4 else (logits[:, 0] > 0).long()
    graph = capture(Net(outputs, answer), (1, 8, 8))
    fitted = task.fitted(last_operators(graph))
    assert torch.allclose(fitted.loss(graph(images), targets), wanted, atol=1e-4)
    for model in (graph, Net(outputs, answer).eval(), graph.forward):
        found = rarefy.evaluate(model, task, progress=False)
        assert found.value == float((answers == targets).double().mean()), model


def test_one_logit_between_0_and_1_is_no_probability() -> None:
    net = Net(1).eval()
    nn.init.constant_(net.head.weight, 0.0)
    nn.init.constant_(net.head.bias, 0.05)  # 8 times this is 0.4: class 1 as a logit, class 0 as a probability
    task = task_of(torch.ones(48, dtype=torch.int64), class_count=2)
    assert rarefy.evaluate(net, task, progress=False).value == 1.0
    assert rarefy.evaluate(capture(net, (1, 8, 8)), task, progress=False).value == 1.0


def test_one_logit_learns_from_labels_and_from_its_teacher() -> None:
    labels = torch.arange(48) % 2
    images = IMAGES // 2 + 100 * labels.to(torch.uint8)[:, None, None, None]
    task = Classification(train=(images, labels), val=(images, labels), augment="none")
    graph = capture(Net(1), (1, 8, 8))
    options: dict[str, Any] = {"epochs": 40, "batch_size": 48, "lr": 0.01, "optimizer": "adamw", "progress": False}
    teacher = rarefy.train(graph, task, **options)
    assert rarefy.evaluate(teacher, task, progress=False).value >= 0.9
    student = rarefy.distill(graph, teacher, task, hard_weight=0, **options)
    assert float(rarefy.evaluate(student, task, reference=teacher, progress=False).agreement or 0) >= 0.9


def test_a_model_of_probabilities_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    task, graph = task_of(LABELS), capture(Net(4, ENDINGS["softmax"][1]), (1, 8, 8))
    for _ in range(2):
        rarefy.evaluate(graph, task, progress=False)
    told = [record.getMessage() for record in caplog.records if record.name == "rarefy"]
    assert len(told) == 1 and "probabilities (a softmax is in it)" in told[0]


def test_what_a_model_ends_in_is_seen_as_it_runs() -> None:
    with Makers() as makers:
        values = {"a": torch.ones(2, 2).softmax(1).reshape(4), "b": (torch.ones(2).sigmoid() + 1, 3)}
    assert makers.of(values) == {"a": "_softmax", "b": ("add", 3)}


# ------------------------------------------------------------------------------------------------- several labels


def several(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (48, 3))


def test_labels_of_which_several_are_true_are_a_task_of_their_own() -> None:
    labels = several()
    task, net = task_of(labels), Net(3).eval()
    assert task.multilabel and task.classes == 3 and not task_of(LABELS).multilabel
    images, targets = next(iter(task.data.batches("val", 48)))
    wanted = F.binary_cross_entropy_with_logits(net(images), torch.tensor(labels).float())
    assert torch.allclose(task.loss(net(images), targets), wanted)
    ends = capture(Net(3, lambda logits, features: logits.sigmoid()), (1, 8, 8))
    assert torch.allclose(task.fitted(last_operators(ends)).loss(ends(images), targets), wanted, atol=1e-5)
    for model in (net, ends):
        found = rarefy.evaluate(model, task, progress=False)
        assert found.metric == "map" and 0 <= found.interval[0] <= found.value <= found.interval[1] <= 1
        assert found.label_accuracy == float(((net(images) > 0) == (targets > 0)).double().mean())


def test_every_verb_takes_several_labels() -> None:
    task = task_of(several())
    for name, graph in verbs(capture(Net(3), (1, 8, 8)), task).items():
        found = rarefy.evaluate(graph, task, reference=graph, progress=False)
        assert found.samples == 48 and found.drop is not None and found.drop["value"] == 0, name


def test_rows_that_are_no_labels_are_refused() -> None:
    with pytest.raises(DataError, match="one-hot: labels.argmax"):
        _ = task_of(np.eye(4)[np.arange(48) % 4]).classes
    with pytest.raises(DataError, match="labels have shape"):
        _ = task_of(np.full((48, 3), 0.5)).classes
    with pytest.raises(DataError, match="rows of 3 labels, class_count=4"):
        _ = task_of(several(), class_count=4).data.source("val")
    with pytest.raises(DataError, match="label 2 needs a model with at least 3 outputs, this one has 2"):
        task_of(several()).check(2)


def by_hand(scores: list[float], true: list[int]) -> float:
    """The mean over true images of the share of true ones among those of at least its score."""
    found = []
    for score, is_true in zip(scores, true, strict=True):
        above = [other for one, other in zip(scores, true, strict=True) if one >= score]
        found += [sum(above) / len(above)] if is_true else []
    return sum(found) / len(found)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_the_mean_of_precisions_ties_together(seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores, true = draw.integers(0, 5, (20, 3)).astype(np.float32), draw.integers(0, 2, (20, 3))
    found = average_precision(torch.tensor(scores), torch.tensor(true) > 0)
    for label in range(3):
        assert float(found[label]) == pytest.approx(by_hand(scores[:, label].tolist(), true[:, label].tolist()))


def test_images_that_are_not_finite_come_last_and_are_counted() -> None:
    metric = LabelPrecision(["a", "b"])
    scores = torch.tensor([[3.0, -1.0], [float("nan"), 2.0], [-2.0, 1.0]])
    metric.add(scores, torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
    assert metric.value() == pytest.approx(((1 + 2 / 3) / 2 + (1 + 2 / 3) / 2) / 2)
    assert metric.details()["nonfinite"] == 1 and metric.details()["label_accuracy"] == pytest.approx(4 / 6)
    assert metric.details()["worst_class"] == {"index": 0, "name": "a", "value": pytest.approx(5 / 6), "samples": 2}
    assert "1 images with NaN or infinity" in metric.text()
