"""Taylor: the first-order change of the loss if a channel left (arXiv 1906.10771, and arXiv 2407.04616 for the sum over coupled weights).

    score = reduce over coupled weights W of  | sum over elements of channel  W * dL/dW |,   dL/dW summed over the batches

The loss is that of the task on its training split, the graph in eval mode (batch norm with its running statistics), so the gradient is that of the
network as it will be judged.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.capturing import device_of
from rarefy.coupling import Coupling
from rarefy.errors import DataError, InputError


@dataclass(frozen=True)
class Taylor:
    """|sum of weight times gradient| of a channel over batches of the training split.

    batches: how many.  batch_size: images in each.  reduce: mean, sum or max over the coupled weights.
    """

    batches: int = 10
    batch_size: int = 64
    reduce: str = "mean"

    def __post_init__(self) -> None:
        if self.batches < 1 or self.batch_size < 1:
            raise ValueError(f"batches={self.batches} and batch_size={self.batch_size} must be at least 1")
        if self.reduce not in ("mean", "sum", "max"):
            raise ValueError(f"reduce={self.reduce!r} is not mean, sum or max")

    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Any, seed: int) -> Tensor:
        """Raises InputError without a task, DataError without data."""
        if task is None:
            raise InputError("criterion 'taylor' needs data: pass task=, or use criterion='magnitude'")
        weights = {
            name: weight.detach().clone().requires_grad_()
            for name, weight in graph.named_parameters()
            if weight.is_floating_point()
        }
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        batches = task.batches("train", self.batch_size, shuffle_seed=seed, device=device_of(graph))
        seen = 0
        for inputs, targets in itertools.islice(batches, self.batches):
            loss = task.loss(torch.func.functional_call(graph, weights, (inputs,)), targets)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient
            seen += 1
        if not seen:
            raise DataError("criterion 'taylor': the training split of the task is empty")
        elements = {name: weights[name].detach() * total[name] for name in weights if weights[name].dim() > 1}
        return coupling.gather(elements, position=torch.abs, reduce=self.reduce)
