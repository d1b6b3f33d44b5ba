"""Taylor: the first-order change of the loss if a channel left (arXiv 1906.10771; arXiv 2407.04616 for the sum over coupled weights).

    weight  score = sum over batches of  reduce over coupled weights W of  | sum over the channel's elements of  W * dL/dW |
    fisher  score = sum over samples of  ( sum over all layers that read the channel of  dL/dm )^2         (group Fisher, arXiv 2108.00708)

m is a mask of ones on what a layer reads (``_reads.py``). Group Fisher adds before it squares, and squares sample by sample, so what one reader wants
and another does not cancels, and the score is also a second-order one. Not divided by the memory of the channel, as the paper does: rankings here
compare within a layer, or against the layer's mean.

The loss is that of the task on its training split, the graph in eval mode (batch norm with its running statistics): the network as it will
be judged. The absolute value is taken batch by batch: over the whole training set a trained network's gradient is about zero, and what
is left of the sum is noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.pruning.criteria._reads import batches_of, check_reads, reads, sensitivities
from rarefy.pruning.groups.groups import Coupling


@dataclass(frozen=True)
class Taylor:
    """|sum of weight times gradient| of a channel, over batches of the training split.

    batches: how many.  batch_size: images in each.  reduce: mean, sum or max over the coupled weights (form weight).
    form: weight, or fisher: squared, for each image and over the group at once.
    """

    batches: int = 10
    batch_size: int = 64
    reduce: str = "mean"
    form: str = "weight"

    def __post_init__(self) -> None:
        if self.batches < 1 or self.batch_size < 1:
            raise ValueError(f"batches={self.batches} and batch_size={self.batch_size} must be at least 1")
        if self.reduce not in ("mean", "sum", "max"):
            raise ValueError(f"reduce={self.reduce!r} is not mean, sum or max")
        if self.form not in ("weight", "fisher"):
            raise ValueError(f"form={self.form!r} is not weight or fisher")

    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Any, seed: int) -> Tensor:
        """Raises InputError without a task, DataError without data."""
        batches = batches_of(task, graph, "taylor", self.batches, self.batch_size, seed)
        total = torch.zeros(coupling.count, dtype=torch.float64)
        if self.form == "fisher":
            places = check_reads(reads(coupling), coupling, "taylor")
            for inputs, targets in batches:

                def summed(outputs: Any, targets: Any = targets, size: int = inputs.shape[0]) -> Tensor:
                    loss: Tensor = task.loss(outputs, targets)  # a mean; a sample's own gradient is that of the sum
                    return loss * size

                total += sensitivities(graph, places, coupling.count, inputs, summed).square().sum(0)
            return total
        weights = {
            name: weight.detach().clone().requires_grad_()
            for name, weight in graph.named_parameters()
            if weight.is_floating_point()
        }
        scored = [name for name, weight in weights.items() if weight.dim() > 1]
        for inputs, targets in batches:
            loss = task.loss(torch.func.functional_call(graph, weights, (inputs,)), targets)
            gradients = torch.autograd.grad(
                loss, [weights[name] for name in scored], materialize_grads=True, allow_unused=True
            )
            elements = {
                name: weights[name].detach() * gradient for name, gradient in zip(scored, gradients, strict=True)
            }
            total += coupling.gather(elements, position=torch.abs, reduce=self.reduce)
        return total
