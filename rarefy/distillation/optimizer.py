"""Distillation-oriented training (DOT, Zhao et al., ICCV 2023, 2307.08436): the gradient of the teacher's loss gets more momentum than that of the labels'.

    v_task ← (μ - Δ) v_task + g_task        v_teacher ← (μ + Δ) v_teacher + g_teacher
    θ ← θ - lr · [ g_task + (μ - Δ) v_task  +  g_teacher + (μ + Δ) v_teacher ]

the Nesterov form of the paper's update, as this loop's SGD has it; with Δ = 0 it is that SGD. Weight decay belongs to the task's gradient. Δ = 0.075 is the paper's for
CIFAR, 0.09 for ImageNet. The price is a second pass backwards through the student.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rarefy.distillation.checkpoint import tensors_of
from rarefy.distillation.options import Training


def _optimizer(parameters: Any, training: Training, device: torch.device) -> torch.optim.Optimizer:
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


class _Averaged(NamedTuple):
    """The tensors of a model and of its running mean, listed once."""

    means: list[Tensor]
    values: list[Tensor]

    @classmethod
    def of(cls, average: nn.Module, model: nn.Module) -> _Averaged:
        """Codes and other integers do not train, so they need no mean."""
        pairs = [
            (mean, value.detach())
            for mean, value in zip(tensors_of(average).values(), tensors_of(model).values())
            if mean.is_floating_point()
        ]
        return cls([mean for mean, _ in pairs], [value for _, value in pairs])

    @torch.no_grad()
    def update(self, decay: float, count: int) -> None:
        """θ̄ += (θ - θ̄) (1 - d) / (1 - dᵗ): the mean of all t states so far, the one i steps back weighing dⁱ."""
        torch._foreach_lerp_(self.means, self.values, (1 - decay) / (1 - decay**count))


class Dot:
    """The two momenta. ``task`` and ``teacher``: a buffer for each parameter, by name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], momentum: float, delta: float, weight_decay: float):
        self.parameters, self.momentum, self.delta, self.weight_decay = parameters, momentum, delta, weight_decay
        self.task = {name: torch.zeros_like(one) for name, one in parameters.items()}
        self.teacher = {name: torch.zeros_like(one) for name, one in parameters.items()}
        self.taught = {name: torch.zeros_like(one) for name, one in parameters.items()}

    def forget(self) -> None:
        torch._foreach_zero_(list(self.taught.values()))

    def add(self, gradients: Iterable[Tensor | None]) -> None:
        """Gradients of the teacher's loss, in the order of the parameters; None: it does not depend on that one."""
        for kept, gradient in zip(self.taught.values(), gradients, strict=True):
            if gradient is not None:
                kept.add_(gradient)

    def mask(self, masks: Mapping[str, Tensor]) -> None:
        """Where a weight is to stay zero, its gradient is."""
        torch._foreach_mul_([self.taught[name] for name in masks], list(masks.values()))

    def _task_gradients(self) -> list[Tensor]:
        for one in self.parameters.values():
            if one.grad is None:
                one.grad = torch.zeros_like(one)
        return [one.grad for one in self.parameters.values() if one.grad is not None]

    @torch.no_grad()
    def step(self, clip: float) -> None:
        """Both gradients become one update, in ``.grad``: for an SGD without momentum and decay. clip: greatest norm of their sum, 0: none."""
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

    def state(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{name}": value
            for kind, found in (("task", self.task), ("teacher", self.teacher))
            for name, value in found.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for kind, found in (("task", self.task), ("teacher", self.teacher)):
            for name, value in found.items():
                value.copy_(state[f"{kind}.{name}"])
