"""What a step of training minimises: the task's loss against labels, and a weighted sum of distillation losses.

    loss = hard_weight · task(student, labels) + Σ weight · distillation(student, teacher)

One ``nn.Module`` maps (inputs, targets) to it, teacher included: what DDP wraps and ``torch.compile`` compiles, as one piece.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.losses import FeatureLoss, Loss
from rarefy.tapping import Tap, matched, tapped
from rarefy.teaching import frozen
from rarefy.training import Task, Training

Losses = str | Loss | Sequence[tuple[float, Loss]] | None
Term = tuple[float, Loss]


def terms(loss: Losses) -> list[Term]:
    """``"lskd + 50*mse:on=stages"`` -> [(1.0, Lskd()), (50.0, Mse(on="stages"))]. Raises InputError."""
    if loss is None:
        return []
    if isinstance(loss, str):
        pairs: list[tuple[float, Any]] = []
        for part in re.split(r"(?<![0-9.][eE])\+", loss):
            number, star, name = part.partition("*")
            try:
                pairs.append((float(number) if star else 1.0, plugins.resolve("losses", name if star else part)))
            except ValueError as error:
                raise InputError(f"loss={loss!r}: {number.strip()!r} is not a number; write weight*name + weight*name") from error
    else:
        pairs = [(1.0, loss)] if isinstance(loss, Loss) else [(float(weight), one) for weight, one in loss]
    for weight, one in pairs:
        if not isinstance(one, Loss) or (one.on != "logits" and not isinstance(one, FeatureLoss)):
            raise InputError(
                f"loss: {type(one).__name__} is no loss; it needs `on`, a call, and `adapter` if it looks at features (rarefy/losses)"
            )
        if not 0 <= weight < math.inf:
            raise InputError(f"loss: weight {weight} of {plugins.describe(one)} is not 0 or more")
    return pairs


class Objective(nn.Module):
    """(inputs (N, ...), targets) -> the loss of that batch, a scalar."""

    def __init__(
        self, student: fx.GraphModule, teacher: fx.GraphModule | None, task: Task, training: Training, sum_of: list[Term], bf16: bool
    ):
        super().__init__()
        ours: list[Tap] = []
        theirs: list[Tap] = []
        self.terms: list[tuple[float, Loss, dict[str, tuple[int, int]]]] = []
        adapters: dict[str, nn.Module] = {}
        for index, (weight, one) in enumerate(sum_of):
            assert teacher is not None
            pairs = matched(student, teacher, one.on)
            self.terms.append((weight, one, {a.node.name: (_place(ours, a), _place(theirs, b)) for a, b in pairs}))
            if isinstance(one, FeatureLoss) and pairs:
                adapter = one.adapter({a.node.name: (a.shape, b.shape) for a, b in pairs})
                if adapter is not None:
                    adapters[str(index)] = adapter
        self.matched = [[term_name, theirs[b].node.name] for _, _, places in self.terms for term_name, (_, b) in places.items()]
        self.student = tapped(student, ours)
        self.teacher = frozen(tapped(teacher, theirs), bf16) if teacher is not None else None
        self.adapters = nn.ModuleDict(adapters)
        self.task, self.bf16 = task, bf16
        self.hard_weight, self.label_smoothing = training.hard_weight, training.label_smoothing

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            outputs, ours = self.student(inputs)
            taught, theirs = None, ()
            if self.teacher is not None:
                with torch.no_grad():
                    taught, theirs = self.teacher(inputs)
        outputs, taught, ours, theirs = pytree.tree_map(_float, (outputs, taught, ours, theirs))
        parts = []
        if self.hard_weight:
            parts.append(self.hard_weight * self.task.loss(outputs, targets, label_smoothing=self.label_smoothing))
        for index, (weight, one, places) in enumerate(self.terms):
            seen = {name: ours[a] for name, (a, _) in places.items()}
            if str(index) in self.adapters:
                seen = self.adapters[str(index)](seen)
            features = {name: (seen[name], theirs[b]) for name, (_, b) in places.items()}
            parts.append(weight * one(outputs, taught, targets, features))
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _place(taps: list[Tap], tap: Tap) -> int:
    if tap not in taps:
        taps.append(tap)
    return taps.index(tap)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
