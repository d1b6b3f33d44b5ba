"""Wanda: |w| times the norm of what it multiplies (arXiv 2306.11695).

    score = |w| * ||x||,    ||x||^2 = sum of x^2 over all images and positions at which w multiplies x

For a linear layer x is a feature; in a convolution a weight has its own input channel and offset, so stride, padding, dilation and groups
decide which positions it meets. No rule for each kind of layer is needed: the operator is linear in w, so the sum of its outputs for the
input x^2 has the derivative ||x||^2 with respect to w, and autograd knows every operator. Weights compete within an output, as in the paper.
Given up: the later layers see the activations of the dense network, not of the one that is masked so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from rarefy.errors import DataError, InputError
from rarefy.graph.nodes import attribute, device_of


@dataclass(frozen=True)
class Wanda:
    """|weight| times the norm of its inputs on training images; weights of one output compete.

    images: how many are looked at, without labels.  batch_size: at once.
    """

    images: int = 128
    batch_size: int = 32
    scope: ClassVar[str] = "output"

    def __post_init__(self) -> None:
        if self.images < 1 or self.batch_size < 1:
            raise ValueError(f"images={self.images} and batch_size={self.batch_size} must be at least 1")

    def scores(
        self, graph: fx.GraphModule, weights: Mapping[str, Sequence[fx.Node]], task: Any, seed: int
    ) -> dict[str, Tensor]:
        """Raises InputError without a task, DataError without data."""
        if task is None:
            raise InputError("criterion 'wanda' needs data: pass task= (--data), or use criterion='magnitude'")
        squares = _Squares(graph, weights)
        split = "train" if task.train is not None else "val"
        for inputs in task.inputs(split, self.images, self.batch_size, seed=seed, device=device_of(graph)):
            squares.run(inputs)
        if len(squares.found) < len(weights):
            raise DataError(f"criterion 'wanda': the {split} split of the task is empty")
        return {name: graph.get_parameter(name).detach().abs() * squares.found[name].sqrt() for name in weights}


class _Squares(fx.Interpreter):
    """Runs the graph and adds up, for each weight, the squares of what it multiplies: ``found``, name -> (shape of the weight)."""

    def __init__(self, graph: fx.GraphModule, weights: Mapping[str, Sequence[fx.Node]]):
        super().__init__(graph)
        self.names = {node: name for name, nodes in weights.items() for node in nodes}
        self.found: dict[str, Tensor] = {}

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        name = self.names.get(n)
        if name is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            with torch.enable_grad():
                weight = torch.zeros_like(attribute(self.module, name)).requires_grad_()
                total = n.target(args[0].square(), weight, *args[2:], **kwargs).sum()  # type: ignore[operator]
                (squares,) = torch.autograd.grad(total, weight)
            self.found[name] = self.found[name] + squares if name in self.found else squares
        return super().run_node(n)
