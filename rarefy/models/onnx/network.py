"""The nodes of a file as one module: constants worked out, weights as parameters under the file's names.

A weight keeps the name that its file has for it (``backbone.conv1.weight``); one without a telling name is called after
its node: ``/backbone/conv1/Conv`` has ``backbone.conv1.weight``, ``Conv_7`` has ``Conv_7.weight``. A MatMul by a
constant matrix, with what is added to it, is a linear layer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.errors import InputError
from rarefy.graph.nodes import Value, attribute, set_attribute
from rarefy.models.onnx.budget import Budget
from rarefy.models.onnx.sizes import HOST
from rarefy.models.onnx.step import Step, as_tensor


@dataclass(frozen=True)
class Stored:
    """A tensor of the network, by its dotted name."""

    name: str


class Network(nn.Module):
    """Runs the steps in order. inputs, outputs: their names in the file, in order."""

    def __init__(self, inputs: Sequence[str], outputs: Sequence[str]):
        super().__init__()
        self.input_names, self.output_names = list(inputs), list(outputs)
        self.order: list[str] = []  # names of the steps
        self.constants: dict[str, np.ndarray] = {}  # outputs that no input has a part in
        self.settle: Callable[[Sequence[Sequence[int]]], None] | None = None  # once, when sizes are known

    def forward(self, *inputs: Tensor) -> Value:
        if self.settle is not None:
            if torch.compiler.is_exporting():
                raise InputError("the file's sizes are free: call the model once on an example before it is captured")
            settle, self.settle = self.settle, None
            settle([list(value.shape) for value in inputs])
        live: dict[str, Value] = {**self.constants, **dict(zip(self.input_names, inputs, strict=True))}
        for name in self.order:
            step = self.step(name)
            live.update(computed(step, self.operands(step, live)))
            for done in step.done:
                live.pop(done, None)
        found = tuple(
            as_tensor(value) if isinstance(value := live[name], np.ndarray) else value for name in self.output_names
        )
        return found[0] if len(found) == 1 else found

    def step(self, name: str) -> Step:
        found = self.get_submodule(name)
        assert isinstance(found, Step)
        return found

    def operands(self, step: Step, live: Mapping[str, Value]) -> list[Value]:
        return [self._operand(read, live) for read in step.reads]

    def _operand(self, read: Value, live: Mapping[str, Value]) -> Value:
        if isinstance(read, str):
            return live[read]
        if isinstance(read, Stored):
            return attribute(self, read.name)
        return [self._operand(one, live) for one in read] if isinstance(read, list) else read


def computed(step: Step, inputs: Sequence[Value]) -> dict[str, Value]:
    """The step's outputs by name."""
    result = None
    if step.kind in HOST and all(one is None or isinstance(one, np.ndarray) for one in inputs):
        result = HOST[step.kind](step, *inputs)
    if result is None:
        result = step(*inputs)
    outputs = result if isinstance(result, tuple) else (result,)
    if any(step.writes[len(outputs) :]):
        raise step.refuse(f"output {len(outputs)} of {step.kind} is read")
    return {name: value for name, value in zip(step.writes, outputs) if name}


def fold(step: Step, inputs: Sequence[np.ndarray | None], budget: Budget) -> dict[str, np.ndarray]:
    """What a step yields that reads constants only. Raises InputError for more than the file may make."""
    budget.ask(step, inputs)
    with torch.no_grad(), budget:
        found = computed(step, inputs)
    made = {name: value.numpy() if isinstance(value, Tensor) else np.asarray(value) for name, value in found.items()}
    budget.took(made)
    return made


def join_bias(steps: list[Step], constants: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[Step]:
    """A MatMul by a matrix reads what the Add behind it adds."""
    readers = Counter(name for step in steps for name in step.reads if isinstance(name, str))
    made = {step.writes[0]: step for step in steps if step.kind == "MatMul"}
    kept = []
    for step in steps:
        if step.kind == "Add" and len(step.reads) == 2:
            for name, other in (step.reads, step.reads[::-1]):
                source = made.get(str(name))
                if source is None or len(source.reads) != 2 or readers[str(name)] != 1 or name in outputs:
                    continue
                weight, bias = (constants.get(str(one)) for one in (source.reads[1], other))
                if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[1:]:
                    continue
                source.reads.append(other)
                source.writes = step.writes
                break
            else:
                kept.append(step)
        else:
            kept.append(step)
    return kept


def needed(steps: list[Step], outputs: Iterable[str]) -> list[Step]:
    """The steps that have a part in the outputs; their ``done`` says what nobody reads after each."""
    read, kept = set(outputs), []
    for step in reversed(steps):
        if not read.intersection(step.writes):
            continue
        names = {name for name in step.reads if isinstance(name, str)}
        step.done = sorted(names - read)
        step.writes = [name if name in read else "" for name in step.writes]
        read |= names
        kept.append(step)
    return kept[::-1]


def assemble(network: Network, steps: Sequence[Step], constants: Mapping[str, np.ndarray]) -> None:
    """Put the steps and their tensors into the network, each under its name."""
    names = _Names()
    places: list[tuple[str, Step]] = []
    tensors: dict[tuple[str, str, object], tuple[str, Value]] = {}
    readers = Counter(name for step in steps for name in step.reads if isinstance(name, str))
    sized: set[str] = set()  # what is made of sizes and constants only
    for step in steps:
        step.path = _owner(step, constants, readers) or step.path
        tie = _tie(step, constants)
        home = step.path
        names_read = {name for name in step.reads if isinstance(name, str)}
        on_sizes = step.kind in HOST and names_read <= sized | set(constants)
        if on_sizes or step.kind in ("Shape", "Size"):
            sized.update(step.writes)
        for place, read in enumerate(step.reads):
            if not isinstance(read, str) or read not in constants:
                continue
            value = constants[read]
            if on_sizes or step.row.reads_array(place, value):
                step.reads[place] = value
                continue
            role = step.row.stored[place] if place < len(step.row.stored) else ""
            stored = step.row.store(step, role, value) if step.row.store and role else value
            parts = stored if isinstance(stored, dict) else {role or "value": stored}
            found = []
            for part, tensor in parts.items():
                key = (read, f"{part}{tensor.shape}" if tensor is not value else "", tie if role else None)
                if key not in tensors:
                    telling = (_TELLING if role else _PLAIN_OR_TELLING).fullmatch(read) and not isinstance(stored, dict)
                    name = names.tensor(read if telling and read not in names.tensors else f"{step.path}.{part}")
                    tensors[key] = name, _kept(tensor, role or read)
                found.append(Stored(tensors[key][0]))
            if role in ("weight", "weight_ih"):
                home = found[0].name.rpartition(".")[0] or home
            step.reads[place] = found if isinstance(stored, dict) else found[0]
        places.append((home, step))
    for home, step in places:
        step.place = names.module(home)
    for _, step in sorted(places, key=lambda one: one[1].place.count(".")):
        _put_module(network, step.place, step)
    for name, value in tensors.values():
        set_attribute(network, name, value)
    network.order = [step.place for step in steps]


def _owner(step: Step, constants: Mapping[str, np.ndarray], readers: Mapping[str, int]) -> str:
    """The module that a weight of the step alone is named after, if one is: exporters rename those that they turned."""
    read = zip(step.row.stored, step.reads)
    names = [name for role, name in read if role and isinstance(name, str) and name in constants and readers[name] == 1]
    return next((name.rpartition(".")[0] for name in names if _TELLING.fullmatch(name)), "")


def _tie(step: Step, constants: Mapping[str, np.ndarray]) -> object:
    """What two layers have in common that are one: a weight of other than one number.

    Exporters store equal tensors once, so that all biases of zeros are the same one in the file.
    """
    for role, name in zip(step.row.stored, step.reads):
        if role.startswith("weight") and isinstance(name, str) and name in constants:
            value = constants[name]
            return name if value.size and (value != value.reshape(-1)[0]).any() else step
    return None


_TELLING = re.compile(r"[A-Za-z_]\w*(\.\w+)+")
_PLAIN_OR_TELLING = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_LEARNED = re.compile(r".*(weight|bias|gamma\w*|beta|scale|embed\w*|token)$")
_BUFFERS = ("running_mean", "running_var")


def _kept(value: np.ndarray, role: str) -> Tensor:
    """A parameter, if it is of floats and its place or its name says that it was learned."""
    tensor = as_tensor(value).clone()
    learned = (
        tensor.is_floating_point() and role not in _BUFFERS and (_LEARNED.match(role) or role.startswith("weight_"))
    )
    return nn.Parameter(tensor) if learned else tensor


def _put_module(network: nn.Module, path: str, step: Step) -> None:
    owner = network
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    owner.add_module(leaf, step)


class _Names:
    """Dotted names, each for one tensor or one step, and none through a tensor or an attribute of a module."""

    def __init__(self) -> None:
        self.tensors: set[str] = set()
        self.modules: set[str] = set()
        self.owners: set[str] = set()

    def _owned(self, name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[:count]) for count in range(1, len(parts))]

    def _plain(self, name: str) -> str:
        return ".".join(f"{part}_" if part in _RESERVED else part for part in name.split("."))

    def tensor(self, name: str) -> str:
        return self._taken(name, self.tensors)

    def module(self, name: str) -> str:
        return self._taken(name, self.modules)

    def _taken(self, name: str, kind: set[str]) -> str:
        base = name = self._plain(name)
        count = 0
        while (
            name in self.tensors
            or name in self.modules
            or (kind is self.tensors and name in self.owners)
            or self.tensors.intersection(self._owned(name))
        ):
            count += 1
            name = f"{base}_{count}"
        kind.add(name)
        self.owners.update(self._owned(name))
        return name


_RESERVED = frozenset(dir(Network([], []))) | frozenset(dir(Step("", "", {}, 0, None)))  # type: ignore[arg-type]


def path_of(label: str, kind: str, index: int, scopes: str = "") -> str:
    """``/layer1/layer1.0/conv1/Conv`` -> ``layer1.0.conv1``; ``Conv_12`` where a node has no name.

    scopes: the modules around it, as torch's exporter writes them: ``"['', 'layer1.0', 'layer1.0.conv1', 'conv2d']"``.
    """
    around = re.findall(r"'([\w.]*)'", scopes)[:-1]
    if around and around[-1]:
        return str(around[-1])
    parts: list[str] = []
    for part in filter(None, label.split("/")):
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    if len(parts) > 1 and re.fullmatch(rf"{kind}(_\d+)?", parts[-1]):
        parts.pop()
    name = re.sub(r"[^\w.]", "_", ".".join(parts))
    return ".".join(filter(None, name.split("."))) or f"{kind}_{index}"
