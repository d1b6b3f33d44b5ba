"""Two tasks that the product knows nothing of, each a few lines: they go through all that a classifier does.

One says which of several things are in a picture (targets (N, 3) of 0 and 1, mean average precision), one estimates a
number (targets (N, 1), mean absolute error, where lower is better).
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import rarefy
from rarefy.data.images import ImageData
from rarefy.data.targets import Numbers
from rarefy.deployment import latency
from rarefy.evaluation import measure
from rarefy.graph.capture import capture
from rarefy.tasks.metric import Difference, Metric, worth
from rarefy.tasks.task import Task

# ---------------------------------------------------------------------------------------- the two tasks, all of them


class Bootstrapped(Metric):
    """A metric of all outputs and targets together: its intervals are those of 200 resamplings of the images."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    @property
    def samples(self) -> int:
        return sum(map(len, self.targets))

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        self.outputs.append(outputs.cpu().float())
        self.targets.append(targets.cpu())

    def of(self, outputs: Tensor, targets: Tensor) -> float:
        raise NotImplementedError

    def value(self) -> float:
        return self.of(torch.cat(self.outputs), torch.cat(self.targets))

    def resampled(self) -> np.ndarray:
        outputs, targets = torch.cat(self.outputs), torch.cat(self.targets)
        draws = torch.randint(len(targets), (200, len(targets)), generator=torch.Generator().manual_seed(0))
        return np.array([self.of(outputs[draw], targets[draw]) for draw in draws])

    def interval(self) -> tuple[float, float]:
        low, high = np.quantile(self.resampled(), (0.025, 0.975))
        return float(low), float(high)

    def paired(self, reference: Bootstrapped) -> Difference:
        sign = -1 if self.better == "higher" else 1
        low, high = np.quantile(sign * (self.resampled() - reference.resampled()), (0.025, 0.975))
        return Difference(sign * (self.value() - reference.value()), (float(low), float(high)))


class MeanAveragePrecision(Bootstrapped):
    name, label, unit, better = "map", "mean average precision", "%", "higher"

    def of(self, outputs: Tensor, targets: Tensor) -> float:
        hits = targets.gather(0, outputs.argsort(dim=0, descending=True, stable=True))
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1).unsqueeze(1)
        return float(((precision * hits).sum(0) / hits.sum(0).clamp(min=1)).mean())


class MeanAbsoluteError(Bootstrapped):
    name, label, unit, better = "mae", "mean absolute error", "widths", "lower"

    def of(self, outputs: Tensor, targets: Tensor) -> float:
        return float((outputs - targets).abs().mean())


class MultiLabel(Task):
    name = "multilabel"

    def __init__(self, **options: object):
        self.options = options

    @functools.cached_property
    def data(self) -> ImageData:
        return ImageData(**self.options, targets=Numbers(), task=self.name)

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets)

    def metric(self) -> MeanAveragePrecision:
        return MeanAveragePrecision()


class Regression(MultiLabel):
    name = "regression"

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.mse_loss(outputs, targets)

    def metric(self) -> MeanAbsoluteError:
        return MeanAbsoluteError()


# ----------------------------------------------------------------------------------------------- pictures and networks


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, 1, 12, 12) with up to three bright squares, and a dark column.

    Which squares are there (N, 3), and where the column is, in widths (N, 1).
    """
    draw = np.random.default_rng(seed)
    images = draw.integers(20, 190, (count, 1, 12, 12), dtype=np.uint8)
    there, column = draw.random((count, 3)) < 0.4, draw.integers(0, 12, count)
    for index, (top, left) in enumerate([(0, 0), (0, 8), (8, 4)]):
        images[there[:, index], 0, top : top + 4, left : left + 4] += 60
    images[np.arange(count), 0, :, column] = 0
    return images, there.astype(np.float32), (column[:, None] / 12).astype(np.float32)


def task_of(kind: type[MultiLabel]) -> MultiLabel:
    place = 1 if kind is MultiLabel else 2
    train, val = pictures(384, 0), pictures(160, 1)
    return kind(train=(train[0], train[place]), val=(val[0], val[place]), augment="none")


def network(outputs: int) -> fx.GraphModule:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 36, outputs),
    )  # fmt: skip
    return capture(net, torch.zeros(2, 1, 12, 12))


@functools.cache
def fitted(kind: type[MultiLabel]) -> tuple[MultiLabel, fx.GraphModule]:
    task, net = task_of(kind), network(3 if kind is MultiLabel else 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.003)
    for epoch in range(8):
        for inputs, targets in task.data.batches("train", 32, shuffle_seed=0, epoch=epoch):
            optimizer.zero_grad()
            task.loss(net.train()(inputs), targets).backward()
            optimizer.step()
    return task, net.eval()


def worse(model: nn.Module, reference: nn.Module, task: Task) -> float:
    return float(rarefy.evaluate(model, task, reference=reference, progress=False).drop["value"])


BOTH = pytest.mark.parametrize("kind", [MultiLabel, Regression])


# -------------------------------------------------------------------------------------------------------- what they do


@BOTH
def test_evaluate_speaks_in_the_words_of_the_metric(kind: type[MultiLabel]) -> None:
    task, net = fitted(kind)
    metric = task.metric()
    new = network(3 if kind is MultiLabel else 1)
    found = rarefy.evaluate(new, task, reference=net, corruptions=["contrast"], severities=(5,), progress=False)
    assert (found.metric, found.unit, found.better) == (metric.name, metric.unit, metric.better)
    inputs, targets = next(task.data.batches("val", 160))
    with torch.no_grad():
        metric.add(new.eval()(inputs), targets)
    assert found.value == pytest.approx(metric.value(), rel=1e-5) and found.samples == 160
    assert found.interval[0] <= found.value <= found.interval[1]
    assert found.drop["value"] > 0 and found.drop["interval"][0] > 0, (
        "untrained is worse, whichever direction is better"
    )
    assert found.reference.robustness["contrast"][5] != found.reference.value
    text, told = str(found), json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert text.startswith(f"{metric.label} ") and text.count(metric.unit) == (3 if metric.unit == "%" else 2)
    assert "top-1" not in text and "agreement" not in text
    assert told["metric"] == metric.name and "top5" not in told


@BOTH
def test_training_keeps_the_best_epoch_by_the_metric(kind: type[MultiLabel]) -> None:
    task = task_of(kind)
    options = {"epochs": 4, "batch_size": 32, "lr": 0.01, "clip": 1.0, "keep": "best", "mixup": 0.2}
    net = rarefy.train(network(3 if kind is MultiLabel else 1), task, **options, device="cpu", progress=False)
    values = [point["val"] for point in net.meta["history"][-1]["facts"]["curve"]]
    best = max(values) if task.metric().better == "higher" else min(values)
    assert rarefy.evaluate(net, task, progress=False).value == pytest.approx(best, rel=1e-4)


@BOTH
def test_a_pruned_student_learns_from_its_original(kind: type[MultiLabel]) -> None:
    task, net = fitted(kind)
    student = rarefy.prune(net, macs=0.3, criterion="taylor", task=task, device="cpu", progress=False)
    training = {"epochs": 3, "batch_size": 32, "lr": 0.005, "clip": 1.0, "device": "cpu", "progress": False}
    taught = rarefy.distill(student, net, task, loss="mse:on=logits", **training)
    assert worse(taught, net, task) < worse(student, net, task)


@BOTH
def test_quantized_it_is_about_as_good(kind: type[MultiLabel]) -> None:
    task, net = fitted(kind)
    assert abs(worse(rarefy.quantize(net, task, images=64, progress=False), net, task)) < 0.02


@BOTH
def test_compress_from_end_to_end(kind: type[MultiLabel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates, report, resume: each step pays, what pruning lost is won back, a run that lost its end goes on."""
    monkeypatch.setattr(latency, "_seconds", lambda model, given, runs: 0.002)  # no clock: each step pays by its size
    monkeypatch.setattr(measure, "peak_memory", lambda *_, **__: None)  # four processes less
    task, net = fitted(kind)
    metric, folder = task.metric(), tmp_path / "run"
    taught = {"loss": "mse:on=logits", "epochs": 3, "batch_size": 32, "lr": 0.005, "clip": 1.0}
    steps = [
        {"do": "prune", "macs": 0.3, "criterion": "taylor"},
        {"do": "distill", **taught},
        {"do": "quantize", "images": 64},
    ]
    options = {"steps": steps, "workdir": folder, "corruptions": ["brightness"], "device": "cpu", "progress": False}
    run = functools.partial(rarefy.compress, net, task, budget=rarefy.Budget(max_drop=0.9, size=10**6), **options)
    result = run()
    report = result.report
    assert result.met and [step["kept"] for step in report["steps"]] == [True, True, True], report["steps"]
    assert all(metric.label in step["why"] or "smaller" in step["why"] for step in report["steps"])
    pruned, trained = (worth(step["value"], metric.better) for step in report["steps"][:2])
    assert trained > pruned, "distilling made it better, whichever direction that is"
    judged = report["after"]["evaluation"]
    assert judged["metric"] == metric.name and set(judged["robustness"]) == {"brightness"}
    saved = result.save(tmp_path / "saved")
    html = (saved / "report.html").read_text()
    assert metric.label in html and "top-1" not in html
    assert rarefy.load(saved).meta["history"][-1]["step"] == "quantize"

    def stored() -> dict[str, bytes]:
        return {path.parent.name: path.read_bytes() for path in folder.glob("*/weights.safetensors")}

    before = stored()
    assert len(before) == 4
    shutil.rmtree(folder / "3-quantize")
    (folder / "final.json").unlink()
    for verb in ("prune", "distill"):  # what was done is read, not done again
        monkeypatch.setattr(f"rarefy.compression.steps.{verb}", None)
    assert [step["value"] for step in run().report["steps"]] == [step["value"] for step in report["steps"]]
    assert stored() == before
