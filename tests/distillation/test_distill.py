"""The training loop: what it computes, that it resumes to the bit, and that it fails well."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rarefy.data.augmentation import mix
from rarefy.distillation import checkpoint, loop, objective
from rarefy.distillation.checkpoint import STATE_FILE
from rarefy.distillation.distill import distill, train
from rarefy.distillation.options import Training
from rarefy.errors import FormatError, InputError, TrainingDiverged
from rarefy.graph.capture import capture
from rarefy.graph.nodes import is_graph
from rarefy.system import progress
from rarefy.tasks.metric import Metric
from rarefy.tasks.metrics.accuracy import Accuracy

torch.set_num_threads(1)  # as in the process that test_killed_run starts: bits depend on it

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)[order] / 8 - 1, torch.tensor(found.target)[
        order
    ]


class Stopped(Exception):
    pass


@dataclass(frozen=True)
class Digits:
    """An in-memory task as the loop wants it. stop: raise at that (epoch, step); spoil: NaN from that (epoch, step)
    on.
    """

    images: int = 160
    stop: tuple[int, int] | None = None
    spoil: tuple[int, int] | None = None
    val: str | None = "digits"
    train: str = "digits"
    classes: int = 10
    input_shape: tuple[int, int, int] = (1, 8, 8)
    watch: Callable[[int, int, Tensor], None] | None = None
    noise: float = 0.1
    labels: bool = True
    name: str = "digits"

    @property
    def data(self) -> Digits:
        return self

    def length(self, split: str) -> int:
        return self.images if split == "train" else 300

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        augment: bool = False,
        epoch: int = 0,
        start: int = 0,
        device: Any = "cpu",
        labelled: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.labels or not labelled or split == "val", "no labels, and they were asked for"
        x, y = digits()
        x, y = (x[: self.images], y[: self.images]) if split == "train" else (x[-300:], y[-300:])
        order = torch.arange(len(y))
        if shuffle_seed is not None:
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 * shuffle_seed + epoch))
        for step, rows in enumerate(order.split(batch_size)[start:], start):
            if augment and self.stop == (epoch, step):
                raise Stopped
            inputs = x[rows]
            if augment:
                inputs = inputs + self.noise * torch.randn(
                    inputs.shape, generator=torch.Generator().manual_seed(1000 * epoch + step)
                )
                if self.spoil is not None and self.spoil <= (epoch, step):
                    inputs = inputs * float("nan")
                if self.watch is not None:
                    self.watch(epoch, step, inputs)
            yield inputs.to(device), y[rows].to(device) if self.labels or split == "val" else None

    def rows(
        self, split: str, batch_size: int, *, shuffle_seed: int | None = None, epoch: int = 0
    ) -> list[Tensor] | None:
        if self.noise:
            return None
        order = torch.arange(self.images)
        if shuffle_seed is not None:
            order = torch.randperm(self.images, generator=torch.Generator().manual_seed(1000 * shuffle_seed + epoch))
        return list(order.split(batch_size))

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    def soft(self, targets: Tensor) -> Tensor:
        return F.one_hot(targets, self.classes).float()

    def metric(self) -> Metric:
        return Accuracy()

    def fingerprint(self, split: str) -> str:
        return hashlib.sha256(f"{split} {self.length(split)}".encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {"task": "digits", "classes": self.classes}


def net(width: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


@functools.cache
def teacher() -> fx.GraphModule:
    return train(net(12), Digits(images=1400), epochs=4, batch_size=50, lr=0.2, seed=1, progress=False)


@functools.cache
def student(width: int = 4, dropout: float = 0.0) -> fx.GraphModule:
    return capture(net(width, dropout), torch.zeros(2, 1, 8, 8))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def top1(model: nn.Module) -> float:
    x, y = digits()
    with torch.no_grad():
        return float((model(x[-300:]).argmax(1) == y[-300:]).float().mean())


def facts(graph: fx.GraphModule) -> dict[str, Any]:
    return graph.meta["history"][-1]["facts"]


QUICK = {"epochs": 2, "batch_size": 40, "lr": 0.05, "progress": False, "validate_every": 0}


# -- what it computes


def test_training_alone_learns_digits() -> None:
    assert top1(teacher()) > 0.9  # chance is 0.1
    assert facts(teacher())["curve"][-1]["val"] == pytest.approx(top1(teacher()), abs=1e-6)


def test_the_teachers_weight_rises_in_equal_steps() -> None:
    """Steps of one batch, at a rate of nothing and on the same pictures: the loss is the weight."""
    options = {**QUICK, "epochs": 4, "batch_size": 160, "lr": 1e-12, "hard_weight": 0.0}
    task = Digits(noise=0.0)
    curves = [
        [point["loss"] for point in facts(distill(student(), teacher(), task, loss_warmup=share, **options))["curve"]]
        for share in (0.0, 0.5, 1.0)
    ]
    assert curves[1] == pytest.approx([one * weight for one, weight in zip(curves[0], (0.5, 1, 1, 1))], rel=1e-4)
    assert curves[2] == pytest.approx([one * weight for one, weight in zip(curves[0], (0.25, 0.5, 0.75, 1))], rel=1e-4)


@pytest.mark.parametrize("loss", ["lskd", "kl", "mse:on=logits", "kl + 5*mse", "lskd + mse:on=embedding"])
def test_distillation_without_labels_brings_the_student_to_the_teacher(loss: str) -> None:
    x, _ = digits()
    with torch.no_grad():
        wanted = teacher()(x[-300:]).argmax(1)

        def agreement(model: nn.Module) -> float:
            return float((model(x[-300:]).argmax(1) == wanted).float().mean())

        start = agreement(student(6))
        taught = distill(
            student(6),
            teacher(),
            Digits(images=1400),
            loss=loss,
            epochs=8,
            batch_size=25,
            lr=0.1,
            hard_weight=0,
            validate_every=0,
            progress=False,
        )
        assert start < 0.3
        assert agreement(taught) > 0.75


def test_caller_keeps_models_modes_generators_and_gets_a_finished_graph() -> None:
    model, guide = net(4, dropout=0.2).train(), copy.deepcopy(teacher())
    guide.train()
    before = [copy.deepcopy(model), copy.deepcopy(guide), copy.deepcopy(guide.meta)]
    generator = torch.get_rng_state()
    result = distill(model, guide, Digits(), **QUICK)
    assert same(model, before[0]) and same(guide, before[1])
    assert model.training and guide.training and guide.meta == before[2]
    assert all(one.grad is None for one in [*model.parameters(), *guide.parameters(), *result.parameters()])
    assert torch.equal(torch.get_rng_state(), generator)
    assert is_graph(result) and not result.training
    assert all(one.is_contiguous() and one.requires_grad for one in result.parameters())
    again = distill(result, guide, Digits(), **QUICK)
    assert [one["step"] for one in again.meta["history"]] == ["distill", "distill"]
    assert len(result.meta["history"]) == 1


def test_matches_a_loop_written_by_hand() -> None:
    """SGD, Nesterov, warm-up, cosine, no decay on norm and bias, CE + LSKD: the same weights as the plain loop's."""
    from rarefy.distillation.losses.lskd import Lskd

    task = Digits(images=120)
    result = distill(
        student(),
        teacher(),
        task,
        epochs=2,
        batch_size=40,
        lr=0.1,
        warmup=0.34,
        weight_decay=0.01,
        clip=1.0,
        channels_last="no",
        progress=False,
    )
    ours, guide = copy.deepcopy(student()).train(), copy.deepcopy(teacher()).eval()
    decayed = [one for one in ours.parameters() if one.dim() > 1]
    plain = [one for one in ours.parameters() if one.dim() == 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain}], lr=1, momentum=0.9, nesterov=True
    )
    rates = [0.1 / 3, 0.2 / 3, 0.1, 0.1 * (1 + np.cos(np.pi / 4)) / 2, 0.05, 0.1 * (1 + np.cos(3 * np.pi / 4)) / 2]
    step = 0
    for epoch in range(2):
        for x, y in task.batches("train", 40, shuffle_seed=0, augment=True, epoch=epoch):
            optimizer.zero_grad()
            with torch.no_grad():
                wanted = guide(x)
            outputs = ours(x)
            (F.cross_entropy(outputs, y) + Lskd()(outputs, wanted, y, {})).backward()
            nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            optimizer.step()
            step += 1
    for name, one in tensors(result).items():
        torch.testing.assert_close(one, tensors(ours)[name], rtol=1e-4, atol=1e-5)


def test_ema_is_the_weighted_mean_of_all_states() -> None:
    """θ̄ = Σ dᵗ⁻ⁱ θᵢ / Σ dᵗ⁻ⁱ, from the states of runs of one schedule stopped at each step."""
    states = []
    for steps in (1, 2, 3):
        # a warm-up longer than the run keeps the rate of a step independent of the run's length
        run = functools.partial(train, student(), Digits(), batch_size=40, validate_every=0, progress=False)
        rates = Training(steps=3, lr=0.1, warmup=0.0)
        states.append(tensors(_with_rates(run, [rates.rate(step, 3) for step in range(3)], steps=steps)))
    averaged = tensors(_with_rates(run, [rates.rate(step, 3) for step in range(3)], steps=3, ema=0.7))
    weights = np.array([0.7**2, 0.7, 1.0]) / (0.7**2 + 0.7 + 1)
    for name, mean in averaged.items():
        expected = sum(float(weight) * state[name] for weight, state in zip(weights, states))
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(mean, states[-1][name]) for name, mean in averaged.items())


def _with_rates(run: Callable[..., fx.GraphModule], rates: list[float], **options: Any) -> fx.GraphModule:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "rate", lambda self, step, total: rates[step])
        return run(**options)


def test_accumulation_gives_the_gradient_of_the_whole_batch() -> None:
    """Without batch norm, four parts of a batch are the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    whole = distill(model, teacher(), Digits(), **QUICK)
    parts = distill(model, teacher(), Digits(), accumulate=3, **QUICK)  # 40 = 14 + 14 + 12
    for name, one in tensors(whole).items():
        torch.testing.assert_close(tensors(parts)[name], one, rtol=1e-4, atol=1e-6)


def test_out_of_memory_halves_the_parts_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    whole = train(model, Digits(), **QUICK)
    forward = objective.Objective.forward

    def small(self: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        if len(inputs) > 12:
            raise torch.OutOfMemoryError("no room")
        return forward(self, inputs, targets)

    monkeypatch.setattr(objective.Objective, "forward", small)
    parts = train(model, Digits(), **QUICK)
    assert facts(parts)["accumulate"] == 4
    for name, one in tensors(whole).items():
        torch.testing.assert_close(tensors(parts)[name], one, rtol=1e-4, atol=1e-6)

    monkeypatch.setattr(
        objective.Objective, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all"))
    )
    with pytest.raises(InputError, match="out of memory with 1 images"):
        train(model, Digits(), **QUICK)


def test_adamw_and_bf16_learn() -> None:
    result = train(
        net(8),
        Digits(images=800),
        epochs=6,
        batch_size=25,
        optimizer="adamw",
        lr=0.01,
        precision="bf16",
        progress=False,
    )
    assert top1(result) > 0.7
    assert all(one.dtype == torch.float32 for one in result.parameters())


def test_precision_and_layout_change_little() -> None:
    plain = distill(student(), teacher(), Digits(), channels_last="no", **QUICK)
    last = distill(student(), teacher(), Digits(), channels_last="yes", **QUICK)
    for name, one in tensors(plain).items():
        torch.testing.assert_close(tensors(last)[name], one, rtol=1e-3, atol=1e-4)


class Volumes(nn.Module):
    """A picture seen as a volume, too: weights and buffers of rank 5 beside those of rank 4."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.deep, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv3d(1, 8, 3, padding=1), nn.Linear(8, 10)
        self.register_buffer("table", torch.rand(1, 1, 8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        volume = self.deep(torch.relu(self.flat(x))[:, None] * self.table.permute(0, 1, 4, 2, 3))
        return self.head(torch.relu(volume).mean((2, 3, 4)))


def test_what_has_no_picture_layout_is_left_in_its_own() -> None:
    graph = capture(Volumes(), torch.randn(2, 1, 8, 8))
    trained = distill(graph, graph, Digits(), **QUICK)
    assert not torch.equal(tensors(trained)["deep.weight"], tensors(graph)["deep.weight"])


def test_best_state_is_kept_and_last_by_default() -> None:
    scores = iter([0.5, 0.9, 0.3])
    seen = []

    def validate(graph: fx.GraphModule) -> float:
        assert not graph.training
        seen.append({name: one.clone() for name, one in tensors(graph).items()})
        return next(scores)

    options = {**QUICK, "epochs": 3, "validate_every": 1}
    best = train(student(), Digits(), validate=validate, keep="best", **options)
    assert all(torch.equal(one, seen[1][name]) for name, one in tensors(best).items())
    assert facts(best)["best"] == {"epoch": 2, "val": 0.9} and facts(best)["kept"] == "best"
    last = train(student(), Digits(), validate=lambda graph: 0.0, **options)
    assert all(torch.equal(one, seen[2][name]) for name, one in tensors(last).items())


def test_frozen_parameters_stay() -> None:
    frozen = copy.deepcopy(student())
    first = next(iter(frozen.parameters())).requires_grad_(False)
    result = train(frozen, Digits(), **QUICK)
    assert torch.equal(next(iter(result.parameters())), first)
    with pytest.raises(InputError, match="requires_grad_"):
        train(copy.deepcopy(frozen).requires_grad_(False), Digits(), **QUICK)


def test_integer_buffers_pass_through() -> None:
    """What a quantised graph carries: codes, which do not train."""

    class Coded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(-8, 8, (16, 64), dtype=torch.int8))
            self.scale, self.head = nn.Parameter(torch.full((16, 1), 0.02)), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(x.flatten(1), self.codes.float() * self.scale).relu())

    model = Coded()
    result = distill(model, teacher(), Digits(), ema=0.9, **QUICK)
    assert torch.equal(tensors(result)["codes"], model.codes) and tensors(result)["codes"].dtype == torch.int8
    assert not torch.equal(tensors(result)["scale"], model.scale)


def test_record_says_how_it_went() -> None:
    result = distill(
        student(), teacher(), Digits(), loss="kl:temperature=2.0 + 3*mse", epochs=2, batch_size=40, progress=False
    )
    record = result.meta["history"][-1]
    json.dumps(record, allow_nan=False)
    assert (
        record["step"] == "distill"
        and record["options"]["loss"] == "1*kl:temperature=2.0 + 3*mse"
        and record["options"]["epochs"] == 2
    )
    assert [one["epoch"] for one in record["facts"]["curve"]] == [1, 2]
    assert record["facts"]["curve"][1]["val"] == pytest.approx(top1(result), abs=1e-6)
    assert record["facts"]["steps"] == 8 and len(record["facts"]["matched"]) == 2
    assert 0 <= record["facts"]["timing"]["data_share"] <= 1


def test_two_runs_with_one_seed_agree_and_another_differs() -> None:
    one, two, other = (distill(student(dropout=0.3), teacher(), Digits(), seed=seed, **QUICK) for seed in (5, 5, 6))
    assert same(one, two) and not same(one, other)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile on a CPU needs a C++ compiler"
)
def test_compiled_is_the_same_training() -> None:
    options = {**QUICK, "epochs": 1}
    plain = distill(student(), teacher(), Digits(), loss="lskd + mse", **options)
    compiled = distill(student(), teacher(), Digits(), loss="lskd + mse", compile="default", **options)
    for name, one in tensors(plain).items():
        torch.testing.assert_close(tensors(compiled)[name], one, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_cuda_graphs_are_the_same_training(accumulate: int) -> None:
    """A graph writes each part's gradients to the same memory; their sum needs its own.

    Without TF32 (whose 2^-11 in each product depends on the algorithm chosen) both compute in fp32, eps 1.2e-7: twelve
    steps of sums of at most 1e3 terms in another order stay below 1e-4.
    """
    options = {
        **QUICK,
        "loss": "lskd + mse",
        "epochs": 3,
        "lr": 0.01,
        "accumulate": accumulate,
        "precision": "fp32",
        "device": "cuda",
    }
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [
        one.allow_tf32 for one in backends
    ]  # not by monkeypatch, which can't undo what a module answers by __getattr__
    try:
        for one in backends:
            one.allow_tf32 = False
        plain, graphs = (
            distill(student(), teacher(), Digits(), compile=mode, **options) for mode in ("no", "reduce-overhead")
        )
    finally:
        for one, was in zip(backends, before, strict=True):
            one.allow_tf32 = was
    for ours, expected in zip(facts(graphs)["curve"], facts(plain)["curve"]):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4)


# -- mixing


def mixed(x: Tensor, y: Tensor | None, training: Training, step: int) -> tuple[Tensor, Tensor | None]:
    """As the loop mixes: labels become probabilities where there is something to blend."""
    soft = y if y is None or not (training.mixup or training.cutmix) else torch.nn.functional.one_hot(y).float()
    return mix(x, soft, mixup=training.mixup, cutmix=training.cutmix, seed=training.seed, step=step)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_pictures_and_their_targets_agree(kind: str) -> None:
    """Pictures that are their own labels: each picture's mean is its label's share."""
    training = Training(**{kind: 1.0})
    y = torch.tensor([0, 1, 1, 0, 1, 1])
    x = y.float().view(-1, 1, 1, 1).expand(-1, 1, 9, 7).contiguous()
    shares = []
    for step in range(40):
        inputs, targets = mixed(x, y, training, step)
        assert targets is not None
        torch.testing.assert_close(inputs.mean((1, 2, 3)), targets[:, 1])
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        assert torch.equal(mixed(x, y, training, step)[0], inputs)
        shares.append(float(targets[0, 0]))
    assert len(set(shares)) > 10 and 0.3 < np.mean(shares) < 0.75
    assert torch.equal(x, y.float().view(-1, 1, 1, 1).expand(-1, 1, 9, 7))


def test_both_kinds_take_turns_and_none_changes_nothing() -> None:
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    untouched = mixed(x, y, Training(), 0)
    assert untouched[0] is x and untouched[1] is y
    both, up = Training(mixup=1.0, cutmix=1.0), Training(mixup=1.0)
    patched = [bool((mixed(x, y, both, step)[0] == x).any()) for step in range(20)]
    assert any(patched) and not all(patched)
    assert not any(bool((mixed(x, y, up, step)[0] == x).all()) for step in range(20))
    assert mixed(x, None, up, 0)[1] is None


def test_teacher_sees_the_student_s_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    forward = objective.Objective.forward

    def spied(self: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        handles = [
            one.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
            for one in (self.student, self.teachers[0])
        ]
        taken: list[Tensor] = []
        loss = forward(self, inputs, targets)
        for handle in handles:
            handle.remove()
        seen.append((taken[0], taken[1]))
        assert self.student.training and not self.teachers[0].training
        assert targets.shape == (40, 10)
        return loss

    originals: list[Tensor] = []
    monkeypatch.setattr(objective.Objective, "forward", spied)
    task = Digits(watch=lambda epoch, step, inputs: originals.append(inputs))
    distill(student(), teacher(), task, mixup=0.5, cutmix=0.5, **QUICK)
    assert len(seen) == 8
    for (ours, theirs), original in zip(seen, originals):
        assert ours is theirs and ours.shape == original.shape
    assert sum(not torch.equal(ours, original) for (ours, _), original in zip(seen, originals)) >= 6


# -- checkpoints

RESUMED = {
    "loss": "lskd + 2*mse",
    "epochs": 3,
    "batch_size": 40,
    "lr": 0.05,
    "ema": 0.9,
    "mixup": 0.4,
    "keep": "best",
    "clip": 5.0,
    "seed": 3,
    "progress": False,
}


@functools.cache
def undisturbed(optimizer: str) -> fx.GraphModule:
    return distill(student(dropout=0.2), teacher(), Digits(), optimizer=optimizer, **RESUMED)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stops", [[(0, 0)], [(0, 1)], [(0, 3), (2, 1)], [(1, 0)], [(1, 2), (1, 3), (2, 3)]])
def test_stopped_run_ends_with_the_same_bits(tmp_path: Path, optimizer: str, stops: list[tuple[int, int]]) -> None:
    run = functools.partial(
        distill,
        student(dropout=0.2),
        teacher(),
        optimizer=optimizer,
        checkpoint=tmp_path,
        checkpoint_seconds=0,
        **RESUMED,
    )
    for stop in stops:
        with pytest.raises(Stopped):
            run(Digits(stop=stop))
    seen: list[tuple[int, int]] = []
    result = run(Digits(watch=lambda epoch, step, _: seen.append((epoch, step))))
    assert seen[0] == stops[-1] and seen[-1] == (2, 3)
    assert same(result, undisturbed(optimizer))
    ours, expected = facts(result), facts(undisturbed(optimizer))
    assert {**ours, "timing": None} == {**expected, "timing": None}


def test_finished_run_is_returned_without_training(tmp_path: Path) -> None:
    run = functools.partial(distill, student(), teacher(), checkpoint=tmp_path, **QUICK)
    first = run(Digits())
    again = run(Digits(stop=(0, 0)))
    assert same(first, again) and first.meta == again.meta
    assert [one.name for one in tmp_path.iterdir()] == [STATE_FILE]


def test_saving_by_time_does_not_save_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = []
    save = checkpoint.Store.save
    monkeypatch.setattr(
        checkpoint.Store,
        "save",
        lambda self, state, numbers: (saves.append(numbers["step"]), save(self, state, numbers)),
    )
    for cost, wanted in (
        (0.0, [4, 8]),
        (3600.0, []),
    ):  # seconds that saving took: epochs as short as this are not worth it
        saves.clear()
        monkeypatch.setattr(
            checkpoint.Store, "cost", property(lambda _, cost=cost: cost, lambda *_: None), raising=False
        )
        folder = tmp_path / str(cost)
        distill(student(), teacher(), Digits(), checkpoint=folder, checkpoint_seconds=7200, **QUICK)
        assert saves == wanted


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_run_ends_with_the_same_bits(tmp_path: Path, kills: int) -> None:
    """SIGKILL at random moments of a training that saves at every step, one life after another; then the rest,
    undisturbed.
    """
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "import torch, time; torch.set_num_threads(1)\n"
        "from test_distill import *\n"
        "task = Digits(watch=lambda *_: (print('step', flush=True), time.sleep(0.02)))\n"
        "places = dict(checkpoint=sys.argv[3], checkpoint_seconds=0)\n"
        "distill(student(dropout=0.2), teacher(), task, optimizer='sgd', **places, **RESUMED)\n"
    )
    folder = tmp_path / "state"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    moments = np.random.default_rng(kills).uniform(0, 0.1, kills)
    for moment in moments:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(ROOT), str(Path(__file__).parent), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"step\n", process.stderr.read().decode()[-2000:]  # it trains
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)  # steps, saves, epochs' ends: a step takes about 0.03 s
        process.wait()
        process.stdout.close()
        process.stderr.close()
        if process.returncode == 0:  # it had ended
            break
    saved = (folder / STATE_FILE).exists()  # not so where every moment came before the first step's end
    (folder / f".{STATE_FILE}.1").write_bytes(b"half a file, as a kill in the middle of a save leaves it")
    seen: list[tuple[int, int]] = []
    task = Digits(watch=lambda epoch, step, _: seen.append((epoch, step)))
    result = distill(student(dropout=0.2), teacher(), task, optimizer="sgd", checkpoint=folder, **RESUMED)
    assert len(seen) < 12 or not saved  # it went on, and did not start anew
    assert same(result, undisturbed("sgd"))
    assert [one.name for one in folder.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lr": 0.06}, r"options \(lr=0.06, there 0.05\)"),
        ({"loss": "kl"}, r"options \(loss='1\*kl', there '1\*lskd'\)"),
        ({"student": 5}, "student"),
        ({"teacher": True}, "teacher"),
        ({"images": 120}, "data"),
        ({"classes": 11}, r"task \(classes=11, there 10\)"),
    ],
)
def test_foreign_checkpoint_is_refused_and_kept(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(Stopped):
        distill(student(), teacher(), Digits(stop=(1, 1)), checkpoint=tmp_path, **QUICK)
    before = (tmp_path / STATE_FILE).read_bytes()
    guide = undisturbed("sgd") if change.pop("teacher", False) else teacher()
    model = student(change.pop("student", 4))
    task = dataclasses.replace(Digits(), **{key: change.pop(key) for key in ("images", "classes") if key in change})
    with pytest.raises(InputError, match=f"another {says}") as raised:
        distill(model, guide, task, checkpoint=tmp_path, **{**QUICK, **change})
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
    assert (tmp_path / STATE_FILE).read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "foreign", "no numbers"])
def test_damaged_checkpoint_is_one_line(tmp_path: Path, damage: str) -> None:
    import safetensors.torch

    with pytest.raises(Stopped):
        distill(student(), teacher(), Digits(stop=(1, 1)), checkpoint=tmp_path, **QUICK)
    file = tmp_path / STATE_FILE
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "noise":
        file.write_bytes(b"\xff" * 200)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "foreign":
        safetensors.torch.save_file({"x": torch.zeros(1)}, file)
    else:
        with safetensors.safe_open(file, "pt") as opened:
            header = json.loads(opened.metadata()["rarefy"])
        safetensors.torch.save_file(
            {"x": torch.zeros(1)}, file, metadata={"rarefy": json.dumps({**header, "numbers": {}})}
        )
    with pytest.raises(FormatError, match="delete it") as raised:
        distill(student(), teacher(), Digits(), checkpoint=tmp_path, **QUICK)
    assert "\n" not in str(raised.value)


def test_checkpoint_that_can_t_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="can't be written"):
        distill(student(), teacher(), Digits(), checkpoint=tmp_path / "file", **QUICK)


# -- failing well


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_nan_stops_with_the_last_good_state(tmp_path: Path, ema: float) -> None:
    options = {**QUICK, "epochs": 3, "ema": ema}
    kept: list[dict[str, Tensor]] = []

    def validate(graph: fx.GraphModule) -> float:
        kept.append({name: one.clone() for name, one in tensors(graph).items()})
        return 0.0

    options["validate_every"] = 1
    with pytest.raises(TrainingDiverged, match=r"after epoch 1; .*clip=1") as raised:
        distill(student(), teacher(), Digits(spoil=(1, 2)), checkpoint=tmp_path, validate=validate, **options)
    assert "\n" not in str(raised.value) and raised.value.exit_code == 1
    graph = raised.value.graph  # type: ignore[attr-defined]
    assert is_graph(graph) and not graph.training
    assert len(kept) == 1 and all(torch.equal(one, kept[0][name]) for name, one in tensors(graph).items())
    with safetensors_open(tmp_path / STATE_FILE) as opened:
        assert all(opened.get_tensor(name).isfinite().all() for name in opened.keys())  # noqa: SIM118 (no mapping)
    with pytest.raises(TrainingDiverged, match="after epoch 1"):
        distill(student(), teacher(), Digits(spoil=(1, 2)), checkpoint=tmp_path, validate=validate, **options)


def safetensors_open(file: Path) -> Any:
    import safetensors

    return safetensors.safe_open(file, "pt")


def test_nan_in_the_first_epoch_keeps_the_start() -> None:
    with pytest.raises(TrainingDiverged, match="from before training") as raised:
        train(student(), Digits(spoil=(0, 0)), **QUICK)
    assert same(raised.value.graph, student())  # type: ignore[attr-defined]


def test_infinite_weights_after_a_finite_loss_are_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step's gradient may break the weights when no loss is left to show it."""
    advance = loop.Loop.advance

    def broken(self: Any, inputs: Tensor, targets: Tensor, taught: Any, rate: float) -> None:
        advance(self, inputs, targets, taught, rate)
        if self.state.step == 3:
            with torch.no_grad():
                next(self.state.graph.parameters()).view(-1)[0] = float("inf")

    monkeypatch.setattr(loop.Loop, "advance", broken)
    with pytest.raises(TrainingDiverged, match="weights not finite at step 4"):
        train(student(), Digits(), **{**QUICK, "epochs": 1})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch_size": 161}, "batch_size=161.*160 training images"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"optimizer": "lion"}, "sgd or adamw"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"momentun": 0.9}, "unknown option 'momentun'"),
        ({"loss": "dkdd"}, "unknown choice 'dkdd'"),
        ({"loss": None}, "train"),
        ({"loss": "mse:on=nowhere"}, "nowhere"),
        ({"precision": "fp16"}, "precision='fp16'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as raised:
        distill(student(), teacher(), Digits(), **{**QUICK, **arguments})
    assert "\n" not in str(raised.value)


def test_the_usual_batch_is_all_images_where_there_are_fewer(capsys: pytest.CaptureFixture[str]) -> None:
    quick = {key: value for key, value in QUICK.items() if key != "batch_size"}
    trained = train(student(), Digits(images=20), **quick)
    assert trained.meta["history"][-1]["options"]["batch_size"] == 20
    assert capsys.readouterr().err == "train: batch_size=20, as many as there are training images\n"
    with pytest.raises(InputError, match="batch_size=64 is above the 20 training images"):
        train(student(), Digits(images=20), batch_size=64, **quick)


OUT_OF_BOUNDS = [
    ({"epochs": 0}, "epochs=0 is not at least 1"),
    ({"steps": 0}, "steps=0 is not at least 1, or None"),
    ({"batch_size": 0}, "batch_size=0 is not at least 1"),
    ({"accumulate": 0}, "accumulate=0 is not 1 to batch_size"),
    ({"accumulate": 3, "batch_size": 2}, "accumulate=3 is not 1 to batch_size"),
    ({"optimizer": "lion"}, "optimizer='lion' is not sgd or adamw"),
    ({"lr": 0.0}, "lr=0.0 is not positive, or None"),
    ({"lr": float("inf")}, "lr=inf is not positive, or None"),
    ({"momentum": 1.0}, "momentum=1.0 is not 0 up to, not including, 1"),
    ({"momentum": -0.1}, "momentum=-0.1 is not 0 up to, not including, 1"),
    ({"weight_decay": -1.0}, "weight_decay=-1.0 is not 0 or more"),
    ({"warmup": 1.0}, "warmup=1.0 is not a share of the steps, 0 up to, not including, 1"),
    ({"clip": -1.0}, "clip=-1.0 is not 0 (off) or more"),
    ({"clip": float("nan")}, "clip=nan is not 0 (off) or more"),
    ({"label_smoothing": 1.0}, "label_smoothing=1.0 is not 0 up to, not including, 1"),
    ({"hard_weight": -1.0}, "hard_weight=-1.0 is not 0 or more"),
    ({"mixup": -1.0}, "mixup=-1.0 is not 0 (off) or more"),
    ({"cutmix": float("inf")}, "cutmix=inf is not 0 (off) or more"),
    ({"ema": 1.0}, "ema=1.0 is not 0 (off) up to, not including, 1"),
    ({"precision": "fp16"}, "precision='fp16' is not auto, fp32 or bf16"),
    ({"channels_last": "maybe"}, "channels_last='maybe' is not auto, yes or no"),
    ({"compile": "max"}, "compile='max' is not auto, no, default or reduce-overhead"),
    ({"validate_every": -1}, "validate_every=-1 is not 0 (never) or more"),
    ({"keep": "first"}, "keep='first' is not last or best"),
    ({"patience": -1}, "patience=-1 is not 0 (never) or more epochs"),
    ({"dot": -0.1}, "dot=-0.1 is not 0 (off) up to momentum, and below 1 - momentum"),
    ({"dot": 0.1}, "dot=0.1 is not 0 (off) up to momentum, and below 1 - momentum"),
    ({"dot": 0.5, "momentum": 0.5}, "dot=0.5 is not 0 (off) up to momentum, and below 1 - momentum"),
    ({"dot": 0.06, "momentum": 0.05}, "dot=0.06 is not 0 (off) up to momentum, and below 1 - momentum"),
    ({"freeze": 1.1}, "freeze=1.1 is not a share of the steps, 0 to 1"),
    ({"loss_warmup": -0.1}, "loss_warmup=-0.1 is not a share of the steps, 0 to 1"),
    ({"sync_norm": "auto"}, "sync_norm='auto' is not yes or no"),
    ({"live_norm": "auto"}, "live_norm='auto' is not yes or no"),
]


@pytest.mark.parametrize(("options", "words"), OUT_OF_BOUNDS)
def test_a_training_out_of_bounds_says_which_field(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as raised:
        Training(**options)
    assert str(raised.value) == f"training: {words}"


def test_a_training_at_its_bounds() -> None:
    names = (
        "accumulate",
        "momentum",
        "weight_decay",
        "warmup",
        "clip",
        "label_smoothing",
        "hard_weight",
        "ema",
        "freeze",
    )
    Training(epochs=1, steps=1, batch_size=1, lr=1e9, **dict.fromkeys(names[1:], 0.0))
    Training(accumulate=128, freeze=1.0, loss_warmup=1.0, dot=0.05, momentum=0.05)
    assert Training(momentum=0.5, dot=0.49).dot == 0.49


def test_defaults_of_a_training_and_of_the_verbs() -> None:
    assert dataclasses.asdict(Training()) == {
        "epochs": 30, "steps": None, "batch_size": 128, "accumulate": 1,
        "optimizer": "sgd", "lr": None, "momentum": 0.9, "weight_decay": 5e-4, "warmup": 0.05, "clip": 0.0,
        "label_smoothing": 0.0, "hard_weight": 1.0, "mixup": 0.0, "cutmix": 0.0, "ema": 0.0,
        "precision": "auto", "channels_last": "auto", "compile": "auto",
        "validate_every": 1, "keep": "last", "patience": 0, "dot": 0.0, "freeze": 0.0, "loss_warmup": 0.0,
        "sync_norm": "yes", "live_norm": "no", "seed": 0,
    }  # fmt: skip
    assert [Training(optimizer=name).rate(0, 1) for name in ("sgd", "adamw")] == [0.05, 1e-3]
    everything = {
        "training": None, "device": None, "checkpoint": None, "checkpoint_seconds": 60.0, "validate": None,
        "penalty": None, "logs": None, "progress": True,
    }  # fmt: skip
    for verb, own in ((distill, {"loss": "auto", "cache": None}), (train, {})):
        parameters = inspect.signature(verb).parameters.values()
        given = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
        assert given == {**everything, **own}


def test_progress_is_shown_unless_that_is_declined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    options = {key: value for key, value in QUICK.items() if key != "progress"}
    train(student(), Digits(), **{**options, "epochs": 1})
    said = capsys.readouterr().err
    assert "train" in said and "4/4" in said
    distill(student(), teacher(), Digits(), **{**options, "epochs": 1}, progress=False)
    assert capsys.readouterr().err == ""


def test_cuda_graphs_are_chosen_where_they_pay() -> None:
    """From 2000 steps on, of one process, with one pass backwards; named, they are taken anywhere."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    pays = "reduce-overhead" if importlib.util.find_spec("triton") is not None else "no"
    assert objective.compiler_mode(Training(), cuda, 2000, 1) == pays
    for training, device, steps, processes in (
        (Training(), cpu, 2000, 1),
        (Training(), cuda, 1999, 1),
        (Training(), cuda, 2000, 2),
        (Training(dot=0.05), cuda, 2000, 1),
        (Training(compile="no"), cuda, 2000, 1),
    ):
        assert objective.compiler_mode(training, device, steps, processes) == "no"
    assert objective.compiler_mode(Training(compile="default"), cpu, 1, 2) == "default"


def test_models_that_do_not_fit_the_task_or_each_other() -> None:
    other = capture(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 10)), torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match=r"teacher: takes inputs of shape \(3, 8, 8\)"):
        distill(student(), other, Digits(), **QUICK)
    seven = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(InputError, match=r"student.*\(10,\).*teacher.*\(7,\)"):
        distill(student(), seven, Digits(), **QUICK)
    with pytest.raises(InputError, match="hard_weight=0"):
        train(student(), Digits(), hard_weight=0, **QUICK)


def test_no_val_data_no_validation() -> None:
    result = train(student(), Digits(val=None), **{**QUICK, "validate_every": 1})
    assert all(one["val"] is None for one in facts(result)["curve"]) and facts(result)["best"] is None


# -- progress


def test_progress_lines_when_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    steps = progress.track(range(4, 10), 10, "distil", done=4)
    for step in steps:
        steps.update(f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["distil 7/10 (70%), 0:12 left, loss 6", "distil 10/10 (100%), 0:00 left, loss 9"]


def test_progress_bar_when_somebody_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    steps = progress.track(range(3), 3, "distil [x]")
    assert [steps.update("loss [1]") or step for step in steps] == [0, 1, 2]
    said = capsys.readouterr().err
    assert "distil [x]" in said and "3/3" in said and "loss [1]" in said


def test_progress_off_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(3), None, "x", False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
