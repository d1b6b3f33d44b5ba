from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from rarefy.data.augmentation import mix
from rarefy.distillation.checkpoint import Store, load_into, tensors_of
from rarefy.distillation.distributed import batch_norm, synchronised
from rarefy.distillation.objective import Answer, Objective, Term
from rarefy.distillation.optimizer import Dot, _Averaged, _optimizer
from rarefy.distillation.options import AUTO_STEPS, Penalty, Training
from rarefy.distillation.teacher_cache import Answers
from rarefy.distillation.tensorboard import Logs
from rarefy.errors import FormatError, InputError, RarefyError, TrainingDiverged
from rarefy.graph.capture import aten
from rarefy.system.progress import track
from rarefy.tasks.task import Task

CHECK_STEPS = 50
MOMENT_BATCHES = 8
NUMBERS = ("step", "accumulate", "halved", "curve", "best_value", "best_epoch", "seconds", "waited")


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
            raise InputError(
                f"batch_size={training.batch_size} can't be split over {world} processes; pass a multiple of {world}"
            )
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
        self.learner: Any = (
            self.plain if self.compiled == "no" else torch.compile(self.plain, mode=self.compiled, dynamic=False)
        )
        self.learned = {name: one for name, one in self.objective.named_parameters() if one.requires_grad}
        if not self.learned:
            raise InputError("the student has no parameter that requires a gradient; call requires_grad_() on it first")
        self.dot = Dot(self.learned, training.momentum, training.dot, training.weight_decay) if training.dot else None
        self.optimizer = _optimizer(self.learned.values(), training, self.device)
        self.parameters = {name: one for name, one in self.graph.named_parameters() if one.requires_grad}
        self.masks = {
            name: self.parameters[name].detach() != 0
            for name in self.graph.meta.get("sparse", [])
            if name in self.parameters
        }
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
        pays = (
            self.device.type == "cuda"
            and self.total >= AUTO_STEPS
            and self.dot is None
            and self.accelerator.num_processes == 1
        )
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
            folder,
            identity,
            self.objective.answers(self._laid(torch.zeros(2, *self.task.input_shape, device=self.device))),
            self.device,
        )

    def _laid(self, inputs: Tensor) -> Tensor:
        return (
            inputs.contiguous(memory_format=torch.channels_last) if self.channels_last and inputs.dim() == 4 else inputs
        )

    # -- the loop

    def fit(
        self, label: str, store: Store | None, validate: Callable[[fx.GraphModule], float] | None, progress: bool
    ) -> dict[str, Any]:
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
                    f"loss {mean:.4f}"
                    + (f", val {self.curve[-1]['val']:.2%}" if self.curve and self.curve[-1]["val"] is not None else "")
                )
                if ends:
                    self._end_epoch(mean, rate, validate)
                self._log(
                    mean, rate, (self.step - resumed) * self.training.batch_size / (time.monotonic() - begun), ends
                )
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
            "stopped": {"epoch": self.curve[-1]["epoch"], "of": math.ceil(self.total / self.per_epoch)}
            if self.step < self.total
            else None,
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
            "train",
            training.batch_size,
            shuffle_seed=training.seed,
            augment=True,
            epoch=epoch,
            start=start,
            device=self.device,
            **fitting,
        )
        step = start
        for inputs, targets in batches:
            if targets is not None and (training.mixup or training.cutmix):
                targets = self.task.soft(targets)
            yield mix(
                inputs,
                targets,
                mixup=training.mixup,
                cutmix=training.cutmix,
                seed=training.seed,
                step=epoch * self.per_epoch + step,
            )
            step += 1
        raise InputError(
            f"the data ended at step {step} of epoch {epoch}, {self.per_epoch} were announced; task.length is wrong"
        )

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
            self.objective.strength.fill_(
                min(1.0, (self.step + 1) / max(1, round(self.training.loss_warmup * self.total)))
            )
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
        masked = [
            (parameter.grad, mask)
            for name, mask in self.masks.items()
            if (parameter := self.parameters[name]).grad is not None
        ]
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
        pieces = zip(
            *(one.chunk(self.accumulate) if isinstance(one, Tensor) else itertools.repeat(one) for one in leaves)
        )
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
        total = (
            self.accelerator.reduce(self.loss_sum, "mean")
            if together and self.accelerator.num_processes > 1
            else self.loss_sum
        )
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
                self.step,
                loss=loss,
                lr=rate,
                images_per_second=speed,
                data_share=self.waited / self.seconds if self.seconds > 0 else None,
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
                f"optimizer.{key}.{name}": value
                for key, value in self.optimizer.state[parameter].items()
                if isinstance(value, Tensor)
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
                like = (
                    torch.empty_like(parameter)
                    if value.shape == parameter.shape
                    else torch.empty_like(value, device=self.device)
                )
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


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random draws inside depend on the seed alone; the caller's generators are as before afterwards."""
    devices = (
        [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else []
    )
    with torch.random.fork_rng(devices=devices), torch.enable_grad():  # the caller may be inside no_grad
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _compiler_keeps_its_hints() -> Iterator[None]:
    """It tells whoever compiles in fp32 of TF32, and the like; precision is the caller's choice here, and was made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\._inductor\.")
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        warnings.filterwarnings(
            "ignore", message="The CUDA Graph is empty"
        )  # its own first one, made to hold a pool of memory
        yield


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it; the CPU's allocator says so in words."""
    return isinstance(error, torch.OutOfMemoryError) or ("DefaultCPUAllocator" in str(error) and "memory" in str(error))


def _step_seed(seed: int, step: int, process: int) -> int:
    return ((seed * 1_000_003 + step) * 1_009 + process) % 2**63


def _finite(model: nn.Module) -> bool:
    floats = [value.detach() for value in tensors_of(model).values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in floats]).all()) if floats else True
