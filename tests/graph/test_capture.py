"""What a captured graph computes is what the module does, also where it changes tensors in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import BehindLayer
from torch import Tensor, nn

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


@pytest.mark.parametrize("step", [changed_and_read, written_to_a_slice_of_a_slice, copied_into, torch.relu_])
def test_a_change_in_place_is_a_value_of_its_own(step: Callable[[Tensor], Tensor]) -> None:
    model = BehindLayer(step)
    graph = capture(model, torch.randn(2, 4))
    x = torch.randn(5, 4)
    assert torch.equal(graph(x), model(x))
    changing = [node for node in graph.graph.nodes if node.op == "call_function" and "_." in str(node.target)]
    assert not changing


def test_a_change_through_a_view_that_can_not_be_written_back_names_the_layer() -> None:
    def step(x: Tensor) -> Tensor:
        y = x + 1
        y.view(-1, 2, 2).mul_(2)
        return y

    with pytest.raises(CaptureError, match="mul_.* changes a tensor through aten.view.default, and it is read later"):
        capture(BehindLayer(step), torch.randn(2, 4))


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
