"""Networks in int8 whose outputs are a convolution's, several, an input, a constant, or one tensor twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy import capture, export, quantize


def block(ins: int, outs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ins, outs, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(outs), nn.ReLU())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.up = block(3, 8), block(8, 12, 2), nn.ConvTranspose2d(12, 8, 2, 2)
        self.d, self.out = block(16, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.out(self.d(torch.cat([self.up(self.b(a)), a], 1)))


class Pyramid(nn.Module):
    """Maps of three sizes, each a convolution's, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 8, 2), block(8, 20, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(width, 10, 1) for width in (8, 20))
        self.out = nn.ModuleList(nn.Conv2d(10, 10, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.a(x)
        low = self.lateral[1](self.b(a))
        high = self.lateral[0](a) + F.interpolate(low, scale_factor=2)
        return {"p2": self.out[0](high), "p3": self.out[1](low)}


class Detector(nn.Module):
    """Boxes and scores, apart for two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 16, 2), block(16, 24, 2)
        self.scores = nn.ModuleList(nn.Conv2d(width, 6, 1) for width in (16, 24))
        self.boxes = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in (16, 24))

    def forward(self, x: Tensor) -> Any:
        maps = (a := self.a(x)), self.b(a)
        found = zip(maps, self.scores, self.boxes, strict=True)
        return [(scores(one).sigmoid(), boxes(one).exp()) for one, scores, boxes in found]


class Larger(nn.Module):
    """Super-resolution by a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 16), nn.Conv2d(16, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.b(self.a(x)), 2).clamp(0, 1)


class Odd(nn.Module):
    """A narrow map twice, its input, a constant, features that others read, and depthwise channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depthwise, self.head = block(3, 9), block(9, 9, 1, 9), nn.Conv2d(9, 3, 1)
        self.register_buffer("anchors", torch.arange(4.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.depthwise(self.a(x))
        y = self.head(features)
        return {"y": y, "again": y, "x": x, "anchors": self.anchors, "features": features, "place": y.argmax(1)}


@pytest.mark.parametrize("network", [UNet, Pyramid, Detector, Larger, Odd])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_maps_that_come_out_are_the_models(runtime: str, network: type[nn.Module], tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    graph = capture(network().eval(), x)
    small = quantize(graph, batches=[torch.randn(4, 3, 16, 16)], progress=False, runtime=runtime)
    found = export(small, tmp_path / "dense.onnx", runtime=runtime, inputs=x)
    assert found["passed"] and found["agreement"] == 1.0 and found["ulp"] <= 1 and found["layers"]


def test_a_value_that_is_an_output_is_read_once_more(tmp_path: Path) -> None:
    """OpenVINO has no second output for it."""
    pytest.importorskip("openvino")
    from rarefy.runtimes.openvino import OpenVINO, Session

    graph = capture(UNet().eval(), torch.randn(2, 3, 16, 16))
    small = quantize(graph, batches=[torch.randn(4, 3, 16, 16)], progress=False, runtime="openvino")
    file = OpenVINO().export(small, tmp_path / "u.xml")
    x = torch.randn(1, 3, 16, 16)
    whole, again = Session(file, 1, taps=["output"]).outputs(x)
    assert torch.equal(whole, again) and torch.equal(whole, Session(file, 1).outputs(x)[0])


class Reduced(nn.Module):
    """A norm of (N, channels) behind a reduction, as Levit's classifier."""

    def __init__(self, reduced: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last, self.reduced = (
            nn.Linear(16, 24),
            nn.BatchNorm1d(24),
            nn.Linear(24, 5),
            reduced,
        )
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.weight, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(self.norm(self.reduced(self.first(x).relu())))
        return scores


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("reduced", [lambda x: x.mean(1), lambda x: x.amax(1), lambda x: x.sum(1)])
def test_a_norm_behind_a_reduction_is_the_models(
    runtime: str, reduced: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    graph = capture(Reduced(reduced).eval(), torch.randn(2, 6, 16))
    small = quantize(graph, batches=[torch.randn(8, 6, 16)], progress=False, runtime=runtime)
    found = export(small, tmp_path / "model.onnx", runtime=runtime, inputs=torch.randn(4, 6, 16))
    assert found["passed"] and found["first_diverging_layer"] is None
