"""Channels leave through every operator between two convolutions, or stay with a reason that is true."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from coupled import classes, coupled, cut_half
from networks import Between
from torch import Tensor, nn

IMAGE = torch.randn(2, 3, 8, 8)
Case = Callable[[nn.Module, Tensor], Tensor]


def looked_up(m: nn.Module, x: Tensor) -> Tensor:
    """The four tokens of largest sum, as vision transformers drop the others."""
    tokens = x.flatten(2).transpose(1, 2)
    best = tokens.sum(-1).topk(4, 1)[1]
    return tokens.gather(1, best[..., None].expand(-1, -1, 12)).transpose(1, 2).unsqueeze(-1)


def unpooled(m: nn.Module, x: Tensor) -> Tensor:
    values, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(values, places, 2)


def gate(largest: Callable[[Tensor], Tensor]) -> Case:
    """CBAM's gate: a map of one channel, made of all."""
    return lambda m, x: x * torch.sigmoid(m.map(largest(x)))


# Each leaves the 12 channels to come and go.
FREE: dict[str, Case] = {
    "amax": gate(lambda x: x.amax(1, keepdim=True)),
    "max": gate(lambda x: x.max(1, keepdim=True)[0]),
    "min": gate(lambda x: x.min(1, keepdim=True)[0]),
    "values": gate(lambda x: torch.max(x, dim=1).values.unsqueeze(1)),
    "median": gate(lambda x: x.median(1, keepdim=True)[0]),
    "mode": gate(lambda x: x.mode(1, keepdim=True)[0]),
    "aminmax": gate(lambda x: torch.aminmax(x, dim=1, keepdim=True).max),
    "quantile": gate(lambda x: x.quantile(0.5, dim=1, keepdim=True)),
    "nansum": gate(lambda x: x.nansum(1, keepdim=True)),
    "cosine": gate(lambda x: F.cosine_similarity(x, x.flip(3), dim=1).unsqueeze(1)),
    "mean and max": lambda m, x: x * torch.sigmoid(m.map(x.mean(1, keepdim=True) + x.max(1, keepdim=True)[0])),
    "two tensors": lambda m, x: torch.max(x, x.flip(2)) + torch.min(x, x.flip(3)),
    "max over places": lambda m, x: x.flatten(2).max(-1)[0][..., None, None],
    "max twice": lambda m, x: x.max(-1, keepdim=True).values.max(-2, keepdim=True).values,
    "place in the plane": lambda m, x: x * x.flatten(2).argmax(-1)[..., None, None].float().sin(),
    "its place too": lambda m, x: sum(x.flatten(2).max(-1))[..., None, None],  # type: ignore[arg-type,return-value]
    "adaptive max": lambda m, x: F.adaptive_max_pool2d(x, 3),
    "topk": lambda m, x: x.flatten(2).topk(4, -1)[0].unsqueeze(-1),
    "sort": lambda m, x: x.flatten(2).sort(-1, descending=True)[0].unsqueeze(-1),
    "argsort and gather": lambda m, x: x.flatten(2).gather(2, x.flatten(2).argsort(-1))[..., :4].unsqueeze(-1),
    "along a plane": lambda m, x: x.gather(2, x.argmax(2, keepdim=True)).expand_as(x),
    "kth value": lambda m, x: x.flatten(2).kthvalue(3, -1)[0][..., None, None],
    "cumsum": lambda m, x: x.cumsum(-1) + x.cumprod(-2),
    "cummax": lambda m, x: x.cummax(-1)[0] + x.cummin(-2)[0] + x.logcumsumexp(3),
    "differences": lambda m, x: x.diff(dim=-1),
    "tokens": looked_up,
    "unpooled": unpooled,
    "windows": lambda m, x: x.unfold(2, 4, 2).unfold(3, 4, 2).mean((-1, -2)),
    "transposed in groups of one": lambda m, x: m.up(x),
}


@pytest.mark.parametrize("case", FREE.values(), ids=FREE)
def test_channels_leave_through_it(case: Case) -> None:
    found = coupled(Between(case), IMAGE)
    own = classes(found, "one.weight", 0)
    assert len(set(own)) == 12 and 0 not in own and not found.unknown
    small, alive = cut_half(found)
    assert len(small.one.weight) == int(alive[own].sum()) < 12


# Each holds them, for that reason.
HELD: dict[str, tuple[Case, str]] = {
    "argmax": (lambda m, x: x * x.argmax(1, keepdim=True).sin(), "a place along it is looked up (argmax"),
    "place of max": (lambda m, x: x * x.max(1, keepdim=True)[1].sin(), "a place along it is looked up (max"),
    "kth channel": (lambda m, x: x * x.kthvalue(3, 1, keepdim=True)[0], "kthvalue runs over it"),
    "sorted channels": (lambda m, x: x.sort(1)[0], "sort runs over it"),
    "best channels": (lambda m, x: torch.cat([x.topk(6, 1)[0]] * 2, 1), "topk runs over it"),
    "looked-up channels": (lambda m, x: x.gather(1, x.argsort(1)), "argsort runs over it"),
    "gathered": (lambda m, x: x.gather(1, (x > 0).long()), "places along it are looked up"),
    "fewer": (
        lambda m, x: torch.cat([x.gather(2, (x[:, :6] > 0).long())] * 2, 1),
        "only the first of it are looked up",
    ),
    "windows": (lambda m, x: x.unfold(1, 1, 1).squeeze(-1), "cut into windows along that axis"),
}


@pytest.mark.parametrize(("case", "why"), HELD.values(), ids=HELD)
def test_channels_stay_for_a_reason(case: Case, why: str) -> None:
    found = coupled(Between(case), IMAGE)
    assert set(classes(found, "one.weight", 0)) == {0}
    assert why in found.frozen["one.weight"] and not found.unknown


def test_a_table_is_read_by_indices_that_are_pruned() -> None:
    """The index has the channels' axis, and so does what is looked up; the table's width is free by itself."""

    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.table, self.head = nn.Conv2d(3, 6, 1), nn.Embedding(64, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            places = self.one(x).flatten(2).argmax(-1)
            return self.head(self.table(places).mean(1))

    found = coupled(Looked(), IMAGE)
    assert len(set(classes(found, "one.weight", 0))) == 6
    assert len(set(classes(found, "table.weight", 1))) == 10
    cut_half(found)


def test_each_input_of_a_transposed_depthwise_convolution_leaves_with_all_that_it_makes() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.up = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 8, 2, 2, groups=4)
            self.last = nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.up(self.one(x)))

    found = coupled(Doubled(), IMAGE)
    own = classes(found, "one.weight", 0)
    assert sorted(own) == [1, 2, 3, 4] and own == classes(found, "up.weight", 0)
    doubled = [one for one in own for _ in range(2)]
    assert classes(found, "up.bias", 0) == classes(found, "last.weight", 1) == doubled
    small, _ = cut_half(found)
    assert small.up.weight.shape[:2] == (2, 2)
