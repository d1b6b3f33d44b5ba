"""k-means of numbers: the values that stand for many, such that the squares of what is lost sum to little.

    minimise  sum over values c of  sum over weights w of its cluster  (w - c)^2

On a line a cluster is an interval of the sorted numbers, so sums of it are differences of running sums, and a round of
Lloyd's algorithm (each number goes to the nearest value, each value to the mean of its numbers) is k binary searches.

Where to start decides where Lloyd's ends. Deep Compression (1510.00149) starts from values at equal distances, since
random numbers miss the few large weights; of a layer with outliers most such values get no weight. So there is a second
start, and the better end is taken: the cluster that loses most is cut at its mean until there are k (Linde, Buzo and
Gray, 1980), which reaches large weights early. Nothing is random. Given up: the best of all clusterings, which dynamic
programming finds in k n steps.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

ROUNDS = 300  # of Lloyd's algorithm, at most


def shared_values(weights: Tensor, count: int) -> Tensor:
    """At most ``count`` different values, rising, that stand for ``weights`` (any shape, finite): float64, (values,).

    Numbers that are no more than ``count`` stand for themselves.
    """
    numbers = weights.detach().reshape(-1).to("cpu", torch.float64).sort().values
    different: Tensor = numbers.unique()
    if len(different) <= count:
        return different
    zero = numbers.new_zeros(1)
    sums, squares = torch.cat((zero, numbers.cumsum(0))), torch.cat((zero, numbers.square().cumsum(0)))
    ends = [
        _settled(numbers, sums, bounds)
        for bounds in (_cut(numbers, sums, squares, count), _equal_distances(numbers, count))
    ]
    # of all clusterings the sum of squares is the same, so the least loss is the most that the means account for
    bounds = max(ends, key=lambda bounds: float((sums[bounds].diff().square() / bounds.diff()).sum()))
    values: Tensor = (sums[bounds].diff() / bounds.diff()).unique()
    return values


def _settled(numbers: Tensor, sums: Tensor, bounds: Tensor) -> Tensor:
    """Where the intervals lie after Lloyd's algorithm, from ``bounds``."""
    for _ in range(ROUNDS):
        means = sums[bounds].diff() / bounds.diff()
        inner = torch.searchsorted(numbers, (means[1:] + means[:-1]) / 2)
        moved = torch.cat((bounds[:1], inner, bounds[-1:])).unique()  # an interval that lost its last number goes
        if torch.equal(moved, bounds):
            break
        bounds = moved
    return bounds


def _equal_distances(numbers: Tensor, count: int) -> Tensor:
    """Intervals of the numbers nearest to values at equal distances, those that are empty left out."""
    steps = torch.arange(1, count, dtype=torch.float64) / count
    inner = torch.searchsorted(numbers, numbers[0] * (1 - steps) + numbers[-1] * steps)
    bounds: Tensor = torch.cat((inner.new_zeros(1), inner, inner.new_tensor([len(numbers)]))).unique()
    return bounds


def nearest(weights: Tensor, values: Tensor) -> Tensor:
    """Which of the rising ``values`` (k,) stands for each weight, int64, in the weights' shape."""
    exact = weights.detach().to("cpu", torch.float64)
    return torch.searchsorted((values[1:] + values[:-1]) / 2, exact.contiguous())


def _cut(numbers: Tensor, sums: Tensor, squares: Tensor, count: int) -> Tensor:
    """(count + 1,): where intervals begin and end, after ``count - 1`` cuts, each of the one that loses most."""

    def loss(begin: int, end: int) -> tuple[float, int, int]:
        total = float(sums[end] - sums[begin])
        return -float(squares[end] - squares[begin]) + total * total / (end - begin), begin, end

    heap, bounds = [loss(0, len(numbers))], {0, len(numbers)}
    while heap and len(bounds) <= count:
        _, begin, end = heapq.heappop(heap)
        part = numbers[begin:end]
        if part[0] == part[-1]:
            continue
        mean = (sums[end] - sums[begin]) / (end - begin)
        place = begin + int(torch.searchsorted(part, mean.clamp(part[0], part[-1]), right=True))
        if place == end:  # by rounding the mean is the largest: that one stands alone
            place = begin + int(torch.searchsorted(part, part[-1]))
        bounds.add(place)
        heapq.heappush(heap, loss(begin, place))
        heapq.heappush(heap, loss(place, end))
    return torch.tensor(sorted(bounds))
