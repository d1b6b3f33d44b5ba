"""Calibration by formula: each rule beside a plain loop, or numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rarefy import plugins
from rarefy.errors import CheckFailed, DataError, InputError
from rarefy.graph.capture import capture
from rarefy.quantization import observers
from rarefy.quantization.formats import Grid
from rarefy.quantization.observers import BINS, Histogram, observe

UINT4, INT4 = Grid(4, False, False), Grid(4, axis=0)


def histogram_of(*batches: Tensor) -> Histogram:
    histogram = Histogram.of(batches[0])
    for batch in batches[1:]:
        histogram.add(batch)
    return histogram


def skewed(count: int, seed: int = 0) -> Tensor:
    """More above zero than below, with a tail."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return x.abs().pow(1.5) - 0.4 * x.sign().clamp_max(0).abs()


def peaked(count: int) -> Tensor:
    """Around 1, but for one number on either side."""
    x = 1 + 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(count))
    return torch.cat([x, torch.tensor([3.0, -0.2])])


def test_a_histogram_grows_to_either_side_and_loses_no_value() -> None:
    """Its range doubles, neighbouring bins are merged, and each value stays in the bin that holds it."""
    first = torch.tensor([0.0, 0.25, 0.5, 1.0])
    histogram = Histogram.of(first)
    assert (histogram.lo, histogram.hi, histogram.minimum, histogram.maximum) == (0, 1, 0, 1)
    for batch, ends in (([1.5], (0.0, 2.0)), ([-0.5], (-2.0, 2.0)), ([-5.0], (-6.0, 2.0)), ([9.0], (-6.0, 10.0))):
        histogram.add(torch.tensor(batch))
        assert (histogram.lo, histogram.hi) == ends
    assert (histogram.minimum, histogram.maximum) == (-5, 9)
    assert histogram.extremes == [(0, 1), (1.5, 1.5), (-0.5, -0.5), (-5, -5), (9, 9)]
    values = torch.cat([first, torch.tensor([1.5, -0.5, -5.0, 9.0])]).double()
    width = 16 / BINS
    found = torch.repeat_interleave(histogram.centers, histogram.counts.long())
    assert histogram.counts.sum() == 8 and bool(((found - values.sort().values).abs() <= width).all())
    assert torch.equal(histogram.centers, torch.arange(-6 + width / 2, 10, width, dtype=torch.double))


def test_of_a_large_batch_values_are_counted_evenly() -> None:
    """With a step that has no factor in common with the size: no channel is preferred, whatever the layout."""
    count = observers.COUNTED
    assert count == 2**18 and len(observers._spread(torch.zeros(count))) == count
    x = torch.arange(3 * count) % 3
    taken = observers._spread(x)
    assert len(taken) <= count and torch.bincount(taken).min() > 0.33 * len(taken)


def test_what_layers_read_is_averaged_over_every_other_batch() -> None:
    layer = torch.nn.Linear(2, 3)
    graph = capture(layer, torch.zeros(2, 2))
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    given = next(one for one in graph.graph.nodes if one.op == "placeholder")
    batches = [(torch.full((2, 2), float(value)),) for value in (1, 2, 5, 8)]
    found = observe(graph, [given], batches, [node], keep=lambda samples: samples <= 4)
    assert [half.value(1).flatten().tolist() for half in found.read[node]] == [[3.0, 3.0], [5.0, 5.0]]
    assert (found.histograms[given].minimum, found.histograms[given].maximum) == (1, 8)
    assert [float(batch[0][0, 0]) for batch in found.batches] == [1.0, 2.0]
    for bad in (math.inf, -math.inf, math.nan):
        with pytest.raises(CheckFailed, match="yields NaN or infinity"):
            observe(graph, [given], [(torch.tensor([[1.0, bad]]),)])
    with pytest.raises(DataError, match="no calibration images"):
        observe(graph, [given], [])


def test_minmax_is_the_extremes() -> None:
    rule = plugins.resolve("calibration", "minmax")
    assert rule.activation_range(histogram_of(torch.tensor([-1.5, 2.0]), torch.tensor([0.0, 7.0])), UINT4) == (-1.5, 7)
    assert rule.weight_scale(torch.tensor([[1.0, -14.0], [3.5, 0.0]]), INT4).tolist() == [2.0, 0.5]


def test_moving_average_of_three_batches() -> None:
    """lo: -1, then -1 + 0.1 (-3 + 1), then -1.2 + 0.1 (-0.2 + 1.2); hi: 2, then 2 + 0.1 (1 - 2), then 1.9 + 0.1 (11.9 -
    1.9)."""
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([-0.2, 11.9])]
    rule = plugins.resolve("calibration", "moving_average")
    assert rule.activation_range(histogram_of(*batches), UINT4) == pytest.approx((-1.1, 2.9))
    latest = plugins.resolve("calibration", "moving_average:momentum=0")
    assert latest.activation_range(histogram_of(*batches), UINT4) == pytest.approx((-0.2, 11.9))
    assert rule.weight_scale(torch.tensor([[1.0, -14.0]]), INT4).tolist() == [2.0]


@pytest.mark.parametrize(
    ("first", "lo", "hi"),
    [
        (0, 0, 9900),  # nothing is negative: all of the share lies above
        (-9999, -9950, 0),  # nothing is positive: half of it below, and none above
        (-5000, -4950, 4950),  # half at either end
    ],
)
def test_percentile_of_ten_thousand_numbers(first: int, lo: float, hi: float) -> None:
    x = torch.arange(first, first + 10_000).float()[torch.randperm(10_000, generator=torch.Generator().manual_seed(0))]
    rule = plugins.resolve("calibration", "percentile:percent=99")
    assert rule.activation_range(histogram_of(x), UINT4) == pytest.approx((lo, hi), abs=10_000 / BINS)
    rows = torch.stack([x, x / 2])
    wanted = torch.quantile(rows.abs(), 0.99, dim=1) / 7
    assert torch.equal(rule.weight_scale(rows, INT4), wanted) and wanted[0] < rows[0].abs().max() / 7


def squared_error(histogram: Histogram, lo: float, hi: float, grid: Grid) -> float:
    """Sum over the bins of count times the square of what quantizing their centre loses."""
    scale = (hi - lo) / grid.levels
    zero = round(grid.qmin - lo / scale)
    total = 0.0
    for x, count in zip(histogram.centers.tolist(), histogram.counts.tolist(), strict=True):
        code = min(max(round(x / scale) + zero, grid.qmin), grid.qmax)
        total += count * ((code - zero) * scale - x) ** 2
    return total


def test_mse_searches_either_end_in_turn_twice() -> None:
    histogram, steps, smallest = histogram_of(skewed(3000)), 12, 0.3
    shares = torch.linspace(smallest, 1.0, steps, dtype=torch.double).tolist()
    lo, hi = histogram.minimum, histogram.maximum
    assert lo < 0 < hi
    for _ in range(2):
        hi = min(
            (share * histogram.maximum for share in shares), key=lambda end: squared_error(histogram, lo, end, UINT4)
        )
        lo = min(
            (share * histogram.minimum for share in shares), key=lambda end: squared_error(histogram, end, hi, UINT4)
        )
    assert hi < histogram.maximum
    rule = plugins.resolve("calibration", f"mse:steps={steps},smallest={smallest}")
    assert rule.activation_range(histogram, UINT4) == pytest.approx((lo, hi), rel=1e-12)


def test_mse_of_weights_is_the_least_error_of_each_row() -> None:
    rows, steps = torch.stack([skewed(200, seed) for seed in range(4)]), 15
    found = plugins.resolve("calibration", f"mse:steps={steps}").weight_scale(rows, INT4)
    for row, scale in zip(rows, found, strict=True):
        tried = [float(row.abs().max()) / 7 * share for share in torch.linspace(1, 0.3 * 7 / 8, steps).tolist()]
        errors = [float(((row / one).round().clamp(-8, 7) * one - row).square().sum()) for one in tried]
        assert float(scale) == pytest.approx(tried[errors.index(min(errors))], rel=1e-6)
        assert min(errors) < errors[0]


def divergence(counts: list[float], codes: list[int], inside: list[bool]) -> float:
    """KL(P || Q) as the file's docstring words it; infinite where nothing is inside."""
    places = [place for place, one in enumerate(inside) if one]
    if not places:
        return math.inf
    p, q = [0.0] * len(counts), [0.0] * len(counts)
    for place, count in enumerate(counts):
        p[min(max(place, places[0]), places[-1])] += count
    for code in set(codes):
        shared = [place for place in places if codes[place] == code and counts[place] > 0]
        for place in shared:
            q[place] = sum(counts[one] for one in shared) / len(shared)
    terms = zip((one / sum(p) for one in p), (one / max(sum(q), 1e-30) for one in q), strict=True)
    return sum(one * math.log(one / max(other, 1e-12)) for one, other in terms if one > 0)


def test_entropy_takes_the_share_of_least_divergence() -> None:
    histogram, steps = histogram_of(peaked(3000)), 8
    counts, centers = histogram.counts.tolist(), histogram.centers.tolist()
    shares, lost = torch.linspace(1.0, 0.3, steps).tolist(), []
    for share in shares:
        lo, hi = share * histogram.minimum, share * histogram.maximum
        codes = torch.round((histogram.centers.clamp(lo, hi) - lo) / ((hi - lo) / 15)).int().tolist()
        lost.append(divergence(counts, codes, [lo <= x <= hi for x in centers]))
    best = shares[lost.index(min(lost))]
    assert best < 1
    found = plugins.resolve("calibration", f"entropy:steps={steps}").activation_range(histogram, UINT4)
    assert found == pytest.approx((best * histogram.minimum, best * histogram.maximum))


def test_entropy_of_weights_takes_the_share_of_least_divergence_of_each_row() -> None:
    rows, steps, bins = torch.stack([peaked(400 + 300 * seed)[-400:] * (seed + 1) for seed in range(3)]), 8, 512
    found = plugins.resolve("calibration", f"entropy:steps={steps}").weight_scale(rows, INT4)
    shares = torch.linspace(1.0, 0.3, steps).tolist()
    centers = (torch.arange(bins) + 0.5) / bins
    for row, scale in zip(rows, found, strict=True):
        sizes = row.abs() / row.abs().max()
        counts = torch.bincount((sizes * bins).long().clamp_max(bins - 1), minlength=bins).double().tolist()
        lost = [
            divergence(
                counts, torch.round(centers.clamp_max(share) / share * 7).int().tolist(), (centers <= share).tolist()
            )
            for share in shares
        ]
        best = shares[lost.index(min(lost))]
        assert best < 1 and float(scale) == pytest.approx(float(row.abs().max()) * best / 7, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("entropy:steps=1", "entropy: steps=1 must be at least 2"),
        ("entropy:smallest=0", "entropy: .*smallest=0.0 between 0 and 1"),
        ("entropy:smallest=1", "entropy: .*smallest=1.0 between 0 and 1"),
        ("mse:steps=1", "mse: steps=1 must be at least 2"),
        ("mse:smallest=0", "mse: .*smallest=0.0 between 0 and 1"),
        ("mse:smallest=1", "mse: .*smallest=1.0 between 0 and 1"),
        ("moving_average:momentum=1", "moving_average: momentum=1.0 must lie in 0 to 1, 1 excluded"),
        ("moving_average:momentum=-0.1", "moving_average: momentum=-0.1 must lie in 0 to 1"),
        ("percentile:percent=50", "percentile: percent=50.0 must lie above 50 and up to 100"),
        ("percentile:percent=100.5", "percentile: percent=100.5 must lie above 50 and up to 100"),
    ],
)
def test_options_out_of_range_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        plugins.resolve("calibration", text)


@pytest.mark.parametrize(
    "text",
    [
        "entropy:steps=2",
        "mse:steps=2",
        "moving_average:momentum=0",
        "percentile:percent=100",
        "percentile:percent=50.1",
    ],
)
def test_options_at_the_end_of_their_range_are_taken(text: str) -> None:
    assert plugins.describe(plugins.resolve("calibration", text)).startswith(text.partition(":")[0])


DEFAULTS: dict[str, dict[str, object]] = {
    "minmax": {},
    "mse": {"steps": 100, "smallest": 0.3},
    "entropy": {"steps": 100, "smallest": 0.3},
    "moving_average": {"momentum": 0.9},
    "percentile": {"percent": 99.99},
    "sensitivity": {},
}


def test_defaults() -> None:
    names = plugins.available("calibration")
    assert {name: dataclasses.asdict(plugins.resolve("calibration", name)) for name in names} == DEFAULTS
