"""Options that say of themselves what they are: help and bound of a field stand in its metadata, once.

::

    @dataclass(frozen=True)
    class Training:
        epochs: int = option(30, "passes over the training images", lambda n: n >= 1, "at least 1")

        def __post_init__(self) -> None:
            check(self, "training")

The dataclass itself, the command line and the docs read them from there.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from rarefy.errors import InputError

LARGEST = 2**63 - 1  # of a whole number: what torch and numpy count with


def option(
    default: Any,
    help: str,
    holds: Callable[[Any], bool] | None = None,
    allowed: str = "",
    metavar: str = "",
    least: int | None = None,
) -> Any:
    """A field of a frozen dataclass.

    help: a line for people, as ``--help`` shows it.
    holds: is this value allowed? None: any is.
    allowed: what is allowed, in words, for the error.
    metavar: what the command line calls a value, such as ``SHARE``; empty: by the field's type.
    least: of a whole number, which the command line says beside it, and refuses less by itself.
    """
    metadata = {"help": help, "holds": holds, "allowed": allowed, "metavar": metavar, "least": least}
    return dataclasses.field(default=default, metadata=metadata)


def check(options: Any, where: str) -> None:
    """Each field against its own bound. Raises InputError, which names the first that does not hold."""
    for field in dataclasses.fields(options):
        holds, value = field.metadata.get("holds"), getattr(options, field.name)
        if isinstance(value, int) and abs(value) > LARGEST:
            raise InputError(f"{where}{': ' if where else ''}{field.name}={str(value)[:40]} is more than {LARGEST}")
        if holds is not None and not holds(value):
            bound = field.metadata["allowed"]
            said = bound if bound.startswith("must ") else f"is not {bound}"
            raise InputError(f"{where}{': ' if where else ''}{field.name}={value!r} {said}")


class Option(NamedTuple):
    """A keyword: its annotation, and its default (``inspect.Parameter.empty``: it must be given)."""

    hint: Any
    default: object


def options_of(function: Callable[..., object]) -> dict[str, Option]:
    """The keywords of a verb, or of a class's constructor; among them the fields of a dataclass that it takes one by
    one."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    loose = any(one.kind is one.VAR_KEYWORD for one in parameters)
    found: dict[str, Option] = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = hints.get(parameter.name, object)
        parts = (hint, *typing.get_args(hint))
        packed = next((part for part in parts if dataclasses.is_dataclass(part)), None)
        if isinstance(packed, type) and (loose or str not in parts):
            found |= options_of(packed)
            if str not in parts:
                continue
            hint = str | None  # the name of one
        found[parameter.name] = Option(hint, parameter.default)
    return found
