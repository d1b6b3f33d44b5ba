"""Batches shrink before memory does: what a graph holds by hand, and judging in parts that changes no answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.evaluation import evaluate as evaluate_
from rarefy.graph.capture import capture
from rarefy.graph.shapes import activation_bytes
from rarefy.system.memory import HELD, available, samples_at_once
from rarefy.tasks.classification import Classification


def net() -> nn.Module:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), *head)


def test_what_a_graph_holds_by_hand() -> None:
    held, kept = activation_bytes(capture(net().eval(), torch.zeros(2, 1, 10, 10)))
    image, features = 4 * 100, 4 * 400
    assert held == 2 * features  # the convolution's and what relu makes of it, of which the first goes then
    assert image + 2 * features < kept <= image + 2 * features + 4 * (4 + 4 + 3)


def test_at_least_one_and_no_more_than_fits() -> None:
    assert samples_at_once(1 << 20, 10 << 20) == 10 and samples_at_once(3 << 20, 10 << 20) == 3
    assert samples_at_once(HELD * 5) == 1 and samples_at_once(0) == HELD
    free = available()
    assert free is None or free > 0


def test_judging_in_parts_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    task = Classification(val=(random.integers(0, 256, (50, 10, 10), dtype=np.uint8), np.arange(50) % 3))
    graph = capture(net().eval(), torch.zeros(2, 1, 10, 10))
    seen: list[int] = []

    def counted(model: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        seen.append(len(inputs[0]))

    handle = graph.register_forward_pre_hook(counted)
    whole = evaluate_.evaluate(graph, task, progress=False)
    assert seen == [50]
    seen.clear()
    monkeypatch.setattr(evaluate_, "samples_at_once", lambda bytes_each: 7)
    parts = evaluate_.evaluate(graph, task, progress=False)
    handle.remove()
    assert seen == [7] * 7 + [1]
    assert (parts.value, parts.samples) == (whole.value, whole.samples)
