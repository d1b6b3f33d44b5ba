"""distill(): the student learns from its teacher. The training loop, written once.

    loss = hard_weight · task(student, labels) + Σ weight · distillation(student, teacher)

A loss (``rarefy/distillation/losses``) only says what the student is to copy; batches, schedule, precision, averaging and recovery are here, and
``train()`` is the same loop without a teacher. The options are in ``training.py``, what a step minimises in ``objective.py``, mixup and cutmix in
``mixing.py``, the file a killed run goes on from in ``checkpoint.py``. Choices made:

* Student and teacher see the same augmented, and the same mixed, picture (Beyer 2021, 2106.05237: consistent teaching).
* SGD with Nesterov momentum, or AdamW; linear warm-up, then a cosine to zero; no weight decay on biases and norms.
* Everything random in step k is drawn from (seed, k): resuming needs no generator's state, and a resumed run ends, on a CPU, with the bits
  of an undisturbed one. The price is one reseeding a step, some microseconds.
* The device is read every ``CHECK_STEPS`` steps and at the end of an epoch, not each step; a loss that is not finite is found then. The state
  of the last epoch's end is kept for that case.
* Where a masked weight (``meta["sparse"]``, see masking.py) is zero, its gradient is set to zero before anything sees it: so it, its momentum and
  its average stay zero, and a checkpoint needs no mask.
* A penalty (``schedules/group_sparse.py``) adds a gradient of its own in each step; what it knows is in the checkpoint.
* EMA (``ema=0.999``) is the bias-corrected mean, θ̄ₜ = Σ dᵗ⁻ⁱ θᵢ / Σ dᵗ⁻ⁱ, so it needs no warm-up; running statistics are averaged like weights.
* Under ``torchrun`` (accelerate finds it) a batch is split over the processes: ``batch_size`` is the whole, and batch norm's statistics are those of the whole (``syncing.py``), unless
  ``sync_norm="no"``; every process reads the whole batch from the task, and takes its share.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import gc
import importlib.util
import itertools
import logging
import math
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from rarefy import plugins
from rarefy.compression import students
from rarefy.data.augmentation import mix
from rarefy.distillation.checkpoint import Store, digest, load_into, tensors_of
from rarefy.distillation.distributed import batch_norm, synchronised
from rarefy.distillation.objective import Answer, Losses, Objective, Term, terms
from rarefy.distillation.optimizer import Dot
from rarefy.distillation.options import AUTO_STEPS, Penalty, Task, Training, training_of
from rarefy.distillation.qat import is_quantized, suited, to_codes, to_trainable
from rarefy.distillation.qat_batch_norm import put_back
from rarefy.distillation.teacher_cache import Answers
from rarefy.distillation.teachers import Teachers, teachers_of
from rarefy.distillation.tensorboard import Logs
from rarefy.errors import FormatError, InputError, RarefyError, TrainingDiverged, WorkerLost
from rarefy.graph.capture import as_graph, aten, device_of, output_shapes
from rarefy.system.progress import track

CHECK_STEPS = 50
MOMENT_BATCHES = 8
NUMBERS = ("step", "accumulate", "halved", "curve", "best_value", "best_epoch", "seconds", "waited")


def distill(
    student: nn.Module | str | students.Student,
    teacher: Teachers,
    task: Task,
    *,
    loss: Losses = "lskd",
    training: Training | str | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    validate: Callable[[fx.GraphModule], float] | None = None,
    penalty: Penalty | None = None,
    cache: str | Path | None = None,
    logs: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """The student's graph with trained weights; student and teacher stay as they are. A quantised student is trained in its codes
    (quantization-aware training, ``trainable.py``) and comes back quantised.

    student: a network, or a word for one made from the (first) teacher (``"depth:keep=0.5"``, ``"timm:resnet18"``; rarefy/compression/students).
    teacher: a module, several, or [(weight, module), ...]: the mean of their losses. The student itself may be one.
    loss: text (``"lskd"``, ``"lskd + 50*mse:on=stages"``), a loss, or [(weight, loss), ...].
    training, options: a Training, or the name of one: fast, normal, patient; options are its fields and go before it. Where images have no labels,
        hard_weight=0 learns from the teacher alone.
    checkpoint: a folder; the run is saved there at each epoch's end and every ``checkpoint_seconds``, and goes on from there when it is called
        again with the same arguments. A finished run is returned at once.
    validate: graph -> a number that should rise, in place of top-1 on the val split.
    penalty: a gradient to add in each step (``Penalty``).
    cache: a folder for the teacher's answers (``answers.py``): each picture is shown to the teacher once.
    logs: a folder for TensorBoard.

    Raises InputError for options, models or checkpoints that do not fit; TrainingDiverged when the loss is not finite, whose ``graph`` is the
    last good state.
    """
    return _run(
        "distill", student, teacher, task, loss, training, device, checkpoint, checkpoint_seconds, validate, penalty, cache, logs, progress, options
    )  # fmt: skip


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
    logs: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """``distill`` without a teacher: the model's graph trained from labels alone."""
    return _run(
        "train", model, None, task, None, training, device, checkpoint, checkpoint_seconds, validate, penalty, None, logs, progress, options
    )


def _run(
    step_name: str,
    student: nn.Module | str | students.Student,
    teacher: Teachers,
    task: Task,
    loss: Losses,
    given: Training | str | None,
    device: torch.device | str | None,
    checkpoint: str | Path | None,
    checkpoint_seconds: float,
    validate: Callable[[fx.GraphModule], float] | None,
    penalty: Penalty | None,
    cache: str | Path | None,
    logs: str | Path | None,
    progress: bool,
    options: Mapping[str, Any],
    origin: str | None = None,
) -> fx.GraphModule:
    """origin: digest of what the student was made from, where that is not the student itself."""
    training = training_of(given, options, step_name)
    if isinstance(student, fx.GraphModule) and is_quantized(student):
        common: Any = (
            teacher, task, loss, suited(training), device, checkpoint, checkpoint_seconds, validate, penalty, cache, logs, progress, {}, digest(student)
        )  # fmt: skip
        try:
            return to_codes(student, _run(step_name, _normed(student, task, training, device), *common))
        except TrainingDiverged as error:
            error.graph = to_codes(student, error.graph)  # type: ignore[attr-defined]
            raise
    sum_of = terms(loss)
    if bool(sum_of) != (teacher is not None):
        raise InputError("distill: a loss needs a teacher, and a teacher a loss; train() learns from labels alone")
    if not sum_of and not training.hard_weight:
        raise InputError("train: hard_weight=0 leaves nothing to learn from; give it a weight, or distil from a teacher")
    if training.dot and not (sum_of and training.hard_weight):
        raise InputError(f"{step_name}: dot={training.dot} weighs labels and teacher apart, so it needs both; pass dot=0")
    if training.patience and validate is None and task.val is None:
        raise InputError(f"{step_name}: patience={training.patience} needs a val split to look at, or validate=; pass patience=0")
    guides = [(share, _graph(one, task, "teacher")) for share, one in teachers_of(teacher)]
    if not isinstance(student, nn.Module):
        if not guides:
            raise InputError(f"student={student!r}: is made from a teacher; pass one, or a network")
        student = students.made(student, guides[0][1], task=task, seed=training.seed)
    home = device_of(student)
    graph = _graph(student, task, "student")
    for _, guide in guides if any(one.on == "logits" for _, one in sum_of) else ():
        ours, theirs = output_shapes(graph), output_shapes(guide)
        if ours != theirs:
            raise InputError(
                f"student answers {ours}, the teacher {theirs}; give both the same classes, or compare features alone (loss='mse')"
            )
    described = {
        **dataclasses.asdict(training),
        "loss": " + ".join(f"{weight:g}*{plugins.describe(one)}" for weight, one in sum_of) or None,
        **({"penalty": penalty.describe()} if penalty is not None else {}),
        **({"shares": [share for share, _ in guides]} if len(guides) > 1 else {}),
        **({"cache": True} if cache is not None else {}),
    }
    accelerator = _accelerator(device, any(one.on == "logits" for _, one in sum_of) or training.hard_weight > 0)
    if accelerator.num_processes > 1 and training.dot:
        raise InputError(f"{step_name}: dot={training.dot} takes two passes backwards, which several processes can't share; pass dot=0")
    if accelerator.num_processes > 1 or device is None:
        device = accelerator.device
    device = torch.device(device)
    store = None
    if checkpoint is not None:
        splits = [split for split in ("train", "val") if split == "train" or task.val is not None]
        identity = {
            "options": described,
            "student": origin or digest(graph),
            "teacher": " ".join(digest(guide) for _, guide in guides) or None,
            "data": {split: task.fingerprint(split) for split in splits},
            "task": {key: value for key, value in task.describe().items() if key not in splits},  # those name places, not content
        }
        store = Store(Path(checkpoint), identity, checkpoint_seconds, accelerator.is_main_process)
        finished = store.finished()
        if finished is not None:
            load_into(graph, {name: value.to(home) for name, value in store.tensors("result.").items()})
            graph.meta.setdefault("history", []).append(finished)
            return graph

    with _seeded(training.seed, device), _compiler_keeps_its_hints(), _all_or_none(accelerator, checkpoint):
        known = [digest(guide) for _, guide in guides] if cache is not None else []
        run = _Run(graph, guides, task, training, sum_of, accelerator, device, penalty)
        if store is not None:
            run.restore(store)
            accelerator.wait_for_everyone()
        if cache is not None:
            run.remember(cache, known)
        if logs is not None and accelerator.is_main_process:
            run.logs = Logs(logs, run.step)
        facts = run.fit(step_name, store, validate, progress)
    record = {"step": step_name, "options": described, "facts": facts}
    graph.to(home)
    graph.meta.setdefault("history", []).append(record)
    if store is not None:
        store.finish(record, tensors_of(graph))
        accelerator.wait_for_everyone()
    return graph


@dataclass
class _Run:
    """Everything that changes while training. A checkpoint holds ``state()`` and the NUMBERS."""

    graph: fx.GraphModule
    guides: list[tuple[float, fx.GraphModule]]
    task: Task
    training: Training
    sum_of: list[Term]
    accelerator: Accelerator
    device: torch.device
    penalty: Penalty | None = None
    memory: Answers | None = None
    fixed: bool = False  # an image is the same picture in every epoch
    logs: Logs | None = None
    compiled: str = "no"
    trusted: bool = False  # the compiled step has run
    frozen: bool = False  # batch norm's statistics stand still
    step: int = 0
    accumulate: int = 1
    halved: list[dict[str, int]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    best_value: float | None = None
    best_epoch: int | None = None
    best: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0

    def __post_init__(self) -> None:
        training, world = self.training, self.accelerator.num_processes
        if training.batch_size % world:
            raise InputError(f"batch_size={training.batch_size} can't be split over {world} processes; pass a multiple of {world}")
        self.per_epoch = self.task.length("train") // training.batch_size
        if not self.per_epoch:
            raise InputError(
                f"batch_size={training.batch_size} is above the {self.task.length('train')} training images; pass a smaller one"
            )
        self.total = training.steps if training.steps is not None else training.epochs * self.per_epoch
        self.bf16 = training.precision == "bf16" or (training.precision == "auto" and self.device.type == "cuda")
        convolves = any(node.target in (aten.conv2d.default, aten.conv2d.padding) for node in self.graph.graph.nodes)
        self.channels_last = training.channels_last == "yes" or (training.channels_last == "auto" and convolves)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.graph.to(self.device).to(memory_format=layout)
        self.objective = Objective(self.graph, self.guides, self.task, training, self.sum_of, self.bf16)
        self.guides = []  # the objective has copies of its own
        if world > 1 and training.sync_norm == "yes":
            synchronised(self.objective.student)
        for one in (self.objective.teachers, self.objective.adapters):
            one.to(self.device).to(memory_format=layout)
        self.plain: Any = self._wrapped()
        self.compiled = self._compiling()
        self.learner: Any = self.plain if self.compiled == "no" else torch.compile(self.plain, mode=self.compiled, dynamic=False)
        self.learned = {name: one for name, one in self.objective.named_parameters() if one.requires_grad}
        if not self.learned:
            raise InputError("the student has no parameter that requires a gradient; call requires_grad_() on it first")
        self.dot = Dot(self.learned, training.momentum, training.dot, training.weight_decay) if training.dot else None
        self.optimizer = _optimizer(self.learned.values(), training, self.device)
        self.parameters = {name: one for name, one in self.graph.named_parameters() if one.requires_grad}
        self.masks = {name: self.parameters[name].detach() != 0 for name in self.graph.meta.get("sparse", []) if name in self.parameters}
        self.average = copy.deepcopy(self.graph).requires_grad_(False) if training.ema else None
        self.averaged = _Averaged.of(self.average, self.graph) if self.average is not None else None
        self.result = self.average if self.average is not None else self.graph
        self.accumulate = training.accumulate
        self.loss_sum = torch.zeros((), device=self.device)
        self.good = {name: value.detach().clone() for name, value in tensors_of(self.result).items()}

    def _wrapped(self) -> Any:
        if self.accelerator.num_processes > 1:
            fixed = [f"teachers.{name}" for name in tensors_of(self.objective.teachers)]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.objective, fixed)
        return self.accelerator.prepare_model(self.objective, device_placement=False)

    def _compiling(self) -> str:
        """The compiler's mode, or no."""
        if self.training.compile != "auto":
            return self.training.compile
        pays = self.device.type == "cuda" and self.total >= AUTO_STEPS and self.dot is None and self.accelerator.num_processes == 1
        return "reduce-overhead" if pays and importlib.util.find_spec("triton") is not None else "no"

    def remember(self, folder: str | Path, teachers: list[str]) -> None:
        """From now on each picture's answers are looked up in that folder. teachers: their digests."""
        training = self.training
        rows = self.task.rows("train", training.batch_size, shuffle_seed=training.seed, epoch=0)
        self.fixed = rows is not None and not (training.mixup or training.cutmix)
        draws = {name: getattr(training, name) for name in ("seed", "batch_size", "mixup", "cutmix")}
        identity = {
            "teachers": teachers,
            "taps": self.objective.matched,
            "data": self.task.fingerprint("train"),
            "task": {key: value for key, value in self.task.describe().items() if key not in ("train", "val")},
            "layout": [self.bf16, self.channels_last, self.device.type],
            "draws": None if self.fixed else draws,
        }
        self.memory = Answers(
            folder, identity, self.objective.answers(self._laid(torch.zeros(2, *self.task.input_shape, device=self.device))), self.device
        )

    def _laid(self, inputs: Tensor) -> Tensor:
        return inputs.contiguous(memory_format=torch.channels_last) if self.channels_last and inputs.dim() == 4 else inputs

    # -- the loop

    def fit(self, label: str, store: Store | None, validate: Callable[[fx.GraphModule], float] | None, progress: bool) -> dict[str, Any]:
        """Train from the step the run is at to the last; leave the result in ``graph``; the facts of the record."""
        begun, resumed, before = time.monotonic(), self.step, self.seconds
        self.plain.train()
        steps = track(self._batches(), self.total, label, progress and self.accelerator.is_main_process, done=self.step)
        for inputs, targets, taught in steps:
            rate = self.training.rate(self.step, self.total)
            self._advance(inputs, targets, taught, rate)
            self.step += 1
            ends = self.step % self.per_epoch == 0 or self.step == self.total
            if ends or self.step % CHECK_STEPS == 0:
                mean = self._checked(rate, whole=ends)
                steps.update(
                    f"loss {mean:.4f}" + (f", val {self.curve[-1]['val']:.2%}" if self.curve and self.curve[-1]["val"] is not None else "")
                )
                if ends:
                    self._end_epoch(mean, rate, validate)
                self._log(mean, rate, (self.step - resumed) * self.training.batch_size / (time.monotonic() - begun), ends)
            self.seconds = before + time.monotonic() - begun
            if store is not None and (ends or store.due()):
                if not ends:
                    self._checked(rate, whole=True, together=False)
                store.save(self.state(), self.numbers())
        if self.logs is not None:
            self.logs.close()
        self._settle()
        images = (self.step - resumed) * self.training.batch_size
        spent = self.seconds - before
        return {
            "epochs": math.ceil(self.step / self.per_epoch),
            "steps": self.step,
            "stopped": {"epoch": self.curve[-1]["epoch"], "of": math.ceil(self.total / self.per_epoch)} if self.step < self.total else None,
            "curve": self.curve,
            "best": None if self.best_value is None else {"epoch": self.best_epoch, "val": self.best_value},
            "kept": self.training.keep if self.best_value is not None else "last",
            "matched": self.objective.matched,
            "device": str(self.device.type),
            "processes": self.accelerator.num_processes,
            "accumulate": self.accumulate,
            "halved": self.halved,
            "compiled": self.compiled,
            "precision": "bf16" if self.bf16 else "fp32",
            "timing": {
                "seconds": self.seconds,
                "images_per_second": images / spent if spent > 0 else None,
                "data_share": self.waited / self.seconds if self.seconds > 0 else None,
            },
        }

    @property
    def stopped(self) -> bool:
        """Has the val split seen no better state for so many epochs?"""
        patience = self.training.patience
        return bool(patience and self.best_epoch is not None and self.curve[-1]["epoch"] - self.best_epoch >= patience)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor | None, Answer | None]]:
        """Batches from the current step to the last: mixed, in the networks' layout, this process's share; and the teachers' answers, if they are kept."""
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        for epoch in itertools.count(self.step // self.per_epoch):
            start = self.step % self.per_epoch
            if self.step == self.total or self.stopped:
                return
            part, rows = self._known(epoch)
            source = self._mixed(epoch, start)
            for index in range(start, self.per_epoch):
                if self.step == self.total or self.stopped:
                    return
                begun = time.perf_counter()
                inputs, targets = next(source)
                if self.accelerator.num_processes > 1:
                    inputs, targets = inputs[share], targets[share] if targets is not None else None
                taught = self.memory.read(part, rows[index][share]) if self.memory is not None else None
                inputs = self._laid(inputs)
                self.waited += time.perf_counter() - begun
                yield inputs, targets, taught

    def _mixed(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """An epoch's batches from that step on."""
        training, fitting = self.training, {} if self.training.hard_weight else {"labelled": False}
        batches = self.task.batches(
            "train", training.batch_size, shuffle_seed=training.seed, augment=True, epoch=epoch, start=start, device=self.device, **fitting
        )
        step = start
        for inputs, targets in batches:
            yield mix(inputs, targets, training, self.task.classes if targets is not None else 0, epoch * self.per_epoch + step)
            step += 1
        raise InputError(f"the data ended at step {step} of epoch {epoch}, {self.per_epoch} were announced; task.length is wrong")

    def _known(self, epoch: int) -> tuple[str, Sequence[Tensor]]:
        """Where the answers to that epoch's pictures are kept, and in which rows; written now if they are not there yet."""
        if self.memory is None:
            return "", ()
        training, size = self.training, self.training.batch_size
        part = "all" if self.fixed else f"epoch {epoch}"
        ordered = self.task.rows("train", size, shuffle_seed=training.seed, epoch=epoch) if self.fixed else None
        rows = ordered if ordered is not None else list(torch.arange(self.per_epoch * size).split(size))
        if not self.memory.file(part).exists() and self.accelerator.is_main_process:
            labels = {"labelled": False}
            pictures = (
                self.task.batches("train", size, device=self.device, **labels)
                if self.fixed
                else itertools.islice(self._mixed(epoch, 0), self.per_epoch)
            )
            count = self.task.length("train") if self.fixed else self.per_epoch * size
            self.memory.write(part, count, (self.objective.answers(self._laid(inputs)) for inputs, _ in pictures))
        self.accelerator.wait_for_everyone()
        return part, rows

    def _advance(self, inputs: Tensor, targets: Tensor | None, taught: Answer | None, rate: float) -> None:
        """One step of the optimizer."""
        if self.training.freeze and not self.frozen and self.step >= round((1 - self.training.freeze) * self.total):
            self._freeze()
        if self.objective.strength is not None:  # linear, from the first step on
            self.objective.strength.fill_(min(1.0, (self.step + 1) / max(1, round(self.training.loss_warmup * self.total))))
        if self.penalty is not None and self.step % self.per_epoch == 0:
            self.penalty.begin(self.parameters)
        torch.manual_seed(_step_seed(self.training.seed, self.step, self.accelerator.process_index))
        loss = self._gradients(inputs, targets, taught)
        while loss is None:
            self._halve(len(inputs))
            loss = self._gradients(inputs, targets, taught)
        self.loss_sum += loss
        if self.penalty is not None:
            self.penalty.add(self.parameters)
        masked = [(parameter.grad, mask) for name, mask in self.masks.items() if (parameter := self.parameters[name]).grad is not None]
        if masked:
            torch._foreach_mul_(*map(list, zip(*masked)))
        if self.dot is not None:
            if self.masks:
                self.dot.mask({f"student.{name}": mask for name, mask in self.masks.items()})
            self.dot.step(self.training.clip)
        elif self.training.clip:
            nn.utils.clip_grad_norm_(self.learned.values(), self.training.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update(self.training.ema, self.step + 1)

    def _gradients(self, inputs: Tensor, targets: Tensor | None, taught: Answer | None) -> Tensor | None:
        """Gradients of the batch's mean loss, and that loss; None if the device's memory did not suffice."""
        graphs = self.compiled == "reduce-overhead"
        self._forget_gradients(own=graphs and self.accumulate > 1)
        try:
            total = None
            parts = self._parts(inputs, targets, taught)
            for index, part in enumerate(parts):
                if graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                apart = index + 1 < len(parts) and self.accelerator.num_processes > 1
                with self.accelerator.no_sync(self.learner) if apart else contextlib.nullcontext():
                    loss = self._backward(self.learner(*part), len(part[0]) / len(inputs))
                total = loss if total is None else total + loss
            self.trusted = True
            return total
        except RuntimeError as error:
            if _out_of_memory(error):
                return None
            if not self._falls_back(error):
                raise
        except Exception as error:
            if not self._falls_back(error):
                raise
        return self._gradients(inputs, targets, taught)

    def _parts(self, inputs: Tensor, targets: Tensor | None, taught: Answer | None) -> list[tuple[Any, ...]]:
        """What the objective is called with, part by part."""
        whole = (inputs, targets) if taught is None else (inputs, targets, taught)
        if self.accumulate == 1:
            return [whole]
        leaves, shape = pytree.tree_flatten(whole)
        pieces = zip(*(one.chunk(self.accumulate) if isinstance(one, Tensor) else itertools.repeat(one) for one in leaves))
        return [pytree.tree_unflatten(list(piece), shape) for piece in pieces]

    def _backward(self, loss: Tensor, share: float) -> Tensor:
        """Adds the gradients of that share of a batch."""
        loss = loss * share if share < 1 else loss
        if self.dot is None:
            loss.backward()
            return loss.detach()
        hard, soft = loss.unbind()
        self.dot.add(torch.autograd.grad(soft, list(self.learned.values()), retain_graph=True, allow_unused=True))
        hard.backward()
        return loss.detach().sum()

    def _freeze(self) -> None:
        """From now on batch norm takes its statistics as they are."""
        self.frozen, student = True, self.objective.student  # a graph of its own, whose tensors are those of ``graph``
        for node in student.graph.nodes:
            if node.target in (aten.batch_norm.default, batch_norm):
                node.update_arg(5, False)
        student.recompile()
        if self.compiled != "no":
            self.learner = torch.compile(self.plain, mode=self.compiled, dynamic=False)

    def _falls_back(self, error: Exception) -> bool:
        """With compile=auto, a network that the compiler can't do is trained without it: True. Only a first step tells of the compiler."""
        if self.training.compile != "auto" or self.compiled == "no" or self.trusted or isinstance(error, RarefyError):
            return False
        self.compiled, self.learner = "no", self.plain
        logging.getLogger("rarefy").warning(
            "not compiled (%s: %s)", type(error).__name__, (str(error).strip().splitlines() or [""])[0][:200]
        )
        return True

    def _forget_gradients(self, own: bool) -> None:
        """own: sums of several parts need memory of their own, for a CUDA graph writes each part's gradients to the same place."""
        self.optimizer.zero_grad(set_to_none=not own)
        if self.dot is not None:
            self.dot.forget()
        if own:
            for parameter in self.learned.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _halve(self, images: int) -> None:
        """Smaller parts after an out-of-memory error: the same batch, accumulated."""
        if self.accelerator.num_processes > 1 or self.accumulate >= images:
            raise InputError(
                f"{self.device}: out of memory with {-(-images // self.accumulate)} images at once; pass a smaller batch_size or accumulate={2 * self.accumulate}"
            )
        self.accumulate = min(2 * self.accumulate, images)
        self.halved.append({"step": self.step, "accumulate": self.accumulate})
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _checked(self, rate: float, *, whole: bool, together: bool = True) -> float:
        """Mean loss of the epoch so far, averaged over the processes if all of them ask ``together``.

        Raises TrainingDiverged unless it is finite; and, with ``whole``, all weights.
        """
        steps = (self.step - 1) % self.per_epoch + 1
        total = self.accelerator.reduce(self.loss_sum, "mean") if together and self.accelerator.num_processes > 1 else self.loss_sum
        mean = float(total) / steps
        if math.isfinite(mean) and not (whole and not _finite(self.result)):
            return mean
        kept = self._settled(self.good)
        epoch = self.curve[-1]["epoch"] if self.curve else None
        diverged = TrainingDiverged(
            f"{'loss' if not math.isfinite(mean) else 'weights'} not finite at step {self.step} of {self.total} (learning rate {rate:.3g}); "
            f"kept the state {f'after epoch {epoch}' if epoch is not None else 'from before training'}; "
            "start anew with a lower lr, clip=1 or precision=fp32"
        )
        diverged.graph = kept  # type: ignore[attr-defined]
        raise diverged

    def _end_epoch(self, mean: float, rate: float, validate: Callable[[fx.GraphModule], float] | None) -> None:
        self._agree()
        epoch = math.ceil(self.step / self.per_epoch)
        every = self.training.validate_every
        value = None
        if every and (epoch % every == 0 or self.step == self.total):
            value = self._validated(validate)
        self.curve.append({"epoch": epoch, "step": self.step, "lr": rate, "loss": mean, "val": value})
        self.loss_sum.zero_()
        for name, tensor in tensors_of(self.result).items():
            self.good[name].copy_(tensor.detach())
        if value is not None and (self.best_value is None or value > self.best_value):
            self.best_value, self.best_epoch = value, epoch
            if self.training.keep == "best":
                self.best = {name: tensor.clone() for name, tensor in self.good.items()}

    def _log(self, loss: float, rate: float, speed: float, ends: bool) -> None:
        if self.logs is not None:
            self.logs.add(
                self.step, loss=loss, lr=rate, images_per_second=speed, data_share=self.waited / self.seconds if self.seconds > 0 else None
            )
            if ends:
                self.logs.add(self.step, val=self.curve[-1]["val"])

    def _agree(self) -> None:
        """With ``sync_norm="no"`` running statistics are each process's own; the first one's are kept."""
        if self.accelerator.num_processes > 1:
            for one in filter(None, (self.graph, self.average)):
                for tensor in dict(one.named_buffers()).values():
                    torch.distributed.broadcast(tensor, 0)

    def _validated(self, validate: Callable[[fx.GraphModule], float] | None) -> float | None:
        """The number to raise: the caller's, else the share of right answers on the val split."""
        self.result.eval()
        if validate is not None:
            value = float(validate(self.result))
            self.result.eval()
            return value
        if self.task.val is None:
            return None
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            for inputs, targets in self.task.batches("val", self.training.batch_size, device=self.device):
                inputs, targets = inputs[share], targets[share]
                if self.channels_last and inputs.dim() == 4:
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                counts[0] += (self.result(inputs).argmax(1) == targets).sum()
                counts[1] += len(targets)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, "sum")
        right, seen = counts.tolist()
        return right / seen

    def _settle(self) -> None:
        """The kept state goes into ``graph``."""
        self._settled(self.best or {name: value.detach() for name, value in tensors_of(self.result).items()})

    def _settled(self, state: Mapping[str, Tensor]) -> fx.GraphModule:
        load_into(self.graph, state)
        self.graph.to(memory_format=torch.contiguous_format)
        self.graph.zero_grad(set_to_none=True)
        return self.graph.eval()

    # -- what a checkpoint holds

    def state(self) -> dict[str, Tensor]:
        found = {f"graph.{name}": value for name, value in tensors_of(self.graph).items()}
        found |= {f"adapters.{name}": value for name, value in tensors_of(self.objective.adapters).items()}
        if self.average is not None:
            found |= {f"average.{name}": value for name, value in tensors_of(self.average).items()}
        found |= {f"best.{name}": value for name, value in self.best.items()}
        for name, parameter in self.learned.items():
            found |= {
                f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[parameter].items() if isinstance(value, Tensor)
            }
        if self.penalty is not None:
            found |= {f"penalty.{name}": value for name, value in self.penalty.state().items()}
        if self.dot is not None:
            found |= {f"dot.{name}": value for name, value in self.dot.state().items()}
        return {**found, "loss_sum": self.loss_sum}

    def numbers(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NUMBERS}

    def restore(self, store: Store) -> None:
        """Go on from the checkpoint, if there is one."""
        numbers = store.numbers()
        if numbers is None:
            return
        try:
            for name in NUMBERS:
                setattr(self, name, numbers[name])
            load_into(self.graph, store.tensors("graph."))
            load_into(self.objective.adapters, store.tensors("adapters."))
            if self.average is not None:
                load_into(self.average, store.tensors("average."))
            self.best = {name: value.to(self.device) for name, value in store.tensors("best.").items()}
            for name, value in store.tensors("optimizer.").items():
                key, _, owner = name.partition(".")
                parameter = self.learned[owner]
                like = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value, device=self.device)
                self.optimizer.state[parameter][key] = like.detach().copy_(value)
            if self.penalty is not None:
                self.penalty.restore(store.tensors("penalty."), self.parameters)
            if self.dot is not None:
                self.dot.restore(store.tensors("dot."))
            self.loss_sum.copy_(store.tensors("loss_sum")[""])
        except (KeyError, RuntimeError) as error:
            raise FormatError(f"{store.file}: is incomplete ({error}); delete it to start anew") from error
        for name, tensor in tensors_of(self.result).items():
            self.good[name].copy_(tensor.detach())


# -- small parts


def _graph(model: nn.Module, task: Task, which: str) -> fx.GraphModule:
    graph = as_graph(model, torch.zeros(2, *task.input_shape, device=device_of(model))).eval()
    wanted = tuple(graph.meta["inputs"][0]["shape"])
    if graph.meta.get("core") is None and wanted != tuple(task.input_shape):
        raise InputError(
            f"{which}: takes inputs of shape {wanted}, the task gives {tuple(task.input_shape)}; give the task that size=, or capture it anew"
        )
    return graph


def _normed(student: fx.GraphModule, task: Task, training: Training, device: torch.device | str | None) -> fx.GraphModule:
    """The trainable form of a quantised student; with ``live_norm`` the batch norm that was folded into it is put back."""
    learns = to_trainable(student)
    weights = {
        name for record in student.meta.get("history", []) if record["step"] == "quantize" for name in record["facts"].get("batch_norm", ())
    }
    if not weights or training.live_norm == "no":
        return learns
    home = device_of(learns)
    device = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fitting = {} if training.hard_weight else {"labelled": False}
    batches = task.batches("train", min(training.batch_size, 64), shuffle_seed=training.seed, augment=True, device=device, **fitting)
    return put_back(learns.to(device), weights, (inputs for inputs, _ in itertools.islice(batches, MOMENT_BATCHES))).to(home)


def _accelerator(device: torch.device | str | None, logits: bool) -> Accelerator:
    """Knows of torchrun. A run of one process uses it for nothing else, and leaves its global state alone."""
    on_cpu = torch.device(device).type == "cpu" if device is not None else not torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    ddp = DistributedDataParallelKwargs(find_unused_parameters=not logits)
    there = _grouped()
    accelerator = Accelerator(cpu=on_cpu and several, kwargs_handlers=[ddp])
    if not there and _grouped() and torch.distributed.get_backend() == "gloo":
        atexit.register(_end_group)
    return accelerator


def _end_group() -> None:
    """Gloo's threads let go of tensors after the call that waited for them has gone on; one that does so while the interpreter ends aborts the process."""
    gc.collect()  # what trained with the group holds it
    if _grouped():
        torch.distributed.destroy_process_group()


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


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


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random draws inside depend on the seed alone; the caller's generators are as before afterwards."""
    devices = [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():  # the caller may be inside no_grad
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _all_or_none(accelerator: Accelerator, checkpoint: str | Path | None) -> Iterator[None]:
    """Where one of several processes ends, the others' next exchange fails, or torchrun ends them: either is told in one line."""
    if accelerator.num_processes == 1:
        yield
        return
    again = f"start it again the same way, and it goes on from {checkpoint}" if checkpoint is not None else "pass checkpoint= to lose less"
    lost = WorkerLost(
        f"process {accelerator.process_index} of {accelerator.num_processes}: another one ended, so this one does too; {again}"
    )

    def told_to_end(*_: Any) -> None:
        raise lost

    mine = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, told_to_end) if mine else None
    try:
        yield
    except RuntimeError as error:
        if not re.search("gloo|nccl|Connection (reset|closed)|peer", str(error), re.IGNORECASE):
            raise
        raise lost from error
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _compiler_keeps_its_hints() -> Iterator[None]:
    """It tells whoever compiles in fp32 of TF32, and the like; precision is the caller's choice here, and was made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\._inductor\.")
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # its own first one, made to hold a pool of memory
        yield


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it; the CPU's allocator says so in words."""
    return isinstance(error, torch.OutOfMemoryError) or ("DefaultCPUAllocator" in str(error) and "memory" in str(error))


def _step_seed(seed: int, step: int, process: int) -> int:
    return ((seed * 1_000_003 + step) * 1_009 + process) % 2**63


def _finite(model: nn.Module) -> bool:
    floats = [value.detach() for value in tensors_of(model).values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in floats]).all()) if floats else True
