"""What a layer multiplies as a matrix, and the mean of its sums from that of what it reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from rarefy.graph import im2col
from rarefy.graph.capture import capture
from rarefy.graph.layers import weighted
from rarefy.graph.nodes import attribute

LAYERS = [
    (nn.Conv2d(6, 8, 3, stride=2, padding=1), (6, 9, 12)),
    (nn.Conv2d(6, 6, (3, 5), padding=(1, 2), groups=6), (6, 7, 10)),
    (nn.Conv2d(6, 4, 3, dilation=2, groups=2), (6, 11, 9)),
    (nn.Conv2d(6, 4, 2, padding="same"), (6, 8, 7)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 13)),
    (nn.Linear(5, 3), (5,)),
    (nn.Linear(5, 3), (7, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_the_mean_of_what_a_layer_reads_gives_that_of_its_sums(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Odd sizes, strides, dilation, groups, padding, batches of different sizes; float32 of at most 400 products."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, *shape, generator=generator) for count in (3, 2)]
    graph = capture(nn.Sequential(layer).eval(), batches[0])
    node: Any = next(node for node in graph.graph.nodes if weighted(node))
    weight, bias = (attribute(graph, source).detach().double() for source in node.args[1:3])
    mean = im2col.Mean(node, weight.shape)
    for batch in batches:
        mean.add(batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch)
    groups = im2col.groups_of(node)
    found = (weight.reshape(groups, len(weight) // groups, -1) @ mean.value(groups)).flatten() + bias
    with torch.no_grad():
        made = torch.cat([graph(batch) for batch in batches]).double()
    axis = made.dim() - 1 if isinstance(layer, nn.Linear) else 1
    wanted = made.movedim(axis, 0).flatten(1).mean(1)
    assert torch.allclose(found, wanted, rtol=0, atol=400 * 2.0**-24 * 4)


@pytest.mark.parametrize("most", [5, 10**6])
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_layer_is_its_weights_times_what_it_unfolds(layer: nn.Module, shape: tuple[int, ...], most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, generator=generator)
    graph = capture(nn.Sequential(layer).eval(), x)
    node: Any = next(node for node in graph.graph.nodes if weighted(node))
    weight, bias = (attribute(graph, source).detach() for source in node.args[1:3])
    groups = im2col.groups_of(node)
    plane = im2col.plane(node, x, weight.shape)
    places = im2col.draw(plane, generator, x.device, most)
    assert len(places) == min(most, math.prod(plane)) and bool((places.diff() > 0).all())
    rows = im2col.unfold(node, x, weight.shape, groups, places)
    sums = weight.reshape(groups, len(weight) // groups, -1) @ rows + bias.view(groups, -1, 1)
    assert rows.shape == (3, groups, weight[0].numel(), len(places))
    with torch.no_grad():
        wanted = im2col.outputs(node, graph(x), groups, places)
    assert torch.allclose(sums, wanted, rtol=0, atol=1e-5)
