"""LiteRT: our own scales in a .tflite file; the same codes for every form of padding, pooling and join."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import DenselyConnected, UnevenDepthwise
from torch import Tensor, nn

from rarefy import plugins
from rarefy.errors import FormatError, InputError
from rarefy.graph.capture import capture
from rarefy.quantization.quantize import quantize

pytest.importorskip("ai_edge_litert")


class Planes(nn.Module):
    """Strides with torch's padding, which is not TensorFlow's; pools, groups, dilation, a resize, a join of three."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.even = nn.Conv2d(8, 8, 4, stride=2, padding=1)
        self.groups = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.one = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, stride=1, padding=1)
        low = F.relu6(self.even(x))
        low = low + self.groups(low)
        high = torch.cat([F.relu(self.depthwise(x)), F.interpolate(low, scale_factor=2.0)], 1)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.one(high)), 1).flatten(1))


def compared(net: nn.Module, x: Tensor, path: Path, **options: Any) -> tuple[Any, Any, Any]:
    runtime = plugins.resolve("runtimes", "litert:threads=1")
    small = quantize(capture(net.eval(), x), batches=[x], progress=False, **options)
    return small, runtime.export(small, path / "model.tflite"), runtime


@pytest.mark.parametrize("made_for", ["litert", "onnxruntime"])
def test_codes_are_the_simulations(made_for: str, tmp_path: Path) -> None:
    """Also of a model that was quantised for another runtime: one set of scales."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    small, path, runtime = compared(Planes(), x, tmp_path, runtime=made_for)
    found = runtime.compare(small, path, x)
    assert found["passed"] and found["ulp"] <= 1 and len(found["layers"]) >= 7, found
    assert all(layer["share"] < 0.01 for layer in found["layers"]), found["layers"]
    small.get_buffer("groups.bias_codes").add_(5_000)
    broken = runtime.compare(small, path, x)
    assert not broken["passed"] and broken["first_diverging_layer"] == "groups"


class Sums(nn.Module):
    """A sum of a sum, of unlike scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.more = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.more:
            x = x + layer(x)
        return self.head(x.mean((2, 3)))


def test_sums_in_fixed_point_are_the_simulations_to_the_last_code(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 24, 24)
    small, path, runtime = compared(Sums(), x, tmp_path, runtime="litert")
    found = runtime.compare(small, path, x)
    shares = {layer["value"]: layer["share"] for layer in found["layers"]}
    assert not any(shares[name] for name in ("add", "add_1", "add_2")), shares
    assert found["passed"] and found["evaluated"] == 1.0


class Shuffled(nn.Module):
    """Branches of unlike scales put together, their channels shuffled: codes go on in another order of axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        with torch.no_grad():
            self.wide.weight.mul_(5.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.wide(x))], 1)
        even, _ = x.view(-1, 8, 2, *x.shape[2:]).transpose(1, 2).reshape(-1, 16, *x.shape[2:]).chunk(2, 1)
        return self.head(F.relu(self.last(even)).mean((2, 3)))


def test_codes_put_together_from_other_scales_are_rounded_as_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    small, path, runtime = compared(Shuffled(), x, tmp_path)
    found = runtime.compare(small, path, x)
    (joined,) = (layer for layer in found["layers"] if layer["value"] == "cat")  # read where it is made
    assert found["passed"] and "unread" not in found and joined["difference"] == 0, found


@pytest.mark.parametrize("net", [DenselyConnected, UnevenDepthwise])
def test_other_networks(net: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 1 if net is DenselyConnected else 3, 16, 16)
    small, path, runtime = compared(net(), x, tmp_path)
    found = runtime.compare(small, path, x)
    assert found["passed"] and found["ulp"] <= 1, found


def test_weights_are_stored_as_codes(tmp_path: Path) -> None:
    """Of integer layers, and of one whose sums nothing rounds."""
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    small, path, runtime = compared(net, x, tmp_path, runtime="onnxruntime")
    assert 64 * 256 * 2 < path.stat().st_size < 64 * 256 * 3
    assert torch.allclose(runtime.open(path)(x), small(x), atol=1e-5)


def test_a_file_for_several_inputs_at_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, 16, 16)
    graph = capture(Planes().eval(), x)
    runtime = plugins.resolve("runtimes", "litert:threads=1,batch=4")
    session = runtime.open(runtime.export(graph, tmp_path / "model.tflite"))
    assert session.batch == 4
    assert torch.allclose(session(x), graph(x), atol=1e-4)  # 4, then 3 and one that is thrown away
    with pytest.raises(InputError, match="batch=0 must be at least 1"):
        plugins.resolve("runtimes", "litert:batch=0")
    with pytest.raises(InputError, match="give inputs of the shapes"):
        session(torch.randn(4, 3, 5, 5))


def test_what_it_has_no_operator_for_is_named(tmp_path: Path) -> None:
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sort(x, 1).values * 2

    runtime = plugins.resolve("runtimes", "litert")
    with pytest.raises(
        InputError, match=r"aten\.sort\S* has no row in the table of LiteRT's operators.*choose another"
    ):
        runtime.export(capture(Sorts(), torch.randn(2, 5)), tmp_path / "model.tflite")
    (tmp_path / "cut.tflite").write_bytes(b"\x10\0\0\0TFL3" + bytes(40))
    with pytest.raises(FormatError, match=r"cut\.tflite: LiteRT can't open it"):
        runtime.open(tmp_path / "cut.tflite")
