"""Taylor: the first-order change of the loss if a channel left.

    weight  score = sum over batches of  reduce over coupled weights W of  | sum over the channel of  W * dL/dW |
    fisher  score = sum over samples of  ( sum over all layers that read the channel of  dL/dm )^2

The first is arXiv 1906.10771, with the sum over coupled weights of arXiv 2407.04616; the second is group Fisher, arXiv
2108.00708.

m is a mask of ones on what a layer reads (``_reads.py``). Group Fisher adds before it squares, and squares sample by
sample, so what one reader wants and another does not cancels, and the score is also a second-order one. Not divided by
the memory of the channel, as the paper does: rankings here compare within a layer, or against the layer's mean.

The loss is that of the task on its training split, the graph in eval mode (batch norm with its running statistics): the
network as it will be judged. The absolute value is taken batch by batch: over the whole training set a trained
network's gradient is about zero, and what is left of the sum is noise.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rarefy.pruning.criteria._options import check_counts, check_reduce
from rarefy.pruning.criteria._reads import batches_of, check_reads, needed, reads, sensitivities
from rarefy.pruning.groups.groups import Coupling
from rarefy.tasks.metric import Outputs, Targets
from rarefy.tasks.task import Task, fitted

Batches = Iterable[tuple[Tensor, Targets]]


@dataclass(frozen=True)
class Taylor:
    """|sum of weight times gradient| of a channel, over batches of the training split.

    For data with labels, where few batches must do; ``form=fisher`` with ranking "loss" was its better form. Not the
    change of the loss itself, but its first order.

    batches: how many.  batch_size: images in each.  reduce: mean, sum or max over the coupled weights (form weight).
    form: weight, or fisher: squared, for each image and over the group at once.
    """

    batches: int = 10
    batch_size: int = 64
    reduce: str = "mean"
    form: str = "weight"

    def __post_init__(self) -> None:
        check_counts(batches=self.batches, batch_size=self.batch_size)
        check_reduce(self.reduce)
        if self.form not in ("weight", "fisher"):
            raise ValueError(f"form={self.form!r} is not weight or fisher")

    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Task | None, seed: int) -> Tensor:
        """Raises InputError without a task, DataError without data."""
        task = fitted(needed(task, "taylor"), graph)
        form = self._fisher if self.form == "fisher" else self._weight
        return form(graph, coupling, task, batches_of(task, graph, "taylor", self.batches, self.batch_size, seed))

    def _fisher(self, graph: fx.GraphModule, coupling: Coupling, task: Task, batches: Batches) -> Tensor:
        places = check_reads(reads(coupling), coupling, "taylor")
        total = torch.zeros(coupling.count, dtype=torch.float64)
        for inputs, targets in batches:
            # The loss is a mean; a sample's own gradient is that of the sum.
            loss = functools.partial(_summed, task, targets, len(inputs))
            total += sensitivities(graph, places, coupling.count, inputs, loss).square().sum(0)
        return total

    def _weight(self, graph: fx.GraphModule, coupling: Coupling, task: Task, batches: Batches) -> Tensor:
        weights = {
            name: weight.detach().clone().requires_grad_()
            for name, weight in graph.named_parameters()
            if weight.is_floating_point()
        }
        scored = {name: weight for name, weight in weights.items() if weight.dim() > 1}
        total = torch.zeros(coupling.count, dtype=torch.float64)
        for inputs, targets in batches:
            loss = task.loss(torch.func.functional_call(graph, weights, (inputs,)), targets)
            gradients = torch.autograd.grad(loss, list(scored.values()), materialize_grads=True, allow_unused=True)
            pairs = zip(scored.items(), gradients, strict=True)
            elements = {name: weight.detach() * gradient for (name, weight), gradient in pairs}
            total += coupling.gather(elements, position=torch.abs, reduce=self.reduce)
        return total


def _summed(task: Task, targets: Targets, count: int, outputs: Outputs) -> Tensor:
    return task.loss(outputs, targets) * count
