"""Students: every kind makes a network that trains, saves and answers in the teacher's shapes; depth takes out blocks,
and what they say of themselves holds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits as sklearn_digits
from networks import DenselyConnected, Encoders
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.artifact import folder
from rarefy.cli import main
from rarefy.compression.students.depth import _evenly, blocks, influence, without
from rarefy.distillation.distill import distill, train
from rarefy.distillation.teachers import student_kind, student_of
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.graph.macs import count_macs, count_parameters
from rarefy.graph.nodes import example_inputs
from rarefy.tasks.classification import Classification


class Block(nn.Module):
    def __init__(self, width: int, gated: bool = False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.gate = nn.Conv2d(width, width, 1) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.gate is not None:
            y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        return (x + y).relu()


class Residual(nn.Module):
    """Three blocks of 8 channels, a step down, three of 16."""

    input_shape = (1, 8, 8)

    def __init__(self, num_classes: int = 10, gated: bool = False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.one = nn.Sequential(*(Block(8, gated) for _ in range(3)))
        self.down = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.two = nn.Sequential(*(Block(16, gated) for _ in range(3)))
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.down(self.one(self.stem(x)))).mean((2, 3)))


def graph_of(model: nn.Module) -> fx.GraphModule:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after some training
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return capture(model.eval(), torch.zeros(2, 1, 8, 8))


@pytest.fixture(scope="module", name="digits")
def cropped_digits() -> Classification:
    return sklearn_digits("crop=1")


def state(graph: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in graph.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


EVERY = [
    *plugins.available("students"),
    "copy:fresh=True",
    "depth:macs=0.6,choose=even",
    "depth:fresh=True",
    "width:macs=0.4,fresh=True",
    "pruned:macs=0.5,criterion=bn_scale",
    "tests.compression.test_students:Residual",
    "tests.compression.test_students:Mine:width=6",
]


@pytest.mark.parametrize("word", EVERY)
def test_every_student_trains_saves_and_leaves_the_teacher_alone(
    word: str, digits: Classification, tmp_path: Path
) -> None:
    teacher = graph_of(Residual())
    before = state(teacher)
    student = student_of(word, teacher, task=digits, seed=1)
    again = student_of(word, teacher, task=digits, seed=1)
    assert same(state(student), state(again)) and same(state(teacher), before)
    record = student.meta["history"][-1]
    assert record["step"] == "student" and record["options"] == {"student": word, "seed": 1}
    assert record["facts"]["macs"] == [count_macs(teacher), count_macs(student)]
    assert record["facts"]["params"] == [count_parameters(teacher), count_parameters(student)]
    json.dumps(record, allow_nan=False)
    taught = distill(
        word, teacher, digits, steps=2, batch_size=16, validate_every=0, seed=1, progress=False, device="cpu"
    )
    assert [one["step"] for one in taught.meta["history"]] == ["student", "distill"] and not same(
        state(taught), state(student)
    )
    assert {name: value.shape for name, value in taught.state_dict().items()} == {
        name: value.shape for name, value in student.state_dict().items()
    }
    loaded = folder.load(folder.save(taught, tmp_path / "student"))
    inputs = example_inputs(teacher, 3)
    assert torch.equal(loaded(*inputs), taught(*inputs)) and loaded(*inputs).shape == (3, 10)


@dataclass(frozen=True)
class Mine:
    """A kind of student of a user's own."""

    width: int = 4

    def make(self, teacher: fx.GraphModule, task: Any, seed: int) -> fx.GraphModule:
        return capture(
            nn.Sequential(nn.Flatten(), nn.Linear(64, self.width), nn.Linear(self.width, 10)), torch.zeros(2, 1, 8, 8)
        )


# ------------------------------------------------------------------ depth


@pytest.mark.parametrize(("model", "names"), [
    (Residual(), ["one.0", "one.1", "one.2", "two.0", "two.1", "two.2"]),
    (Residual(gated=True), ["one.0", "one.1", "one.2", "two.0", "two.1", "two.2"]),  # the gate is no block of its own
    (Encoders(), ["layers.0", "layers.1", "layers.2"]),  # attention and MLP leave together
    (Encoders(post=True), ["layers.0", "layers.1", "layers.2"]),
])  # fmt: skip
def test_blocks_are_the_authors_own(model: nn.Module, names: list[str]) -> None:
    graph = graph_of(model)
    found = blocks(graph)
    assert [block.name for block in found] == names
    for block in found:
        small = without(graph, [block])
        assert count_macs(small) == count_macs(graph) - block.macs
        left = {name for name, _ in small.named_parameters()}
        assert not any(name.startswith(f"{block.name}.") for name in left)  # all of it is gone, and nothing else
        assert left == {name for name, _ in graph.named_parameters() if not name.startswith(f"{block.name}.")}


def test_a_graph_without_its_blocks_is_the_model_built_without_them() -> None:
    model = Residual()
    graph = graph_of(model)
    found = {block.name: block for block in blocks(graph)}
    small = without(graph, [found["one.1"], found["one.2"], found["two.0"]])
    model.one, model.two = nn.Sequential(model.one[0]), nn.Sequential(*model.two[1:])
    inputs = torch.randn(4, 1, 8, 8)
    assert torch.equal(small(inputs), model(inputs))
    small.train(), model.train()
    assert torch.equal(small(inputs), model(inputs))


def test_influence_is_zero_where_a_block_does_nothing_and_such_blocks_leave_first(digits: Classification) -> None:
    model = Residual()
    graph_of(model)  # sets batch norms
    for idle in (model.one[1], model.two[2]):
        nn.init.zeros_(idle.bn2.weight), nn.init.zeros_(idle.bn2.bias)
    teacher = capture(model, torch.zeros(2, 1, 8, 8))
    images = list(digits.inputs("train", 64, 32))
    scores = dict(zip([block.name for block in blocks(teacher)], influence(teacher, blocks(teacher), images)))
    assert scores["one.1"] == pytest.approx(0, abs=1e-6) and scores["two.2"] == pytest.approx(0, abs=1e-6)
    assert min(score for name, score in scores.items() if name not in ("one.1", "two.2")) > 1e-3
    small = student_of("depth:keep=0.67", teacher, task=digits)
    assert small.meta["history"][-1]["facts"]["removed"] == ["one.1", "two.2"]
    assert torch.equal(small(images[0]), teacher(images[0]))


def test_depth_to_a_share_of_the_macs_takes_no_block_too_many(digits: Classification) -> None:
    teacher = graph_of(Residual())
    largest = max(block.macs for block in blocks(teacher))
    for share in (0.9, 0.6, 0.4):
        left = count_macs(student_of(f"depth:macs={share}", teacher, task=digits)) / count_macs(teacher)
        assert share - largest / count_macs(teacher) < left <= share
    with pytest.raises(InputError, match="out of reach, without all 6 blocks"):
        student_of("depth:macs=0.01", teacher, task=digits)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 27])
def test_evenly_chosen_blocks_are_spread(count: int) -> None:
    order = _evenly(count)
    assert sorted(order) == list(range(count))
    half = sorted(order[: count // 2])
    assert all(later - earlier <= 4 for earlier, later in zip([-1, *half], [*half, count])) or count < 2


def test_depth_says_where_it_can_do_nothing(digits: Classification) -> None:
    with pytest.raises(InputError, match="no block can leave; choose width"):
        student_of("depth", graph_of(DenselyConnected()), task=digits)
    with pytest.raises(InputError, match="pass task=, or choose=even"):
        student_of("depth", graph_of(Residual()))
    for wrong in ("depth:keep=0", "depth:keep=1.5", "depth:choose=odd", "depth:images=0", "depth:depth=3"):
        with pytest.raises(InputError):
            student_kind(wrong)


# ------------------------------------------------------------------ width, fresh, others


def test_width_leaves_the_same_share_everywhere(digits: Classification) -> None:
    teacher = graph_of(Residual())
    small = student_of("width:keep=0.5", teacher, task=digits)
    for name, (was, now) in small.meta["history"][-1]["facts"]["channels"].items():
        assert now == (was if name == "head.weight" else was // 2), name
    with pytest.raises(InputError, match="keep"):
        student_of("width:keep=2", teacher, task=digits)


def test_fresh_weights_are_those_of_an_untrained_network() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, 64, 3, groups=4),
        nn.Flatten(),
        nn.LayerNorm(1024),
        nn.Linear(1024, 50),
    )
    teacher = graph_of(model)
    nn.init.normal_(teacher.get_parameter("4.weight"))
    made = student_of("copy:fresh=True", teacher, seed=3)
    found, was = state(made), state(teacher)
    for name, variance in (("2.weight", 2 / (16 * 9)), ("5.weight", 1 / 1024)):
        numbers = found[name]
        expected = math.sqrt(variance)
        assert abs(float(numbers.std()) - expected) < 5 * expected / math.sqrt(
            2 * numbers.numel()
        )  # five standard errors
        assert abs(float(numbers.mean())) < 5 * expected / math.sqrt(numbers.numel())
        assert not torch.equal(numbers, was[name])
    for name, constant in (
        ("1.weight", 1),
        ("1.bias", 0),
        ("1.running_mean", 0),
        ("1.running_var", 1),
        ("4.weight", 1),
        ("4.bias", 0),
        ("0.bias", 0),
        ("5.bias", 0),
    ):
        assert bool((found[name] == constant).all()), name
    assert not same(found, state(student_of("copy:fresh=True", teacher, seed=4)))
    assert same(state(student_of("copy", teacher)), was)


def test_a_quantised_teacher_has_no_fresh_copy() -> None:
    teacher = graph_of(Residual())
    teacher.meta["history"] = [{"step": "quantize", "options": {}, "facts": {}}]
    with pytest.raises(InputError, match="codes can't be drawn anew"):
        student_of("copy:fresh=True", teacher)


def test_another_model_gets_the_teachers_classes_and_input() -> None:
    pytest.importorskip("timm")
    teacher = capture(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)),
        torch.zeros(2, 3, 64, 64),
    )
    student = student_of("timm:test_resnet", teacher)
    assert student(torch.zeros(3, 3, 64, 64)).shape == (3, 7)
    assert not same(state(student), state(student_of("timm:test_resnet", teacher, seed=1)))


@pytest.mark.parametrize(("word", "told"), [
    ("deep", "neither one of copy, depth, pruned, width"),
    ("timm:no_such_net", "timm has no model"),
    ("tests.compression.test_students:Nobody", "no 'Nobody'"),
])  # fmt: skip
def test_a_word_that_names_nothing(word: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        student_of(word, graph_of(Residual()))


def test_a_student_of_other_classes_is_refused() -> None:
    teacher = capture(Residual(num_classes=7).eval(), torch.zeros(2, 1, 8, 8))
    with pytest.raises(InputError, match=r"answers \[\(10,\)\], the teacher \[\(7,\)\]"):
        student_of("tests.compression.test_students:Residual", teacher)
    with pytest.raises(InputError, match="makes no student"):
        student_of(3, teacher)
    with pytest.raises(InputError, match="is made from a teacher"):
        train("copy", Classification(train="sklearn:digits"), device="cpu")  # type: ignore[arg-type]


def test_a_shallow_student_learns_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data", "sklearn:digits", "--augment", "crop=1", "--batch-size", "64", "--device", "cpu", "--json"]
    assert (
        main.run(
            [
                "distill",
                "tests.compression.test_students:Residual",
                *common,
                "--epochs",
                "4",
                "--lr",
                "0.1",
                "-o",
                str(tmp_path / "teacher"),
            ]
        )
        == 0
    )
    capsys.readouterr()
    arguments = [
        str(tmp_path / "teacher"),
        "--student",
        "depth:keep=0.5",
        *common,
        "--epochs",
        "3",
        "-o",
        str(tmp_path / "student"),
    ]
    assert main.run(["distill", *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["step"] == "distill" and told["facts"]["curve"][-1]["val"] > 0.85
    student, teacher = folder.load(tmp_path / "student"), folder.load(tmp_path / "teacher")
    assert len(blocks(student)) == 3 and count_macs(student) < 0.65 * count_macs(teacher)
    assert (
        main.run(["distill", str(tmp_path / "teacher"), "--student", "deep", *common, "-o", str(tmp_path / "none")])
        == 2
    )
    assert "neither one of" in capsys.readouterr().err
