"""Weights as codes, activations in float: near the float answers, saved without gaps, loaded back exactly, written for ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rarefy import plugins
from rarefy.artifact import load, save
from rarefy.capturing import capture
from rarefy.errors import InputError
from rarefy.quantizing import quantize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, groups=32, bias=False)
        self.c, self.head = nn.Conv2d(32, 24, 1), nn.Linear(24, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.c(self.b(self.bn(self.a(x)).relu()))).mean((2, 3)))


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return capture(Net().eval(), torch.randn(2, 3, 9, 9))


# relative error of the weights that the format's step allows: a uniform grid of b bits over +-4 sigma leaves (4 / 2^(b-1))^2 / 12
MOST = {"int8": 1e-4, "int4": 0.03, "int4:group=8": 0.02, "uint4:group=8": 0.02, "int3": 0.12, "int2": 0.5, "uint3": 0.12,
        "fp8:e4m3": 2e-3, "fp8:e5m2": 6e-3, "mxfp4": 0.03, "nvfp4": 0.02}  # fmt: skip


@pytest.mark.parametrize("weights", MOST)
def test_formats_keep_the_weights_and_come_back_from_disk(weights: str, graph, tmp_path) -> None:
    small = quantize(graph, weights=weights, activations="float", progress=False)
    facts = small.meta["history"][-1]["facts"]["layers"]
    assert [fact["name"] for fact in facts] == ["a", "b", "c", "head"]
    assert max(fact["error"] for fact in facts) < MOST[weights]
    back = load(save(small, tmp_path / "small"))
    x = torch.randn(4, 3, 9, 9)
    assert torch.equal(back(x), small(x)) and back.meta["bits"] == small.meta["bits"]
    codes = [value for name, value in back.named_buffers() if name.endswith("_codes")]
    assert len(codes) == 4 and all(value.element_size() == 1 for value in codes)


@pytest.mark.parametrize("weights", ["int8", "int4", "int3:group=8"])
def test_the_file_computes_it(weights: str, graph, tmp_path) -> None:
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    small = quantize(graph, weights=weights, activations="float", ignore=["a"] if "group" in weights else (), progress=False)
    x = torch.randn(4, 3, 9, 9)
    file = runtime.export(small, tmp_path / "small.onnx")
    assert torch.allclose(runtime.open(file)(x), small(x), atol=1e-5)


def test_wrong_requests(graph) -> None:
    for message, options in {
        "looks at weights alone": {"rounding": "gptq"},
        "no weight is left": {"ignore": ["*"]},
        "mixed": {"weights": "mixed:bits=4"},
    }.items():
        with pytest.raises(InputError, match=message):
            quantize(graph, activations="float", progress=False, **options)
    with pytest.raises(InputError, match="already"):
        quantize(quantize(graph, activations="float", progress=False), activations="float")
