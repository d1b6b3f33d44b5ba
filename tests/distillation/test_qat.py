"""Quantization-aware training: the trainable form answers as the codes do, comes back to the same codes untrained,
and learns.
"""

from __future__ import annotations

import pytest
import torch
from networks import GateOnTwoGrids
from torch import nn

from rarefy import distill, plugins
from rarefy.artifact.folder import load, save
from rarefy.distillation.distill import train
from rarefy.distillation.qat import to_codes, to_trainable
from rarefy.distillation.qat_batch_norm import put_back
from rarefy.errors import InputError, TrainingDiverged
from rarefy.graph.capture import capture
from rarefy.kernels import is_quantised
from rarefy.quantization.quantize import quantize
from rarefy.tasks.classification import Classification


@pytest.fixture(scope="module")
def task() -> Classification:
    return Classification(train="sklearn:digits", val="sklearn:digits")


@pytest.fixture(scope="module")
def teacher(task: Classification):
    torch.manual_seed(0)
    return train(
        capture(GateOnTwoGrids(), torch.zeros(2, 1, 8, 8)),
        task,
        steps=200,
        batch_size=64,
        lr=0.1,
        progress=False,
        device="cpu",
        validate_every=0,
    )


def right(model: nn.Module, task: Classification) -> float:
    with torch.no_grad():
        return float(torch.cat([model(x).argmax(1) == y for x, y in task.batches("val", 256)]).float().mean())


def apart(model: nn.Module, teacher: nn.Module, task: Classification) -> float:
    """Kullback-Leibler divergence of the answers on the val split."""
    with torch.no_grad():
        x = next(iter(task.batches("val", 1000)))[0]
        answers = [one(x).log_softmax(1) for one in (model, teacher)]
    return float(nn.functional.kl_div(*answers, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("weights, activations", [("int8", "uint8"), ("int4", "uint4"), ("int2", "uint8")])
def test_both_forms_answer_alike_and_untrained_tensors_come_back_as_they_were(
    weights: str, activations: str, teacher, task
) -> None:
    small = quantize(teacher, task, images=64, weights=weights, activations=activations, progress=False)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    learns = to_trainable(small)
    x = next(iter(task.batches("val", 64)))[0]
    assert torch.allclose(small(x), learns(x), atol=1e-5)
    assert is_quantised(small) and not is_quantised(learns)
    back = to_codes(small, learns)
    assert (
        back.code == small.code and back.meta["bits"] == small.meta["bits"]
        if weights != "int8"
        else "bits" not in back.meta
    )
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in before.items())
    learns(x).square().sum().backward()
    silent = {name for name, parameter in learns.named_parameters() if parameter.grad is None}
    assert not silent  # everything learns


@pytest.mark.parametrize("weights, activations", [("int8", "uint8"), ("int3", "uint4")])
def test_batch_norm_put_back_changes_nothing_and_folds_into_the_same_codes(
    weights: str, activations: str, teacher, task
) -> None:
    small = quantize(
        teacher, task, images=64, weights=weights, activations=activations, calibration="mse", progress=False
    )
    names = small.meta["history"][-1]["facts"]["batch_norm"]
    assert names == ["stem.0.weight", "left.0.weight"]  # the two that batch norm followed
    x = next(iter(task.batches("val", 256)))[0]
    learns = put_back(to_trainable(small), names, [x[:128], x[128:]])
    assert learns.get_parameter("left.0.weight").flatten(1).norm(dim=1).sub(1).abs().max() < 1e-5
    assert torch.allclose(small(x), learns.eval()(x), atol=1e-5)
    assert torch.allclose(small(x), learns.train()(x), atol=1e-4)  # the statistics are those of these very images
    before = small.state_dict()
    back = to_codes(small, put_back(to_trainable(small), names, [x]))
    assert all(torch.equal(value, back.state_dict()[name]) or name.endswith("_scale") for name, value in before.items())
    assert all(
        torch.allclose(value, back.state_dict()[name], rtol=1e-6)
        for name, value in before.items()
        if name.endswith("_scale")
    )


def test_codes_of_live_batch_norm_are_those_it_was_trained_with(teacher, task) -> None:
    """Of batch norm's factor the size alone counts, as a turned sign would turn the codes', and the grid of few bits
    is no mirror image of itself.
    """
    small = quantize(teacher, task, images=64, weights="int4", activations="uint8", progress=False)
    x = next(iter(task.batches("val", 256)))[0]
    learns = put_back(to_trainable(small), small.meta["history"][-1]["facts"]["batch_norm"], [x]).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*learns.named_parameters(), *learns.named_buffers()]:
            if "batch_norm" in name:
                value.mul_(1 + 0.5 * torch.rand(value.shape, generator=draw))
        learns.get_parameter("left.0.batch_norm.weight")[::2] *= -1
    with torch.no_grad():
        ours, theirs = to_codes(small, learns)(x), learns(x)
    assert (
        ours - theirs
    ).norm() < 0.02 * theirs.norm()  # a bias is rounded in codes, which moves some activations by one


def test_training_with_live_batch_norm_ends_in_codes(teacher, task) -> None:
    small = quantize(teacher, task, images=64, weights="int3", activations="uint4", progress=False)
    options = {
        "steps": 160,
        "batch_size": 64,
        "loss": "kl",
        "hard_weight": 0.0,
        "validate_every": 0,
        "device": "cpu",
        "progress": False,
    }
    taught = distill(small, teacher, task, live_norm="yes", **options)
    told = taught.meta["history"][-1]["options"]
    assert (told["lr"], told["clip"], told["freeze"]) == (0.03, 1.0, 0.25)  # what it bears, as no rate was given
    assert is_quantised(taught) and taught.code == small.code
    assert apart(taught, teacher, task) < apart(small, teacher, task)
    with pytest.raises(InputError, match="live_norm"):
        train(
            small,
            task,
            live_norm="maybe",
            **{key: value for key, value in options.items() if key not in ("loss", "hard_weight")},
        )


def test_frozen_statistics_stand_still(teacher, task) -> None:
    common = {"steps": 12, "batch_size": 64, "lr": 0.05, "progress": False, "device": "cpu", "validate_every": 0}
    buffers = {
        freeze: dict(train(teacher, task, freeze=freeze, **common).named_buffers()) for freeze in (0.0, 0.5, 1.0)
    }
    for name, value in teacher.named_buffers():
        if "running" in name:
            assert torch.equal(buffers[1.0][name], value)
            assert not torch.equal(buffers[0.5][name], value) and not torch.equal(
                buffers[0.5][name], buffers[0.0][name]
            )
    with pytest.raises(InputError, match="freeze"):
        train(teacher, task, freeze=1.5, **common)


def test_training_mends_what_few_bits_broke_and_the_file_computes_it(teacher, task, tmp_path) -> None:
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    small = quantize(
        teacher,
        task,
        images=64,
        weights="int2",
        activations="uint4",
        rounding="nearest",
        correct_bias=False,
        progress=False,
    )
    options = {
        "steps": 120,
        "batch_size": 64,
        "loss": "kl",
        "hard_weight": 0.0,
        "validate_every": 0,
    }  # the rate and clipping are training's own
    taught = distill(small, teacher, task, device="cpu", progress=False, **options)
    assert right(teacher, task) > 0.85
    assert apart(taught, teacher, task) < 0.6 * apart(small, teacher, task)
    assert [record["step"] for record in taught.meta["history"]][-2:] == ["quantize", "distill"]
    codes = {name: value for name, value in taught.named_buffers() if name.endswith("weight_codes")}
    assert len(codes) == 4 and all(int(value.min()) >= -2 and int(value.max()) <= 1 for value in codes.values())
    assert any(not torch.equal(value, dict(small.named_buffers())[name]) for name, value in codes.items())
    x = next(iter(task.batches("val", 128)))[0]
    found = runtime.compare(taught, runtime.export(taught, tmp_path / "taught.onnx"), x)
    assert found["passed"] and found["ulp"] <= 1, found
    assert torch.equal(load(save(taught, tmp_path / "taught"))(x), taught(x))


def test_a_checkpoint_and_labels_alone_do(teacher, task, tmp_path) -> None:
    small = quantize(teacher, task, images=64, weights="int3", progress=False)
    options = {"steps": 9, "batch_size": 64, "device": "cpu", "progress": False, "checkpoint": tmp_path / "run"}
    first = train(small, task, **options)
    again = train(small, task, **options)  # finished: read from the checkpoint
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    with pytest.raises(TrainingDiverged) as caught:
        train(small, task, **{**options, "lr": 1e12, "checkpoint": None, "steps": 60})
    assert is_quantised(caught.value.graph)


def test_a_copy_of_a_quantised_teacher_is_trained_in_codes_too(teacher, task) -> None:
    small = quantize(teacher, task, images=64, weights="int3", progress=False)
    options = {"steps": 2, "batch_size": 64, "device": "cpu", "progress": False, "validate_every": 0}
    taught = distill("copy", small, task, **options)
    assert is_quantised(taught) and [one["step"] for one in taught.meta["history"]][-2:] == ["student", "distill"]
