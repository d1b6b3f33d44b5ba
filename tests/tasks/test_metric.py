"""Metrics: how they are written, and what a classifier's can't read. Top-1 itself is tested with evaluate."""

from __future__ import annotations

import pytest
import torch

from rarefy.errors import DataError
from rarefy.tasks.metric import Difference, OutputError, shown, shown_change, worth
from rarefy.tasks.metrics.accuracy import Accuracy, calibration_error


def test_shares_are_shown_in_percent_and_the_rest_in_its_unit() -> None:
    assert (shown(0.91734, "%"), shown(1.23456, "years"), shown(12.0, "")) == ("91.73%", "1.235 years", "12")
    assert (shown_change(0.0085, "%"), shown_change(-0.5, "px")) == ("0.85 points", "-0.5 px")
    assert worth(0.3, "higher") > worth(0.2, "higher") and worth(0.3, "lower") < worth(0.2, "lower")


def test_a_difference_tells_what_it_counts() -> None:
    counted = Difference(0.1, (0.0, 0.2), 3, 1, 0.9, {"worst_class": None})
    assert counted.to_json() == {"value": 0.1, "interval": [0.0, 0.2], "lost": 3, "gained": 1, "worst_class": None}
    assert Difference(0.1, (0.0, 0.2)).to_json() == {"value": 0.1, "interval": [0.0, 0.2]}


def test_the_number_of_classes_is_the_task_s_or_that_of_all_labels() -> None:
    """What outputs are compared with: the user's word, else the names, else the labels if all were seen."""
    outputs = torch.eye(4).repeat(25, 1)[:, :4]
    for options, whole, expected in (
        ({"classes": 10}, False, "10 classes"),
        ({"names": ("a", "b", "c")}, True, "3 classes"),
        ({}, True, None),
        ({}, False, None),
    ):
        metric = Accuracy(**options)
        metric.add(outputs, torch.arange(100) % 4)
        assert [expected in warning for warning in metric.warnings(whole)] == ([True] if expected else [])


def test_outputs_that_are_no_logits_are_refused() -> None:
    for outputs, message in (
        (torch.zeros(3), "returns shape"),
        ((1, 2), "returns a tuple"),
        (torch.zeros(2, 4), "shape"),
    ):
        with pytest.raises(OutputError, match=message):
            Accuracy().add(outputs, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match="label 5 needs"):
        Accuracy().add(torch.zeros(3, 4), torch.tensor([0, 5, 1]))


def test_calibration_error_is_the_sum_over_bins() -> None:
    confidence = torch.rand(500, generator=torch.Generator().manual_seed(0))
    right = torch.rand(500, generator=torch.Generator().manual_seed(1)) < confidence**2
    expected = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            expected += float(
                inside.double().mean() * (right[inside].double().mean() - confidence[inside].double().mean()).abs()
            )
    assert calibration_error(confidence, right) == pytest.approx(expected, abs=1e-6)
    assert calibration_error(torch.ones(10), torch.ones(10, dtype=torch.bool)) == 0
    assert calibration_error(torch.ones(10), torch.zeros(10, dtype=torch.bool)) == 1
