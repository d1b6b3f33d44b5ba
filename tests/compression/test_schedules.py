"""Schedules and selection: how much goes when, what the penalty pulls at, and that a killed run ends with the same
bits."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import digits
from networks import PooledResidual
from test_students import Residual as Blocks
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.artifact import folder
from rarefy.cli import main
from rarefy.compression import recipe
from rarefy.compression.schedules.group_sparse import GroupSparse, Pull
from rarefy.compression.schedules.iterative import Iterative
from rarefy.compression.schedules.joint import Fade
from rarefy.distillation.distill import train
from rarefy.errors import InputError
from rarefy.evaluation.evaluate import evaluate
from rarefy.graph.capture import capture
from rarefy.graph.macs import count_macs, count_parameters
from rarefy.kernels import is_quantised
from rarefy.pruning.groups.groups import couple
from rarefy.pruning.options import Target
from rarefy.pruning.prune import prune
from rarefy.pruning.ranking import choose, rank
from rarefy.pruning.repair import kept_channels
from rarefy.pruning.selection.best import Best
from rarefy.pruning.selection.sample import Sample
from rarefy.tasks.classification import Classification

OPTIONS = "epochs=1,batch_size=96,lr=0.05"
ITERATIVE = f"iterative:rounds=3,{OPTIONS}"
GROUP_SPARSE = "group_sparse:epochs=2,batch_size=96,lr=0.05,reg=0.01"


@functools.cache
def net() -> fx.GraphModule:
    torch.manual_seed(2)
    graph = capture(PooledResidual(), torch.zeros(2, 1, 8, 8))
    return train(graph, digits(), epochs=6, batch_size=64, lr=0.1, validate_every=0, progress=False)


class Stopped(Exception):
    pass


class Stopping:
    """The task, until ``left`` training batches were read; ``read`` counts them."""

    def __init__(self, task: Any, left: int):
        self.task, self.left, self.read = task, left, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    @property
    def data(self) -> Stopping:
        return self

    def batches(self, *args: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.task.batches(*args, **options):
            if options.get("augment"):
                if self.read == self.left:
                    raise Stopped
                self.read += 1
            yield batch


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def record(graph: fx.GraphModule) -> dict[str, Any]:
    return graph.meta["history"][-1]


def untimed(graph: fx.GraphModule) -> dict[str, Any]:
    found = copy.deepcopy(record(graph))
    found["facts"].pop("timing", None)
    return found


# -- oneshot


def test_at_once_is_the_default_and_leaves_no_trace() -> None:
    plain = prune(net(), macs=0.5)
    for schedule in ("oneshot", plugins.resolve("schedules", "oneshot")):
        again = prune(net(), macs=0.5, schedule=schedule, select="best")
        assert same(plain, again) and plain.meta == again.meta
    assert "schedule" not in record(plain)["options"] and "select" not in record(plain)["options"]


# -- iterative


def test_what_goes_follows_the_cubic_schedule() -> None:
    """s_k = s (1 - (1 - k/K)^3), arXiv 1710.01878 (1) with s_i = 0."""
    shares = Iterative(rounds=4).shares(0.36)
    assert shares == pytest.approx([1 - 0.64 * (1 - 0.75**3), 1 - 0.64 * (1 - 0.5**3), 1 - 0.64 * (1 - 0.25**3), 0.36])
    assert shares[-1] == 0.36 and Iterative(rounds=1).shares(0.1) == [0.1]


@pytest.mark.parametrize("target", [{"macs": 0.4}, {"params": 0.4}, {"keep": 0.5}, {"macs": 16_000}, {"params": 900}])
def test_rounds_come_down_to_the_target(target: dict[str, float]) -> None:
    ((kind, value),) = target.items()
    before = copy.deepcopy(net().state_dict())
    small = prune(net(), **target, schedule=ITERATIVE, task=digits(), progress=False)
    assert all(
        torch.equal(value, before[name]) for name, value in net().state_dict().items()
    )  # the caller's model is left alone
    assert [one["step"] for one in small.meta["history"]] == ["train", "prune"]
    options, facts = record(small)["options"], record(small)["facts"]
    assert options[kind] == value and options["schedule"].startswith("iterative:rounds=3") and facts["asked"] == target
    counts = {
        "macs": (count_macs(net()), count_macs(small)),
        "params": (count_parameters(net()), count_parameters(small)),
    }
    assert {name: facts[name] for name in counts} == {name: list(pair) for name, pair in counts.items()}
    for name, (was, now) in counts.items():
        assert facts["reached"][name] == pytest.approx(now / was)
    asked = [one["asked"] for one in facts["rounds"]]
    reached = [one["reached"] for one in facts["rounds"]]
    share = value if value <= 1 else value / counts[kind][0]
    assert asked == pytest.approx(Iterative(rounds=3).shares(share)) and reached[-1] == pytest.approx(
        facts["reached"][kind]
    )
    assert all(now <= most + 1e-9 for now, most in zip(reached, asked, strict=True)) and reached == sorted(
        reached, reverse=True
    )
    assert facts["channels"]["one.weight"] == [16, small.one.weight.shape[0]]
    assert [point["epoch"] for point in facts["curve"]] == [1, 2]  # a training of one epoch between two rounds


def test_the_record_says_which_channels_of_the_original_are_left() -> None:
    """Over all rounds: training at a rate of nothing leaves the weights where they are in the original."""
    small = prune(net(), macs=0.3, schedule="iterative:rounds=3,epochs=1,lr=1e-12", task=digits(), progress=False)
    kept, was = kept_channels(small, net()), net().one.weight
    assert 0 < len(kept["one.weight"]) < len(was) and 0 < len(kept["stem.weight"]) < 12
    assert torch.allclose(small.one.weight, was[kept["one.weight"]][:, kept["stem.weight"]], atol=1e-6)


@pytest.mark.parametrize("rounds", [1, 4])
def test_floor_is_of_the_original_in_all_rounds(rounds: int) -> None:
    small = prune(
        net(),
        macs=0.35,
        floor=0.5,
        schedule=f"iterative:rounds={rounds},epochs=1,lr=0.05",
        task=digits(),
        progress=False,
    )
    assert all(after >= 0.5 * before for before, after in record(small)["facts"]["channels"].values())


def test_one_round_is_at_once_and_training_between_helps() -> None:
    once = prune(net(), macs=0.3)
    assert same(once, prune(net(), macs=0.3, schedule="iterative:rounds=1", task=digits()))
    several = prune(
        net(), macs=0.3, schedule="iterative:rounds=4,epochs=2,batch_size=64,lr=0.05", task=digits(), progress=False
    )
    assert _top1(several) > _top1(once) + 0.1


def _top1(graph: fx.GraphModule) -> float:
    right = total = 0
    with torch.no_grad():
        for inputs, targets in digits().batches("val", 400):
            right += int((graph(inputs).argmax(1) == targets).sum())
            total += len(targets)
    return right / total


@pytest.mark.parametrize("schedule", [ITERATIVE, ITERATIVE + ",loss=none", GROUP_SPARSE])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path: Path, schedule: str) -> None:
    run = functools.partial(prune, net(), macs=0.4, schedule=schedule, progress=False)
    whole = Stopping(digits(), -1)
    undisturbed = run(task=whole)
    steps = whole.read
    for stop in (steps // 2 + 2, 5):
        with pytest.raises(Stopped):
            run(task=Stopping(digits(), stop), checkpoint=tmp_path)
    rest = Stopping(digits(), -1)
    resumed = run(task=rest, checkpoint=tmp_path)
    assert same(resumed, undisturbed) and untimed(resumed) == untimed(undisturbed)
    assert 0 < rest.read < steps - 5  # what was done is not done again
    again = run(task=Stopping(digits(), 0), checkpoint=tmp_path)
    assert same(again, undisturbed)


# -- group sparse


def test_the_pull_is_the_formula() -> None:
    """Against loops over channels, with the groups of the network written by hand."""
    graph = copy.deepcopy(net())
    penalty = Pull(couple(graph), reg=0.01, alpha=4.0)
    parameters = dict(graph.named_parameters())
    penalty.begin(parameters)
    for one in parameters.values():
        one.grad = torch.zeros_like(one)
    penalty.add(parameters)
    groups = {  # the axes that leave together: the residual stream, and what lies inside the block
        "stream": [
            ("stem.weight", 0),
            ("norm.weight", 0),
            ("norm.bias", 0),
            ("one.weight", 1),
            ("two.weight", 0),
            ("two.bias", 0),
            ("out.weight", 1),
        ],
        "inside": [("one.weight", 0), ("one.bias", 0), ("two.weight", 1)],
    }
    wanted = {name: torch.zeros_like(one, dtype=torch.float64) for name, one in parameters.items()}
    for members in groups.values():
        count = parameters[members[0][0]].shape[members[0][1]]
        sizes = [
            sum(float(parameters[name].detach().double().select(axis, k).square().sum()) for name, axis in members)
            for k in range(count)
        ]
        for k, size in enumerate(sizes):
            pull = 0.01 * 2 ** (4.0 * (max(sizes) - size) / (max(sizes) - min(sizes)))
            for name, axis in members:
                wanted[name].select(axis, k).add_(pull * parameters[name].detach().double().select(axis, k))
    for name, one in parameters.items():
        assert one.grad is not None
        torch.testing.assert_close(one.grad, wanted[name].to(one.dtype), rtol=1e-4, atol=1e-7, msg=name)
    assert not bool(parameters["out.bias"].grad.any())  # the answers are not pulled


def test_frozen_and_ignored_channels_are_not_pulled() -> None:
    penalty = Pull(couple(net(), ("one",)), reg=0.01, alpha=4.0)
    penalty.begin(dict(net().named_parameters()))
    assert penalty.strength[0] == 0 and "one.bias" not in penalty.factors and "stem.weight" in penalty.factors


def test_the_penalty_shrinks_what_will_be_pruned() -> None:
    """Pruning costs less of the answer after it than after the same training without."""
    lost = {}
    for reg in (1e-9, 0.003):
        setting = GroupSparse(epochs=8, batch_size=64, lr=0.05, reg=reg)
        small = prune(net(), macs=0.4, schedule=setting, task=digits(), progress=False)
        lost[reg] = _top1(small), record(small)["facts"]["weight_left"]
    assert lost[0.003][1] < 0.3 * lost[1e-9][1]
    assert lost[0.003][0] > lost[1e-9][0] + 0.1


@pytest.mark.parametrize("stop", [1, 7, 20])
def test_the_pull_of_an_epoch_is_in_the_checkpoint(tmp_path: Path, stop: int) -> None:
    run = functools.partial(
        train, net(), epochs=2, batch_size=96, lr=0.05, ema=0.9, validate_every=0, progress=False, checkpoint_seconds=0
    )
    pull = functools.partial(Pull, couple(net()), 0.01)
    with pytest.raises(Stopped):
        run(Stopping(digits(), stop), penalty=pull(4.0), checkpoint=tmp_path)
    with pytest.raises(
        InputError, match="penalty='group_sparse reg=0.01 alpha=2.0', there 'group_sparse reg=0.01 alpha=4.0'"
    ):
        run(digits(), penalty=pull(2.0), checkpoint=tmp_path)
    resumed = run(digits(), penalty=pull(4.0), checkpoint=tmp_path)
    assert same(resumed, run(digits(), penalty=pull(4.0))) and not same(resumed, run(digits(), penalty=pull(2.0)))


# -- selection


@pytest.mark.parametrize("ranking", ["global", "loss", "local", "isomorphic"])
def test_a_draw_is_repeated_by_its_seed(ranking: str) -> None:
    draw = functools.partial(prune, net(), keep=0.5, ranking=ranking, select="sample:temperature=2")
    one, again, other = (draw(seed=seed) for seed in (1, 1, 2))
    assert same(one, again) and not same(one, other)
    assert record(one)["options"]["select"] == "sample:temperature=2.0"
    best = prune(net(), keep=0.5, ranking=ranking)
    assert same(best, prune(net(), keep=0.5, ranking=ranking, select=Sample(temperature=1e-9)))
    if ranking == "local":  # each layer keeps its share, whoever is drawn
        assert record(one)["facts"]["channels"] == record(best)["facts"]["channels"]


def test_the_first_is_drawn_by_its_score_and_the_rest_without_replacement() -> None:
    scores = np.array([0.0, 1.0, 2.0, 5.0])
    for temperature, weights in ((1.0, scores), (0.5, scores**2)):
        keys = np.stack([Sample(temperature).keys(scores, seed) for seed in range(4000)])
        first = np.bincount(keys.argmax(1), minlength=4) / len(keys)
        wanted = weights / weights.sum()
        assert np.abs(first - wanted).max() < 4 * np.sqrt(0.25 / len(keys))  # four standard deviations
        second = np.argsort(-keys, 1)[:, 1]
        pairs = np.array(
            [[wanted[j] * wanted[i] / (1 - wanted[j]) if i != j else 0 for i in range(1, 4)] for j in range(1, 4)]
        ).sum(0)
        assert np.abs(np.bincount(second, minlength=4)[1:] / len(keys) - pairs).max() < 4 * np.sqrt(0.25 / len(keys))
    assert np.array_equal(Best().keys(scores, 3), scores)


def test_what_floor_protects_is_drawn_too() -> None:
    coupling = couple(net())
    scores = torch.ones(coupling.count, dtype=torch.float64)
    alive = [choose(rank(coupling, scores, select=Sample(), seed=seed), Target("keep", 0.3)).alive for seed in (1, 2)]
    assert not torch.equal(*alive)


class Negative:
    def scores(self, graph: fx.GraphModule, coupling: Any, task: Any, seed: int) -> Tensor:
        return -torch.ones(coupling.count, dtype=torch.float64)


# -- bad input, and the other doors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "gradual"}, "have group_sparse, iterative, joint, oneshot"),
        ({"schedule": "iterative"}, "needs data: pass task="),
        ({"schedule": "group_sparse"}, "needs data: pass task="),
        ({"schedule": "iterative:rounds=0"}, "at least 1"),
        ({"schedule": "iterative:lr=0"}, "must be positive"),
        ({"schedule": "group_sparse:reg=-1"}, "must be positive"),
        ({"schedule": "group_sparse:epoch=1"}, "unknown option"),
        ({"schedule": ITERATIVE + ",loss=hinton", "task": "digits"}, "have "),
        ({"schedule": GROUP_SPARSE, "task": "digits", "macs": 0.001}, "out of reach"),
        ({"schedule": ITERATIVE, "task": "digits", "macs": 0.001}, "out of reach"),
        ({"select": "worst"}, "have best, sample"),
        ({"select": "sample:temperature=0"}, "must be positive"),
        ({"select": "sample", "criterion": Negative()}, "select='best'"),
    ],
)
def test_bad_input_is_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    options = {"macs": 0.5, "progress": False, **options, **({"task": digits()} if "task" in options else {})}
    with pytest.raises(InputError) as caught:
        prune(net(), **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_target_out_of_reach_is_told_before_any_training() -> None:
    for schedule in (ITERATIVE, GROUP_SPARSE):
        task = Stopping(digits(), 0)
        with pytest.raises(InputError, match="out of reach"):
            prune(net(), macs=0.001, schedule=schedule, task=task, progress=False)


def test_a_recipe_takes_them_and_checks_them_when_it_is_read() -> None:
    step = recipe.step("prune macs=0.5 schedule=iterative:rounds=5,epochs=2 select=sample:temperature=0.5")
    assert step["schedule"] == "iterative:rounds=5,epochs=2" and step["select"] == "sample:temperature=0.5"
    assert recipe.step("mask sparsity=2:4 criterion=wanda") == {"do": "mask", "sparsity": "2:4", "criterion": "wanda"}
    assert recipe.step({"do": "mask", "sparsity": 0.5})["sparsity"] == 0.5
    for text, words in {
        "prune macs=0.5 schedule=iterative:round=5": "unknown option",
        "prune macs=0.5 checkpoint=x": "unknown key",
        "prune macs=0.5 criterion=wanda": "unknown choice 'wanda'",
        "mask sparsity=0.5 criterion=taylor": "unknown choice 'taylor'",
        "mask criterion=wanda": "sparsity",
        "distill penalty=x": "unknown key",
    }.items():
        with pytest.raises(InputError, match=words):
            recipe.step(text)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.save(net(), tmp_path / "net")
    arguments = [
        "prune",
        str(tmp_path / "net"),
        "--macs",
        "0.5",
        "--schedule",
        ITERATIVE,
        "--data",
        "sklearn:digits",
        "--augment",
        "none",
    ]
    assert main.run([*arguments, "-o", str(tmp_path / "small"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["schedule"].startswith("iterative") and len(found["facts"]["rounds"]) == 3
    assert same(
        folder.load(tmp_path / "small"), prune(net(), macs=0.5, schedule=ITERATIVE, task=digits(), progress=False)
    )
    assert not (tmp_path / "small.work").exists()
    assert main.run([*arguments[:4], "--schedule", "slowly", "-o", str(tmp_path / "x")]) == 2
    assert "group_sparse, iterative, joint, oneshot" in capsys.readouterr().err


def test_joint_prunes_distils_and_quantises_in_one_training(tmp_path: Path) -> None:
    task = Classification(train="sklearn:digits", val="sklearn:digits", augment="crop=1")
    original = train(
        capture(Blocks(), torch.zeros(2, 1, 8, 8)),
        task,
        epochs=6,
        batch_size=64,
        lr=0.1,
        validate_every=0,
        progress=False,
        device="cpu",
    )
    before = {name: value.clone() for name, value in original.state_dict().items()}
    schedule = "joint:steps=160,batch_size=64,shrink=0.2,weights=int4,images=64"
    options: dict[str, Any] = {"macs": 0.5, "schedule": schedule, "task": task, "device": "cpu", "progress": False}
    small = prune(original, **options, checkpoint=tmp_path / "work")
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in before.items())
    assert is_quantised(small) and 0.4 < count_macs(small) / count_macs(original) <= 0.5
    assert evaluate(small, task).value > evaluate(original, task).value - 0.08
    record = next(one for one in small.meta["history"] if one["step"] == "prune")
    assert (
        record["options"]["schedule"] == schedule
        and record["facts"]["steps"] == [32, 96, 32]
        and record["facts"]["reached"]["macs"] <= 0.5
    )
    again = prune(original, **options, checkpoint=tmp_path / "work")  # all trainings are read from their checkpoints
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in small.state_dict().items())
    images = next(iter(task.batches("val", 64)))[0]
    assert torch.equal(folder.load(folder.save(small, tmp_path / "small"))(images), small(images))
    with pytest.raises(InputError, match="quantises by itself"):
        prune(small, **options)
    with pytest.raises(InputError, match="needs data"):
        prune(original, macs=0.5, schedule=schedule)


def test_what_fades_shrinks_in_equal_steps_to_nothing() -> None:
    graph = net()
    small = prune(graph, macs=0.5)
    channels, kept = (small.meta["history"][-1]["facts"][name] for name in ("channels", "kept"))
    parameters = dict(graph.named_parameters())
    start = {name: value.detach().clone() for name, value in parameters.items()}
    fade = Fade(couple(graph), kept, 5)
    for step in range(5):
        if step == 3:  # killed, and gone on
            state, fade = fade.state(), Fade(couple(graph), kept, 5)
            fade.restore(state, parameters)
        elif step == 0:
            fade.begin(parameters)
        for value in parameters.values():
            value.grad = torch.ones_like(value)
        fade.add(parameters)
        for one, mask in fade.masks:
            name = next(name for name, value in parameters.items() if value is one)
            expected = torch.where(mask, start[name] * (4 - step) / 5, start[name])
            assert torch.allclose(one, expected, rtol=1e-6, atol=0) and torch.equal(
                one.grad == 0, mask
            )  # a product of five factors
    for name, (was, now) in channels.items():
        left = int((parameters[name].flatten(1).abs().amax(1) > 0).sum())
        assert left == (now if name in kept else was)
    again = prune(graph, macs=0.5)
    assert again.meta["history"][-1]["facts"]["channels"] == channels
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in small.state_dict().items())
