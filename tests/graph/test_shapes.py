"""Shapes told by rule are those the operators yield."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from networks import Creates
from torch import Tensor, nn

from rarefy.graph.capture import capture
from rarefy.graph.interpreter import values
from rarefy.graph.shapes import _SHAPES, _fake_shapes, _meta_shapes, _stepped, output_shapes, remembered, shape_of, walk

aten = torch.ops.aten
t = torch.randn


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (aten.conv1d.default, (t(2, 4, 11), t(6, 2, 3), None, [2], [1], [2], 2)),
        (aten.conv2d.default, (t(2, 3, 9, 12), t(5, 3, 3, 2), t(5), [2, 1], [1, 0], [1, 3])),
        (aten.conv2d.default, (t(1, 3, 8, 8), t(5, 3, 3, 3))),
        (aten.conv2d.default, (t(1, 3, 8, 8), t(5, 3, 3, 3), None, [2], [1])),
        (aten.conv3d.default, (t(1, 2, 7, 8, 9), t(4, 2, 3, 3, 3), None, [1, 2, 2], [1, 1, 1])),
        (aten.linear.default, (t(2, 7, 5), t(4, 5), t(4))),
        (aten.linear.default, (t(5), t(4, 5))),
        (aten.scaled_dot_product_attention.default, (t(2, 3, 5, 8), t(2, 3, 7, 8), t(2, 3, 7, 6))),
        (aten.cat.default, ([t(2, 3, 4), t(2, 1, 4), t(2, 0, 4)], 1)),
        (aten.cat.default, ([t(2, 3), t(1, 3)],)),
        (aten.cat.default, ([t(2, 3), t(2, 1)], -1)),
        (aten.adaptive_avg_pool2d.default, (t(2, 3, 7, 9), [1, 2])),
        (aten.add.Tensor, (t(2, 1, 4), t(3, 1))),
        (aten.mul.Tensor, (t(5), t(2, 1, 1))),
        (aten.sub.Tensor, (t(2, 1, 0), t(2, 3, 1))),
        (aten.upsample_linear1d.vec, (t(2, 3, 5), None, True, [1.7])),
        (aten.upsample_bilinear2d.default, (t(2, 3, 5, 7), [9, 4], False)),
        (aten.upsample_bilinear2d.vec, (t(2, 3, 5, 7).bfloat16(), None, False, [0.5, 2.3])),
        (aten.upsample_bicubic2d.vec, (t(2, 3, 5, 7), [3, 9], True, None)),
        (aten.upsample_trilinear3d.default, (t(2, 3, 5, 7, 4), [9, 4, 6], False)),
    ],
)
def test_as_the_operator_says(operator: Any, arguments: tuple[Any, ...]) -> None:
    found, made = operator(*arguments), _SHAPES[operator](*arguments)
    assert (made.shape, made.dtype) == (found.shape, found.dtype)


@pytest.mark.parametrize(("first", "both"), [(False, True), (True, False)])
@pytest.mark.parametrize("kind", [nn.GRU, functools.partial(nn.RNN, nonlinearity="relu"), nn.RNN])
def test_a_recurrent_layer_is_asked_about_one_step(kind: Any, first: bool, both: bool) -> None:
    layer = kind(4, 6, 2, batch_first=first, bidirectional=both)
    operator = {"GRU": aten.gru, "RNN_TANH": aten.rnn_tanh, "RNN_RELU": aten.rnn_relu}[layer.mode].input
    state = t(4 if both else 2, 3 if first else 5, 6)
    options = (layer._flat_weights, True, 2, 0.0, False, both, first)
    asked = []

    def counted(x: Tensor, *others: Any) -> Any:
        asked.append(tuple(x.shape))
        return operator(x, *others)

    found = _stepped(counted)(t(3, 5, 4), state, *options)
    assert [one.shape for one in found] == [one.shape for one in operator(t(3, 5, 4), state, *options)]
    assert asked == [(3, 1, 4) if first else (1, 5, 4)]
    with pytest.raises(RuntimeError):
        _SHAPES[operator](t(3, 5, 5), state, *options)


def test_an_operator_is_asked_once_for_each_kind_of_arguments() -> None:
    asked = []

    def ask(node: Any, live: Any) -> Any:
        asked.append(node.name)
        return shape_of(node, live)

    class Repeats(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()
            z = y.exp() + x.flip(1).exp()
            w = torch.clamp(torch.clamp(z, 0, 2), 0, 2).clamp(0.0, 2.0)
            return w.exp().double().exp()

    graph = capture(Repeats(), t(2, 3, 4))
    found = dict(walk(graph, [torch.empty(2, 3, 4, device="meta")], remembered(ask)))
    assert all(found[node].shape == (2, 3, 4) for node in found)
    names = [name.rpartition("_")[0] if name[-1].isdigit() else name for name in asked]
    assert names.count("exp") == 2  # of two types
    assert names.count("clamp") == 2  # by whole numbers, and by others
    assert [found[node].dtype for node in found][-1] == torch.float64


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (aten.conv2d.default, (t(3, 8, 8), t(5, 3, 3, 3))),
        (aten.cat.default, ([t(2), t(2).double()],)),
        (aten.cat.default, ([t(0), t(2, 3)],)),
        (aten.add.Tensor, (t(2), torch.tensor([1, 2]))),
        (aten.mul.Tensor, (torch.tensor([1, 2]), t(2))),
        (aten.scaled_dot_product_attention.default, (t(3, 5, 8), t(3, 7, 8), t(3, 7, 6))),
        (aten.upsample_bilinear2d.default, (torch.zeros(1, 2, 3, 3, dtype=torch.uint8), [2, 2], False)),
    ],
)
def test_what_is_not_plain_is_left_to_the_operator(operator: Any, arguments: tuple[Any, ...]) -> None:
    assert isinstance(operator(*arguments), Tensor)
    assert _SHAPES[operator](*arguments) is None


def test_every_value_has_the_shape_and_type_that_it_has_when_the_graph_runs() -> None:
    graph = capture(Creates(), t(2, 3, 8, 8))
    exact = dict(values(graph, [t(5, 3, 8, 8)]))
    for found in (_meta_shapes(graph, 5), _fake_shapes(graph, 5)):
        assert found.keys() == exact.keys()
        for node, value in exact.items():
            parts, wanted = ([one] if not isinstance(one, (list, tuple)) else one for one in (found[node], value))
            for one, other in zip(parts, wanted, strict=True):
                told = (one.shape, one.dtype) if isinstance(one, Tensor) else int(one)
                assert told == ((other.shape, other.dtype) if isinstance(other, Tensor) else other), node
    assert all(
        not isinstance(value, Tensor) or value.device.type == "meta" for value in _meta_shapes(graph, 5).values()
    )
    assert output_shapes(graph) == [(2 * 6 * 6,), (2,)]
