"""The mean of a layer's sums from that of what it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rarefy import capture
from rarefy.graph import im2col
from rarefy.graph.layers import weighted
from rarefy.graph.nodes import attribute


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), (6, 9, 12)),
        (nn.Conv2d(6, 6, (3, 5), padding=(1, 2), groups=6), (6, 7, 10)),
        (nn.Conv2d(6, 4, 3, dilation=2, groups=2), (6, 11, 9)),
        (nn.Conv2d(6, 4, 2, padding="same"), (6, 8, 7)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 13)),
        (nn.Linear(5, 3), (5,)),
        (nn.Linear(5, 3), (7, 5)),
    ],
)
def test_the_mean_of_what_a_layer_reads_gives_that_of_its_sums(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Odd sizes, strides, dilation, groups, padding, several batches of different sizes; float32 of at most 400 products."""
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
