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
from collections.abc import Callable
from typing import Any

from rarefy.errors import InputError


def option(
    default: Any, help: str, holds: Callable[[Any], bool] | None = None, allowed: str = "", metavar: str = ""
) -> Any:
    """A field of a frozen dataclass.

    help: a line for people, as ``--help`` shows it.
    holds: is this value allowed? None: any is.
    allowed: what is allowed, in words, for the error.
    metavar: what the command line calls a value, such as ``SHARE``; empty: by the field's type.
    """
    metadata = {"help": help, "holds": holds, "allowed": allowed, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def check(options: Any, where: str) -> None:
    """Each field against its own bound. Raises InputError, which names the first that does not hold."""
    for field in dataclasses.fields(options):
        holds, value = field.metadata.get("holds"), getattr(options, field.name)
        if holds is not None and not holds(value):
            bound = field.metadata["allowed"]
            said = bound if bound.startswith("must ") else f"is not {bound}"
            raise InputError(f"{where}{': ' if where else ''}{field.name}={value!r} {said}")
