"""What a step of training minimises: the task's loss against labels, and a weighted sum of distillation losses.

    loss = hard_weight · task(student, labels) + Σ share · Σ weight · distillation(student, teacher)

Several teachers: the mean of their losses (by their shares, which sum to 1), not the loss of their mean. For KL the two have the same gradient; features of
networks that differ have no mean, and each teacher is matched with the student on its own.

One ``nn.Module`` maps (inputs, targets) to it, teacher included: what DDP wraps and ``torch.compile`` compiles, as one piece.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rarefy import plugins
from rarefy.distillation.options import Training
from rarefy.distillation.teachers import frozen
from rarefy.errors import InputError
from rarefy.graph.features import Tap, matched, tapped
from rarefy.graph.nodes import device_of
from rarefy.tasks.task import Task

Features = Mapping[str, tuple[Tensor, Tensor]]
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


@runtime_checkable
class Loss(Protocol):
    @property
    def on(self) -> str: ...

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        """student, teacher: logits (N, classes). targets: int64 (N,), or probabilities (N, classes), or None without labels."""
        ...


@runtime_checkable
class FeatureLoss(Loss, Protocol):
    def adapter(self, shapes: Shapes) -> nn.Module | None:
        """A module from the student's features, {name: value}, to {name: value} as this loss compares them with the teacher's.

        shapes: node name -> (student's, teacher's) shape without the batch, (channels, ...).
        """
        ...


Losses = str | Loss | Sequence[tuple[float, Loss]] | None
Term = tuple[float, Loss]
Answer = tuple[tuple[Any, tuple[Tensor, ...]], ...]  # of each teacher: its output, and the values of its taps


def terms(loss: Losses) -> list[Term]:
    """``"lskd + 50*mse:on=stages"`` -> [(1.0, Lskd()), (50.0, Mse(on="stages"))]; ``feature`` is another word for mse. Raises InputError."""
    if loss is None:
        return []
    if isinstance(loss, str):
        pairs: list[tuple[float, Any]] = []
        for part in re.split(r"(?<![0-9.][eE])\+", loss):
            number, star, name = part.partition("*")
            try:
                word = re.sub(r"^\s*feature\b", "mse", name if star else part)
                pairs.append((float(number) if star else 1.0, plugins.resolve("losses", word)))
            except ValueError as error:
                raise InputError(
                    f"loss={loss!r}: {number.strip()!r} is not a number; write weight*name + weight*name"
                ) from error
    else:
        pairs = [(1.0, loss)] if isinstance(loss, Loss) else [(float(weight), one) for weight, one in loss]
    for weight, one in pairs:
        if not isinstance(one, Loss) or (one.on != "logits" and not isinstance(one, FeatureLoss)):
            raise InputError(
                f"loss: {type(one).__name__} is no loss; it needs `on`, a call, and `adapter` if it looks at features (rarefy/distillation/losses)"
            )
        if not 0 <= weight < math.inf:
            raise InputError(f"loss: weight {weight} of {plugins.describe(one)} is not 0 or more")
    return pairs


class Lesson(NamedTuple):
    """One loss from one teacher. places: student's node -> (index of its tap, index of the teacher's)."""

    weight: float
    loss: Loss
    teacher: int
    places: dict[str, tuple[int, int]]


class Objective(nn.Module):
    """(inputs (N, ...), targets) -> the loss of that batch, a scalar; with ``apart``, (2,): against labels, and against the teachers.

    taught: the teachers' answers, where they are known already. strength: what the teachers' losses are multiplied by, where it is not always 1.
    """

    def __init__(
        self, student: fx.GraphModule, teachers: Sequence[tuple[float, fx.GraphModule]], task: Task, training: Training, sum_of: list[Term], bf16: bool
    ):  # fmt: skip
        super().__init__()
        ours: list[Tap] = []
        theirs: list[list[Tap]] = [[] for _ in teachers]
        self.lessons: list[Lesson] = []
        self.adapters = nn.ModuleDict()
        for number, (share, teacher) in enumerate(teachers):
            for weight, one in sum_of:
                pairs = matched(student, teacher, one.on)
                places = {a.node.name: (_place(ours, a), _place(theirs[number], b)) for a, b in pairs}
                adapter = (
                    one.adapter({a.node.name: (a.shape, b.shape) for a, b in pairs})
                    if isinstance(one, FeatureLoss) and pairs
                    else None
                )
                if adapter is not None:
                    self.adapters[str(len(self.lessons))] = adapter
                self.lessons.append(Lesson(share * weight, one, number, places))
        self.matched = [
            [name, theirs[lesson.teacher][b].node.name]
            for lesson in self.lessons
            for name, (_, b) in lesson.places.items()
        ]
        self.student = tapped(student, ours)
        self.teachers = nn.ModuleList(
            frozen(tapped(teacher, taps), bf16) for (_, teacher), taps in zip(teachers, theirs)
        )
        self.task, self.bf16, self.apart = task, bf16, training.dot > 0
        self.hard_weight, self.label_smoothing = training.hard_weight, training.label_smoothing
        self.strength: Tensor | None
        self.register_buffer(
            "strength", torch.ones((), device=device_of(student)) if training.loss_warmup else None, persistent=False
        )

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        self.teachers.eval()
        return self

    def forward(self, inputs: Tensor, targets: Tensor | None, taught: Answer | None = None) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            outputs, ours = self.student(inputs)
        taught = self.answers(inputs) if taught is None else taught
        outputs, ours, taught = pytree.tree_map(_float, (outputs, ours, taught))
        hard = (
            [self.hard_weight * self.task.loss(outputs, targets, label_smoothing=self.label_smoothing)]
            if self.hard_weight
            else []
        )
        soft = []
        for index, (weight, one, teacher, places) in enumerate(self.lessons):
            answer, theirs = taught[teacher]
            seen = {name: ours[a] for name, (a, _) in places.items()}
            if str(index) in self.adapters:
                seen = self.adapters[str(index)](seen)
            features = {name: (seen[name], theirs[b]) for name, (_, b) in places.items()}
            soft.append(weight * one(outputs, answer, targets, features))
        if self.strength is not None:
            soft = [self.strength * one for one in soft]
        return torch.stack([_sum(hard), _sum(soft)]) if self.apart else _sum(hard + soft)

    @torch.no_grad()
    def answers(self, inputs: Tensor) -> Answer:
        """(output, (value of each tap)) of each teacher."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            return tuple(teacher(inputs) for teacher in self.teachers)


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _place(taps: list[Tap], tap: Tap) -> int:
    if tap not in taps:
        taps.append(tap)
    return taps.index(tap)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
