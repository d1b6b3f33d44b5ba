"""MACs and parameters of a graph.

One multiply-accumulate (MAC) is one product added to a sum; a convolution, a linear layer, a matrix product or
attention is a sum of products of sizes, and the table below names those sizes as axes of tensors:

    conv2d        output (n, o, h, w) times weight[1:] (i / groups, kh, kw)      one MAC each
    attention     queries x keys x d  +  queries x keys x d_v
    recurrent     steps times the matrices of every layer and direction

Because the table names axes rather than numbers, pruning can put the surviving widths in and know the cost of a network
it has not built yet. Additions, activations, normalisation and pooling count nothing, as in every published MACs
figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import fx

from rarefy.graph.nodes import Value, argument, operator_name
from rarefy.graph.shapes import shapes

Axis = tuple[fx.Node, int]
Products = list[list[Axis]]  # the MACs of a node: the sum over products of the sizes of these axes
Shapes = Mapping[fx.Node, Value]
Rule = Callable[[fx.Node, Shapes], Products]


def count_macs(graph: fx.GraphModule) -> int:
    """MACs of one forward pass of one sample."""
    return sum(layer_macs(graph).values())


def layer_macs(graph: fx.GraphModule, found: Shapes | None = None) -> dict[str, int]:
    """MACs of each node that multiplies, by node name, for one sample.

    ``found``: the ``shapes`` of the graph, if already known.
    """
    found = shapes(graph, 1) if found is None else found
    return {
        node.name: sum(
            math.prod(found[source].shape[axis] for source, axis in product) for product in products(node, found)
        )
        for node in graph.graph.nodes
        if operator_name(node) in MACS
    }


def count_parameters(graph: fx.GraphModule) -> int:
    """Parameters, each shared one once; buffers (batch norm statistics) are not parameters."""
    return sum(parameter.numel() for parameter in graph.parameters())


def products(node: fx.Node, found: Shapes) -> Products:
    """The axes whose sizes multiply to the MACs of ``node``; empty for an operator that multiplies nothing."""
    rule = MACS.get(operator_name(node))
    return rule(node, found) if rule is not None else []


def _axes(node: Value, found: Shapes, start: int = 0) -> list[Axis]:
    return [(node, axis) for axis in range(start, found[node].dim())]


def _convolution(node: fx.Node, found: Shapes) -> Products:
    return [_axes(node, found) + _axes(node.args[1], found, 1)]


def _transposed_convolution(node: fx.Node, found: Shapes) -> Products:
    return [_axes(node.args[0], found) + _axes(node.args[1], found, 1)]


def _matrix_product(first: int) -> Rule:
    def rule(node: fx.Node, found: Shapes) -> Products:
        left: Value = node.args[first]
        return [[*_axes(node, found), (left, found[left].dim() - 1)]]

    return rule


def _attention(node: fx.Node, found: Shapes) -> Products:
    query, key = argument(node, "query"), argument(node, "key")
    keys = (key, found[key].dim() - 2)
    return [[*_axes(query, found), keys], [*_axes(node, found), keys]]


def _einsum(node: fx.Node, found: Shapes) -> Products:
    operands = argument(node, "tensors")
    letters, _ = einsum_letters(argument(node, "equation"), [found[operand].dim() for operand in operands])
    if len(letters) < 2:
        return []
    first: dict[str, Axis] = {}
    for operand, names in zip(operands, letters, strict=True):
        for axis, letter in enumerate(names):
            if letter not in first or found[first[letter][0]].shape[first[letter][1]] == 1:
                first[letter] = (operand, axis)
    return [list(first.values())]


def _recurrent(node: fx.Node, found: Shapes) -> Products:
    """Each step takes one product with each matrix of each layer and direction."""
    source: Value = argument(node, "input")
    matrices = [weight for weight in argument(node, "params") if found[weight].dim() == 2]
    return [[(source, 0), (source, 1), *_axes(weight, found)] for weight in matrices]


def _recurrent_cell(node: fx.Node, found: Shapes) -> Products:
    source: Value = argument(node, "input")
    return [[(source, 0), *_axes(argument(node, name), found)] for name in ("w_ih", "w_hh")]


def einsum_letters(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """The letter of each axis, of every operand and of the result.

    Axes under ``...`` are named by their distance from its end.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = [
        rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)
    ]

    def spelled(term: str, under: int) -> list[str]:
        before, dots, after = term.partition("...")
        return [*before, *([f".{index}" for index in range(under, 0, -1)] if dots else []), *after]

    if not arrow:
        once = [letter for letter in sorted(set(left) - set(",.")) if left.count(letter) == 1]
        right = ("..." if "..." in left else "") + "".join(once)
    return [spelled(term, under) for term, under in zip(terms, hidden, strict=True)], spelled(right, max(hidden))


MACS: dict[str, Rule] = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "convolution", "conv1d_codes", "conv2d_codes", "conv3d_codes"), _convolution
    ),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    **dict.fromkeys(("linear", "linear_codes", "matmul", "mm", "bmm", "mv", "dot"), _matrix_product(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _matrix_product(1)),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    **dict.fromkeys(("gru", "lstm", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell"), _recurrent_cell),
}
