"""Rewrites change no answer, and leave what they were given as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import WithParts
from torch import Tensor, fx
from torch.nn import functional as F

import rarefy.kernels  # noqa: F401  registers torch.ops.rarefy
from rarefy.graph.canonical import simplify
from rarefy.graph.capture import capture
from rarefy.graph.fold import fold, fold_constants, normed
from rarefy.graph.nodes import operator_name

aten = torch.ops.aten


def graph_of(step: Callable[[WithParts, Tensor], Tensor]) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    return capture(WithParts(step).eval(), torch.randn(2, 4, 6, 6)), torch.randn(3, 4, 6, 6)


def operators(graph: fx.GraphModule) -> list[str]:
    return [operator_name(node) for node in graph.graph.nodes if node.op == "call_function"]


def test_what_follows_from_parameters_is_stored_once_and_the_rest_is_shared() -> None:
    def step(model: WithParts, x: Tensor) -> Tensor:
        weight = model.table - model.table.mean((1, 2, 3), keepdim=True)  # two readers, both constant
        return F.conv2d(x, weight / weight.std()) + F.conv2d(x, weight)

    graph, x = graph_of(step)
    text = str(graph.graph)
    folded = fold_constants(graph)
    assert operators(folded) == ["conv2d", "conv2d", "add"]
    assert torch.equal(folded(x), graph(x)) and str(graph.graph) == text
    assert "table" not in dict(folded.named_parameters()) and len(list(folded.parameters())) == 2
    plain, x = graph_of(lambda model, x: model.conv(x))
    assert fold_constants(plain).conv.weight is plain.conv.weight


def test_what_is_drawn_or_comes_of_codes_is_not_stored() -> None:
    graph, x = graph_of(lambda model, x: x + torch.rand(4, 1, 1) * model.mask[:4].float().view(4, 1, 1))
    assert "rand" in operators(fold_constants(graph)) and "view" not in operators(fold_constants(graph))
    codes, x = graph_of(lambda model, x: F.conv2d(x, model.table))
    with codes.graph.inserting_before(next(n for n in codes.graph.nodes if operator_name(n) == "conv2d")):
        table = next(node for node in codes.graph.nodes if node.target == "table")
        one = codes.graph.call_function(aten.ones.default, ([],))
        zero = codes.graph.call_function(aten.zeros.default, ([],))
        decoded = codes.graph.call_function(torch.ops.rarefy.dequantize.default, (table, one, zero, None))
    table.replace_all_uses_with(decoded, delete_user_cb=lambda user: user is not decoded)
    codes.recompile()
    assert operators(fold_constants(codes)) == ["dequantize", "conv2d"]
    assert torch.equal(fold_constants(codes)(x), codes(x))


@pytest.mark.parametrize(
    ("step", "left"),
    [
        (lambda model, x: model.norm(model.conv(x)), ["conv2d"]),
        (lambda model, x: model.other(model.conv(x)), ["conv2d"]),
        (lambda model, x: model.norm(F.conv2d(x, model.conv.weight)), ["conv2d"]),
        (lambda model, x: model.norm(torch.cat([x, x[:, :2]], 1)), ["slice", "slice", "cat", "conv2d"]),  # stands alone
        (lambda model, x: (y := model.conv(x)) + model.norm(y), ["conv2d", "conv2d", "add"]),  # is not the only reader
        (lambda model, x: model.norm(model.conv(x)) + model.conv(x), ["conv2d", "conv2d", "add"]),  # a shared weight
        (lambda model, x: F.dropout(model.conv(x).detach(), 0.5, model.training), ["conv2d"]),
    ],
)  # fmt: skip
def test_batch_norm_goes_into_the_layer_before_it(step: Callable[[WithParts, Tensor], Tensor], left: list[str]) -> None:
    graph, x = graph_of(step)
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    folded = fold(graph)
    assert operators(folded) == left
    assert torch.allclose(folded(x), graph(x), atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())
    shared = {id(value) for value in graph.parameters()} & {id(value) for value in folded.parameters()}
    assert not shared


def test_batch_norm_without_statistics_stays() -> None:
    graph, _ = graph_of(lambda model, x: F.batch_norm(model.conv(x), None, None, training=True))
    assert "batch_norm" in operators(fold(graph))


def test_layers_that_batch_norm_alone_reads_are_named() -> None:
    graph, _ = graph_of(lambda model, x: model.norm(model.conv(x)) + F.conv2d(x, model.table))
    assert normed(graph) == ["conv.weight"]


@pytest.mark.parametrize(
    ("step", "left"),
    [
        (lambda model, x: model.conv(F.pad(x, (1, 1, 2, 2))), ["conv2d"]),
        (lambda model, x: model.conv(F.pad(x, (1, 0, 2, 2))), ["pad", "conv2d"]),
        (lambda model, x: model.conv(F.pad(x, (1, 1), value=1.0)), ["pad", "conv2d"]),
        (lambda model, x: model.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")), ["pad", "conv2d"]),
        (lambda model, x: model.conv(F.pad(x, (-1, -1))), ["pad", "conv2d"]),
        (lambda model, x: x.mean((2, 3)), ["adaptive_avg_pool2d", "flatten"]),
        (lambda model, x: x.mean((-1, 2), keepdim=True), ["adaptive_avg_pool2d"]),
        (lambda model, x: x.mean(1), ["mean"]),
        (lambda model, x: F.adaptive_avg_pool2d(x, 3), ["avg_pool2d"]),
        (lambda model, x: F.adaptive_avg_pool2d(x, 4), ["adaptive_avg_pool2d"]),
        (lambda model, x: F.adaptive_avg_pool2d(x, 6) + 1, ["add"]),
        (lambda model, x: F.hardswish(F.silu(x)), ["sigmoid", "mul", "hardsigmoid", "mul"]),
        (lambda model, x: F.scaled_dot_product_attention(x, x, x), ["mul", "transpose", "matmul", "softmax", "matmul"]),
        (lambda model, x: F.scaled_dot_product_attention(x, x, x, x, scale=0.3),
         ["mul", "transpose", "matmul", "add", "softmax", "matmul"]),
        (lambda model, x: F.scaled_dot_product_attention(x, x, x, x > 0), ["gt", "scaled_dot_product_attention"]),
        (lambda model, x: F.scaled_dot_product_attention(x, x, x, is_causal=True), ["scaled_dot_product_attention"]),
    ],
)  # fmt: skip
def test_one_form_for_what_can_be_written_in_several(
    step: Callable[[WithParts, Tensor], Tensor], left: list[str]
) -> None:
    graph, x = graph_of(step)
    simple = simplify(graph)
    assert operators(simple) == left
    assert torch.allclose(simple(x), graph(x), atol=1e-5)
    kept = simplify(graph, frozenset(node.target for node in graph.graph.nodes))
    assert operators(kept) == operators(graph)
