"""measure(): counts are exact, clocks take turns, memory is that of a process of its own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

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


class Clock:
    """A callable that takes so many seconds, and tells when it was called."""

    def __init__(self, name: str, seconds: float, log: list[str]):
        self.name, self.seconds, self.log = name, seconds, log

    def __call__(self, inputs: Tensor) -> Tensor:
        self.log.append(self.name)
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        return inputs


def test_models_take_turns_and_the_order_rotates() -> None:
    log: list[str] = []
    found = latency.latency({name: Clock(name, 0.0025, log) for name in "abc"}, torch.zeros(1), repeats=3, warmup=1)
    assert log[-9:] == list("abcbcacab")  # one run a sample, since a run takes longer than a sample must
    assert 1 <= found["a"]["repeats"] <= 3


def test_a_disturbed_round_counts_for_no_model() -> None:
    """Every third run of one model takes ten times as long; its rounds are left out, and the ratio is as if nothing had been."""
    calls = iter(range(10**6))

    def disturbed(inputs: Tensor) -> None:
        Clock("", 0.1 if next(calls) % 3 == 2 else 0.01, [])(inputs)

    found = latency.latency({"a": disturbed, "b": Clock("b", 0.01, [])}, torch.zeros(1), repeats=30)
    assert found["a"]["repeats"] <= 20
    assert found["a"]["ms"]["high"] < 50 and 0.7 < found["b"]["speedup"]["a"]["median"] < 1.4


def test_speedup_is_of_pairs() -> None:
    log: list[str] = []
    found = latency.latency(
        {"slow": Clock("slow", 0.006, log), "fast": Clock("fast", 0.002, log)}, torch.zeros(1), repeats=15
    )
    assert found["slow"]["speedup"]["slow"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    ratio = found["fast"]["speedup"]["slow"]
    assert ratio["high"] >= ratio["median"] >= ratio["low"]
    assert ratio["high"] > 1.5  # 3 on a machine of one's own
    assert found["fast"]["ms"]["low"] >= 2.0 and found["slow"]["ms"]["low"] >= 6.0


def test_a_sample_is_long_enough() -> None:
    log: list[str] = []
    clock = Clock("a", 1e-4, log)
    latency.latency({"a": clock}, torch.zeros(1), repeats=1, warmup=1)
    before = len(log)
    latency.latency({"a": clock}, torch.zeros(1), repeats=2, warmup=1)
    inner = (len(log) - before - 11) / 2  # without the warm-up and the ten runs that estimate
    assert inner == int(inner) and 2 <= inner <= 20  # 2 ms of runs of 0.1 ms, fewer where the machine is slow


def test_repeats_are_chosen_within_bounds() -> None:
    found = latency.latency({"a": Clock("a", 0.02, [])}, torch.zeros(1))
    assert latency.ROUNDS[0] / 10 <= found["a"]["repeats"] <= latency.ROUNDS[1]


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_bad_counts(repeats: int, warmup: int) -> None:
    with pytest.raises(InputError, match="at least"):
        latency.latency({"a": torch.relu}, torch.zeros(1), repeats=repeats, warmup=warmup)


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


def test_threads_are_stated() -> None:
    assert latency.with_threads("onnxruntime").threads == 1
    assert latency.with_threads("onnxruntime:threads=3").threads == 3
    assert latency.with_threads("onnxruntime:threads=3", 2).threads == 2
    with pytest.raises(InputError, match="threads=0"):
        latency.with_threads("onnxruntime", 0)


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
