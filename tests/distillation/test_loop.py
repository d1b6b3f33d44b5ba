"""What the training loop offers beside the plain run: other teachers, no labels, a cache, two momenta, an early end,
presets.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from test_distill import QUICK, RESUMED, Digits, Stopped, digits, facts, net, same, student, teacher, tensors, top1
from torch import Tensor, fx, nn

from rarefy.distillation import loop, objective
from rarefy.distillation.distill import distill, train
from rarefy.distillation.optimizer import Dot
from rarefy.distillation.options import PRESETS, Training, training_of
from rarefy.distillation.teachers import teachers_of
from rarefy.errors import DataError, FormatError, InputError
from rarefy.graph.capture import capture


@functools.cache
def other_teacher() -> fx.GraphModule:
    return train(net(10), Digits(images=800), epochs=2, batch_size=50, lr=0.2, seed=2, validate_every=0, progress=False)


# -- teachers and labels


def test_pictures_without_labels_are_enough() -> None:
    x, _ = digits()
    with torch.no_grad():
        wanted = teacher()(x[-300:]).argmax(1)
        taught = distill(
            student(6),
            teacher(),
            Digits(images=1400, labels=False),
            hard_weight=0,
            mixup=0.2,
            epochs=8,
            batch_size=25,
            lr=0.1,
            progress=False,
        )
        assert float((taught(x[-300:]).argmax(1) == wanted).float().mean()) > 0.6  # chance is 0.1
    assert facts(taught)["curve"][-1]["val"] == pytest.approx(top1(taught), abs=1e-6)


def test_a_folder_of_images_without_classes_distils_in_python_on_the_command_line_and_in_compress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from rarefy import demo, save
    from rarefy.cli import main
    from rarefy.compression.budget import Budget, usual_steps
    from rarefy.compression.compress import compress
    from rarefy.tasks.classification import Classification

    for index, image in enumerate(load_digits().images[:96]):
        folder = tmp_path / "photos" / str(index % 7)  # which is no class
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{index}.png")
    task = Classification(
        train=f"images:{tmp_path / 'photos'}", val="sklearn:digits", size=8, channels=1, augment="none"
    )
    assert not task.labelled("train") and task.labelled("val") and task.classes == 10
    assert next(one for one in usual_steps(Budget(), 10**6, task) if one["do"] == "distill")["hard_weight"] == 0
    torch.manual_seed(0)
    model = capture(demo.model(width=16), torch.zeros(2, 1, 8, 8))
    with pytest.raises(DataError, match="hard_weight=0"):
        distill(model, model, task, steps=2, batch_size=32, progress=False)
    result = distill(
        model, model, task, hard_weight=0, cache=tmp_path / "cache", epochs=2, batch_size=32, progress=False
    )
    assert facts(result)["curve"][-1]["val"] is not None

    save(model, tmp_path / "model")
    given = [
        "--train",
        f"images:{tmp_path / 'photos'}",
        "--val",
        "sklearn:digits",
        "--image-size",
        "8",
        "--channels",
        "1",
        "--augment",
        "none",
    ]
    teaching = ["--teacher", str(tmp_path / "model"), "--hard-weight", "0", "--steps", "2", "--batch-size", "32"]
    assert (
        main.run(["distill", str(tmp_path / "model"), *given, *teaching, "-o", str(tmp_path / "small"), "--json"]) == 0
    )
    assert '"hard_weight": 0.0' in capsys.readouterr().out
    steps = [{"do": "distill", "hard_weight": 0.0, "steps": 2, "batch_size": 32, "training": "fast"}]
    done = compress(
        model, task, budget=Budget(), steps=steps, workdir=tmp_path / "work", corruptions=[], progress=False
    )
    assert done.report["steps"][0]["step"] == "distill"


def test_labels_that_are_not_needed_change_nothing_where_the_loss_reads_none() -> None:
    with_labels, without = (
        distill(student(), teacher(), Digits(labels=labels), hard_weight=0, **QUICK) for labels in (True, False)
    )
    assert same(with_labels, without)


def test_several_teachers_are_the_mean_of_their_losses() -> None:
    """Twice the same teacher is that teacher, whatever the weights; two teachers are what a loss written by hand
    makes of them.
    """
    twice = distill(student(), [(3, teacher()), (1, teacher())], Digits(), loss="kl", **QUICK)
    alone = distill(student(), teacher(), Digits(), loss="kl", **QUICK)
    for name, one in tensors(alone).items():
        torch.testing.assert_close(tensors(twice)[name], one, rtol=1e-3, atol=1e-5)

    training = Training(hard_weight=0)
    x, y = (one[:20] for one in digits())
    both = teachers_of([(1, teacher()), (3, other_teacher())])
    assert [share for share, _ in both] == [0.25, 0.75]

    def lost(guides: Any, loss: str) -> objective.Objective:
        return objective.Objective(student(), guides, Digits(), training, objective.terms(loss), False)

    torch.testing.assert_close(lost(both, "kl + at")(x, y), sum(lost([one], "kl + at")(x, y) for one in both))
    assert len(lost(both, "kl + mse").adapters) == 2  # a projection for each teacher


def test_a_network_teaches_itself() -> None:
    model = net(4)
    result = distill(model, model, Digits(), loss="lskd", **QUICK)
    assert not same(result, student()) and result.meta["history"][-1]["facts"]["steps"] == 8
    still = distill(
        model.eval(), model, Digits(), loss="mse:on=logits", hard_weight=0, weight_decay=0.0, **{**QUICK, "lr": 1e-3}
    )
    assert facts(still)["curve"][-1]["loss"] < facts(result)["curve"][-1]["loss"]


@pytest.mark.parametrize("given", [[], [(0, nn.Identity())], [(1, 2, 3)], ["resnet"]])
def test_what_is_no_teacher(given: Any) -> None:
    with pytest.raises(InputError, match="teacher"):
        teachers_of(given)


# -- the cache


@pytest.mark.parametrize(("noise", "mixup"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.3)])
def test_cached_answers_train_the_same_and_the_teacher_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: float, mixup: float
) -> None:
    task, options = (
        Digits(images=170, noise=noise),
        {**QUICK, "loss": "lskd + mse", "mixup": mixup},
    )  # 170: the last images fill no batch
    plain = distill(student(), teacher(), task, **options)
    asked: list[int] = []
    answers = objective.Objective.answers
    monkeypatch.setattr(
        objective.Objective, "answers", lambda self, inputs: (asked.append(len(inputs)), answers(self, inputs))[1]
    )
    cached = distill(student(), teacher(), task, cache=tmp_path, **options)
    fixed = not noise and not mixup
    assert sum(asked) == 2 + (170 if fixed else 2 * 160)  # two to learn the shapes
    for name, one in tensors(plain).items():  # float32: rows of another batch are rounded otherwise
        torch.testing.assert_close(tensors(cached)[name], one, rtol=1e-4, atol=1e-5)
    asked.clear()
    again = distill(student(), teacher(), task, cache=tmp_path, **options)
    assert same(again, cached) and sum(asked) == 2
    assert len(list(tmp_path.iterdir())) == (1 if fixed else 2)
    distill(student(5), teacher(), task, cache=tmp_path, **{**options, "loss": "kl"})  # other taps
    assert sum(asked) == 4 + (170 if fixed else 2 * 160)


def test_cached_run_resumes_to_the_bit(tmp_path: Path) -> None:
    run = functools.partial(
        distill, student(dropout=0.2), teacher(), cache=tmp_path / "cache", **{**RESUMED, "accumulate": 2}
    )
    whole = run(Digits())
    with pytest.raises(Stopped):
        run(Digits(stop=(1, 2)), checkpoint=tmp_path / "state", checkpoint_seconds=0)
    assert same(run(Digits(), checkpoint=tmp_path / "state", checkpoint_seconds=0), whole)


def test_a_cache_that_was_changed_is_refused(tmp_path: Path) -> None:
    task = Digits(noise=0.0)
    distill(student(), teacher(), task, cache=tmp_path, **QUICK)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for bad in (whole[:100], whole.replace(b"teachers", b"preacher", 1), b"\xff" * 64):
        file.write_bytes(bad)
        with pytest.raises(FormatError, match="delete it") as raised:
            distill(student(), teacher(), task, cache=tmp_path, **QUICK)
        assert "\n" not in str(raised.value)
    (tmp_path / "in the way").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        distill(student(), teacher(), task, cache=tmp_path / "in the way", **QUICK)


# -- two momenta


def test_dot_without_a_difference_is_sgd() -> None:
    options = {**QUICK, "weight_decay": 0.01, "clip": 1.0}
    plain = distill(student(), teacher(), Digits(), **options)
    apart = distill(student(), teacher(), Digits(), dot=1e-9, **options)
    for name, one in tensors(plain).items():
        torch.testing.assert_close(tensors(apart)[name], one, rtol=1e-4, atol=1e-5)


def test_dot_is_its_formula() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 2))
    dot = Dot({"w": weight}, 0.9, 0.05, 0.1)
    task, taught = torch.zeros(3, 2), torch.zeros(3, 2)
    for _ in range(3):
        g, k = torch.randn(3, 2), torch.randn(3, 2)
        dot.forget()
        dot.add([k])
        weight.grad = g.clone()
        dot.step(0.0)
        g = g + 0.1 * weight.detach()
        task, taught = 0.85 * task + g, 0.95 * taught + k
        torch.testing.assert_close(weight.grad, g + 0.85 * task + k + 0.95 * taught)
    restored = Dot({"w": weight}, 0.9, 0.05, 0.1)
    restored.restore(dot.state())
    assert torch.equal(restored.task["w"], dot.task["w"]) and torch.equal(restored.teacher["w"], dot.teacher["w"])


def test_dot_resumes_to_the_bit_and_needs_both_losses(tmp_path: Path) -> None:
    run = functools.partial(distill, student(), teacher(), dot=0.05, **RESUMED)
    whole = run(Digits())
    with pytest.raises(Stopped):
        run(Digits(stop=(1, 2)), checkpoint=tmp_path, checkpoint_seconds=0)
    assert same(run(Digits(), checkpoint=tmp_path, checkpoint_seconds=0), whole)
    with pytest.raises(InputError, match="dot=0.05 weighs labels and teacher apart"):
        distill(student(), teacher(), Digits(), dot=0.05, hard_weight=0, **QUICK)
    with pytest.raises(InputError, match="compile=no"):
        Training(dot=0.05, compile="default")


# -- the end, presets, memory, the compiler


def test_an_early_end(tmp_path: Path) -> None:
    """Best in the second epoch, so the fourth is the last; a run that stopped early is finished."""
    scores = [0.5, 0.9, 0.3, 0.9, 0.95, 1.0]
    seen: list[float] = []

    def validate(graph: fx.GraphModule) -> float:
        seen.append(scores[len(seen)])
        return seen[-1]

    options = {
        **QUICK,
        "epochs": 6,
        "validate_every": 1,
        "patience": 2,
        "keep": "best",
        "validate": validate,
        "checkpoint": tmp_path,
    }
    result = train(student(), Digits(), **options)
    assert (
        seen == [0.5, 0.9, 0.3, 0.9]
        and facts(result)["stopped"] == {"epoch": 4, "of": 6}
        and facts(result)["best"]["epoch"] == 2
    )
    assert facts(result)["steps"] == 16
    assert same(train(student(), Digits(), **options), result) and len(seen) == 4
    with pytest.raises(InputError, match="patience=2 needs a val split"):
        train(student(), Digits(val=None), **{**QUICK, "validate_every": 1, "patience": 2})
    with pytest.raises(InputError, match="patience=2 needs validation"):
        Training(patience=2, validate_every=0)


def test_presets_by_name() -> None:
    assert training_of("normal", {}, "distill") == Training() == training_of(None, {}, "distill")
    patient = training_of("patient", {"lr": 0.3}, "distill")
    assert patient.lr == 0.3 and patient.epochs > Training().epochs > PRESETS["fast"].epochs
    with pytest.raises(InputError, match="no preset; have fast, normal, patient"):
        train(student(), Digits(), training="slow", progress=False)
    result = train(student(), Digits(), training="fast", steps=2, batch_size=40, progress=False)
    assert result.meta["history"][-1]["options"]["epochs"] == PRESETS["fast"].epochs and facts(result)["steps"] == 2


def test_out_of_memory_on_a_cpu_halves_too_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    whole = distill(model, teacher(), Digits(), **QUICK)
    forward = objective.Objective.forward

    def small(self: Any, inputs: Tensor, *rest: Any) -> Tensor:
        if len(inputs) > 20:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 9 bytes."
            )
        return forward(self, inputs, *rest)

    monkeypatch.setattr(objective.Objective, "forward", small)
    parts = distill(model, teacher(), Digits(), **QUICK)
    assert facts(parts)["halved"] == [{"step": 0, "accumulate": 2}]
    for name, one in tensors(whole).items():
        torch.testing.assert_close(tensors(parts)[name], one, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(objective.Objective, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train(model, Digits(), **QUICK)


def test_what_the_compiler_can_t_do_is_trained_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = distill(student(), teacher(), Digits(), **QUICK)
    monkeypatch.setattr(loop, "compiler_mode", lambda *_: "default")

    def broken(model: nn.Module, **_: Any) -> Any:
        def call(*_: Any) -> Any:
            raise NotImplementedError("no such operator")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    assert same(distill(student(), teacher(), Digits(), **QUICK), plain)
    with pytest.raises(NotImplementedError):  # asked for in so many words
        distill(student(), teacher(), Digits(), compile="default", **QUICK)


def test_logs_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(student(), Digits(), logs=tmp_path, **{**QUICK, "validate_every": 1})
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [one.step for one in read.Scalars("val")] == [4, 8]
    assert [one.value for one in read.Scalars("loss")] == pytest.approx([one["loss"] for one in facts(result)["curve"]])


@pytest.mark.parametrize(
    ("logger", "module", "extra"),
    [("{}", "torch.utils.tensorboard", "logs"), ("mlflow", "mlflow", "mlflow"), ("wandb", "wandb", "wandb")],
)
def test_without_its_package_a_logger_says_what_to_install(
    logger: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(InputError, match=rf"pip install 'rarefy\[{extra}\]'"):
        train(student(), Digits(), logs=logger.format(tmp_path), **QUICK)


def test_a_function_and_an_object_are_told_what_the_curve_says(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, dict[str, float]]] = []
    seen: list[object] = []

    class Mine:
        def open(self, run: str, first: int, about: dict[str, object]) -> Mine:
            seen.append((run, first, about["optimizer"]))
            return self

        def add(self, step: int, values: dict[str, float]) -> None:
            seen.append(step)
            raise OSError("the disk is full")

        def close(self) -> None:
            seen.append("closed")

    loggers = [Mine(), lambda step, values: told.append((step, values))]
    result = train(student(), Digits(), logs=loggers, **{**QUICK, "validate_every": 1})
    curve = facts(result)["curve"]
    assert [step for step, _ in told] == [4, 8]
    assert [values["loss"] for _, values in told] == [one["loss"] for one in curve]
    assert [values["val"] for _, values in told] == [one["val"] for one in curve]
    assert seen == [("train", 0, "sgd"), 4]  # left out, once it fails; the run goes on
    assert "warning: logs: the disk is full; the run goes on" in capsys.readouterr().err
    assert same(result, train(student(), Digits(), **{**QUICK, "validate_every": 1}))
