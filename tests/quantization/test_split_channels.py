"""Dead channels that carry noisy ones: float answers stay, rounding costs a fraction, and what is not dead for certain
is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rarefy import capture, quantize
from rarefy.graph.canonical import simplify
from rarefy.graph.fold import fold
from rarefy.graph.layers import weighted
from rarefy.graph.nodes import attribute
from rarefy.quantization.formats import Grid
from rarefy.quantization.transforms.split_channels import double, places

DEAD = (2, 7, 11)
LOUD = 5


class Separable(nn.Module):
    """A stem, a depthwise layer and a 1 x 1 one.

    Channel ``LOUD`` is an edge detector on an offset, weighed 20 times as much as the others; ``DEAD`` say nothing.
    """

    def __init__(self, padding: int | None = 1, dead: bool = True):
        super().__init__()
        self.padding = padding
        self.stem = nn.Conv2d(3, 16, 3)
        self.deep = nn.Conv2d(16, 16, 3, padding=padding or 0, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.stem.bias[LOUD] = 3.0
            self.deep.weight[LOUD] = 20 * torch.tensor([[-0.1, 0, 0.1], [-0.2, 0, 0.2], [-0.1, 0, 0.1]])
            self.deep.bias[LOUD] = 3.0
            self.project.weight[:, LOUD] *= 4
            if dead:
                self.stem.weight[list(DEAD)] = 1e-9
                self.stem.bias[list(DEAD)] = -0.01
                self.deep.bias[list(DEAD)] = 0.7  # a constant that has to stay

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        if self.padding is None:
            x = F.pad(x, (0, 1, 0, 1))
        return self.head(self.project(F.relu6(self.deep(x)))[:, :, 5, 5])


class TwoReaders(Separable):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        return self.head(self.project(F.relu6(self.deep(x)) + x)[:, :, 5, 5])


def images(count: int = 8) -> Tensor:
    return torch.rand(count, 3, 20, 20, generator=torch.Generator().manual_seed(1))


def folded(model: nn.Module) -> fx.GraphModule:
    graph = simplify(fold(capture(model.eval(), images(2))))
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    return graph


def doubled(graph: fx.GraphModule) -> int:
    values = {node: Grid(signed=False, symmetric=False) for node in graph.graph.nodes if node.op == "call_function"}
    return double(graph, [(images(),)], values, {node: Grid(axis=0) for node in values if weighted(node)})


class Rounded(fx.Interpreter):
    """Rounds one value to 255 steps of its largest."""

    def __init__(self, graph: fx.GraphModule, value: fx.Node):
        super().__init__(graph)
        self.value = value

    def run_node(self, node: fx.Node) -> Any:
        found = super().run_node(node)
        step = found.max() / 255 if node is self.value else None
        return found if step is None else (found / step).round() * step


def noise(graph: fx.GraphModule) -> float:
    (place,) = places(graph)
    return float((Rounded(graph, place.value).run(images(256)) - graph(images(256))).square().mean())


@pytest.mark.parametrize("padding", [0, 1, None])
def test_answers_stay_and_rounding_costs_a_fraction(padding: int | None) -> None:
    torch.manual_seed(0)
    graph = folded(Separable(padding))
    exact, before = graph(images()), noise(graph)
    assert doubled(graph) == len(DEAD)
    assert torch.allclose(graph(images()), exact, rtol=0, atol=2e-3 * float(exact.abs().max()))
    assert float((graph(images()) - exact).square().mean()) < before / 10
    assert noise(graph) < before / 4  # of four copies a 16th, where the others' noise is nothing


def test_int8_is_nearer_to_float() -> None:
    torch.manual_seed(0)
    model = Separable().eval()
    batches = [images(16)]
    errors = [
        (
            quantize(model, batches=batches, inputs=images(2), equalize=equalize, calibration="minmax", progress=False)(
                images()
            )
            - model(images())
        )
        .square()
        .mean()
        for equalize in (False, True)
    ]
    assert errors[1] < errors[0] / 2


def test_only_what_is_dead_for_certain_is_taken() -> None:
    """Weights that could reach half a step, on images brighter than these, are no dead channel, though none was seen
    alive."""
    torch.manual_seed(0)
    model = Separable(dead=False)
    with torch.no_grad():
        model.stem.weight[list(DEAD)] = 0.05
        model.stem.bias[list(DEAD)] = -0.05 * 27 * 1.01
    graph = folded(model)
    before = {name: value.clone() for name, value in graph.named_parameters()}
    seen: list[Tensor] = []
    model.stem.register_forward_hook(lambda module, inputs, output: seen.append(output[:, list(DEAD)]))
    model(images())
    assert float(seen[0].detach().max()) < 0
    assert doubled(graph) == 0
    assert all(torch.equal(before[name], value) for name, value in graph.named_parameters())


def test_a_value_with_another_reader_is_left_alone() -> None:
    torch.manual_seed(0)
    graph = folded(TwoReaders())
    assert places(graph) == []
    assert doubled(graph) == 0


def test_channels_of_like_noise_are_left_alone() -> None:
    """Each would win less than its share."""
    torch.manual_seed(0)
    model = Separable()
    with torch.no_grad():
        model.deep.weight[:] = model.deep.weight[0].clone()
        model.project.weight[:] = model.project.weight[:, :1].clone()
    graph = folded(model)
    assert len(places(graph)) == 1
    assert doubled(graph) == 0


def test_the_dead_stay_where_the_bias_is() -> None:
    """What a dead channel did behind the depthwise layer, a constant, is the reader's bias now."""
    torch.manual_seed(0)
    graph = folded(Separable())
    (place,) = places(graph)
    bias, read = attribute(graph, place.reader.args[2]), attribute(graph, place.reader.args[1])
    before, columns = bias.clone(), read[:, list(DEAD), 0, 0].clone()
    assert doubled(graph) == len(DEAD)
    assert torch.allclose(bias, before + 0.7 * columns.sum(1))
