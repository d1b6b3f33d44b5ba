"""distill(): the student learns from its teacher. The training loop, written once.

    loss = hard_weight · task(student, labels) + Σ weight · distillation(student, teacher)

A loss (``rarefy/losses``) only says what the student is to copy; batches, schedule, precision, averaging, checkpoints and recovery are here,
and ``train()`` is the same loop without a teacher. Choices made:

* Student and teacher see the same augmented, and the same mixed, picture (Beyer 2021, 2106.05237: consistent teaching).
* SGD with Nesterov momentum, or AdamW; linear warm-up, then a cosine to zero; no weight decay on biases and norms.
* Everything random in step k is drawn from (seed, k): resuming needs no generator's state, and a resumed run ends, on a CPU, with the bits
  of an undisturbed one. The price is one reseeding a step, some microseconds.
* The device is read every ``CHECK_STEPS`` steps and at the end of an epoch, not each step; a loss that is not finite is found then. The state
  of the last epoch's end is kept for that case.
* One ``nn.Module`` maps (inputs, targets) to the loss, teacher included: what DDP wraps and ``torch.compile`` compiles, as one piece.
* Where a masked weight (``meta["sparse"]``, see masking.py) is zero, its gradient is set to zero before anything sees it: so it, its momentum and
  its average stay zero, and a checkpoint needs no mask.
* A penalty (``schedules/group_sparse.py``) adds a gradient of its own in each step; what it knows is in the checkpoint.
* EMA (``ema=0.999``) is the bias-corrected mean, θ̄ₜ = Σ dᵗ⁻ⁱ θᵢ / Σ dᵗ⁻ⁱ, so it needs no warm-up; running statistics are averaged like weights.
* Under ``torchrun`` (accelerate finds it) a batch is split over the processes: ``batch_size`` is the whole. Batch norm's statistics are each
  process's own, as in DDP; every process reads the whole batch from the task, and takes its share.

A checkpoint is one safetensors file with JSON in its header, renamed into place: killed at any moment, the run goes on from the last one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from rarefy import plugins
from rarefy.capturing import as_graph, aten, device_of, shapes
from rarefy.errors import FormatError, InputError, TrainingDiverged
from rarefy.losses import FeatureLoss, Loss
from rarefy.progress import track
from rarefy.tapping import Tap, matched, tapped

CHECK_STEPS = 50
STATE_FILE = "state.safetensors"
NUMBERS = ("step", "accumulate", "curve", "best_value", "best_epoch", "seconds", "waited")
DEFAULT_LR = {"sgd": 0.05, "adamw": 1e-3}

Losses = str | Loss | Sequence[tuple[float, Loss]] | None
Term = tuple[float, Loss]


class Task(Protocol):
    """What the loop asks of a task (rarefy/tasks)."""

    @property
    def train(self) -> Any: ...
    @property
    def val(self) -> Any: ...
    @property
    def classes(self) -> int: ...
    @property
    def input_shape(self) -> tuple[int, int, int]: ...
    def length(self, split: Any) -> int: ...
    def batches(
        self, split: Any, batch_size: int, *, shuffle_seed: int | None = None, augment: bool = False, epoch: int = 0, start: int = 0,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]: ...  # fmt: skip
    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor: ...
    def fingerprint(self, split: Any) -> str: ...
    def describe(self) -> dict[str, Any]: ...


class Penalty(Protocol):
    """What else pulls at the weights. The loop calls ``begin`` at each epoch's start, ``add`` in each step, once the gradients are there."""

    def describe(self) -> str: ...  # two penalties that pull differently differ in it
    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None: ...
    def add(self, parameters: Mapping[str, nn.Parameter]) -> None: ...  # to .grad, in place
    def state(self) -> dict[str, Tensor]: ...  # for a checkpoint in the middle of an epoch
    def restore(self, state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None: ...


@dataclass(frozen=True)
class Training:
    """How to train: what ``distill`` and ``train`` take as keywords.

    epochs, steps: length of the run; steps wins. batch_size: pictures a step, over all processes; accumulate: in so many parts.
    lr: peak learning rate; None: 0.05 for sgd, 0.001 for adamw. warmup: share of the steps with rising lr. clip: greatest norm of the
    gradient, 0: none. hard_weight: weight of the loss against labels. mixup, cutmix: α of Beta(α, α), 0: off; with both on, one of them at
    random a step. ema: decay, 0: off. precision: fp32, bf16 or auto (bf16 on CUDA). channels_last: yes, no or auto (for convolutions).
    compile: no, default or reduce-overhead (CUDA graphs). validate_every: epochs between two looks at the val split, 0: never. keep: the
    last state or the best on the val split (whose figure is then optimistic: it was chosen by it).
    """

    epochs: int = 30
    steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    clip: float = 0.0
    label_smoothing: float = 0.0
    hard_weight: float = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    precision: str = "auto"
    channels_last: str = "auto"
    compile: str = "no"
    validate_every: int = 1
    keep: str = "last"
    seed: int = 0

    def __post_init__(self) -> None:
        rules: list[tuple[str, bool, str]] = [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("steps", self.steps is None or self.steps >= 1, "at least 1, or None"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("accumulate", 1 <= self.accumulate <= self.batch_size, "1 to batch_size"),
            ("optimizer", self.optimizer in DEFAULT_LR, " or ".join(DEFAULT_LR)),
            ("lr", self.lr is None or 0 < self.lr < math.inf, "positive, or None"),
            ("momentum", 0 <= self.momentum < 1, "0 up to, not including, 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("warmup", 0 <= self.warmup < 1, "a share of the steps, 0 up to, not including, 1"),
            ("clip", 0 <= self.clip < math.inf, "0 (off) or more"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 up to, not including, 1"),
            ("hard_weight", 0 <= self.hard_weight < math.inf, "0 or more"),
            ("mixup", 0 <= self.mixup < math.inf, "0 (off) or more"),
            ("cutmix", 0 <= self.cutmix < math.inf, "0 (off) or more"),
            ("ema", 0 <= self.ema < 1, "0 (off) up to, not including, 1"),
            ("precision", self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16"),
            ("channels_last", self.channels_last in ("auto", "yes", "no"), "auto, yes or no"),
            ("compile", self.compile in ("no", "default", "reduce-overhead"), "no, default or reduce-overhead"),
            ("validate_every", self.validate_every >= 0, "0 (never) or more"),
            ("keep", self.keep in ("last", "best"), "last or best"),
        ]
        for name, holds, allowed in rules:
            if not holds:
                raise InputError(f"training: {name}={getattr(self, name)!r} is not {allowed}")

    def rate(self, step: int, total: int) -> float:
        """Learning rate of that step: linear up to the peak, then a cosine to zero."""
        peak = self.lr if self.lr is not None else DEFAULT_LR[self.optimizer]
        rising = round(self.warmup * total)
        if step < rising:
            return peak * (step + 1) / (rising + 1)
        return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    task: Task,
    *,
    loss: Losses = "lskd",
    training: Training | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    validate: Callable[[fx.GraphModule], float] | None = None,
    penalty: Penalty | None = None,
    progress: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """The student's graph with trained weights; student and teacher stay as they are.

    loss: text (``"lskd"``, ``"lskd + 50*mse:on=stages"``), a loss, or [(weight, loss), ...].
    training, options: see Training; options are its fields and go before it.
    checkpoint: a folder; the run is saved there at each epoch's end and every ``checkpoint_seconds``, and goes on from there when it is called
        again with the same arguments. A finished run is returned at once.
    validate: graph -> a number that should rise, in place of top-1 on the val split.
    penalty: a gradient to add in each step (``Penalty``).

    Raises InputError for options, models or checkpoints that do not fit; TrainingDiverged when the loss is not finite, whose ``graph`` is the
    last good state.
    """
    return _run(
        "distill", student, teacher, task, loss, training, device, checkpoint, checkpoint_seconds, validate, penalty, progress, options
    )


def train(
    model: nn.Module,
    task: Task,
    *,
    training: Training | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    validate: Callable[[fx.GraphModule], float] | None = None,
    penalty: Penalty | None = None,
    progress: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """``distill`` without a teacher: the model's graph trained from labels alone."""
    return _run("train", model, None, task, None, training, device, checkpoint, checkpoint_seconds, validate, penalty, progress, options)


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


def _run(
    step_name: str,
    student: nn.Module,
    teacher: nn.Module | None,
    task: Task,
    loss: Losses,
    training: Training | None,
    device: torch.device | str | None,
    checkpoint: str | Path | None,
    checkpoint_seconds: float,
    validate: Callable[[fx.GraphModule], float] | None,
    penalty: Penalty | None,
    progress: bool,
    options: Mapping[str, Any],
) -> fx.GraphModule:
    known = {one.name for one in dataclasses.fields(Training)}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise InputError(f"{step_name}: unknown option {unknown[0]!r}; have {', '.join(sorted(known))}")
    training = dataclasses.replace(training or Training(), **options)
    sum_of = terms(loss)
    if bool(sum_of) != (teacher is not None):
        raise InputError("distill: a loss needs a teacher, and a teacher a loss; train() learns from labels alone")
    if not sum_of and not training.hard_weight:
        raise InputError("train: hard_weight=0 leaves nothing to learn from; give it a weight, or distil from a teacher")
    home = device_of(student)
    graph = _graph(student, task, "student")
    guide = _graph(teacher, task, "teacher") if teacher is not None else None
    if guide is not None and any(one.on == "logits" for _, one in sum_of):
        ours, theirs = _answers(graph), _answers(guide)
        if ours != theirs:
            raise InputError(
                f"student answers {ours}, the teacher {theirs}; give both the same classes, or compare features alone (loss='mse')"
            )
    described = {
        **dataclasses.asdict(training),
        "loss": " + ".join(f"{weight:g}*{plugins.describe(one)}" for weight, one in sum_of) or None,
        **({"penalty": penalty.describe()} if penalty is not None else {}),
    }
    accelerator = _accelerator(device, any(one.on == "logits" for _, one in sum_of) or training.hard_weight > 0)
    if accelerator.num_processes > 1 or device is None:
        device = accelerator.device
    device = torch.device(device)
    store = None
    if checkpoint is not None:
        splits = [split for split in ("train", "val") if split == "train" or task.val is not None]
        identity = {
            "options": described,
            "student": _digest(graph),
            "teacher": _digest(guide) if guide is not None else None,
            "data": {split: task.fingerprint(split) for split in splits},
            "task": {key: value for key, value in task.describe().items() if key not in splits},  # those name places, not content
        }
        store = _Store(Path(checkpoint), identity, checkpoint_seconds, accelerator.is_main_process)
        finished = store.finished()
        if finished is not None:
            _load(graph, {name: value.to(home) for name, value in store.tensors("result.").items()})
            graph.meta.setdefault("history", []).append(finished)
            return graph

    with _seeded(training.seed, device):
        run = _Run(graph, guide, task, training, sum_of, accelerator, device, penalty)
        if store is not None:
            run.restore(store)
            accelerator.wait_for_everyone()
        facts = run.fit(step_name, store, validate, progress)
    record = {"step": step_name, "options": described, "facts": facts}
    graph.to(home)
    graph.meta.setdefault("history", []).append(record)
    if store is not None:
        store.finish(record, _tensors(graph))
        accelerator.wait_for_everyone()
    return graph


class _Objective(nn.Module):
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
        self.teacher = tapped(teacher, theirs) if teacher is not None else None
        self.adapters = nn.ModuleDict(adapters)
        self.task, self.bf16 = task, bf16
        self.hard_weight, self.label_smoothing = training.hard_weight, training.label_smoothing

    def train(self, mode: bool = True) -> _Objective:
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


@dataclass
class _Run:
    """Everything that changes while training. A checkpoint holds ``state()`` and the NUMBERS."""

    graph: fx.GraphModule
    guide: fx.GraphModule | None
    task: Task
    training: Training
    sum_of: list[Term]
    accelerator: Accelerator
    device: torch.device
    penalty: Penalty | None = None
    step: int = 0
    accumulate: int = 1
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
        for one in filter(None, (self.graph, self.guide)):
            one.to(self.device).to(memory_format=layout)
        if self.guide is not None:
            self.guide.requires_grad_(False)
        self.objective = _Objective(self.graph, self.guide, self.task, training, self.sum_of, self.bf16)
        self.objective.adapters.to(self.device).to(memory_format=layout)
        self.learner: Any = self._wrapped()
        self.learned = {name: one for name, one in self.objective.named_parameters() if one.requires_grad}
        if not self.learned:
            raise InputError("the student has no parameter that requires a gradient; call requires_grad_() on it first")
        self.optimizer = _optimizer(self.learned.values(), training, self.device)
        self.parameters = {name: one for name, one in self.graph.named_parameters() if one.requires_grad}
        self.masks = {name: self.parameters[name].detach() != 0 for name in self.graph.meta.get("sparse", []) if name in self.parameters}
        self.average = copy.deepcopy(self.graph).requires_grad_(False) if training.ema else None
        self.averaged = _Averaged.of(self.average, self.graph) if self.average is not None else None
        self.result = self.average if self.average is not None else self.graph
        self.accumulate = training.accumulate
        self.loss_sum = torch.zeros((), device=self.device)
        self.good = {name: value.detach().clone() for name, value in _tensors(self.result).items()}

    def _wrapped(self) -> Any:
        if self.accelerator.num_processes > 1:
            fixed = [f"teacher.{name}" for name in _tensors(self.objective.teacher)] if self.objective.teacher is not None else []
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.objective, fixed)
        learner: Any = self.accelerator.prepare_model(self.objective, device_placement=False)
        if self.training.compile != "no":
            learner = torch.compile(learner, mode=self.training.compile, dynamic=False)
        return learner

    # -- the loop

    def fit(self, label: str, store: _Store | None, validate: Callable[[fx.GraphModule], float] | None, progress: bool) -> dict[str, Any]:
        """Train from the step the run is at to the last; leave the result in ``graph``; the facts of the record."""
        begun, resumed, before = time.monotonic(), self.step, self.seconds
        self.learner.train()
        steps = track(self._batches(), self.total, label, progress and self.accelerator.is_main_process, done=self.step)
        for inputs, targets in steps:
            rate = self.training.rate(self.step, self.total)
            self._advance(inputs, targets, rate)
            self.step += 1
            ends = self.step % self.per_epoch == 0 or self.step == self.total
            if ends or self.step % CHECK_STEPS == 0:
                mean = self._checked(rate, whole=ends)
                steps.update(
                    f"loss {mean:.4f}" + (f", val {self.curve[-1]['val']:.2%}" if self.curve and self.curve[-1]["val"] is not None else "")
                )
                if ends:
                    self._end_epoch(mean, rate, validate)
            self.seconds = before + time.monotonic() - begun
            if store is not None and (ends or store.due()):
                if not ends:
                    self._checked(rate, whole=True, together=False)
                store.save(self)
        self._settle()
        images = (self.total - resumed) * self.training.batch_size
        spent = self.seconds - before
        return {
            "epochs": math.ceil(self.total / self.per_epoch),
            "steps": self.total,
            "curve": self.curve,
            "best": None if self.best_value is None else {"epoch": self.best_epoch, "val": self.best_value},
            "kept": self.training.keep if self.best_value is not None else "last",
            "matched": self.objective.matched,
            "device": str(self.device.type),
            "processes": self.accelerator.num_processes,
            "accumulate": self.accumulate,
            "precision": "bf16" if self.bf16 else "fp32",
            "timing": {
                "seconds": self.seconds,
                "images_per_second": images / spent if spent > 0 else None,
                "data_share": self.waited / self.seconds if self.seconds > 0 else None,
            },
        }

    def _batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches from the current step to the last: mixed, in the networks' layout, this process's share."""
        training, share = self.training, slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        for epoch in itertools.count(self.step // self.per_epoch):
            start = self.step % self.per_epoch
            source = iter(
                self.task.batches(
                    "train", training.batch_size, shuffle_seed=training.seed, augment=True, epoch=epoch, start=start, device=self.device
                )
            )
            for _ in range(start, self.per_epoch):
                if self.step == self.total:
                    return
                begun = time.perf_counter()
                batch = next(source, None)
                if batch is None:
                    raise InputError(
                        f"the data ended at step {self.step % self.per_epoch} of epoch {epoch}, {self.per_epoch} were announced; task.length is wrong"
                    )
                inputs, targets = mix(*batch, training, self.task.classes, self.step)
                if self.accelerator.num_processes > 1:
                    inputs, targets = inputs[share], targets[share] if targets is not None else None
                if self.channels_last and inputs.dim() == 4:
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                self.waited += time.perf_counter() - begun
                yield inputs, targets

    def _advance(self, inputs: Tensor, targets: Tensor | None, rate: float) -> None:
        """One step of the optimizer."""
        if self.penalty is not None and self.step % self.per_epoch == 0:
            self.penalty.begin(self.parameters)
        torch.manual_seed(_step_seed(self.training.seed, self.step, self.accelerator.process_index))
        loss = self._gradients(inputs, targets)
        while loss is None:
            self._halve(len(inputs))
            loss = self._gradients(inputs, targets)
        self.loss_sum += loss
        if self.penalty is not None:
            self.penalty.add(self.parameters)
        masked = [(parameter.grad, mask) for name, mask in self.masks.items() if (parameter := self.parameters[name]).grad is not None]
        if masked:
            torch._foreach_mul_(*map(list, zip(*masked)))
        if self.training.clip:
            nn.utils.clip_grad_norm_(self.learned.values(), self.training.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update(self.training.ema, self.step + 1)

    def _gradients(self, inputs: Tensor, targets: Tensor | None) -> Tensor | None:
        """Gradients of the batch's mean loss, and that loss; None if the device's memory did not suffice."""
        graphs = self.training.compile == "reduce-overhead"
        self._forget_gradients(own=graphs and self.accumulate > 1)
        try:
            if self.accumulate == 1:
                if graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                loss = self.learner(inputs, targets)
                loss.backward()
                return loss.detach()
            total = torch.zeros((), device=self.device)
            parts = inputs.chunk(self.accumulate)
            labels = targets.chunk(self.accumulate) if targets is not None else itertools.repeat(None)
            for index, (part, label) in enumerate(zip(parts, labels)):
                if graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                apart = index + 1 < len(parts) and self.accelerator.num_processes > 1
                with self.accelerator.no_sync(self.learner) if apart else contextlib.nullcontext():
                    loss = self.learner(part, label) * (len(part) / len(inputs))
                    loss.backward()
                total += loss.detach()
            return total
        except torch.OutOfMemoryError:
            return None

    def _forget_gradients(self, own: bool) -> None:
        """own: sums of several parts need memory of their own, for a CUDA graph writes each part's gradients to the same place."""
        self.optimizer.zero_grad(set_to_none=not own)
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
        for name, tensor in _tensors(self.result).items():
            self.good[name].copy_(tensor.detach())
        if value is not None and (self.best_value is None or value > self.best_value):
            self.best_value, self.best_epoch = value, epoch
            if self.training.keep == "best":
                self.best = {name: tensor.clone() for name, tensor in self.good.items()}

    def _agree(self) -> None:
        """Running statistics are each process's own; the first one's are kept."""
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
        self._settled(self.best or {name: value.detach() for name, value in _tensors(self.result).items()})

    def _settled(self, state: Mapping[str, Tensor]) -> fx.GraphModule:
        _load(self.graph, state)
        self.graph.to(memory_format=torch.contiguous_format)
        self.graph.zero_grad(set_to_none=True)
        return self.graph.eval()

    # -- what a checkpoint holds

    def state(self) -> dict[str, Tensor]:
        found = {f"graph.{name}": value for name, value in _tensors(self.graph).items()}
        found |= {f"adapters.{name}": value for name, value in _tensors(self.objective.adapters).items()}
        if self.average is not None:
            found |= {f"average.{name}": value for name, value in _tensors(self.average).items()}
        found |= {f"best.{name}": value for name, value in self.best.items()}
        for name, parameter in self.learned.items():
            found |= {
                f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[parameter].items() if isinstance(value, Tensor)
            }
        if self.penalty is not None:
            found |= {f"penalty.{name}": value for name, value in self.penalty.state().items()}
        return {**found, "loss_sum": self.loss_sum}

    def numbers(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NUMBERS}

    def restore(self, store: _Store) -> None:
        """Go on from the checkpoint, if there is one."""
        numbers = store.numbers()
        if numbers is None:
            return
        try:
            for name in NUMBERS:
                setattr(self, name, numbers[name])
            _load(self.graph, store.tensors("graph."))
            _load(self.objective.adapters, store.tensors("adapters."))
            if self.average is not None:
                _load(self.average, store.tensors("average."))
            self.best = {name: value.to(self.device) for name, value in store.tensors("best.").items()}
            for name, value in store.tensors("optimizer.").items():
                key, _, owner = name.partition(".")
                parameter = self.learned[owner]
                like = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value, device=self.device)
                self.optimizer.state[parameter][key] = like.detach().copy_(value)
            if self.penalty is not None:
                self.penalty.restore(store.tensors("penalty."), self.parameters)
            self.loss_sum.copy_(store.tensors("loss_sum")[""])
        except (KeyError, RuntimeError) as error:
            raise FormatError(f"{store.file}: is incomplete ({error}); delete it to start anew") from error
        for name, tensor in _tensors(self.result).items():
            self.good[name].copy_(tensor.detach())


class _Store:
    """The checkpoint's folder: one file, replaced whole."""

    def __init__(self, folder: Path, identity: dict[str, Any], seconds: float, writes: bool):
        self.folder, self.seconds, self.writes = folder, seconds, writes
        self.identity = json.loads(json.dumps(identity))
        self.saved = time.monotonic()
        self.file = folder / STATE_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f".{STATE_FILE}.*") if writes else ():
                left.unlink()
        except OSError as error:
            raise InputError(f"checkpoint={folder}: can't be written ({error.strerror}); name a folder that can") from error
        self.header: dict[str, Any] | None = None
        self.loaded: dict[str, Tensor] = {}
        if self.file.exists():
            self.header, self.loaded = self._read()
            self._same(self.header["identity"])

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            with safetensors.safe_open(self.file, framework="pt") as opened:
                header = json.loads((opened.metadata() or {})["rarefy"])
                if not {"identity", "numbers", "record"} <= header.keys():
                    raise KeyError("identity, numbers or record")
                return header, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"{self.file}: is no checkpoint of a training ({type(error).__name__}: {error}); delete it, or name another folder"
            ) from error

    def _same(self, theirs: Mapping[str, Any]) -> None:
        for part, mine in self.identity.items():
            other = theirs.get(part)
            if mine == other:
                continue
            what = f"{part} ({_changed(mine, other)})" if part in ("options", "task") and isinstance(other, dict) else part
            raise InputError(
                f"{self.folder}: the checkpoint is of a run with another {what}; name another folder, or delete this one to start anew"
            )

    def finished(self) -> dict[str, Any] | None:
        return self.header["record"] if self.header is not None else None

    def numbers(self) -> dict[str, Any] | None:
        return self.header["numbers"] if self.header is not None else None

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self.loaded.items() if name.startswith(prefix)}

    def due(self) -> bool:
        return self.writes and time.monotonic() - self.saved >= self.seconds

    def save(self, run: _Run) -> None:
        self._write(run.state(), {"identity": self.identity, "numbers": run.numbers(), "record": None})

    def finish(self, record: dict[str, Any], result: Mapping[str, Tensor]) -> None:
        tensors = {f"result.{name}": value for name, value in result.items()}
        self._write(tensors, {"identity": self.identity, "numbers": None, "record": record})

    def _write(self, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None:
        if not self.writes:
            return
        temporary = self.folder / f".{STATE_FILE}.{os.getpid()}"
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            safetensors.torch.save_file(plain, temporary, metadata={"rarefy": json.dumps(header)})
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, self.file)
        except (OSError, safetensors.SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"checkpoint={self.folder}: can't be written ({error}); free some space, or name another folder") from error
        self.saved = time.monotonic()


# -- mixing


def mix(inputs: Tensor, targets: Tensor | None, training: Training, classes: int, step: int) -> tuple[Tensor, Tensor | None]:
    """Mixup (1710.09412) or cutmix (1905.04899) of the batch with itself backwards; targets become probabilities (N, classes).

    inputs: (N, channels, H, W); what is drawn depends on (seed, step) alone. Cutmix's share is that of the rectangle as cut.
    """
    alphas = [("mixup", training.mixup)] * bool(training.mixup) + [("cutmix", training.cutmix)] * bool(training.cutmix)
    if not alphas:
        return inputs, targets
    draw = random.Random(f"{training.seed}/{step}")
    kind, alpha = draw.choice(alphas)
    share = draw.betavariate(alpha, alpha)
    if kind == "mixup":
        inputs = inputs.lerp(inputs.flip(0), 1 - share)
    else:
        height, width = inputs.shape[-2:]
        rows, columns = (_span(size, math.sqrt(1 - share), draw) for size in (height, width))
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        inputs, other = inputs.clone(), inputs.flip(0)
        inputs[..., rows, columns] = other[..., rows, columns]
    if targets is None:
        return inputs, None
    certain = nn.functional.one_hot(targets, classes).to(inputs.dtype) if targets.dim() == 1 else targets
    return inputs, certain.lerp(certain.flip(0), 1 - share)


def _span(size: int, share: float, draw: random.Random) -> slice:
    """That share of an edge around a random point of it, cut off at the ends."""
    length = round(share * size)
    first = draw.randrange(size) - length // 2
    return slice(max(0, first), min(size, first + length))


# -- small parts


def _graph(model: nn.Module, task: Task, which: str) -> fx.GraphModule:
    graph = as_graph(model, torch.zeros(2, *task.input_shape, device=device_of(model))).eval()
    wanted = tuple(graph.meta["inputs"][0]["shape"])
    if graph.meta.get("core") is None and wanted != tuple(task.input_shape):
        raise InputError(
            f"{which}: takes inputs of shape {wanted}, the task gives {tuple(task.input_shape)}; give the task that size=, or capture it anew"
        )
    return graph


def _answers(graph: fx.GraphModule) -> list[tuple[int, ...]]:
    """Shape of each output, without the batch."""
    values = shapes(graph)
    outputs = [node for node in pytree.tree_leaves(next(iter(reversed(graph.graph.nodes))).args[0]) if isinstance(node, fx.Node)]
    return [tuple(values[node].shape[1:]) for node in outputs]


def _accelerator(device: torch.device | str | None, logits: bool) -> Accelerator:
    """Knows of torchrun. A run of one process uses it for nothing else, and leaves its global state alone."""
    on_cpu = torch.device(device).type == "cpu" if device is not None else not torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    ddp = DistributedDataParallelKwargs(find_unused_parameters=not logits)
    return Accelerator(cpu=on_cpu and several, kwargs_handlers=[ddp])


def _optimizer(parameters: Any, training: Training, device: torch.device) -> torch.optim.Optimizer:
    parameters = list(parameters)
    groups = [
        {"params": [one for one in parameters if one.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [one for one in parameters if one.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda") and all(one.is_floating_point() for one in parameters)
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
            (mean, value.detach()) for mean, value in zip(_tensors(average).values(), _tensors(model).values()) if mean.is_floating_point()
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


def _step_seed(seed: int, step: int, process: int) -> int:
    return ((seed * 1_000_003 + step) * 1_009 + process) % 2**63


def _place(taps: list[Tap], tap: Tap) -> int:
    if tap not in taps:
        taps.append(tap)
    return taps.index(tap)


def _changed(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    names = [name for name in sorted(mine.keys() | other.keys()) if mine.get(name) != other.get(name)]
    return ", ".join(f"{name}={mine.get(name)!r}, there {other.get(name)!r}" for name in names)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _load(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in _tensors(model).items():
        tensor.copy_(values[name])


def _finite(model: nn.Module) -> bool:
    floats = [value.detach() for value in _tensors(model).values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in floats]).all()) if floats else True


def _digest(graph: fx.GraphModule) -> str:
    """sha256 of the graph's code and its tensors."""
    digest = hashlib.sha256(graph.code.encode())
    for name, value in sorted(_tensors(graph).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
