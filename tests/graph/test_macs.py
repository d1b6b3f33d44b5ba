"""MACs by hand."""

from __future__ import annotations

import math

import pytest
import torch
from networks import Stepwise
from torch import nn
from torch.nn import functional as F

from rarefy.graph.capture import capture
from rarefy.graph.macs import count_macs, count_parameters, einsum_letters


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Conv2d(6, 8, (3, 5), stride=2, groups=2), (6, 9, 13), 8 * 4 * 5 * (3 * 3 * 5)),
        (nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2), (6, 4, 5), 6 * 4 * 5 * (4 * 3 * 3)),
        (nn.Conv1d(4, 6, 3), (4, 10), 6 * 8 * (4 * 3)),
        (nn.Linear(5, 3), (7, 5), 7 * 3 * 5),
        (Stepwise(lambda x: x @ x.mT), (4, 5), 4 * 4 * 5),
        (Stepwise(lambda x: torch.einsum("bij,jk->bik", x, torch.ones(5, 7))), (4, 5), 4 * 5 * 7),
        # "..." is a batch axis on the left only, and two axes of it
        (Stepwise(lambda x: torch.einsum("...ij,jk->...ik", x, torch.ones(5, 7))), (2, 3, 4, 5), 2 * 3 * 4 * 5 * 7),
        (Stepwise(lambda x: torch.einsum("bi,bi->b", x, x)), (4,), 4),
        (
            Stepwise(lambda x: F.scaled_dot_product_attention(x, x[..., :3, :], x[..., :3, :2])),
            (2, 6, 4),
            2 * 6 * 3 * 6,
        ),
        (Stepwise(lambda x: torch.relu(x + 1).mean(1)), (4, 4), 0),
    ],
)  # fmt: skip
def test_the_macs_of_one_sample(model: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    graph = capture(model, torch.randn(2, *shape))
    assert count_macs(graph) == macs
    assert count_parameters(graph) == sum(math.prod(one.shape) for one in model.parameters())


def test_letters_of_axes_under_dots_are_counted_from_their_end() -> None:
    assert einsum_letters("...ij,jk->...ik", [4, 2]) == ([[".2", ".1", "i", "j"], ["j", "k"]], [".2", ".1", "i", "k"])
    assert einsum_letters("ij,...jk", [2, 3]) == ([["i", "j"], [".1", "j", "k"]], [".1", "i", "k"])
