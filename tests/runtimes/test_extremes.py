"""Maxima, minima and the order of values between integer layers choose among codes, and are rounded no second time.

OpenVINO computes a maximum over axes wrongly where the rounding stands right behind it (codes up to 53 of 255 off).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy import capture, export, quantize

aten = torch.ops.aten

# (N, 16, H, W) -> (N, 16)
OVER_THE_PLANE: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x.amax((2, 3)),
    "amin": lambda x: x.amin((2, 3), keepdim=True).flatten(1),
    "max": lambda x: x.flatten(2).max(-1)[0],
    "min of min": lambda x: x.min(-1)[0].min(-1)[0],
    "max and its place": lambda x: x.flatten(2).max(-1)[0] + 0.01 * x.flatten(2).max(-1)[1].float(),
    "topk": lambda x: x.flatten(2).topk(1)[0].flatten(1),
    "sort": lambda x: x.flatten(2).sort(-1)[0][..., 3],
    "adaptive": lambda x: F.adaptive_max_pool2d(x, 1).flatten(1),
    "beside the mean": lambda x: x.amax((2, 3)) + x.mean((2, 3)),
}
OVER_CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "CBAM": lambda x: torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)] * 8, 1),
    "maxout": lambda x: torch.cat([x.unflatten(1, (8, 2)).amax(2)] * 2, 1),
    "expanded": lambda x: x.amax(1, keepdim=True).expand(-1, 16, -1, -1),
}


class Between(nn.Module):
    """A function between two integer layers; then a third."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: bool) -> None:
        super().__init__()
        self.function, self.channels = function, channels
        self.conv, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
        self.one = nn.Conv2d(16, 16, 3, padding=1) if channels else nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.function(self.conv(x).relu())).relu()
        return self.two(x.mean((2, 3)) if self.channels else x)


CASES = [(name, False) for name in OVER_THE_PLANE] + [(name, True) for name in OVER_CHANNELS]


@pytest.mark.parametrize(("name", "channels"), CASES, ids=[name for name, _ in CASES])
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_what_chooses_among_codes_is_exact(runtime: str, name: str, channels: bool, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    torch.manual_seed(1)
    x = torch.randn(4, 3, 8, 8)
    graph = capture(Between((OVER_CHANNELS if channels else OVER_THE_PLANE)[name], channels).eval(), x)
    small = quantize(graph, batches=[torch.randn(4, 3, 8, 8) for _ in range(2)], progress=False, runtime=runtime)
    found = export(small, tmp_path / "model.onnx", runtime=runtime, inputs=x)
    assert found["passed"] and found["ulp"] <= 1
    assert found["largest_difference"] < 0.01 * float(small(x).abs().max())


def test_a_place_is_no_code() -> None:
    """Of a maximum's two results the second says where it is."""
    x = torch.randn(4, 3, 8, 8)
    graph = capture(Between(OVER_THE_PLANE["max and its place"], False).eval(), x)
    small = quantize(graph, batches=[x], progress=False)
    (place,) = (one for one in small.graph.nodes if str(one.target) == "aten.to.dtype" or "_to_copy" in str(one.target))
    assert "getitem" in place.args[0].name and place.args[0].args[1] == 1
