"""Channels many times as large as the rest, in values that are numbers before they are rounded: a product in front of
that, or a norm that does its work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rarefy import plugins
from rarefy.deployment.runtime import Runtime
from rarefy.graph.capture import capture
from rarefy.quantization.quantize import quantize

aten = torch.ops.aten


class PostNorm(nn.Module):
    """As BERT has it: norms that the next addition reads, too, and GELU between two linear layers."""

    def __init__(self, loud: float) -> None:
        super().__init__()
        self.attend, self.widen, self.narrow, self.head = (
            nn.Linear(*sizes) for sizes in ((32, 32), (32, 64), (64, 32), (32, 10))
        )
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)
        with torch.no_grad():
            self.widen.bias[5] = loud
            self.first.weight[3] *= max(1.0, loud)
            self.attend.weight[:, 3] /= max(1.0, loud)
            self.widen.weight[:, 3] /= max(1.0, loud)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + self.attend(x))
        x = self.second(x + self.narrow(F.gelu(self.widen(x))))
        return self.head(x)  # type: ignore[no-any-return]


class Convolved(nn.Module):
    """GELU of a depthwise layer behind a norm over channels, as in ConvNeXt, read by a convolution."""

    def __init__(self, loud: float) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.gain = nn.Parameter(torch.ones(16, 1, 1))
        with torch.no_grad():
            self.gain[2] = max(1.0, loud)
            self.head.weight[:, 2] /= max(1.0, loud)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x)) * self.gain).mean((2, 3))  # type: ignore[no-any-return]


def graph_of(model: type[nn.Module], loud: float, batches: Sequence[Tensor]) -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(model(loud).eval(), batches[0])


@pytest.fixture(scope="module")
def tokens() -> list[Tensor]:
    return list(torch.randn(96, 7, 32, generator=torch.Generator().manual_seed(0)).split(16))


@pytest.fixture(scope="module")
def pictures() -> list[Tensor]:
    return list(torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(16))


def decibels(graph: fx.GraphModule, small: fx.GraphModule, judged: Tensor) -> float:
    wanted = graph(judged).detach()
    return 10 * math.log10(float(wanted.square().sum() / (small(judged).detach() - wanted).square().sum()))


def relieved(small: fx.GraphModule) -> int:
    facts = small.meta["history"][-1]["facts"]
    assert isinstance(facts["relieved"], int)
    return facts["relieved"]


@pytest.mark.parametrize(("model", "drawn"), [(PostNorm, "tokens"), (Convolved, "pictures")])
def test_one_loud_channel_does_not_cost_the_rest_its_resolution(
    model: type[nn.Module], drawn: str, request: pytest.FixtureRequest
) -> None:
    *batches, judged = request.getfixturevalue(drawn)
    graph = graph_of(model, 60.0, batches)
    small = quantize(graph, batches=batches, progress=False)
    plain = quantize(graph, batches=batches, equalize=False, progress=False)
    assert relieved(small) >= 1
    assert relieved(plain) == 0
    assert decibels(graph, small, judged) > decibels(graph, plain, judged) + 6


def test_nothing_is_multiplied_where_channels_are_alike(tokens: list[Tensor]) -> None:
    *batches, judged = tokens
    graph = graph_of(PostNorm, 0.0, batches)
    small = quantize(graph, batches=batches, progress=False)
    assert not [node for node in small.graph.nodes if node.target is aten.mul.Tensor]
    assert decibels(graph, small, judged) > 30


def test_a_norm_that_only_layers_read_takes_the_factor_for_nothing(tokens: list[Tensor]) -> None:
    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(32), nn.Linear(32, 16), nn.Linear(32, 16)
            with torch.no_grad():
                self.norm.weight[7] = 80
                for layer in (self.one, self.two):
                    layer.weight[:, 7] /= 80

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return torch.tanh(self.one(x)) + self.two(x)

    *batches, judged = tokens
    torch.manual_seed(0)
    graph = capture(PreNorm().eval(), batches[0])
    small = quantize(graph, batches=batches, progress=False)
    assert relieved(small) == 1
    assert not [node for node in small.graph.nodes if node.target is aten.mul.Tensor]
    plain = quantize(graph, batches=batches, equalize=False, progress=False)
    assert decibels(graph, small, judged) > decibels(graph, plain, judged) + 6


def test_a_weight_that_two_layers_share_serves_both(tokens: list[Tensor]) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widen, self.narrow = nn.Linear(32, 32), nn.Linear(32, 32)
            with torch.no_grad():
                self.widen.bias[5] = 60

        def forward(self, x: Tensor) -> Tensor:
            return self.narrow(F.gelu(self.narrow(F.gelu(self.widen(x)))))  # type: ignore[no-any-return]

    *batches, judged = tokens
    torch.manual_seed(0)
    graph = capture(Shared().eval(), batches[0])
    assert decibels(graph, quantize(graph, batches=batches, progress=False), judged) > 30


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_file_answers_as_the_simulation(name: str, tokens: list[Tensor], tmp_path: Path) -> None:
    *batches, judged = tokens
    graph = graph_of(PostNorm, 60.0, batches)
    runtime: Runtime = plugins.resolve("runtimes", name)
    small = quantize(graph, batches=batches, runtime=runtime, progress=False)
    assert relieved(small) >= 1
    path = tmp_path / ("model.onnx" if name == "onnxruntime" else "model.xml")
    runtime.export(small, path)
    answers = runtime.open(path)(judged)
    wanted = small(judged)
    assert (torch.as_tensor(answers) - wanted).abs().max() < 0.02 * wanted.abs().max()
