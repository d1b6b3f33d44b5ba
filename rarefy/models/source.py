from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy.errors import InputError, MissingDependency
from rarefy.graph.nodes import is_graph

FORMS = "timm:NAME, torchvision:NAME, package.module:function, a folder saved by rarefy, or a .pt2 file"


@dataclass(frozen=True)
class Source:
    """A model and what its maker says of its input.

    text: what was asked for.
    model: the module, in eval mode, on the CPU.
    shape: its input without batch, ``(3, 224, 224)``, or None where nobody says.
    preprocessing: ``mean``, ``std`` (a float a channel), ``size`` (pixels), ``crop`` (share of the resized image kept), ...,
        as far as the maker states them; they are ``Classification``'s options of the same names.
    weights: what was loaded into it, or None: as the source made it.
    """

    text: str
    model: nn.Module
    shape: tuple[int, ...] | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def example(self, shape: tuple[int, ...] | None = None, batch: int = 2) -> Tensor:
        """An input of that shape (else the source's own): standard normal numbers, the same every time."""
        chosen = shape or self.shape
        if chosen is None:
            raise InputError(
                f"{self.text}: nothing says what its input looks like; pass --input, for example --input 3,224,224"
            )
        return torch.randn((batch, *chosen), generator=torch.Generator().manual_seed(0))


def parse_shape(text: str) -> tuple[int, ...]:
    """``"3,224,224"`` or ``"3x224x224"`` -> ``(3, 224, 224)``."""
    try:
        shape = tuple(int(part) for part in re.split(r"[,x]", text.strip().strip("()")) if part.strip())
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(f"--input {text!r}: give positive sizes without the batch, for example 3,224,224")
    return shape


def parse_value(text: str) -> Any:
    """An option's value: a number, true, false, none, or else text."""
    plain = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check_classes(text: str, own: list[tuple[int, ...]], classes: int) -> None:
    """What is made already can't be given other classes; the same number is no contradiction (``--classes`` is meant for a reference beside it, too)."""
    if own != [(classes,)]:
        raise InputError(
            f"{text}: was made with outputs of {', '.join(map(_by, own))}, not {classes}; leave out --classes"
        )


def _shape_of(model: nn.Module) -> tuple[int, ...] | None:
    if isinstance(model, fx.GraphModule) and is_graph(model):
        return tuple(model.meta["inputs"][0]["shape"])
    stated = getattr(model, "input_shape", None)
    return (
        tuple(stated) if isinstance(stated, (tuple, list)) and all(isinstance(size, int) for size in stated) else None
    )


def _made(text: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except MissingDependency:
        raise
    except Exception as error:
        raise InputError(
            f"{text}: making it failed: {type(error).__name__}: {_first_line(error)}; check the name and the options after '?'"
        ) from error


def _parameters(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def _near(name: str, have: list[str]) -> str:
    close = difflib.get_close_matches(name, have, n=3, cutoff=0.5)
    return f"; the nearest are {', '.join(close)}" if close else f"; it has {len(have)} others"


def _by(shape: Any) -> str:
    return "x".join(str(int(size)) for size in shape) or "a single number"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
