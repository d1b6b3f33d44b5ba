"""Intervals: each end solves its equation, and covers the truth as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.tasks.intervals import paired_drop, wilson


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation(case: tuple[int, int]) -> None:
    successes, samples = case
    share, (low, high) = successes / samples, wilson(successes, samples)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):  # each end is the p at which the observation is z standard deviations away
        if 0 < bound < 1:
            assert abs(share - bound) == pytest.approx(
                1.959963984540054 * math.sqrt(bound * (1 - bound) / samples), abs=1e-9
            )


def test_wilson_known_values() -> None:
    # Newcombe, Stat. Med. 17 (1998) 857, table I: 81/263 and 0/20
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
def test_paired_interval_holds_the_estimate_and_mirrors(case: tuple[int, int, int]) -> None:
    samples, lost, gained = case
    if lost + gained > samples:
        lost, gained = lost // 2, gained // 2
    value, (low, high) = paired_drop(lost, gained, samples)
    assert -1 <= low <= value <= high <= 1 and low < high
    mirrored = paired_drop(gained, lost, samples)
    assert mirrored[0] == -value and mirrored[1] == pytest.approx((-high, -low))


def test_paired_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    for p_lost, p_gained in ((0.03, 0.02), (0.10, 0.04), (0.01, 0.01)):
        counts = draw.multinomial(300, [p_lost, p_gained, 1 - p_lost - p_gained], 2000)
        intervals = [paired_drop(int(lost), int(gained), 300)[1] for lost, gained, _ in counts]
        covered = np.mean([low <= p_lost - p_gained <= high for low, high in intervals])
        assert covered > 0.93  # 0.95 less four standard deviations of 2000 draws
    low, high = paired_drop(0, 0, 1000)[1]
    assert low < 0 < high < 3.7 / 1000 + 1e-9  # no narrower than needed by the rule of three would say, and finite
