"""Hessian: the second-order change of the loss as a channel leaves.

    diagonal  score = reduce over coupled weights W of  1/2 sum over the channel's elements of  F_W W^2
    group     score = E over samples of  || J w ||^2

    F_W = E (dL/dW)^2;  w: all weights that read the channel;  J: the Jacobian of the network's output

The diagonal form is Optimal Brain Damage (LeCun 1990) with the Fisher information for the Hessian; Optimal Brain
Surgeon's w^2 / (2 [H^-1]_ii) is the same number where H is diagonal. A gradient is that of a batch: the smaller the
batch, the nearer the mean of squares is to the Fisher information. The group form is Optimal Brain Connection's (arXiv
2508.05521): w' J'J w has the interactions inside a group, which a diagonal leaves out (two weights that cancel). J w is
one directional derivative a sample, found as the gradient of a mask (``_reads.py``); ||J w||^2 over the outputs is
estimated without bias by ``draws`` random sums of outputs with signs +-1. Needs no labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rarefy.graph.signature import tensors
from rarefy.pruning.criteria._options import check_counts, check_reduce
from rarefy.pruning.criteria._reads import batches_of, check_reads, needed, reads, sensitivities
from rarefy.pruning.groups.groups import Coupling
from rarefy.tasks.metric import Outputs
from rarefy.tasks.task import Task, fitted


@dataclass(frozen=True)
class Hessian:
    """Fisher information times the square of a channel's weights, or of the whole group at once.

    ``group=true`` with ranking "loss" was the best of all where there is data, and needs no labels. Not to be mixed up
    with the diagonal form, which needs labels and was below magnitude.

    group: with the interactions inside a group.  batches: how many.  batch_size: images in each.
    draws: random sums of outputs a batch (group).  reduce: mean, sum or max over the coupled weights (diagonal).
    """

    group: bool = False
    batches: int = 50
    batch_size: int = 8
    draws: int = 2
    reduce: str = "mean"

    def __post_init__(self) -> None:
        check_counts(batches=self.batches, batch_size=self.batch_size, draws=self.draws)
        check_reduce(self.reduce)

    def scores(self, graph: fx.GraphModule, coupling: Coupling, task: Task | None, seed: int) -> Tensor:
        """Raises InputError without a task, DataError without data."""
        return self._group(graph, coupling, task, seed) if self.group else self._diagonal(graph, coupling, task, seed)

    def _diagonal(self, graph: fx.GraphModule, coupling: Coupling, task: Task | None, seed: int) -> Tensor:
        task = fitted(needed(task, "hessian"), graph)
        weights = {
            name: weight.detach().clone().requires_grad_()
            for name, weight in graph.named_parameters()
            if weight.dim() > 1
        }
        fisher = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
        seen = 0
        for inputs, targets in batches_of(task, graph, "hessian", self.batches, self.batch_size, seed):
            loss = task.loss(torch.func.functional_call(graph, weights, (inputs,)), targets)
            gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True, allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                fisher[name] += gradient.square()
            seen += 1
        elements = {name: weight.detach().square() * fisher[name] / (2 * seen) for name, weight in weights.items()}
        return coupling.gather(elements, reduce=self.reduce)

    def _group(self, graph: fx.GraphModule, coupling: Coupling, task: Task | None, seed: int) -> Tensor:
        places = check_reads(reads(coupling), coupling, "hessian")
        generator = torch.Generator().manual_seed(seed)
        total, samples = torch.zeros(coupling.count, dtype=torch.float64), 0

        def signed(outputs: Outputs) -> Tensor:
            found = [value for value in tensors(outputs) if value.is_floating_point()]
            signs = [(torch.randint(0, 2, value.shape, generator=generator) * 2 - 1).to(value) for value in found]
            return torch.stack([(value * sign).sum() for value, sign in zip(found, signs, strict=True)]).sum()

        for inputs, _ in batches_of(task, graph, "hessian", self.batches, self.batch_size, seed):
            for _ in range(self.draws):
                total += sensitivities(graph, places, coupling.count, inputs, signed).square().sum(0)
            samples += len(inputs)
        return total / (samples * self.draws)
