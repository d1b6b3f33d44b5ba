"""Classification: the loss, and whether a model fits the labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import stacked

from rarefy.errors import DataError
from rarefy.tasks.classification import Classification

ZEROS = np.zeros((4, 1, 8, 8), np.uint8)


def test_loss_takes_indices_and_probabilities() -> None:
    task = Classification(train="sklearn:digits")
    outputs, targets = torch.randn(6, 10), torch.arange(6)
    soft = torch.nn.functional.one_hot(targets, 10).float()
    assert torch.allclose(task.loss(outputs, targets), task.loss(outputs, soft))
    smoothed = -(outputs.log_softmax(1) * (0.9 * soft + 0.01)).sum(1).mean()
    assert torch.allclose(task.loss(outputs, targets, label_smoothing=0.1), smoothed)


def test_a_label_without_an_output_is_told_in_training_too() -> None:
    task = Classification(train="sklearn:digits")
    for targets in (torch.tensor([0, 8]), torch.full((2, 10), 0.1)):
        with pytest.raises(DataError, match="needs a model with at least 10 outputs, this one has 5"):
            task.loss(torch.randn(2, 5), targets)


def test_a_model_with_enough_outputs_passes() -> None:
    Classification(val=(ZEROS, np.arange(4))).check(4)


def test_real_cifar(real_data: Path) -> None:
    task = Classification(val="bench.real_data:cifar10")
    assert (task.length("val"), task.classes, task.input_shape) == (10_000, 10, (3, 32, 32))
    assert torch.bincount(stacked(task, batch_size=1000)[1]).tolist() == [1000] * 10
