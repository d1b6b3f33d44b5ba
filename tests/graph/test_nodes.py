"""Arguments of nodes by the names of their operators' schemas."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

import rarefy.kernels  # noqa: F401  registers torch.ops.rarefy
from rarefy.graph.nodes import argument, argument_name, arguments, set_argument
from rarefy.kernels.quantize import fake_quantize

aten = torch.ops.aten


def node(target: object, *args: object, **kwargs: object) -> fx.Node:
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{index}") for index in range(3)]
    return graph.call_function(
        target, tuple(inputs[: args.count(...)]) + tuple(a for a in args if a is not ...), kwargs
    )  # type: ignore[arg-type]


def test_an_argument_stands_in_place_by_keyword_or_in_the_schema() -> None:
    plain, placed = node(aten.conv2d.default, ..., ...), node(aten.conv2d.default, ..., ..., ..., [2, 2], groups=4)
    assert (argument(plain, "bias"), argument(plain, "stride"), argument(plain, "groups")) == (None, [1, 1], 1)
    assert (argument(placed, "stride"), argument(placed, "padding"), argument(placed, "groups")) == ([2, 2], [0, 0], 4)
    assert argument(placed, "bias") is placed.args[2]
    assert list(arguments(plain)) == ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    assert arguments(placed)["groups"] == 4 and arguments(placed)["dilation"] == [1, 1]
    with pytest.raises(KeyError):
        argument(plain, "kernel")


@pytest.mark.parametrize("name", ["stride", "groups"])
def test_a_set_argument_is_read_back_and_the_others_stay(name: str) -> None:
    one = node(aten.conv2d.default, ..., ..., ..., [2, 2], groups=4)
    before = arguments(one)
    set_argument(one, name, 7)
    assert arguments(one) == {**before, name: 7}
    assert len(one.args) == 4
    with pytest.raises(KeyError):
        set_argument(one, "kernel", 1)


def test_readers_follow_an_argument_that_is_set() -> None:
    one = node(aten.add.Tensor, ..., ...)
    left, right = one.args
    set_argument(one, "other", left)
    assert one.all_input_nodes == [left] and not right.users  # type: ignore[union-attr]


def test_operators_of_our_own_python_functions_and_getitem_have_names_too() -> None:
    ours = node(torch.ops.rarefy.quantize.default, ..., ..., ..., None, -8, 7, torch.int8)
    assert (argument(ours, "qmax"), argument(ours, "group"), argument(ours, "axis")) == (7, 0, None)
    function = node(fake_quantize, ..., ..., ..., 0, -8, 7)
    assert (argument(function, "qmin"), argument(function, "gradient"), argument(function, "group")) == (-8, 1.0, 0)
    set_argument(function, "gradient", 0.5)
    assert function.kwargs == {"gradient": 0.5}
    item = node(operator.getitem, ..., 1)
    assert arguments(item) == {"self": item.args[0], "index": 1}


def test_keyword_only_arguments_are_set_as_keywords() -> None:
    gelu = node(aten.gelu.default, ...)
    assert argument(gelu, "approximate") == "none"
    set_argument(gelu, "approximate", "tanh")
    assert (len(gelu.args), gelu.kwargs) == (1, {"approximate": "tanh"})


def test_the_name_of_the_argument_that_a_node_is() -> None:
    one = node(aten.conv2d.default, ..., ..., bias=None)
    assert [argument_name(one, source) for source in one.args] == ["input", "weight"]  # type: ignore[arg-type]
    both = node(aten.cat.default, ...)
    both.args = ([both.args[0], both.args[0]], 1)
    assert argument_name(both, both.all_input_nodes[0]) == ""
