"""Channel padding: what leaves the graph keeps its channels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import rarefy
from rarefy.graph.capture import capture


def test_channels_that_leave_the_graph_are_not_padded(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU()).eval()
    images = torch.rand(8, 3, 12, 12)
    graph = rarefy.quantize(capture(net, images[:2]), batches=[images], progress=False)
    assert rarefy.export(graph, tmp_path / "net.onnx")["passed"]
    with torch.no_grad():
        assert graph(images).shape == (8, 6, 8, 8)
