"""measure(): counts are exact, memory is that of a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from rarefy.artifact import folder
from rarefy.deployment import latency
from rarefy.errors import InputError
from rarefy.evaluation import measure
from rarefy.graph.capture import capture


def network(width: int, side: int = 8) -> fx.GraphModule:
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.Flatten(),
        nn.Linear(width * side * side, 10),
    )
    return capture(model, torch.zeros(2, 1, side, side))


def test_measure_counts_exactly(tmp_path: Path) -> None:
    graph = network(4)
    found = measure.measure({"net": graph}, repeats=3, memory=False, batch=2, folder=tmp_path)["net"]
    assert found["parameters"] == 1 * 4 * 9 + 4 + 4 * 4 * 9 + 4 + 4 * 64 * 10 + 10
    assert found["macs"] == (4 * 9 + 4 * 4 * 9) * 64 + 4 * 64 * 10
    saved = folder.save(graph, tmp_path / "saved") / "weights.safetensors"
    assert found["size_bytes"] == saved.stat().st_size
    assert (
        found["latency_ms"]["batch"] == 2
        and found["latency_ms"]["threads"] == 1
        and 1 <= found["latency_ms"]["repeats"] <= 3
    )
    assert found["latency_ms"]["runtime"] == "onnxruntime"
    assert found["peak_memory_bytes"] is None
    assert (tmp_path / "0.onnx").is_file()


def test_models_of_other_inputs_are_not_compared() -> None:
    with pytest.raises(InputError, match="different inputs"):
        measure.measure({"a": network(2, 8), "b": network(2, 4)})
    with pytest.raises(InputError, match=r"GraphModule\w* has no name; pass \{name: graph\}"):
        measure.measure(network(8))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no model"):
        measure.measure({})


def test_peak_memory_sees_the_weights(tmp_path: Path) -> None:
    """A model of 32 MB more of weights takes at least that much more memory, whatever this process holds."""
    ballast = torch.ones(64 * 2**20 // 4)  # a child that inherited its parent's peak would hide everything below it
    runtime = latency.with_threads("onnxruntime")
    found = []
    for width in (8, 2**20):
        graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(8, width), nn.ReLU()), torch.zeros(2, 2, 4))
        runtime.export(graph, tmp_path / "net.onnx")
        found.append(measure.peak_memory(tmp_path / "net.onnx", torch.zeros(1, 2, 4), runtime=runtime))
    if None in found:
        pytest.skip("this system does not tell a process's peak memory")
    small, large = found
    assert large is not None and small is not None
    assert large - small >= 32 * 2**20
    assert ballast.sum() > 0


def test_peak_memory_of_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"net\.onnx"):
        measure.peak_memory(tmp_path / "net.onnx", torch.zeros(1, 2))


def test_the_peak_can_start_anew_at_what_is_held_now() -> None:
    """A process that once held more than the model takes would hide all of it."""
    ballast = torch.ones(200 * 2**20 // 4)
    before = measure.peak_bytes()
    del ballast
    after = measure.peak_bytes(reset=True)
    if before is None or after is None:
        pytest.skip("this system does not tell a process's peak memory")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not forget a process's peak memory")
    assert after <= before - 150 * 2**20
