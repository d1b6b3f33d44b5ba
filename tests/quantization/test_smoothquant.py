"""SmoothQuant: exact in float, the ranges it promises, less noise where a norm has outlier channels, and hands off what
it can't serve."""

from __future__ import annotations

import pytest
import torch
from networks import LoudNorms
from torch import Tensor, fx

from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.graph.fold import fold
from rarefy.graph.layers import layer_name
from rarefy.graph.nodes import attribute
from rarefy.quantization.quantize import quantize
from rarefy.quantization.transforms.smoothquant import smooth

aten = torch.ops.aten


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    return list(torch.randn(64, 7, 32, generator=torch.Generator().manual_seed(0)).split(16))


@pytest.fixture(scope="module")
def graph(batches: list[Tensor]) -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(LoudNorms().eval(), batches[0])


def norms(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.target in (aten.layer_norm.default, aten.rms_norm.default)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_answers_stay_and_ranges_are_shared(graph: fx.GraphModule, batches: list[Tensor], alpha: float) -> None:
    smoothed = fold(graph)
    assert smooth(smoothed, [(batch,) for batch in batches], alpha) == 2
    assert torch.allclose(smoothed(batches[0]), graph(batches[0]), atol=1e-4, rtol=1e-4)
    seen: dict[str, list[Tensor]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Tensor:
            value = super().run_node(node)
            seen.setdefault(node.name, []).append(value)
            return value

    for batch in batches:
        Watch(smoothed).run(batch)
    for norm in norms(smoothed)[:2]:
        activations = torch.cat(seen[norm.name]).abs().flatten(0, 1).amax(0)
        columns = torch.stack([attribute(smoothed, layer.args[1]).abs().amax(0) for layer in norm.users]).amax(0)
        # X / s = X^(1 - a) W^(1 - a), W s = X^a W^a
        assert torch.allclose(activations.log() * alpha, columns.log() * (1 - alpha), atol=1e-3)


def test_less_noise_where_there_are_outliers(graph: fx.GraphModule, batches: list[Tensor]) -> None:
    noise = {}
    for alpha in (None, 0.5):
        small = quantize(graph, batches=batches, smooth=alpha, equalize=False, progress=False)
        with torch.no_grad():
            noise[alpha] = float(sum((small(batch) - graph(batch)).square().sum() for batch in batches))
        assert small.meta["history"][-1]["options"]["smooth"] == alpha
    assert small.meta["history"][-1]["facts"]["smoothed"] == 2
    assert noise[0.5] < noise[None] / 2


def test_the_caller_s_model_stays_and_shared_norms_are_left(graph: fx.GraphModule, batches: list[Tensor]) -> None:
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    quantize(graph, batches=batches, smooth=0.5, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())
    smoothed = fold(graph)
    smooth(smoothed, [(batches[0],)])
    assert torch.equal(smoothed.get_parameter("last.weight"), before["last.weight"])
    assert [layer_name(layer) for layer in norms(smoothed)[0].users] == ["q", "k", "v"]
    with pytest.raises(InputError, match="alpha lies in 0 to 1"):
        quantize(graph, batches=batches, smooth=2.0, progress=False)
