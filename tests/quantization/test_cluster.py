"""cluster(): which values a layer's weights share, that training leaves them shared, and how they are stored."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from digits import digits
from hypothesis import strategies as st
from networks import EveryConvolution
from torch import Tensor, fx, nn

import rarefy
from rarefy import plugins
from rarefy.artifact import folder as folder_
from rarefy.cli import main
from rarefy.compression import recipe
from rarefy.compression.steps import VERBS, Context
from rarefy.distillation.distill import distill, train
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.pruning.mask import mask
from rarefy.quantization.clustering.cluster import cluster
from rarefy.quantization.clustering.kmeans import nearest, shared_values
from rarefy.quantization.quantize import quantize

QUICK: dict[str, Any] = {"steps": 4, "batch_size": 32, "lr": 0.05, "progress": False, "validate_every": 0}


def net() -> fx.GraphModule:
    torch.manual_seed(5)
    return capture(EveryConvolution(), torch.zeros(2, 1, 8, 8))


def groups(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Which weights are equal, whatever their value: of each weight the first place of its value."""
    found = {}
    for name in graph.meta["shared"]:
        flat = graph.get_parameter(name).detach().reshape(-1)
        found[name] = (flat[:, None] == flat[None]).to(torch.int8).argmax(1)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- k-means


def loss(numbers: Tensor, values: Tensor) -> float:
    return float((numbers.double() - values[nearest(numbers, values)]).square().sum())


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    numbers=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=9), count=st.integers(1, 4), big=st.booleans()
)
def test_values_rise_stand_at_the_means_of_their_weights_and_are_no_worse_than_one(
    numbers: list[float], count: int, big: bool
) -> None:
    weights = torch.tensor(numbers) * (1e30 if big else 1)
    values = shared_values(weights, count)
    assert 1 <= len(values) <= count or len(values) == len(weights.unique()) <= count
    assert bool((values.diff() > 0).all())
    chosen = nearest(weights, values)
    for index in chosen.unique():
        mean = weights.double()[chosen == index].mean()
        assert abs(float(values[index] - mean)) <= 1e-9 * float(weights.abs().max())
    one = weights.double().mean()[None]
    assert loss(weights, values) <= loss(weights, one) * (1 + 1e-9)


def least_loss(numbers: Tensor, count: int) -> float:
    """Of all cuts of the sorted numbers into ``count`` intervals, by dynamic programming."""
    size = len(numbers)
    costs = {
        (a, b): float((numbers[a:b] - numbers[a:b].mean()).square().sum())
        for a, b in itertools.combinations(range(size + 1), 2)
    }
    best = [0.0, *(costs[0, b] for b in range(1, size + 1))]
    for _ in range(count - 1):
        best = [0.0, *(min(best[b], *(best[a] + costs[a, b] for a in range(b))) for b in range(1, size + 1))]
    return best[-1]


def test_a_clustering_is_near_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(20):
        numbers = torch.randn(40, generator=generator).double().sort().values
        best = least_loss(numbers, 6)
        ratios.append(loss(numbers, shared_values(numbers, 6)) / best)
        assert ratios[-1] >= 1 - 1e-9
    assert sorted(ratios)[10] < 1.15 and max(ratios) < 1.8


def test_outliers_get_values_and_bells_lose_less_than_on_equal_steps() -> None:
    bell = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    weights = torch.cat((bell, torch.tensor([40.0, -35.0])))
    values = shared_values(weights, 16)
    assert {40.0, -35.0} <= {*values.tolist()}
    equal = torch.linspace(-35, 40, 16, dtype=torch.float64)
    assert loss(weights, values) < loss(weights, equal) / 50


# -- the step


def test_each_layer_has_few_values_and_the_model_is_left_as_it_is() -> None:
    graph = net()
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    small = cluster(graph, values=5, fold=False)
    assert all(torch.equal(value, graph.state_dict()[name]) for name, value in before.items())
    assert small.meta["shared"]
    facts = small.meta["history"][-1]["facts"]
    for layer in facts["layers"]:
        weight = small.get_parameter(f"{layer['name']}.weight")
        assert len(weight.unique()) == layer["values"] <= 5 and 0 <= layer["bits"] <= 2.33
    left = {name for name in before if name not in small.meta["shared"]}
    assert left and all(torch.equal(before[name], small.state_dict()[name]) for name in left)
    again = cluster(net(), values=5, fold=False)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in small.state_dict().items())


def test_layers_may_be_left_alone_and_be_given_other_values_later() -> None:
    names = [name.removesuffix(".weight") for name in cluster(net(), fold=False).meta["shared"]]
    first = cluster(net(), values=4, fold=False, ignore=[names[0]])
    assert f"{names[0]}.weight" not in first.meta["shared"] and len(first.meta["shared"]) == len(names) - 1
    second = cluster(first, values=32, fold=False, ignore=names[1:])
    assert len(second.meta["shared"]) == len(names)
    assert len(second.get_parameter(f"{names[1]}.weight").unique()) <= 4
    with pytest.raises(InputError, match="matches no layer"):
        cluster(net(), ignore="nothing.*")
    with pytest.raises(InputError, match="no convolution"):
        cluster(net(), ignore="*")


@pytest.mark.parametrize("values", [1, 257, 0, -3, 2.5, True])
def test_a_number_of_values_out_of_its_bounds(values: Any) -> None:
    with pytest.raises(InputError, match="values="):
        cluster(net(), values=values)


def test_weights_that_are_not_finite_are_refused() -> None:
    graph = net()
    name = cluster(graph, fold=False).meta["shared"][0]
    with torch.no_grad():
        graph.get_parameter(name).view(-1)[0] = torch.nan
    with pytest.raises(InputError, match=f"{name}: has weights that are NaN"):
        cluster(graph, fold=False)


# -- training


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"dot": 0.05}, {"optimizer": "adamw"}, {"accumulate": 2}])
def test_values_learn_and_weights_stay_together(options: dict[str, Any]) -> None:
    graph = cluster(mask(net(), sparsity=0.5), values=6, fold=False)
    trained = distill(graph, net(), digits(), **{**QUICK, **options})
    assert same(groups(trained), groups(graph))
    moved = [not torch.equal(trained.get_parameter(one), graph.get_parameter(one)) for one in graph.meta["shared"]]
    assert sum(moved) == len(moved)
    for name in graph.meta["sparse"]:
        assert torch.equal(trained.get_parameter(name) == 0, graph.get_parameter(name) == 0)


def test_a_value_takes_the_mean_gradient_of_its_weights() -> None:
    """One step without momentum and decay: value <- value - rate · mean of its weights' gradients."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(64, 10, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(x.flatten(1))

    torch.manual_seed(0)
    graph = cluster(capture(Line(), torch.zeros(2, 1, 8, 8)), values=3)
    plain = capture(Line(), torch.zeros(2, 1, 8, 8))
    plain.load_state_dict(graph.state_dict())
    options = {**QUICK, "steps": 1, "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "channels_last": "no"}
    one, other = (train(model, digits(), **options) for model in (graph, plain))
    begun, tied, free = (model.get_parameter("line.weight").detach() for model in (graph, one, other))
    for value in begun.unique():
        members = begun == value
        torch.testing.assert_close(tied[members], free[members].mean().expand(int(members.sum())))


# -- storing, other steps, the command line


def size(graph: fx.GraphModule, folder: Path, store: str = "smallest") -> int:
    folder_.save(graph, folder, store=store)
    return (folder / "weights.safetensors").stat().st_size


def test_shared_values_are_stored_as_such_and_come_back(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = capture(nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10)), (1, 8, 8))
    small = cluster(model, values=16)
    facts = small.meta["history"][-1]["facts"]
    assert size(small, tmp_path / "small") <= facts["bits"] * facts["weights"] / 8 * 1.05 + 4 * 210 + 900
    loaded = rarefy.load(tmp_path / "small")
    assert loaded.meta["shared"] == small.meta["shared"]
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in loaded.state_dict().items())
    first = (tmp_path / "small" / "weights.safetensors").read_bytes()
    assert (
        size(cluster(model, values=16), tmp_path / "again")
        and first == (tmp_path / "again" / "weights.safetensors").read_bytes()
    )


def test_the_step_stands_in_a_recipe_and_on_the_command_line(tmp_path: Path, capsys: Any) -> None:
    assert recipe.step("cluster values=8 fold=false") == {"do": "cluster", "values": 8, "fold": False}
    with pytest.raises(InputError, match="unknown key 'value'"):
        recipe.step("cluster value=8")
    context = Context(
        digits(), [(1.0, net())], plugins.resolve("runtimes", "onnxruntime"), 0, None, tmp_path / "training", False
    )
    assert VERBS["cluster"].run(net(), context, {"values": 8}).meta["shared"]
    folder_.save(net(), tmp_path / "net")
    asked = ["cluster", str(tmp_path / "net"), "--values", "4", "--store", "smallest", "-o", str(tmp_path / "small")]
    assert main.run(asked) == 0, capsys.readouterr().err
    assert rarefy.load(tmp_path / "small").meta["history"][-1]["options"]["values"] == 4
    assert main.run(["cluster", str(tmp_path / "net"), "--values", "1", "-o", str(tmp_path / "x")]) == 2


def test_a_model_of_shared_values_is_quantised_as_any_other() -> None:
    small = quantize(cluster(net(), values=8), digits(), images=16, progress=False)
    with pytest.raises(InputError, match="float weight"):
        cluster(small)
