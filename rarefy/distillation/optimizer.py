"""What turns gradients into new weights: the optimizer, the running mean of the weights (EMA), and DOT's two momenta.

**Optimizer.** SGD with Nesterov momentum, or AdamW; no weight decay on biases and norms.

**EMA** is the bias-corrected mean, θ̄ₜ = Σ dᵗ⁻ⁱ θᵢ / Σ dᵗ⁻ⁱ, so it needs no warm-up; running statistics are averaged
like weights.

**DOT**, distillation-oriented training (Zhao et al., ICCV 2023, 2307.08436): the gradient of the teacher's loss gets
more momentum than that of the labels'.

    v_task ← (μ - Δ) v_task + g_task        v_teacher ← (μ + Δ) v_teacher + g_teacher
    θ ← θ - lr · [ g_task + (μ - Δ) v_task  +  g_teacher + (μ + Δ) v_teacher ]

the Nesterov form of the paper's update, as this loop's SGD has it; with Δ = 0 it is that SGD. Weight decay belongs to
the task's gradient. Δ = 0.075 is the paper's for CIFAR, 0.09 for ImageNet. The price is a second pass backwards through
the student.

**Shared** weights (``meta["shared"]``, see quantization/clustering) stay equal while they learn: each takes the mean of
the gradients of those that share its value. Deep Compression (1510.00149) takes their sum, the derivative by the value;
the mean is that sum in the measure of weights, the nearest gradient that keeps them together, so the rate that suits
single weights suits values of ten weights and of ten thousand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from rarefy.distillation.options import Training


def optimizer_of(parameters: Iterable[nn.Parameter], training: Training, device: torch.device) -> torch.optim.Optimizer:
    """Its rate is 0: the loop sets it in each step."""
    parameters = list(parameters)
    groups = [
        {"params": [one for one in parameters if one.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [one for one in parameters if one.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda") and all(one.is_floating_point() for one in parameters)
    if training.dot:  # whose update is the gradient
        return torch.optim.SGD([{"params": parameters, "weight_decay": 0.0}], lr=0.0, fused=fused)
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=training.momentum, nesterov=training.momentum > 0, fused=fused)
    return torch.optim.AdamW(groups, lr=0.0, fused=fused)


class Average:
    """The running mean of a graph, as a graph of its own. Codes and other integers do not train: they have no mean."""

    def __init__(self, graph: fx.GraphModule, decay: float):
        self.graph, self.decay = copy.deepcopy(graph).requires_grad_(False), decay
        pairs = zip(
            [*self.graph.parameters(), *self.graph.buffers()], [*graph.parameters(), *graph.buffers()], strict=True
        )
        floats = [(mean, value.detach()) for mean, value in pairs if mean.is_floating_point()]
        self.means, self.values = [mean for mean, _ in floats], [value for _, value in floats]

    @torch.no_grad()
    def update(self, count: int) -> None:
        """θ̄ += (θ - θ̄) (1 - d) / (1 - dᵗ): the mean of all t states so far, the one i steps back weighing dⁱ."""
        torch._foreach_lerp_(self.means, self.values, (1 - self.decay) / (1 - self.decay**count))


class Shared:
    """Groups of weights of one value, of each of the ``weights``, by name, that has few values."""

    MOST = 256  # values of a weight; one that has more shares none

    def __init__(self, weights: Mapping[str, Tensor]):
        self.groups: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # which group; the weights, group by group; lengths
        for name, weight in weights.items():
            values, group, lengths = weight.detach().reshape(-1).unique(return_inverse=True, return_counts=True)
            if len(values) <= self.MOST:
                self.groups[name] = (group, group.argsort(stable=True), lengths)

    @torch.no_grad()
    def level(self, values: Mapping[str, Tensor | None]) -> None:
        """What stands for each weight, by name, becomes the mean of its group: gradients, or the weights themselves."""
        for name, (group, order, lengths) in self.groups.items():
            value = values.get(name)
            if value is not None:
                means = torch.segment_reduce(value.reshape(-1)[order].double(), "mean", lengths=lengths)
                value.copy_(means[group].reshape(value.shape))


class Dot:
    """The two momenta. ``task`` and ``teacher``: a buffer for each parameter, by name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], momentum: float, delta: float, weight_decay: float):
        self.parameters, self.momentum, self.delta, self.weight_decay = parameters, momentum, delta, weight_decay
        self.task, self.teacher, self.taught = (
            {name: torch.zeros_like(one) for name, one in parameters.items()} for _ in range(3)
        )

    def forget(self) -> None:
        """The gradients of the step before."""
        torch._foreach_zero_(list(self.taught.values()))

    def add(self, gradients: Iterable[Tensor | None]) -> None:
        """Gradients of the teacher's loss, in the order of the parameters; None: it does not depend on that one."""
        for total, gradient in zip(self.taught.values(), gradients, strict=True):
            if gradient is not None:
                total.add_(gradient)

    def mask(self, masks: Mapping[str, Tensor]) -> None:
        """Where a weight is to stay zero, its gradient is."""
        torch._foreach_mul_([self.taught[name] for name in masks], list(masks.values()))

    @torch.no_grad()
    def step(self, clip: float) -> None:
        """Both gradients become one update, in ``.grad``: for an SGD without momentum and decay.

        clip: greatest norm of their sum, 0: none.
        """
        taught = list(self.taught.values())
        task = self._task_gradients()
        if clip:
            norm = nn.utils.get_total_norm(torch._foreach_add(task, taught))
            share = (clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*task, *taught], share)
        decayed = [(grad, one) for grad, one in zip(task, self.parameters.values()) if one.dim() > 1]
        if self.weight_decay and decayed:
            torch._foreach_add_(*map(list, zip(*decayed)), alpha=self.weight_decay)
        for gradients, buffers, momentum in (
            (task, list(self.task.values()), self.momentum - self.delta),
            (taught, list(self.teacher.values()), self.momentum + self.delta),
        ):
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
            torch._foreach_add_(task, buffers, alpha=momentum)
        torch._foreach_add_(task, taught)

    def _task_gradients(self) -> list[Tensor]:
        for one in self.parameters.values():
            if one.grad is None:
                one.grad = torch.zeros_like(one)
        return [one.grad for one in self.parameters.values() if one.grad is not None]

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        buffers = (("task", self.task), ("teacher", self.teacher))
        return {f"{kind}.{name}": value for kind, values in buffers for name, value in values.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """As ``state`` told it."""
        for name, value in self.state().items():
            value.copy_(state[name])
