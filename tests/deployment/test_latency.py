"""latency(): models take turns, disturbed rounds count for none.

The clock is one that the test turns, so no machine is too slow for it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.deployment import latency
from rarefy.deployment.runtime import Capabilities
from rarefy.errors import InputError


class Clock:
    """The time, as the models below let it pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def model(self, name: str, *seconds: float) -> latency.Call:
        """Takes so many seconds, each of them in turn, and tells when it was called."""
        calls = 0

        def call(inputs: Tensor) -> Tensor:
            nonlocal calls
            self.log.append(name)
            self.now += seconds[calls % len(seconds)]
            calls += 1
            return inputs

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


X = torch.zeros(1)


def test_models_take_turns_and_the_order_rotates(clock: Clock) -> None:
    found = latency.latency({name: clock.model(name, 0.0025) for name in "abc"}, X, repeats=3, warmup=1)
    assert clock.log[-9:] == list("abcbcacab")  # one run a sample, since a run takes longer than a sample must
    assert found["a"]["repeats"] == 3


def test_a_disturbed_round_counts_for_no_model(clock: Clock) -> None:
    """Every third run of one model takes ten times as long; those rounds are left out, and the ratio does not know."""
    models = {"a": clock.model("a", 0.01, 0.01, 0.1), "b": clock.model("b", 0.01)}
    found = latency.latency(models, X, repeats=30)
    assert found["a"]["repeats"] == 20
    assert found["a"]["ms"] == pytest.approx({"median": 10.0, "low": 10.0, "high": 10.0})
    assert found["b"]["speedup"]["a"] == pytest.approx({"median": 1.0, "low": 1.0, "high": 1.0})


def paces(calm: int, rounds: int) -> list[float]:
    """Seconds of one call in each of so many rounds, every one longer than the last but for the calm ones."""
    return [0.01] * calm + [0.02 + 0.01 * step for step in range(rounds - calm)]


WARM = [0.01] * 11  # what latency() runs before anything counts, with warmup=1


def test_too_few_trusted_rounds_are_measured_once_more(clock: Clock) -> None:
    """12 of 60 rounds are calm, then 50 of 60: the second time counts, and nothing is to be said."""
    call = clock.model("a", *WARM, *paces(12, 60), *paces(50, 60))
    found = latency.latency({"a": call}, X, repeats=60, warmup=1)["a"]
    assert (found["repeats"], found["rounds"], found["disturbed"]) == (50, 60, False)
    assert len(clock.log) == 11 + 120


def test_a_measurement_that_is_disturbed_twice_says_so(clock: Clock) -> None:
    """The better of the two is told, with its rounds; a third is no share that needs an excuse."""
    call = clock.model("a", *WARM, *paces(15, 60), *paces(12, 60))
    found = latency.latency({"a": call}, X, repeats=60, warmup=1)["a"]
    assert (found["repeats"], found["rounds"], found["disturbed"]) == (15, 60, True)
    assert found["ms"]["median"] == pytest.approx(10)
    told = latency.doubt(_run_time(found))
    assert "only 15 of 60 rounds could be trusted" in told and "measure again on a quiet machine" in told
    clock.log.clear()
    calm = latency.latency({"a": clock.model("a", *WARM, *paces(20, 60))}, X, repeats=60, warmup=1)["a"]
    assert (calm["repeats"], calm["disturbed"]) == (20, False) and len(clock.log) == 11 + 60
    assert latency.doubt(_run_time(calm)) == ""


def _run_time(found: latency.Latency) -> latency.RunTime:
    counts: Any = {name: value for name, value in found.items() if name not in ("ms", "speedup")}
    return {**found["ms"], "batch": 1, "threads": 1, "runtime": "x", **counts}


def test_ratios_are_apart_where_neither_interval_explains_it() -> None:
    def ratio(low: float, median: float, high: float) -> latency.Quartiles:
        return {"low": low, "median": median, "high": high}

    assert latency.are_apart(ratio(1.45, 1.5, 1.55), ratio(1.2, 1.25, 1.3))
    assert not latency.are_apart(ratio(1.45, 1.5, 1.55), ratio(1.35, 1.4, 1.45))  # 0.1 wide, 0.1 apart
    assert not latency.are_apart(ratio(1.45, 1.5, 1.55), ratio(0.8, 1.2, 1.4))


def test_speedup_is_of_pairs(clock: Clock) -> None:
    """A machine that slows down from round to round changes the times, and no ratio."""
    drift = [1 + step / 100 for step in range(12)]
    slow, fast = ([factor * second for factor in drift] for second in (0.006, 0.002))
    found = latency.latency({"slow": clock.model("s", *slow), "fast": clock.model("f", *fast)}, X, repeats=12, warmup=2)
    assert found["slow"]["speedup"]["slow"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    ratio = found["fast"]["speedup"]["slow"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"] and ratio == pytest.approx(dict.fromkeys(ratio, 3.0))
    assert found["fast"]["ms"]["low"] < found["fast"]["ms"]["high"]


def test_a_sample_is_long_enough(clock: Clock) -> None:
    latency.latency({"a": clock.model("a", 1.01e-4)}, X, repeats=2, warmup=1)
    assert len(clock.log) == 1 + 10 + 2 * 20  # the warm-up, what estimates, and 2 ms of runs of 0.1 ms in each sample


@pytest.mark.parametrize("seconds", [1e-6, 0.02, 1.0])
def test_repeats_are_chosen_within_bounds(clock: Clock, seconds: float) -> None:
    found = latency.latency({"a": clock.model("a", seconds)}, X)
    assert found["a"]["repeats"] == min(
        latency.ROUNDS[1], max(latency.ROUNDS[0], round(latency.SECONDS / max(seconds, 0.002)))
    )


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_bad_counts(repeats: int, warmup: int) -> None:
    with pytest.raises(InputError, match="at least"):
        latency.latency({"a": torch.relu}, X, repeats=repeats, warmup=warmup)


def test_threads_are_stated() -> None:
    assert latency.with_threads("onnxruntime").threads == 1
    assert latency.with_threads("onnxruntime:threads=3").threads == 3
    assert latency.with_threads("onnxruntime:threads=3", 2).threads == 2
    with pytest.raises(InputError, match="threads=0"):
        latency.with_threads("onnxruntime", 0)


def test_a_ratio_is_trusted_where_its_quartiles_lie_near_and_a_gain_where_it_is_more_than_noise() -> None:
    def ratio(low: float, median: float, high: float) -> latency.Quartiles:
        return {"low": low, "median": median, "high": high}

    assert latency.is_calm(ratio(1.0, 1.2, 1.3)) and not latency.is_calm(ratio(1.0, 1.2, 1.31))
    assert latency.is_faster(ratio(1.001, 1.02, 1.1))
    assert not latency.is_faster(ratio(1.001, 1.005, 1.1)) and not latency.is_faster(ratio(0.99, 1.02, 1.1))


def test_the_first_runs_of_a_profile_and_the_disturbed_ones_count_for_nothing(clock: Clock) -> None:
    call = clock.model("a", 0.1)
    runs = latency.repeated(lambda: call(X), seconds=2.0)
    assert len(runs) == 20 and len(latency.repeated(lambda: call(X), seconds=0.0)) == latency.RUNS[0]
    quiet, disturbed = [1.0, 3.0], [9.0, 90.0]
    assert latency.quiet_medians([disturbed] * 3 + [quiet, disturbed] * 6) == quiet
    assert latency.quiet_medians([quiet] * 3 + [quiet, disturbed] * 3) == [5.0, 46.5]  # five runs count in any case


def test_a_runtime_without_threads_is_left_as_it_is() -> None:
    alone: Any = SimpleNamespace(threads=0, capabilities=Capabilities(has_threads=False))
    assert latency.with_threads(alone, 4) is alone
    assert latency.with_threads("onnxruntime", 4).threads == 4 and latency.with_threads("onnxruntime").threads == 1
    with pytest.raises(InputError, match="give at least 1"):
        latency.with_threads("onnxruntime", 0)
