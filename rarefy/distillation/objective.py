"""What a step of training minimises: the task's loss against labels, and a weighted sum of distillation losses.

    loss = hard_weight · task(student, labels) + Σ share · Σ weight · distillation(student, teacher)

Several teachers: the mean of their losses (by their shares, which sum to 1), not the loss of their mean. For KL the two
have the same gradient; features of networks that differ have no mean, and each teacher is matched with the student on
its own.

One ``nn.Module`` maps (inputs, targets) to it, teacher included: what DDP wraps and ``torch.compile`` compiles, as one
piece (``Compiled``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rarefy import plugins
from rarefy.distillation.distributed import batch_norm
from rarefy.distillation.options import AUTO_STEPS, Training
from rarefy.distillation.teachers import frozen
from rarefy.errors import InputError, RarefyError
from rarefy.graph.features import Tap, behind, matched, tapped
from rarefy.graph.nodes import argument, device_of, set_argument
from rarefy.tasks.metric import Outputs
from rarefy.tasks.task import Task, compared, fitted, logits, teaching

aten = torch.ops.aten

Features = Mapping[str, tuple[Tensor, Tensor]]
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


@runtime_checkable
class Loss(Protocol):
    """What the student is to copy of its teacher: a choice of ``losses/``, or a user's own."""

    @property
    def on(self) -> str:
        """What it looks at beside the logits (``losses/__init__.py``)."""
        ...

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        """The loss of a batch, a scalar.

        student, teacher: logits (N, classes), float32; of a loss on features whatever the networks answer.
        targets: int64 (N,), or probabilities (N, classes), or None without labels.
        features: student's node name -> (student's value, teacher's value), both (N, channels, ...). Of a loss on
            "answers" or "cross" what the task compares: "scores" and the like (``rarefy/tasks/task.py``).
        """
        ...


@runtime_checkable
class FeatureLoss(Loss, Protocol):
    """A loss that looks at features."""

    def adapter(self, shapes: Shapes) -> nn.Module | None:
        """What brings the student's features, {name: value}, to the teacher's shape; trained along, then thrown away.

        shapes: node name -> (student's, teacher's) shape without the batch, (channels, ...).
        """
        ...


Losses = str | Loss | Sequence[tuple[float, Loss]] | None
Term = tuple[float, Loss]
Answer = tuple[tuple[Tensor, tuple[Tensor, ...]], ...]  # of each teacher: its output, and the values of its taps
T = TypeVar("T")


def terms(loss: Losses, task: Task | None = None) -> list[Term]:
    """``"lskd + 50*mse:on=stages"`` -> [(1.0, Lskd()), (50.0, Mse(on="stages"))]; ``feature`` is another word for mse,
    and ``auto`` for what the task says.

    Raises InputError.
    """
    if loss is None:
        return []
    if loss == "auto":
        loss = teaching(task)
    if isinstance(loss, str):
        pairs = []
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
                f"loss: {type(one).__name__} is no loss; it needs `on`, a call, and `adapter` if it looks at features "
                "(rarefy/distillation/losses)"
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
    """(inputs (N, ...), targets) -> the loss of that batch, a scalar; with ``dot`` (2,): of labels, and of teachers.

    taught: the teachers' answers, where they are known already.
    strength: what the teachers' losses are multiplied by, where that is not always 1.
    matched: [name of the student's node, of the teacher's] of each pair of features.
    """

    def __init__(
        self,
        student: fx.GraphModule,
        teachers: Sequence[tuple[float, fx.GraphModule]],
        task: Task,
        training: Training,
        losses: Sequence[Term],
        bf16: bool,
    ):
        super().__init__()
        ours: list[Tap] = []
        theirs: list[list[Tap]] = [[] for _ in teachers]
        self.lessons: list[Lesson] = []
        self.adapters, self.rests = nn.ModuleDict(), nn.ModuleDict()
        for number, (share, teacher) in enumerate(teachers):
            for weight, one in losses:
                pairs = matched(student, teacher, one.on)
                places = {a.node.name: (_place(ours, a), _place(theirs[number], b)) for a, b in pairs}
                adapter = (
                    one.adapter({a.node.name: (a.shape, b.shape) for a, b in pairs})
                    if isinstance(one, FeatureLoss) and pairs
                    else None
                )
                if adapter is not None:
                    self.adapters[str(len(self.lessons))] = adapter
                if one.on == "cross":
                    self.rests[str(len(self.lessons))] = behind(teacher.eval(), [tap for _, tap in pairs])
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
        self.task, self.bf16, self.apart = fitted(task, student), bf16, training.dot > 0
        self.of_teachers = [fitted(task, teacher) for _, teacher in teachers]
        self.hard_weight, self.label_smoothing = training.hard_weight, training.label_smoothing
        self.strength: Tensor | None
        self.register_buffer(
            "strength", torch.ones((), device=device_of(student)) if training.loss_warmup else None, persistent=False
        )

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        self.teachers.eval()
        self.rests.eval()
        return self

    def freeze(self) -> bool:
        """From now on the student's batch norm takes its statistics as they are. Was that new?"""
        norms = [node for node in self.student.graph.nodes if node.target in (aten.batch_norm.default, batch_norm)]
        live = [node for node in norms if argument(node, "training") is not False]
        for node in live:
            set_argument(node, "training", False)
        self.student.recompile()
        return bool(live)

    def forward(self, inputs: Tensor, targets: Tensor | None, taught: Answer | None = None) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            outputs, ours = self.student(inputs)
        taught = self.answers(inputs) if taught is None else taught
        outputs, ours, taught = pytree.tree_map(_float, (outputs, ours, taught))
        hard, soft = [], []
        if self.hard_weight:
            hard = [self.hard_weight * self.task.loss(outputs, targets, label_smoothing=self.label_smoothing)]
        for index, lesson in enumerate(self.lessons):
            answer, theirs = taught[lesson.teacher]
            seen = {name: ours[a] for name, (a, _) in lesson.places.items()}
            if str(index) in self.adapters:
                seen = self.adapters[str(index)](seen)
            soft.append(lesson.weight * self._taught(index, inputs, outputs, answer, targets, seen, theirs))
        if self.strength is not None:
            soft = [self.strength * one for one in soft]
        return torch.stack([_sum(hard), _sum(soft)]) if self.apart else _sum(hard + soft)

    def _taught(
        self,
        index: int,
        inputs: Tensor,
        outputs: Outputs,
        answer: Outputs,
        targets: Tensor | None,
        seen: Mapping[str, Tensor],
        theirs: Sequence[Tensor],
    ) -> Tensor:
        """One lesson's loss. answer: the teacher's. seen: the student's features, as the loss wants them."""
        _, one, teacher, places = self.lessons[index]
        guide = self.of_teachers[teacher]
        if one.on == "cross":
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
                outputs = self.rests[str(index)](inputs, *seen.values())
            outputs = pytree.tree_map(_float, outputs)
        if one.on in ("answers", "cross"):
            return one(
                logits(self.task, outputs), logits(guide, answer), targets, compared(self.task, outputs, answer, guide)
            )
        features = {name: (seen[name], theirs[b]) for name, (_, b) in places.items()}
        if one.on != "logits":
            return one(outputs, answer, targets, features)
        pair = logits(self.task, outputs), logits(guide, answer)
        labels = None if targets is None or len(targets) != len(pair[0]) else targets
        return one(*pair, labels, features)

    @torch.no_grad()
    def answers(self, inputs: Tensor) -> Answer:
        """(output, (value of each tap)) of each teacher."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            return tuple(teacher(inputs) for teacher in self.teachers)


class Compiled:
    """The objective as the loop calls it: compiled where that is asked for or pays, and plain where the compiler can't.

    mode: no, default or reduce-overhead (CUDA graphs), as ``torch.compile`` takes it.
    auto: nobody asked for the compiler in so many words.
    trusted: a step of it has run, so an error of a later one is not the compiler's.
    """

    call: Callable[..., Tensor]

    def __init__(self, plain: nn.Module, mode: str, auto: bool):
        self.plain, self.mode, self.auto, self.trusted = plain, mode, auto, False
        self.compile()

    def compile(self) -> None:
        """From here on, and again after a change of the graphs."""
        self.call = self.plain if self.mode == "no" else torch.compile(self.plain, mode=self.mode, dynamic=False)

    def falls_back(self, error: Exception) -> bool:
        """A first step that failed is to be tried again, without the compiler."""
        if not self.auto or self.mode == "no" or self.trusted or isinstance(error, RarefyError):
            return False
        self.mode, self.call = "no", self.plain
        logging.getLogger("rarefy").warning(
            "not compiled (%s: %s)", type(error).__name__, (str(error).strip().splitlines() or [""])[0][:200]
        )
        return True


def compiler_mode(training: Training, device: torch.device, steps: int, processes: int) -> str:
    """``Compiled.mode`` of a training of so many steps."""
    if training.compile != "auto":
        return training.compile
    pays = device.type == "cuda" and steps >= AUTO_STEPS and not training.dot and processes == 1
    return "reduce-overhead" if pays and importlib.util.find_spec("triton") is not None else "no"


@contextlib.contextmanager
def compiler_silenced() -> Iterator[None]:
    """It tells whoever compiles in fp32 of TF32, and the like; precision is the caller's choice here, and was made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\._inductor\.")
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        # its own first one, made to hold a pool of memory
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        yield


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _place(taps: list[Tap], tap: Tap) -> int:
    if tap not in taps:
        taps.append(tap)
    return taps.index(tap)


def _float(value: T) -> T | Tensor:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
