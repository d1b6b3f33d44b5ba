"""Wanda: |w| times the norm of what it multiplies (arXiv 2306.11695).

    score = |w| * ||x||,    ||x||^2 = sum of x^2 over all images and positions at which w multiplies x

For a linear layer x is a feature; in a convolution a weight has its own input channel and offset, so stride, padding,
dilation and groups decide which positions it meets. No rule for each kind of layer is needed: the operator is linear in
w, so the sum of its outputs for the input x^2 has the derivative ||x||^2 with respect to w, and autograd knows every
operator. Weights compete within an output, as in the paper. Given up: the later layers see the activations of the dense
network, not of the one that is masked so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from rarefy.data.items import Split
from rarefy.errors import DataError, InputError
from rarefy.graph.interpreter import call, run
from rarefy.graph.nodes import Value, argument, device_of
from rarefy.tasks.task import Task


@dataclass(frozen=True)
class Wanda:
    """|weight| times the norm of its inputs on training images; weights of one output compete.

    For masks without training behind them, of linear layers above all; of a convolutional network no better than
    magnitude.

    images: how many are looked at, without labels.  batch_size: at once.
    """

    images: int = 128
    batch_size: int = 32
    scope: ClassVar[str] = "output"

    def __post_init__(self) -> None:
        if self.images < 1 or self.batch_size < 1:
            raise ValueError(f"images={self.images} and batch_size={self.batch_size} must be at least 1")

    def scores(
        self, graph: fx.GraphModule, weights: Mapping[str, Sequence[fx.Node]], task: Task | None, seed: int
    ) -> dict[str, Tensor]:
        """Raises InputError without a task, DataError without data."""
        if task is None:
            raise InputError("criterion 'wanda' needs data: pass task= (--data), or use criterion='magnitude'")
        names = {node: name for name, nodes in weights.items() for node in nodes}
        squares: dict[str, Tensor] = {}

        def rule(node: fx.Node, live: Mapping[fx.Node, Value]) -> Value:
            if node in names:
                name, added = names[node], _squares(node, live)
                squares[name] = squares[name] + added if name in squares else added
            return call(node, live)

        split: Split = "train" if task.data.train is not None else "val"
        with torch.no_grad():
            for inputs in task.data.inputs(split, self.images, self.batch_size, seed=seed, device=device_of(graph)):
                run(graph, (inputs,), instead=rule)
        if len(squares) < len(weights):
            raise DataError(f"criterion 'wanda': the {split} split of the task is empty")
        return {name: graph.get_parameter(name).detach().abs() * squares[name].sqrt() for name in weights}


@torch.enable_grad()
def _squares(node: fx.Node, live: Mapping[fx.Node, Value]) -> Tensor:
    """Of what the node's weight multiplies, the sum for each element of the weight."""
    inputs, weight = node.all_input_nodes[0], argument(node, "weight")
    given = dict(live)
    given[inputs] = live[inputs].square()
    given[weight] = torch.zeros_like(live[weight]).requires_grad_()
    squares: Tensor = torch.autograd.grad(call(node, given).sum(), given[weight])[0]
    return squares
