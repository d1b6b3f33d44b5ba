"""Where a model comes from: what was asked for, what was got, and the words in which both are told."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from rarefy.artifact.snapshot import Snapshot
from rarefy.errors import InputError, MissingDependency, first_line
from rarefy.graph.nodes import is_graph
from rarefy.system.failures import refusal
from rarefy.system.memory import afford

FORMS = "timm:NAME, torchvision:NAME, package.module:function, a folder saved by rarefy, a .pt2 file, or an .onnx file"

Option = bool | int | float | str | None
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A model and what its maker says of its input.

    text: what was asked for. model: the module, in eval mode, on the CPU. shape: its input without batch, ``(3, 224,
    224)``, or None where nobody says. preprocessing: ``mean``, ``std`` (a float a channel), ``size`` (pixels), ``crop``
    (share of the resized image that is
        used), ..., as far as the maker states them; they are ``Classification``'s options of the same names.
    inputs: shape without batch and type of each input, for a model of other inputs than one tensor of floats.
    names: of inputs and outputs, where the source says them.
    weights: what was loaded into it, or None: as the source made it. taken: which part of that file, in a line, where
        it holds more.
    folder: the saved folder that it came from, held open.
    captured: graphs that were needed to see what the model is, by shapes of the inputs; each is for who asks next.
    """

    text: str
    model: nn.Module
    shape: tuple[int, ...] | None = None
    preprocessing: Mapping[str, object] = field(default_factory=dict)
    weights: str | None = None
    taken: str | None = None
    inputs: Sequence[tuple[tuple[int, ...], torch.dtype]] = ()
    names: Mapping[str, Sequence[str]] | None = None
    folder: Snapshot | None = None
    captured: dict[tuple[tuple[int, ...], ...], fx.GraphModule] = field(default_factory=dict, repr=False, compare=False)

    def example(self, shape: tuple[int, ...] | None = None, batch: int = 2) -> Tensor | tuple[Tensor, ...]:
        """An input of that shape (else the source's own): standard normal numbers, the same every time.

        Ones for integers. For a model of several inputs all of them, ``shape`` being the first's.
        """
        if self.inputs:
            generator = torch.Generator().manual_seed(0)
            shapes = [shape or self.inputs[0][0], *(own for own, _ in self.inputs[1:])]
            made = [
                torch.randn((batch, *sizes), generator=generator).to(dtype)
                if dtype.is_floating_point
                else torch.ones((batch, *sizes), dtype=dtype)
                for sizes, (_, dtype) in zip(shapes, self.inputs)
            ]
            return made[0] if len(made) == 1 else tuple(made)
        chosen = shape or self.shape
        if chosen is None:
            raise InputError(
                f"{self.text}: nothing says what its input looks like; pass --input, for example --input 3,224,224"
            )
        afford(4 * batch * math.prod(chosen), f"{self.text}: an input of {by(chosen)}", "pass a smaller --input")
        return torch.randn((batch, *chosen), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Request:
    """What was asked for.

    text: the source as text. classes: outputs of the classifier, if they are to be others than the source's own.
    has_weights: they come from a file beside it. key: the public key of who must have signed it, a saved folder.
    """

    text: str
    classes: int | None = None
    has_weights: bool = False
    key: str | os.PathLike[str] | None = None

    @property
    def prefix(self) -> str:
        """What stands before the colon: a library, or a module."""
        return self.text.partition(":")[0]

    @property
    def rest(self) -> str:
        """What stands behind it."""
        return self.text.partition(":")[2]

    def name_and_options(self) -> tuple[str, dict[str, Option]]:
        """``resnet18?num_classes=3`` behind the colon -> ``("resnet18", {"num_classes": 3})``."""
        name, _, query = self.rest.partition("?")
        options = {}
        for part in filter(None, query.split("&")):
            key, equals, value = part.partition("=")
            if not equals or not key.isidentifier():
                raise InputError(f"{self.text!r}: {part!r} is no option; write ?name=value&name=value")
            options[key] = parse_value(value)
        return name, options

    def make(self, build: Callable[[], T]) -> T:
        """What ``build`` returns; whatever it raises is told as this request's failure."""
        try:
            return build()
        except MissingDependency:
            raise
        except Exception as error:
            refused = refusal(error)
            if refused is not None:
                raise InputError(f"{self.text}: {refused}") from error
            raise InputError(
                f"{self.text}: making it failed: {type(error).__name__}: {first_line(error)}; "
                "check the name and the options after '?'"
            ) from error

    def check_classes(self, outputs: Sequence[tuple[int, ...]]) -> None:
        """What is made already can't be given other classes.

        The same number is no contradiction (``--classes`` is meant for a reference beside it, too).
        """
        if self.classes is not None and list(outputs) != [(self.classes,)]:
            raise InputError(
                f"{self.text}: was made with outputs of {', '.join(map(by, outputs))}, not {self.classes}; "
                "leave out --classes"
            )


Form = Callable[[Request], Source | None]  # None where the text is of another form


def parse_shape(text: str) -> tuple[int, ...]:
    """``"3,224,224"`` or ``"3x224x224"`` -> ``(3, 224, 224)``."""
    try:
        shape = tuple(int(part) for part in re.split(r"[,x]", text.strip().strip("()")) if part.strip())
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(f"--input {text!r}: give positive sizes without the batch, for example 3,224,224")
    return shape


def parse_value(text: str) -> Option:
    """An option's value: a number, true, false, none, or else text."""
    plain: dict[str, Option] = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def input_shape_of(model: nn.Module) -> tuple[int, ...] | None:
    """Shape of its input without batch, as a graph knows it, or as the module's ``input_shape`` says."""
    if is_graph(model):
        return tuple(model.meta["inputs"][0]["shape"])
    stated = getattr(model, "input_shape", None)
    if isinstance(stated, (tuple, list)) and all(isinstance(size, int) for size in stated):
        return tuple(stated)
    return None


def parameters_of(function: Callable[..., object]) -> set[str]:
    """Names of what it takes; none where Python can't tell."""
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def near(name: str, have: Sequence[str]) -> str:
    """What an error adds: the names most like ``name``, or how many there are."""
    close = difflib.get_close_matches(name, have, n=3, cutoff=0.5)
    return f"; the nearest are {', '.join(close)}" if close else f"; it has {len(have)} others"


def by(shape: Sequence[int]) -> str:
    """``3x224x224``."""
    return "x".join(str(int(size)) for size in shape) or "a single number"
