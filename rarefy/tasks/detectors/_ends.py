"""How a graph's outputs are put together, by which families of exported files are told apart.

An exported detector has no class that says what it is. It has outputs, each a concatenation of parts in other layouts,
and the operators that make the numbers of the parts, with their channels, are its family's: of YOLOX a convolution of
4 channels, and sigmoids of 1 and of as many as there are classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn
from torch.utils import _pytree as pytree

from rarefy.graph.nodes import is_graph, operator_name
from rarefy.graph.shapes import shapes

_LAYOUT = frozenset(
    "view reshape _unsafe_view flatten squeeze unsqueeze permute transpose contiguous clone alias detach to "
    "_to_copy".split()
)
_SPLITS = frozenset("getitem split split_with_sizes chunk slice".split())
_JOINS = ("cat", "concat", "stack")


@dataclass(frozen=True)
class End:
    """node: an output. parts: (operator, node) of what makes its numbers, in the order of concatenation."""

    node: fx.Node
    parts: tuple[tuple[str, fx.Node], ...]

    @property
    def operators(self) -> list[str]:
        return [operator for operator, _ in self.parts]


def ends(model: nn.Module) -> list[End]:
    """Of each output of a graph that takes pictures; none of another module."""
    if not is_graph(model) or [len(one["shape"]) for one in model.meta["inputs"]] != [3]:
        return []
    (output,) = model.graph.find_nodes(op="output")
    nodes = [node for node in pytree.tree_leaves(output.args[0]) if isinstance(node, fx.Node)]
    return [End(node, tuple(_parts(node))) for node in nodes]


def input_size(model: fx.GraphModule) -> tuple[int, int]:
    """(H, W) of the example."""
    _, height, width = model.meta["inputs"][0]["shape"]
    return height, width


def sizes(model: fx.GraphModule, found: list[End]) -> list[tuple[tuple[int, ...], list[tuple[str, int]]]]:
    """Of each output its shape without the batch, and (operator, channels) of its parts."""
    known = shapes(model)
    return [
        (tuple(known[end.node].shape[1:]), [(operator, known[node].shape[1]) for operator, node in end.parts])
        for end in found
    ]


def _parts(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    while operator_name(node) in _LAYOUT:
        node = node.args[0]  # type: ignore[assignment]
    if operator_name(node) in _JOINS:
        for part in node.args[0]:  # type: ignore[union-attr]
            yield from _parts(part)  # type: ignore[arg-type]
        return
    maker = node
    while operator_name(maker) in _LAYOUT | _SPLITS:
        maker = maker.args[0]  # type: ignore[assignment]
    yield ("convolution" if operator_name(maker) in _CONVOLUTIONS else operator_name(maker)), node


_CONVOLUTIONS = ("conv2d", "convolution", "batch_norm")
