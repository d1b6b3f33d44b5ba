"""The latency gate: stretches are found, what is slow as integers goes back to float and is named, and weights keep to
the bits a processor adds exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import AlikeStretches
from torch import Tensor

from rarefy import plugins
from rarefy.compression import environment
from rarefy.deployment import latency
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.graph.fold import fold
from rarefy.quantization import latency_gate
from rarefy.quantization.placement import place
from rarefy.quantization.quantize import quantize
from rarefy.system import cpu


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    return [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def graph(batches: list[Tensor]) -> Any:
    torch.manual_seed(0)
    return capture(AlikeStretches().eval(), batches[0])


def test_candidates_are_stretches_and_kinds_of_layers(graph: Any) -> None:
    folded = fold(graph)
    placement = place(folded, plugins.resolve("runtimes", "onnxruntime").capabilities)
    found = {one.layers: one.name for one in latency_gate.candidates(folded, placement)}
    assert ("first.0", "second.0", "first.1", "second.1") in found
    assert found["depthwise",].startswith("depthwise layers of stem") and ("head",) in found
    assert all(0 < len(layers) < len(placement.layers) for layers in found)


def clock(price: dict[str, float]) -> Any:
    """``deployment.latency.latency``, but each file takes what ``price`` says of its name, and is run all the same."""

    def clocked(sessions: Any, inputs: Tensor, **_: Any) -> dict[str, Any]:
        ms = {name: next((cost for part, cost in price.items() if part in name), 10.0) for name in sessions}
        for session in sessions.values():
            assert session(inputs).shape == (1, 10)
        quartiles = lambda value: {"median": value, "low": value, "high": value}
        return {
            name: {
                "ms": quartiles(ms[name]),
                "speedup": {other: quartiles(ms[other] / ms[name]) for other in ms},
                "repeats": 1,
            }
            for name in ms
        }

    return clocked


LINEAR = {"first.0", "second.0", "first.1", "second.1"}


@pytest.mark.parametrize(
    ("price", "undone", "why"),
    [
        ({"first.0 and 3 more in float": 8.0, "without": 8.0, "float on": 20.0}, LINEAR,
         "faster in float: first.0 and 3 more"),
        ({"float on": 20.0}, set(), "every stretch pays"),
        ({"in float": 9.99, "float on": 20.0}, set(), "every stretch pays"),
        ({"float on": 5.0}, {"stem", "depthwise", "pointwise", *LINEAR, "head"}, "float on onnxruntime"),
    ],
)  # fmt: skip
def test_what_does_not_pay_goes_back(
    graph: Any,
    batches: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    price: dict[str, float],
    undone: set[str],
    why: str,
) -> None:
    """Clocks are planted, since no timing can be promised on a machine that others use; everything else is real."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(latency, "latency", clock(price))
    small = quantize(graph, batches=batches, gate="latency", progress=False)
    facts = small.meta["history"][-1]["facts"]
    assert set(facts["gate"]["undone"]) == undone and why in facts["gate"]["why"]
    assert undone <= set(facts["float"])
    assert {layer["name"] for layer in facts["layers"]}.isdisjoint(undone)
    assert torch.allclose(small(batches[0]), graph(batches[0]), atol=0.2)


def test_gate_times_for_real(graph: Any, batches: list[Tensor]) -> None:
    pytest.importorskip("openvino")
    small = quantize(graph, batches=batches, gate="latency", runtime="openvino:threads=1", progress=False)
    facts = small.meta["history"][-1]["facts"]
    timed = {one["what"]: one["latency_ms"] for one in facts["timing"]["gate"]}
    assert {
        "float on openvino:threads=1",
        "float on openvino:threads=1,precision=bf16",
        latency_gate.INTEGER,
    } <= timed.keys()
    assert all(ms > 0 for ms in timed.values()) and facts["gate"]["threads"] == 1


def test_unknown_gate(graph: Any, batches: list[Tensor]) -> None:
    with pytest.raises(InputError, match="choose latency"):
        quantize(graph, batches=batches, gate="size", progress=False)


def test_without_vnni_no_sum_of_two_products_saturates(
    graph: Any, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vpmaddubsw adds two products of unsigned by signed bytes in 16 bits."""
    for runtime, flags in (
        ("onnxruntime:vnni=no", None),
        ("onnxruntime", {"avx2": True}),
        ("openvino", {"avx512": True}),
    ):
        if flags is not None:
            monkeypatch.setattr(cpu, "cpu_flags", lambda flags=flags: flags)
        small = quantize(graph, batches=batches, runtime=runtime, progress=False)
        codes = [value for name, value in small.named_buffers() if name.endswith("weight_codes")]
        assert codes and all(2 * 255 * int(value.abs().max()) < 2**15 for value in codes)
        assert {layer["bits"] for layer in small.meta["history"][-1]["facts"]["layers"]} == {7}
    assert any("7 bits" in line for line in environment.examine()["advice"])
    exact = quantize(graph, batches=batches, runtime="onnxruntime:vnni=yes", progress=False)
    assert {layer["bits"] for layer in exact.meta["history"][-1]["facts"]["layers"]} == {8}
