"""Taylor: the first-order change of the loss if a channel left (arXiv 1906.10771; arXiv 2407.04616 for the sum over coupled weights).

    score = sum over batches of  reduce over coupled weights W of  | sum over the channel's elements of  W * dL/dW |

The loss is that of the task on its training split, the graph in eval mode (batch norm with its running statistics): the network as it will
be judged. The absolute value is taken batch by batch: over the whole training set a trained network's gradient is about zero, and what
is left of the sum is noise.
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
    """|sum of weight times gradient| of a channel, over batches of the training split.

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
        scored = [name for name, weight in weights.items() if weight.dim() > 1]
        total = torch.zeros(coupling.count, dtype=torch.float64)
        batches = task.batches("train", self.batch_size, shuffle_seed=seed, device=device_of(graph))
        seen = 0
        for inputs, targets in itertools.islice(batches, self.batches):
            loss = task.loss(torch.func.functional_call(graph, weights, (inputs,)), targets)
            gradients = torch.autograd.grad(loss, [weights[name] for name in scored], materialize_grads=True, allow_unused=True)
            elements = {name: weights[name].detach() * gradient for name, gradient in zip(scored, gradients, strict=True)}
            total += coupling.gather(elements, position=torch.abs, reduce=self.reduce)
            seen += 1
        if not seen:
            raise DataError("criterion 'taylor': the training split of the task is empty")
        return total
