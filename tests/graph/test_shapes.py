"""Shapes told by rule are those the operators yield."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import Creates
from torch import Tensor

from rarefy.graph.capture import capture
from rarefy.graph.interpreter import values
from rarefy.graph.shapes import _SHAPES, _fake_shapes, _meta_shapes, output_shapes

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
    ],
)
def test_as_the_operator_says(operator: Any, arguments: tuple[Any, ...]) -> None:
    found, made = operator(*arguments), _SHAPES[operator](*arguments)
    assert (made.shape, made.dtype) == (found.shape, found.dtype)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (aten.conv2d.default, (t(3, 8, 8), t(5, 3, 3, 3))),
        (aten.cat.default, ([t(2), t(2).double()],)),
        (aten.cat.default, ([t(0), t(2, 3)],)),
        (aten.add.Tensor, (t(2), torch.tensor([1, 2]))),
        (aten.mul.Tensor, (torch.tensor([1, 2]), t(2))),
        (aten.scaled_dot_product_attention.default, (t(3, 5, 8), t(3, 7, 8), t(3, 7, 6))),
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
