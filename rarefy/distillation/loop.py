"""The training loop, written once: ``distill`` and ``train`` say what it is to do by a ``Job``.

What a step minimises is in ``objective.py``, what a batch holds in ``batches.py``, what changes and what a checkpoint
keeps of it in ``checkpoint.py``. Choices made:

* Student and teacher see the same augmented, and the same mixed, picture (Beyer 2021, 2106.05237: consistent teaching).
* Everything random in step k is drawn from (seed, k): resuming needs no generator's state. The price is one reseeding a
  step, some microseconds.
* The device is read every ``CHECK_STEPS`` steps and at the end of an epoch, not each step; a loss that is not finite is
  found then. The state of the last epoch's end is kept for that case.
* Where a masked weight (``meta["sparse"]``, see pruning/mask.py) is zero, its gradient is set to zero before anything
  sees it: so it, its momentum and its average stay zero. Weights that share a value (``meta["shared"]``) get the mean
  of their gradients, and stay equal.
* A penalty (compression/schedules/group_sparse.py) adds a gradient of its own in each step.
* Where a batch does not fit into memory, it is done in twice as many parts, whose gradients add up to the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rarefy import plugins
from rarefy.data.items import Split
from rarefy.distillation.batches import Batches, Validation, outgrows
from rarefy.distillation.checkpoint import State, Store, digest, load_into, tensors_of
from rarefy.distillation.distributed import agree, all_or_none, synchronised, wrapped
from rarefy.distillation.objective import Answer, Compiled, Objective, Term, compiler_mode, compiler_silenced
from rarefy.distillation.options import Penalty, Training
from rarefy.distillation.teacher_cache import Memory
from rarefy.errors import InputError, TrainingDiverged
from rarefy.graph import history
from rarefy.graph.nodes import device_of
from rarefy.system.logs import Callback, Logger, Logs
from rarefy.system.progress import track
from rarefy.tasks.task import Task

CHECK_STEPS = 50
aten = torch.ops.aten


@dataclass(frozen=True)
class Extras:
    """What may be asked of a run beside the training itself, as ``distill`` takes it."""

    validate: Callable[[fx.GraphModule], float] | None = None
    penalty: Penalty | None = None
    checkpoint: str | Path | None = None
    checkpoint_seconds: float = 60.0
    cache: str | Path | None = None
    logs: Sequence[Logger | Callback] = ()
    progress: bool = True


@dataclass(frozen=True)
class Job:
    """A training to be done, all of it checked.

    verb: distill or train.
    student: trained where it is.
    teachers: (share, network), the shares sum to 1.
    losses: (weight, loss).
    origin: digest of what the student was made of, where that is not the student itself.
    """

    verb: str
    student: fx.GraphModule
    teachers: list[tuple[float, fx.GraphModule]]
    losses: list[Term]
    task: Task
    training: Training
    accelerator: Accelerator
    device: torch.device
    extras: Extras
    origin: str | None = None

    def options(self) -> dict[str, Any]:
        """What was asked, as the record says it."""
        losses = " + ".join(f"{weight:g}*{plugins.describe(one)}" for weight, one in self.losses)
        shares = [share for share, _ in self.teachers]
        return {
            **dataclasses.asdict(self.training),
            "loss": losses or None,
            **({"penalty": self.extras.penalty.describe()} if self.extras.penalty is not None else {}),
            **({"shares": shares} if len(shares) > 1 else {}),
            **({"cache": True} if self.extras.cache is not None else {}),
        }

    def identity(self) -> dict[str, object]:
        """What a run must have in common with the one whose checkpoint it goes on from."""
        splits: list[Split] = ["train"] if self.task.data.val is None else ["train", "val"]
        described = self.task.describe().items()
        return {
            "options": self.options(),
            "student": self.origin or digest(self.student),
            "teacher": " ".join(digest(teacher) for _, teacher in self.teachers) or None,
            "data": {split: self.task.data.fingerprint(split) for split in splits},
            "task": {key: value for key, value in described if key not in splits},  # those name places, not content
        }


def run(job: Job) -> fx.GraphModule:
    """The job's student, trained, with a record of it. Raises InputError, FormatError, TrainingDiverged, WorkerLost."""
    graph, home, accelerator, store = job.student, device_of(job.student), job.accelerator, None
    folder, seconds = job.extras.checkpoint, job.extras.checkpoint_seconds
    if folder is not None:
        store = Store(Path(folder), job.identity(), seconds, accelerator.is_main_process)
        finished = store.finished()
        if finished is not None:
            load_into(graph, {name: value.to(home) for name, value in store.tensors("result.").items()})
            history.append(graph, finished["step"], finished["options"], finished["facts"])
            return graph
    with _seeded(job.training.seed, job.device), compiler_silenced(), all_or_none(accelerator, folder):
        loop = Loop(job)
        if store is not None:
            loop.state.restore(store)
            accelerator.wait_for_everyone()
        facts = loop.fit(store)
    graph.to(home)
    history.append(graph, job.verb, job.options(), facts)
    if store is not None:
        store.finish(history.records(graph)[-1], tensors_of(graph))
        accelerator.wait_for_everyone()
    return graph


class Loop:
    """From the step that ``state`` is at to the last one."""

    def __init__(self, job: Job):
        self.job, self.extras, self.training = job, job.extras, job.training
        self.accelerator, self.device = job.accelerator, job.device
        training, world = self.training, self.accelerator.num_processes
        if training.batch_size % world:
            raise InputError(
                f"batch_size={training.batch_size} can't be split over {world} processes; pass a multiple of {world}"
            )
        bf16 = training.precision == "bf16" or (training.precision == "auto" and self.device.type == "cuda")
        self.batches = Batches(job.task, training, self.device, _channels_last(training, job.student))
        self.total = training.steps if training.steps is not None else training.epochs * self.batches.per_epoch
        self.objective = _placed(job, bf16, self.batches.layout)
        mode = compiler_mode(training, self.device, self.total, world)
        self.learner = Compiled(wrapped(self.objective, self.accelerator), mode, training.compile == "auto")
        self.state = State(job.student, self.objective, training, job.extras.penalty, self.device)
        self.validation = Validation(job.task, job.extras.validate, self.batches, bf16, self.accelerator)
        self.memory = None
        if job.extras.cache is not None:
            teachers = [digest(teacher) for _, teacher in job.teachers]
            self.memory = Memory(job.extras.cache, self.objective, self.batches, teachers, self.accelerator)

    def fit(self, store: Store | None) -> dict[str, object]:
        """Train to the end; leave the result in the job's student; the facts of the record."""
        state, batch_size = self.state, self.training.batch_size
        begun, resumed, before = time.monotonic(), state.step, state.seconds
        main = self.accelerator.is_main_process
        logs = Logs(self.extras.logs if main else (), self.job.verb, state.step, self.job.options())
        self.learner.plain.train()
        while not state.step and outgrows(self.job.student, -(-batch_size // state.accumulate), self.accelerator):
            self.halve(batch_size)
        steps = track(self.read(), self.total, self.job.verb, self.extras.progress and main, done=state.step)
        for inputs, targets, taught in steps:
            rate = self.training.rate(state.step, self.total)
            self.advance(inputs, targets, taught, rate)
            state.step += 1
            ends = state.step % self.batches.per_epoch == 0 or state.step == self.total
            if ends or state.step % CHECK_STEPS == 0:
                mean = self.checked(rate, whole=ends)
                steps.update(f"loss {mean:.4f}{self.validation.shown(state.curve)}")
                if ends:
                    self.end_epoch(mean, rate)
                speed, val = (state.step - resumed) * batch_size / (time.monotonic() - begun), state.curve[-1:]
                curves = {"loss": mean, "lr": rate, "images_per_second": speed, "data_share": state.data_share}
                logs.add(state.step, **curves, val=val[0]["val"] if ends else None)
            state.seconds = before + time.monotonic() - begun
            if store is not None and store.due(ends):
                if not ends:
                    self.checked(rate, whole=True, together=False)
                store.save(state.tensors(), state.numbers())
        logs.close()
        state.settle(state.best or {name: value.detach() for name, value in tensors_of(state.result).items()})
        spent = state.seconds - before
        return _facts(self, (state.step - resumed) * batch_size / spent if spent > 0 else None)

    def read(self) -> Iterator[tuple[Tensor, Tensor | None, Answer | None]]:
        """Batches from the current step to the last, this process's share of each, with the teachers' kept answers."""
        state, memory = self.state, self.memory
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        while state.step < self.total and not state.stopped(self.training.patience):
            epoch, start = divmod(state.step, self.batches.per_epoch)
            rows = memory.rows(epoch) if memory is not None else ()
            source = self.batches.of_epoch(epoch, start)
            for index in range(start, min(self.batches.per_epoch, start + self.total - state.step)):
                begun = time.perf_counter()
                inputs, targets = next(source)
                if self.accelerator.num_processes > 1:
                    inputs, targets = inputs[share], targets[share] if targets is not None else None
                taught = memory.read(epoch, rows[index][share]) if memory is not None else None
                inputs = self.batches.laid_out(inputs)
                state.waited += time.perf_counter() - begun
                yield inputs, targets, taught

    def advance(self, inputs: Tensor, targets: Tensor | None, taught: Answer | None, rate: float) -> None:
        """One step of the optimizer."""
        state, training = self.state, self.training
        if training.freeze and state.step >= round((1 - training.freeze) * self.total) and self.objective.freeze():
            self.learner.compile()
        if self.objective.strength is not None:  # linear, from the first step on
            rising = max(1, round(training.loss_warmup * self.total))
            self.objective.strength.fill_(min(1.0, (state.step + 1) / rising))
        if state.penalty is not None and state.step % self.batches.per_epoch == 0:
            state.penalty.begin(state.parameters)
        torch.manual_seed(_step_seed(training.seed, state.step, self.accelerator.process_index))
        loss = self.gradients(inputs, targets, taught)
        while loss is None:
            self.halve(len(inputs))
            loss = self.gradients(inputs, targets, taught)
        state.loss_sum += loss
        state.update(rate, training.clip)

    def gradients(self, inputs: Tensor, targets: Tensor | None, taught: Answer | None) -> Tensor | None:
        """Gradients of the batch's mean loss, and that loss; None if the device's memory did not suffice."""
        graphs = self.learner.mode == "reduce-overhead"
        self.state.forget(summed=graphs and self.state.accumulate > 1)
        total = None
        try:
            parts = self.parts(inputs, targets, taught)
            for index, part in enumerate(parts):
                if graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                apart = index + 1 < len(parts) and self.accelerator.num_processes > 1
                with self.accelerator.no_sync(self.learner.plain) if apart else contextlib.nullcontext():
                    loss = self.backward(self.learner.call(*part), len(part[0]) / len(inputs))
                total = loss if total is None else total + loss
            self.learner.trusted = True
            return total
        except Exception as error:
            if _out_of_memory(error):
                return None
            if not self.learner.falls_back(error):
                raise
        return self.gradients(inputs, targets, taught)

    def parts(self, inputs: Tensor, targets: Tensor | None, taught: Answer | None) -> list[tuple[Any, ...]]:
        """What the objective is called with, part by part."""
        whole = (inputs, targets) if taught is None else (inputs, targets, taught)
        count = self.state.accumulate
        if count == 1:
            return [whole]
        leaves, shape = pytree.tree_flatten(whole)
        pieces = zip(*(one.chunk(count) if isinstance(one, Tensor) else itertools.repeat(one) for one in leaves))
        return [pytree.tree_unflatten(list(piece), shape) for piece in pieces]

    def backward(self, loss: Tensor, share: float) -> Tensor:
        """Adds the gradients of that share of a batch."""
        loss = loss * share if share < 1 else loss
        if self.state.dot is None:
            loss.backward()
            return loss.detach()
        hard, soft = loss.unbind()
        learned = list(self.state.learned.values())
        self.state.dot.add(torch.autograd.grad(soft, learned, retain_graph=True, allow_unused=True))
        hard.backward()
        return loss.detach().sum()

    def halve(self, images: int) -> None:
        """Smaller parts after an out-of-memory error: the same batch, accumulated."""
        state = self.state
        if self.accelerator.num_processes > 1 or state.accumulate >= images:
            raise InputError(
                f"{self.device}: out of memory with {-(-images // state.accumulate)} images at once; "
                f"pass a smaller batch_size or accumulate={2 * state.accumulate}"
            )
        state.accumulate = min(2 * state.accumulate, images)
        state.halved.append({"step": state.step, "accumulate": state.accumulate})
        state.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def checked(self, rate: float, *, whole: bool, together: bool = True) -> float:
        """Mean loss of the epoch so far, averaged over the processes if all of them ask ``together``.

        Raises TrainingDiverged unless it is finite; and, with ``whole``, all weights.
        """
        state, exchanged = self.state, together and self.accelerator.num_processes > 1
        total = self.accelerator.reduce(state.loss_sum, "mean") if exchanged else state.loss_sum
        mean = float(total) / ((state.step - 1) % self.batches.per_epoch + 1)
        if math.isfinite(mean) and not (whole and not state.finite):
            return mean
        since = f"after epoch {state.curve[-1]['epoch']}" if state.curve else "from before training"
        diverged = TrainingDiverged(
            f"{'loss' if not math.isfinite(mean) else 'weights'} not finite at step {state.step} of {self.total} "
            f"(learning rate {rate:.3g}); kept the state {since}; start anew with a lower lr, clip=1 or precision=fp32"
        )
        diverged.graph = state.settle(state.good)
        raise diverged

    def end_epoch(self, mean: float, rate: float) -> None:
        """A point of the curve, and what is kept."""
        state, every = self.state, self.training.validate_every
        agree(state.graph, state.result, accelerator=self.accelerator)
        epoch = math.ceil(state.step / self.batches.per_epoch)
        looks = every and (epoch % every == 0 or state.step == self.total)
        value = self.validation.value(state.result) if looks else None
        state.curve.append({"epoch": epoch, "step": state.step, "lr": rate, "loss": mean, "val": value})
        state.loss_sum.zero_()
        state.remember()
        if value is not None and (state.best_value is None or self.validation.better(value, state.best_value)):
            state.best_value, state.best_epoch = value, epoch
            if self.training.keep == "best":
                state.best = {name: tensor.clone() for name, tensor in state.good.items()}


def _channels_last(training: Training, graph: fx.GraphModule) -> bool:
    convolves = any(node.target in (aten.conv2d.default, aten.conv2d.padding) for node in graph.graph.nodes)
    return training.channels_last == "yes" or (training.channels_last == "auto" and convolves)


def _placed(job: Job, bf16: bool, layout: torch.memory_format) -> Objective:
    """The objective of the job on its device, student and teachers in the layout of the batches."""
    _lay_out(job.student.to(job.device), layout)
    objective = Objective(job.student, job.teachers, job.task, job.training, job.losses, bf16)
    if job.accelerator.num_processes > 1 and job.training.sync_norm == "yes":
        synchronised(objective.student)
    for one in (objective.teachers, objective.adapters, objective.rests):
        _lay_out(one.to(job.device), layout)
    return objective


def _lay_out(module: nn.Module, layout: torch.memory_format) -> None:
    """Weights and buffers of pictures so in memory; of volumes, and tables of other ranks, there is no such layout."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def _facts(loop: Loop, images_per_second: float | None) -> dict[str, object]:
    """What the record says of the run."""
    state, last = loop.state, math.ceil(loop.total / loop.batches.per_epoch)
    early = {"epoch": state.curve[-1]["epoch"], "of": last} if state.step < loop.total else None
    timing = {"seconds": state.seconds, "images_per_second": images_per_second, "data_share": state.data_share}
    return {
        "epochs": math.ceil(state.step / loop.batches.per_epoch),
        "steps": state.step,
        "stopped": early,
        "curve": state.curve,
        "best": None if state.best_value is None else {"epoch": state.best_epoch, "val": state.best_value},
        "kept": loop.training.keep if state.best_value is not None else "last",
        "matched": loop.objective.matched,
        "device": str(loop.device.type),
        "processes": loop.accelerator.num_processes,
        "accumulate": state.accumulate,
        "halved": state.halved,
        "compiled": loop.learner.mode,
        "precision": "bf16" if loop.objective.bf16 else "fp32",
        "timing": timing,
    }


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random draws inside depend on the seed alone; the caller's generators are as before afterwards."""
    cuda = device.type == "cuda"
    devices = [device.index if device.index is not None else torch.cuda.current_device()] if cuda else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():  # the caller may be inside no_grad
        torch.manual_seed(seed)
        yield


def _step_seed(seed: int, step: int, process: int) -> int:
    return ((seed * 1_000_003 + step) * 1_009 + process) % 2**63


def _out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; the CPU's allocator says so in words."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error) and "memory" in str(error)
