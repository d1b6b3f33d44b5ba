"""The two forms of a quantised graph: same codes, same tensors, and back again."""

from __future__ import annotations

import pytest
import torch
from networks import Pools
from torch import fx

from rarefy.artifact.folder import content_hash, save
from rarefy.distillation.qat import to_trainable
from rarefy.graph.capture import capture
from rarefy.graph.lowering import to_integers, to_numbers
from rarefy.graph.nodes import operator_name
from rarefy.quantization.quantize import quantize


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 14, 14)
    return quantize(capture(Pools().eval(), images), batches=[images], progress=False)


def operators(graph: fx.GraphModule) -> list[str]:
    return [name for node in graph.graph.nodes if (name := operator_name(node)) not in ("", "pad", "flatten")]


def test_layers_sums_and_averages_are_integer_operators(graph: fx.GraphModule) -> None:
    found = operators(graph)
    assert found[:6] == ["quantize", "conv2d_codes", "avg_pool2d", "conv2d_codes", "add", "mean"]
    assert found[6:] == ["dequantize", "quantize", "linear"]  # the mean is flattened as numbers
    assert all("rarefy" in str(node.target) for node in graph.graph.nodes if operator_name(node) in found)


def test_each_form_makes_the_other(graph: fx.GraphModule, tmp_path) -> None:
    numbers = to_numbers(graph)
    assert set(operators(numbers)) == {
        "quantize",
        "dequantize",
        "conv2d",
        "avg_pool2d",
        "add",
        "adaptive_avg_pool2d",
        "linear",
    }
    x = torch.randn(4, 3, 14, 14)
    assert torch.allclose(numbers(x), graph(x), atol=1e-5)
    back = to_integers(numbers)
    assert operators(back) == operators(graph) and torch.equal(back(x), graph(x))
    assert content_hash(save(to_integers(to_numbers(back)), tmp_path / "a")) == content_hash(save(back, tmp_path / "b"))


@pytest.mark.parametrize("pass_", [to_numbers, to_integers])
def test_a_copy_shares_its_tensors_and_leaves_the_graph_as_it_is(graph: fx.GraphModule, pass_) -> None:
    text, tensors = str(graph.graph), dict(graph.named_buffers())
    copied = pass_(graph)
    assert str(graph.graph) == text and dict(graph.named_buffers()).keys() == tensors.keys()
    shared = {name: value for name, value in copied.named_buffers() if name in tensors}
    assert len(shared) == len(tensors) and all(value is tensors[name] for name, value in shared.items())


def test_a_trainable_copy_shares_none(graph: fx.GraphModule) -> None:
    """Its tensors are changed in place."""
    x = torch.randn(4, 3, 14, 14)
    before = graph(x)
    learns = to_trainable(graph)
    with torch.no_grad():
        for value in (*learns.parameters(), *learns.buffers()):
            value.add_(1)
    assert torch.equal(graph(x), before)
