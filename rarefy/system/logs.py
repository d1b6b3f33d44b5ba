"""Numbers of a run over its steps, told to whoever keeps them: a logger opens a run, and gets its numbers.

A logger is a choice of ``rarefy/system/loggers``, an object of the user's own that has ``open``, or just a function of
``(step, values)``, a callback. What a logger does wrong once the run has begun costs its curve, not the run: it is told
in a line and left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rarefy.errors import RarefyError, first_line
from rarefy.system.progress import say

Values = Mapping[str, float]
Callback = Callable[[int, Values], object]


class Writer(Protocol):
    """A run that was opened."""

    def add(self, step: int, values: Values) -> None:
        """One point of each curve. values: by the curve's name."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Logger(Protocol):
    """Opens a run."""

    def open(self, run: str, first: int, about: Mapping[str, object]) -> Writer:
        """run: what is done, such as "distill"; a part of another run has its path, "compress/2-distill".
        about: what was asked of it.

        first: the step that it starts or goes on from; what an earlier, killed run said of later ones does not count.
        Raises InputError where nothing can be written.
        """
        ...


@dataclass(frozen=True)
class Part:
    """Opens parts of another run. name: the part's path."""

    logger: Logger
    name: str

    def open(self, run: str, first: int, about: Mapping[str, object]) -> Writer:
        return self.logger.open(self.name, first, about)


def part(loggers: Sequence[Logger | Callback], name: str) -> list[Logger | Callback]:
    """The same loggers, for a part of the run."""
    return [Part(one, name) if isinstance(one, Logger) else one for one in loggers]


class Logs:
    """All writers of a run."""

    def __init__(self, loggers: Sequence[Logger | Callback], run: str, first: int, about: Mapping[str, object]):
        self.writers: list[Writer] = []
        try:
            for one in loggers:
                self.writers.append(one.open(run, first, about) if isinstance(one, Logger) else _Called(one))
        except BaseException:
            self.close()
            raise

    def add(self, step: int, **values: float | None) -> None:
        """One point of each curve that has a value."""
        told = {name: float(value) for name, value in values.items() if value is not None}
        for writer in tuple(self.writers) if told else ():
            try:
                writer.add(step, told)
            except RarefyError:
                raise
            except Exception as error:
                self.writers.remove(writer)
                say(f"warning: logs: {first_line(error)}; the run goes on without this logger")

    def close(self) -> None:
        for writer in self.writers:
            try:
                writer.close()
            except Exception as error:
                say(f"warning: logs: {first_line(error)}")


# As a verb takes them: rarefy/plugins.py makes objects of texts and paths.
One = str | os.PathLike[str] | Logger | Callback
Logging = One | Sequence[One] | None


class _Called:
    """A function as a writer."""

    def __init__(self, function: Callback):
        self.function = function

    def add(self, step: int, values: Values) -> None:
        self.function(step, values)

    def close(self) -> None:
        pass
