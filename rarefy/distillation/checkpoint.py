"""The checkpoint of a training: all that changes in it (``State``), in one safetensors file with JSON in its header.

Killed at any moment, the run goes on from the last one. The header says whose it is (``identity``): a file of another
run is refused, not overwritten. Everything random in step k is drawn from (seed, k), so no generator's state is kept;
and where a masked weight is zero, its gradient, its momentum and its average are too, so no mask is, nor
which weights share a value: the student that comes in says so. A resumed run
ends, on a CPU, with the bits of an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from rarefy.distillation.objective import Objective
from rarefy.distillation.optimizer import Average, Dot, Shared, optimizer_of
from rarefy.distillation.options import Penalty, Training
from rarefy.errors import FormatError, InputError
from rarefy.system.files import replacing

STATE_FILE = "state.safetensors"
NUMBERS = ("step", "accumulate", "halved", "curve", "best_value", "best_epoch", "seconds", "waited")


class Point(TypedDict):
    """One of a training's curve: an epoch's mean loss, its last rate, and what the val split said at its end."""

    epoch: int
    step: int
    lr: float
    loss: float
    val: float | None


class Header(TypedDict):
    """What the file's header says: whose it is; where it stands or, once it is finished, the record it ended with."""

    identity: dict[str, Any]
    numbers: dict[str, Any] | None
    record: dict[str, Any] | None


class Store:
    """The checkpoint's folder: one file, replaced whole.

    identity: what a run must have in common with the one that wrote the file. seconds: from one save to the next.
    writes: is this the process that does?
    """

    def __init__(self, folder: Path, identity: Mapping[str, object], seconds: float, writes: bool):
        self.folder, self.seconds, self.writes = folder, seconds, writes
        self.identity = json.loads(json.dumps(identity))
        self.saved, self.cost = time.monotonic(), 0.0
        self.file = folder / STATE_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f".{self.file.stem}.*") if writes else ():  # half a file, as a kill leaves it
                left.unlink()
        except OSError as error:
            raise InputError(
                f"checkpoint={folder}: can't be written ({error.strerror}); name a folder that can"
            ) from error
        self.header: Header | None = None
        self.loaded: dict[str, Tensor] = {}
        if self.file.exists():
            self.header, self.loaded = self._read()
            self._same(self.header["identity"])

    def _read(self) -> tuple[Header, dict[str, Tensor]]:
        try:
            with safetensors.safe_open(self.file, framework="pt") as opened:
                header = json.loads((opened.metadata() or {})["rarefy"])
                if not {"identity", "numbers", "record"} <= header.keys():
                    raise KeyError("identity, numbers or record")
                return header, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"{self.file}: is no checkpoint of a training ({type(error).__name__}: {error}); "
                "delete it, or name another folder"
            ) from error

    def _same(self, theirs: Mapping[str, object]) -> None:
        for part, mine in self.identity.items():
            other = theirs.get(part)
            if mine == other:
                continue
            what = part
            if part in ("options", "task") and isinstance(mine, dict) and isinstance(other, dict):
                what = f"{part} ({_changed(mine, other)})"
            raise InputError(
                f"{self.folder}: the checkpoint is of a run with another {what}; "
                "name another folder, or delete this one to start anew"
            )

    def finished(self) -> dict[str, Any] | None:
        """The record of a run that has ended."""
        return self.header["record"] if self.header is not None else None

    def numbers(self) -> dict[str, Any] | None:
        """``State.numbers`` of a run that has not."""
        return self.header["numbers"] if self.header is not None else None

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Those whose name begins so, by the rest of it."""
        return {name.removeprefix(prefix): value for name, value in self.loaded.items() if name.startswith(prefix)}

    def due(self, ends: bool) -> bool:
        """Is it time to save again? ends: an epoch does, and saving takes no tenth of the time: they can be short."""
        since = time.monotonic() - self.saved
        return self.writes and (since >= self.seconds or (ends and since >= 10 * self.cost))

    def save(self, state: Mapping[str, Tensor], numbers: dict[str, Any]) -> None:
        self._write(state, {"identity": self.identity, "numbers": numbers, "record": None})

    def finish(self, record: Mapping[str, object], result: Mapping[str, Tensor]) -> None:
        tensors = {f"result.{name}": value for name, value in result.items()}
        self._write(tensors, {"identity": self.identity, "numbers": None, "record": record})

    def _write(self, tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> None:
        if not self.writes:
            return
        begun = time.monotonic()
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            with replacing(self.file, durable=True) as partial:
                partial.write_bytes(safetensors.torch.save(plain, metadata={"rarefy": json.dumps(header)}))
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(
                f"checkpoint={self.folder}: can't be written ({error}); free some space, or name another folder"
            ) from error
        self.saved = time.monotonic()
        self.cost = self.saved - begun


class State:
    """All that changes in a training: tensors, which are written where they lie, and the NUMBERS.

    graph: the student as it is returned, whose tensors are those of the objective's.
    learned: what the optimizer changes, of graph and adapters, by its name in the objective.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        objective: Objective,
        training: Training,
        penalty: Penalty | None,
        device: torch.device,
    ):
        # what learns, and what teaches it to
        self.graph, self.adapters, self.penalty = graph, objective.adapters, penalty
        self.learned = learned = {name: one for name, one in objective.named_parameters() if one.requires_grad}
        if not learned:
            raise InputError("the student has no parameter that requires a gradient; call requires_grad_() on it first")
        self.optimizer = optimizer_of(learned.values(), training, device)
        self.dot = Dot(learned, training.momentum, training.dot, training.weight_decay) if training.dot else None
        self.average = Average(graph, training.ema) if training.ema else None
        self.parameters = {name: one for name, one in graph.named_parameters() if one.requires_grad}
        sparse = [name for name in graph.meta.get("sparse", []) if name in self.parameters]
        self.masks = {name: self.parameters[name].detach() != 0 for name in sparse}
        self.shared = Shared(
            {name: self.parameters[name] for name in graph.meta.get("shared", []) if name in self.parameters}
        )
        self.loss_sum = torch.zeros((), device=device)  # of the epoch so far
        self.good = {name: value.detach().clone() for name, value in tensors_of(self.result).items()}

        # where it stands
        self.step, self.accumulate = 0, training.accumulate
        self.halved: list[dict[str, int]] = []
        self.curve: list[Point] = []  # a point an epoch
        self.best_value: float | None = None
        self.best_epoch: int | None = None
        self.best: dict[str, Tensor] = {}  # where that is what will be kept
        self.seconds, self.waited = 0.0, 0.0

    @property
    def result(self) -> fx.GraphModule:
        """What the training comes to: the average, where there is one."""
        return self.average.graph if self.average is not None else self.graph

    @property
    def finite(self) -> bool:
        """Are all weights of the result?"""
        floats = [value.detach() for value in tensors_of(self.result).values() if value.is_floating_point()]
        return bool(torch.stack([value.isfinite().all() for value in floats]).all()) if floats else True

    @property
    def data_share(self) -> float | None:
        """Of the time, what was spent on waiting for data."""
        return self.waited / self.seconds if self.seconds > 0 else None

    def stopped(self, patience: int) -> bool:
        """Has the val split seen no better state for so many epochs?"""
        return bool(patience and self.best_epoch is not None and self.curve[-1]["epoch"] - self.best_epoch >= patience)

    def forget(self, summed: bool) -> None:
        """The gradients of the step before.

        summed: the sum of several parts needs memory of its own, for a CUDA graph writes each part's gradients to the
            same place.
        """
        self.optimizer.zero_grad(set_to_none=not summed)
        if self.dot is not None:
            self.dot.forget()
        if summed:
            for parameter in self.learned.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def update(self, rate: float, clip: float) -> None:
        """New weights from the gradients. rate: of the optimizer. clip: greatest norm of the gradient, 0: none."""
        if self.penalty is not None:
            self.penalty.add(self.parameters)
        gradients = [(self.parameters[name].grad, mask) for name, mask in self.masks.items()]
        masked = [(gradient, mask) for gradient, mask in gradients if gradient is not None]
        if masked:
            torch._foreach_mul_(*map(list, zip(*masked)))
        self.shared.level({name: self.parameters[name].grad for name in self.shared.groups})
        if self.dot is not None:
            if self.masks:
                self.dot.mask({f"student.{name}": mask for name, mask in self.masks.items()})
            self.shared.level({name: self.dot.taught[f"student.{name}"] for name in self.shared.groups})
            self.dot.step(clip)
        elif clip:
            nn.utils.clip_grad_norm_(self.learned.values(), clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.step + 1)

    def settle(self, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
        """The graph becomes that state, and is finished."""
        load_into(self.graph, tensors)
        self.shared.level(self.parameters)  # equal but for what vector and scalar instructions round otherwise
        self.graph.to(memory_format=torch.contiguous_format)
        self.graph.zero_grad(set_to_none=True)
        return self.graph.eval()

    def remember(self) -> None:
        """The result as it is now is good; what goes wrong later leads back to it."""
        for name, tensor in tensors_of(self.result).items():
            self.good[name].copy_(tensor.detach())

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint, by name."""
        parts = {"graph": tensors_of(self.graph), "adapters": tensors_of(self.adapters), "best": self.best}
        if self.average is not None:
            parts["average"] = tensors_of(self.average.graph)
        parts["optimizer"] = {
            f"{key}.{name}": value
            for name, parameter in self.learned.items()
            for key, value in self.optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }
        if self.penalty is not None:
            parts["penalty"] = self.penalty.state()
        if self.dot is not None:
            parts["dot"] = self.dot.state()
        named = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        return {**named, "loss_sum": self.loss_sum}

    def numbers(self) -> dict[str, Any]:
        """For a checkpoint's header."""
        return {name: getattr(self, name) for name in NUMBERS}

    def restore(self, store: Store) -> None:
        """Go on from the checkpoint, if there is one. Raises FormatError for one that lacks something."""
        numbers = store.numbers()
        if numbers is None:
            return
        try:
            for name in NUMBERS:
                setattr(self, name, numbers[name])
            load_into(self.graph, store.tensors("graph."))
            load_into(self.adapters, store.tensors("adapters."))
            if self.average is not None:
                load_into(self.average.graph, store.tensors("average."))
            self.best = {name: value.to(self.loss_sum.device) for name, value in store.tensors("best.").items()}
            self._restore_optimizer(store.tensors("optimizer."))
            if self.penalty is not None:
                self.penalty.restore(store.tensors("penalty."), self.parameters)
            if self.dot is not None:
                self.dot.restore(store.tensors("dot."))
            self.loss_sum.copy_(store.tensors("loss_sum")[""])
        except (KeyError, RuntimeError) as error:
            raise FormatError(f"{store.file}: is incomplete ({error}); delete it to start anew") from error
        self.remember()

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """What is shaped like the parameter lies in memory like it, too."""
        for name, value in tensors.items():
            key, _, owner = name.partition(".")
            parameter = self.learned[owner]
            alike = value.shape == parameter.shape
            place = torch.empty_like(parameter) if alike else torch.empty_like(value, device=self.loss_sum.device)
            self.optimizer.state[parameter][key] = place.detach().copy_(value)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def load_into(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Parameters and buffers become ``values``, where they lie."""
    for name, tensor in tensors_of(model).items():
        tensor.copy_(values[name])


def digest(graph: fx.GraphModule) -> str:
    """sha256 of the graph's code and its tensors."""
    digest = hashlib.sha256(graph.code.encode())
    for name, value in sorted(tensors_of(graph).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _changed(mine: Mapping[str, object], other: Mapping[str, object]) -> str:
    names = [name for name in sorted(mine.keys() | other.keys()) if mine.get(name) != other.get(name)]
    return ", ".join(f"{name}={mine.get(name)!r}, there {other.get(name)!r}" for name in names)
