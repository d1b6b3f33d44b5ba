"""What a captured graph computes is what the module does, also where it changes tensors in place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import BehindLayer
from torch import Tensor, nn

import rarefy
from rarefy.errors import CaptureError
from rarefy.graph.capture import capture
from rarefy.graph.nodes import operator_name


def changed_and_read(x: Tensor) -> Tensor:
    y = x + 1
    z = y.mul_(2)
    return y + z


def written_to_a_slice_of_a_slice(x: Tensor) -> Tensor:
    y = x + 1
    y[:, 1:][:, 0] = x[:, 0]
    return y * x


def copied_into(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.copy_(x[:, :1])
    return y + x


def part_changed_twice(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0].mul_(0.5).add_(1)
    y.sub_(0.5).div_(0.25)
    return y


def part_of_a_part_then_the_part(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    part = y[:, 1:]
    part[:, 1].mul_(3)
    part.add_(1)
    return y, part


def part_returned_then_changed(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    part = y[:, 1:].relu_()
    part[:, 1].mul_(3)
    return y, part


def through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1, 2, 2)[:, 1].mul_(2)
    return y


def through_turned_axes(x: Tensor) -> Tensor:
    y = (x * 2).unflatten(1, (2, 1, 2))
    y.transpose(1, 3)[:, 0].add_(3)
    y.permute(0, 3, 1, 2)[:, 1].mul_(2)
    return y.flatten(1)


def through_a_new_axis(x: Tensor) -> Tensor:
    y = x * 2
    y.unsqueeze(1).add_(x[:, None])
    return y


def at_places(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, ::2] = x[:, 1::2]
    y[:, 1::2] += x[:, ::2]
    y[y < 0] = -1.0
    return y


CHANGES: list[Callable[[Tensor], object]] = [
    changed_and_read, written_to_a_slice_of_a_slice, copied_into, torch.relu_, part_changed_twice,
    part_of_a_part_then_the_part, part_returned_then_changed, through_a_view, through_turned_axes, through_a_new_axis,
    at_places,
]  # fmt: skip


@pytest.mark.parametrize("step", CHANGES)
def test_a_change_in_place_is_a_value_of_its_own(step: Callable[[Tensor], Tensor]) -> None:
    model = BehindLayer(step)
    graph = capture(model, torch.randn(2, 4))
    x = torch.randn(5, 4)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    changing = [node for node in graph.graph.nodes if node.op == "call_function" and "_." in str(node.target)]
    assert not changing


def of_a_copy_or_none(x: Tensor) -> Tensor:
    y = x + 1
    y.reshape(-1, 2, 2).mul_(2)  # a view here, a copy of what lies otherwise in memory
    return y


def part_seen_after_the_whole(x: Tensor) -> Tensor:
    y = x + 1
    part = y[:, 0].mul_(2)
    y.add_(1)
    return part


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (of_a_copy_or_none, "mul_.* changes a tensor through aten.reshape.default, and it is read later"),
        (part_seen_after_the_whole, "add_.* changes a tensor that .* also views, and both are read later"),
    ],
)
def test_a_change_that_can_not_be_followed_is_refused(step: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        capture(BehindLayer(step), torch.randn(2, 4))


def test_a_model_that_writes_to_its_input_is_compared_with_what_it_was_given() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.sub_(0.5))

    model = Centred().eval()
    graph = capture(model, torch.rand(2, 3, 8, 8))
    x = torch.rand(3, 3, 9, 12)
    assert graph.meta["sizes"] == [[None, 1, 1]] and torch.equal(graph(x), model(x.clone()))


class Following(nn.Module):
    """Keeps a running mean of what it sees, of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.seen: Tensor
        self.seen.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
        return y - self.seen[:, None, None]


def test_what_a_graph_leaves_out_is_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = Following().eval()
    with caplog.at_level(logging.WARNING, "rarefy"):
        graph = capture(model, torch.rand(2, 3, 8, 8))
    told = [record.getMessage() for record in caplog.records if record.name == "rarefy"]
    assert any("Following writes to its buffers in forward (seen)" in line for line in told)
    x = torch.rand(3, 3, 8, 8)
    assert torch.allclose(graph(x), copy.deepcopy(model)(x), atol=1e-6)  # its first answer
    assert torch.equal(rarefy.load(rarefy.save(graph, tmp_path / "saved"))(x), graph(x))

    caplog.clear()
    with caplog.at_level(logging.WARNING, "rarefy"):
        capture(BehindLayer(nn.functional.dropout), torch.rand(2, 4, 4))
    told = [record.getMessage() for record in caplog.records if record.name == "rarefy"]
    assert len(told) == 1 and "answers otherwise each time" in told[0]


class Counted(nn.Module):
    """Reads how many there are in several ways."""

    def __init__(self, count: Callable[[Tensor], int]):
        super().__init__()
        self.head, self.count = nn.Linear(4, 3), count

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).reshape(self.count(x), 1, 3).mean(1)


def test_the_length_of_a_tensor_is_free() -> None:
    model = Counted(lambda x: len(x) + 0)
    graph = capture(model, torch.randn(2, 4))
    x = torch.randn(5, 4)
    assert torch.equal(graph(x), model(x)) and "len" not in globals()


@pytest.mark.parametrize("count", [lambda x: int(x.shape[0]), lambda x: sum(1 for _ in range(x.shape[0])), lambda x: 2])
def test_a_batch_that_becomes_a_number_is_refused_with_its_line(count: Callable[[Tensor], int]) -> None:
    with pytest.raises(CaptureError, match=r"number of its batch.*, by int.* write x.shape\[0\] or -1"):
        capture(Counted(count), torch.randn(2, 4))


def test_the_line_where_a_batch_becomes_a_number_is_told() -> None:
    with pytest.raises(CaptureError, match=r"number of its batch at test_capture.py:\d+, by int"):
        capture(Counted(lambda x: int(x.shape[0])), torch.randn(2, 4))


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore")
def test_weight_norm_is_the_weight_that_it_makes(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(wrap(nn.Linear(4, 3)))
    graph = capture(model, torch.randn(2, 4))
    x = torch.randn(5, 4)
    assert torch.allclose(graph(x), model(x), atol=1e-6)
    assert set(dict(graph.named_parameters())) == {"0.weight", "0.bias"}


def test_training_flags_are_left_as_they_were_whatever_is_captured() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), nn.BatchNorm1d(4))
    model.train()
    model[0][1].eval()
    before = [module.training for module in model.modules()]
    for core in (None, "0"):
        graph = capture(model, torch.randn(2, 4), core=core)
        assert [module.training for module in model.modules()] == before
        assert not graph.training and any(operator_name(node) == "dropout" for node in graph.graph.nodes)
    with pytest.raises(CaptureError, match="no such submodule; have 0, 1"):
        capture(model, torch.randn(2, 4), core="gone")
    assert [module.training for module in model.modules()] == before


def test_shared_parameters_stay_one_and_containers_plain() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"pair": (self.b(self.a(x)), [x]), "none": None}

    graph = capture(Tied(), torch.randn(2, 4))
    assert sum(name.endswith("weight") for name, _ in graph.named_parameters(remove_duplicate=False)) == 1
    found = graph(torch.randn(3, 4))
    assert found["none"] is None and isinstance(found["pair"], tuple) and list(map(len, found["pair"][1])) == [3]
