"""Pruning to a measured latency: the table finds planted times, the path weighs damage against time, the cache, and the
whole of it on a small network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from networks import ThreeConvolutions
from torch import fx, nn

from rarefy.deployment import latency
from rarefy.deployment.runtime import Capabilities, Kernel
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.graph.macs import count_macs
from rarefy.pruning import latency_search
from rarefy.pruning.latency_search import damage, descend
from rarefy.pruning.latency_table import Space, cached, design, fit, keep
from rarefy.pruning.prune import prune
from rarefy.runtimes.onnxruntime import OnnxRuntime


def chain(*sizes: int, step: int = 8) -> Space:
    """Families in a row, one axis each, and a last axis of the constant size 3."""
    widths = [np.unique(np.append(np.arange(step, size, step), size)) for size in sizes]
    parts = [own[:, None] * np.eye(len(sizes) + 1)[index] for index, own in enumerate(widths)]
    return Space(
        widths, [damage(np.ones(int(own[-1])), own) for own in widths], parts, np.array([*[0.0] * len(sizes), 3.0])
    )


def run(space: Space, option: np.ndarray, slope: float = 2e-3) -> list[Kernel]:
    """A runtime of known times: layers read one family and make the next, in blocks of 16; the first is ten times as
    dear."""
    kept = -(-space.kept(option) // 16) * 16
    kernels = [Kernel("stem#1", "Conv", [[1, 3, 32, 32], [1, int(kept[0]), 32, 32]], 5 + 0.1 * kept[0])]
    for index, (one, other) in enumerate(zip(kept[:-1].tolist(), kept[1:].tolist(), strict=True)):
        price = slope * (10 if index == 0 else 1)
        plane = 32 if index == 0 else 16
        kernels.append(
            Kernel(f"conv{index}#1", "Conv", [[1, one, plane, plane], [other, one, 3, 3]], 7 + price * one * other)
        )
    return kernels


def test_table_finds_planted_times_at_widths_it_never_saw() -> None:
    space = chain(128, 96, 256, 64)
    options = design(space, 0)
    table = fit([run(space, option) for option in options], np.stack([space.axes(option) for option in options]))
    random = np.random.default_rng(1)
    apart = []
    for _ in range(40):
        option = np.array([random.integers(len(widths)) for widths in space.widths])
        truth = sum(kernel.us for kernel in run(space, option))
        apart.append(abs(table(space.axes(option)[None])[0] / truth - 1))
    assert np.median(apart) < 0.05  # six samples, blocks that some of them can't tell apart
    assert max(apart) < 0.2
    assert table.error < 0.01
    assert table.modelled == 1


def test_path_spares_what_is_cheap_and_keeps_blocks_full() -> None:
    space = chain(128, 128, 128, 128)
    options = design(space, 0)
    table = fit([run(space, option) for option in options], np.stack([space.axes(option) for option in options]))
    path = descend(space, table)
    assert (np.diff(path.us) < 0).all()
    assert (np.diff(path.options, axis=0) <= 0).all()
    point = path.within(path.us[0] / 2)
    assert point is not None
    kept = space.kept(path.options[point])
    assert path.us[point] == pytest.approx(sum(kernel.us for kernel in run(space, path.options[point])), rel=0.2)
    assert kept[1] < kept[3]  # its layer costs ten times as much
    assert (kept % 16 == 0).all()  # half a block would cost as a whole one
    even = np.array([len(widths) for widths in space.widths])
    same = next(
        share
        for share in np.arange(1, 0, -0.05)
        if sum(k.us for k in run(space, (even * share).astype(int) - 1)) <= path.us[0] / 2
    )
    assert kept.sum() > space.kept((even * same).astype(int) - 1).sum()
    assert path.within(0.0) is None


def test_damage_is_convex_and_falls_on_the_least_important() -> None:
    lost = damage(np.array([4.0, 3.0, 2.0, 1.0]), np.array([0, 1, 2, 3, 4]))
    np.testing.assert_allclose(lost, [4.0, 4 * 0.6**2, 4 * 0.3**2, 4 * 0.1**2, 0.0])
    np.testing.assert_allclose(damage(np.zeros(4), np.array([1, 2, 4])), [4 * 0.75**2, 1.0, 0.0])


def test_cache_gives_back_what_was_kept_and_nothing_else(tmp_path: Path) -> None:
    space = chain(64, 64)
    samples = [run(space, option) for option in design(space, 0)]
    file = tmp_path / "deep" / "one.json"
    keep(file, samples)
    assert cached(file) == samples
    assert [path.name for path in file.parent.iterdir()] == ["one.json"]
    sound = file.read_bytes()
    content = json.loads(sound)
    content["samples"][0][0][3] += 1
    for broken in (
        sound[:-20],
        b"",
        b"[]",
        b'{"format": 1}',
        json.dumps(content).encode(),
        sound.replace(b'"format": 1', b'"format": 0'),
    ):
        file.write_bytes(broken)
        assert cached(file) is None
    assert cached(tmp_path / "none.json") is None


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    # On a machine that others use, no timing can be promised: what is tested is that the parts fit.
    monkeypatch.setattr(latency, "SPREAD", 1e3)
    monkeypatch.setattr(latency_search, "LEAST", 0.5)
    model, example = ThreeConvolutions().eval(), torch.randn(2, 3, 32, 32)
    model(example)
    graph = capture(model, example)
    small = prune(graph, speedup=2.0, threads=1)
    facts = small.meta["history"][-1]["facts"]
    found = facts["latency"]
    assert small(example).shape == (2, 10)
    assert facts["asked"] == {"speedup": 2.0}
    assert count_macs(small) < 0.8 * count_macs(graph)
    runtime = OnnxRuntime(threads=1)
    files = {
        name: runtime.open(runtime.export(one, tmp_path / f"{name}.onnx"))
        for name, one in (("whole", graph), ("small", small))
    }
    # Measured anew, in turns, so not the round that was picked for its figure: half of the time was asked for.
    assert latency.latency(files, example[:1], repeats=100)["small"]["speedup"]["whole"]["median"] > 1.3
    assert not found["table"]["from_cache"]
    assert 1 <= len(found["rounds"]) <= latency_search.ROUNDS + latency_search.SPARE
    assert all(after % 8 == 0 or after == before for before, after in facts["channels"].values())
    assert facts["self_check"]["nodes"] > 0
    json.dumps(small.meta["history"])
    assert len(list((tmp_path / "latency").glob("*.json"))) == 1
    with pytest.raises(InputError, match=r"speedup=900 is out of reach on onnxruntime .* as fast"):
        prune(graph, speedup=900, threads=1)


@pytest.mark.parametrize("speedup", [1, 0.5, float("nan"), True, "2"])
def test_refuses_what_is_no_speedup(speedup: object) -> None:
    with pytest.raises(InputError, match="is not a ratio above 1"):
        prune(capture(nn.Linear(4, 4), torch.randn(2, 4)), speedup=speedup)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Mute:
    """A runtime that does not tell the time of its kernels."""

    threads: int = 0
    suffix: ClassVar[str] = ".none"
    package: ClassVar[str] = "none"
    capabilities: ClassVar[Capabilities] = Capabilities()

    def export(self, graph: fx.GraphModule, path: Path) -> Path:
        return path


def test_refuses_a_runtime_that_tells_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    model = ThreeConvolutions().eval()
    model(torch.randn(2, 3, 32, 32))
    with pytest.raises(InputError, match=r"test_latency_search:Mute: can't tell the time of each of its kernels"):
        prune(model, inputs=torch.randn(2, 3, 32, 32), speedup=2.0, runtime=Mute())  # type: ignore[arg-type]


def test_the_best_round_is_the_nearest_of_those_fast_enough_and_calm() -> None:
    def one(median: float, spread: float = 1.1) -> latency_search.Round:
        return latency_search.Round(
            np.zeros(1), 2.0, {"median": median, "low": median, "high": spread * median}, {}, 0.0
        )

    rounds = [one(2.6), one(1.8), one(2.4), one(2.04, latency.SPREAD + 1)]
    assert latency_search._best(rounds, 2.0) is rounds[2]
    assert latency_search._best(rounds[1:2], 2.0) is rounds[1]
