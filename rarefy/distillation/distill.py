"""distill(): the student learns from its teacher; train(): from labels alone. Both are one loop (``loop.py``).

    loss = hard_weight · task(student, labels) + Σ weight · distillation(student, teacher)

A loss (``rarefy/distillation/losses``) only says what the student is to copy. The options are in ``options.py``, what a
step minimises in ``objective.py``, optimizers in ``optimizer.py``, the file a killed run goes on from in
``checkpoint.py``. A quantised student is trained in its codes (``qat.py``). Under ``torchrun`` a batch is split over
the processes (``distributed.py``): ``batch_size`` is the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from rarefy.deployment.description import remember
from rarefy.distillation import loop, qat
from rarefy.distillation.distributed import accelerator_of
from rarefy.distillation.loop import Extras, Job
from rarefy.distillation.objective import Losses, Term, terms
from rarefy.distillation.options import Penalty, Student, Training, training_of
from rarefy.distillation.teachers import Teachers, student_of, teachers_of
from rarefy.errors import InputError
from rarefy.graph.nodes import device_of
from rarefy.graph.shapes import output_shapes
from rarefy.graph.signature import refusal
from rarefy.kernels import is_quantised
from rarefy.plugins import several
from rarefy.system.logs import Logging
from rarefy.system.progress import say
from rarefy.tasks.detector import capture
from rarefy.tasks.task import Task, settled


def distill(
    student: nn.Module | str | Student,
    teacher: Teachers,
    task: Task,
    *,
    loss: Losses = "auto",
    training: Training | str | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    validate: Callable[[fx.GraphModule], float] | None = None,
    penalty: Penalty | None = None,
    cache: str | Path | None = None,
    logs: Logging = None,
    progress: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """The student's graph with trained weights; student and teacher stay as they are.

    student: a network, which comes back quantised if it is, or a word for one made from the (first) teacher
        (``"depth:keep=0.5"``, ``"timm:resnet18"``; rarefy/compression/students).
    teacher: a module, several, or [(weight, module), ...]: the mean of their losses. The student itself may be one.
    task: what is to be learned, and from which images (rarefy/tasks).
    loss: text (``"lskd"``, ``"lskd + 50*mse:on=stages"``), a loss, or [(weight, loss), ...]; "auto": what the task
        says, else lskd.
    training: a Training, or the name of one: fast, normal, patient.
    device: where to compute; None: on the GPU, if there is one.
    checkpoint: a folder; the run is saved there at each epoch's end (of short ones at so many as take no tenth of the
        time) and every ``checkpoint_seconds``, and goes on from there when it is called again with the same arguments.
        A finished run is returned at once.
    validate: graph -> a number that should rise, in place of the task's metric on the val split.
    penalty: a gradient to add in each step (``Penalty``).
    cache: a folder for the teacher's answers (``teacher_cache.py``): each picture is shown to the teacher once.
    logs: who is told the numbers of each epoch while it runs: a logger (``"tensorboard:folder=runs"``, ``"mlflow"``,
        ``"wandb"``; rarefy/system/loggers), a folder for TensorBoard, a function of (step, values), or a list of these.
    progress: show how far it is, on stderr.
    options: fields of Training, which go before those of ``training``. Where images have no labels, hard_weight=0
        learns from the teacher alone.

    Raises InputError for options, models or checkpoints that do not fit; TrainingDiverged when the loss is not finite,
    whose ``graph`` is the last good state.
    """
    extras = Extras(validate, penalty, checkpoint, checkpoint_seconds, cache, several("loggers", logs), progress)
    return _trained("distill", student, teacher, task, loss, training_of(training, options, "distill"), device, extras)


def train(
    model: nn.Module,
    task: Task,
    *,
    training: Training | str | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    validate: Callable[[fx.GraphModule], float] | None = None,
    penalty: Penalty | None = None,
    logs: Logging = None,
    progress: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """The model's graph trained from labels alone: ``distill`` without a teacher, whose arguments it takes."""
    extras = Extras(validate, penalty, checkpoint, checkpoint_seconds, None, several("loggers", logs), progress)
    return _trained("train", model, None, task, None, training_of(training, options, "train"), device, extras)


def _trained(
    verb: str,
    student: nn.Module | str | Student,
    teacher: Teachers,
    task: Task,
    loss: Losses,
    training: Training,
    device: torch.device | str | None,
    extras: Extras,
) -> fx.GraphModule:
    losses = terms(loss, task)
    _check(verb, losses, teacher is not None, training)
    if training.patience and extras.validate is None and task.data.val is None:
        raise InputError(
            f"{verb}: patience={training.patience} needs a val split to look at, or validate=; pass patience=0"
        )
    for one in (student, *(one for _, one in teachers_of(teacher))):
        task = settled(task, one)
    training = _of_few(training, task, verb)
    teachers = [(share, _graph(one, task, "teacher")) for share, one in teachers_of(teacher)]
    if not isinstance(student, nn.Module):
        if not teachers:
            raise InputError(f"student={student!r}: is made from a teacher; pass one, or a network")
        student = student_of(student, teachers[0][1], task=task, seed=training.seed)
    graph = _graph(student, task, "student")
    on_logits = any(one.on in ("logits", "answers", "cross") for _, one in losses)
    for _, guide in teachers if on_logits else ():
        ours, theirs = output_shapes(graph), output_shapes(guide)
        if ours != theirs:
            raise InputError(
                f"student answers {ours}, the teacher {theirs}; "
                "give both the same classes, or compare features alone (loss='mse', of detectors loss='pkd')"
            )
    accelerator = accelerator_of(device, on_logits or training.hard_weight > 0)
    several = accelerator.num_processes > 1
    if several and training.dot:
        raise InputError(
            f"{verb}: dot={training.dot} takes two passes backwards, which several processes can't share; pass dot=0"
        )
    place = torch.device(accelerator.device if several or device is None else device)
    job = Job(verb, graph, teachers, losses, task, training, accelerator, place, extras)
    return remember(qat.trained(job) if is_quantised(graph) else loop.run(job), task)


def _of_few(training: Training, task: Task, verb: str) -> Training:
    """The usual batch is all images where there are fewer; another one, that was asked for, stays."""
    images = task.data.length("train") if task.data.train is not None else 0
    if training.batch_size != Training.batch_size or not 0 < images < training.batch_size:
        return training
    say(f"{verb}: batch_size={images}, as many as there are training images")
    return dataclasses.replace(training, batch_size=images, accumulate=min(training.accumulate, images))


def _check(verb: str, losses: Sequence[Term], taught: bool, training: Training) -> None:
    """Is there something to learn from? Raises InputError."""
    if bool(losses) != taught:
        raise InputError("distill: a loss needs a teacher, and a teacher a loss; train() learns from labels alone")
    if not losses and not training.hard_weight:
        raise InputError(
            "train: hard_weight=0 leaves nothing to learn from; give it a weight, or distil from a teacher"
        )
    if training.dot and not (losses and training.hard_weight):
        raise InputError(f"{verb}: dot={training.dot} weighs labels and teacher apart, so it needs both; pass dot=0")


def _graph(model: nn.Module, task: Task, which: str) -> fx.GraphModule:
    shape = tuple(task.data.input_shape)
    graph = capture(model, torch.zeros(2, *shape, device=device_of(model))).eval()
    wanted = tuple(graph.meta["inputs"][0]["shape"])
    if graph.meta.get("core") is None and wanted != shape and not _takes(graph, shape):
        raise InputError(
            f"{which}: takes inputs of shape {wanted}, the task gives {shape}; "
            "give the task that size=, or capture it anew"
        )
    return graph


def _takes(graph: fx.GraphModule, shape: tuple[int, ...]) -> bool:
    """Are its sizes free, and fit?"""
    return "sizes" in graph.meta and refusal(graph, 0, (1, *shape)) is None
