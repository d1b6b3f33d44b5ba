"""track(): a loop's progress on stderr, with the time left.

A bar where a person watches (stderr is a terminal), else a plain line every ten seconds, so that a log stays readable.
It is drawn at most ten times a second, by the loop itself: no thread, and a few hundred nanoseconds a turn in between.

    >>> steps = track(range(400), 400, "distil")
    >>> for step in steps:
    ...     steps.update(f"loss {loss:.3f}")
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rarefy.system.text import one_line, printable

T = TypeVar("T")

BAR_SECONDS = 0.1
LINE_SECONDS = 10.0


def say(line: str) -> None:
    """A line on stderr, as a terminal may be shown it; nobody may be listening, which stops no work."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(one_line(line), file=sys.stderr, flush=True)


def track(iterable: Iterable[T], total: int | None, label: str, enabled: bool = True, *, done: int = 0) -> Track[T]:
    """An iterator over ``iterable`` that shows how far it is.

    total: turns of the whole loop (None: unknown). done: turns made before, by a run that this one resumes.
    enabled: False shows nothing and costs nothing.
    """
    return Track(iterable, total, label, enabled, done)


class Track(Generic[T]):
    def __init__(self, iterable: Iterable[T], total: int | None, label: str, enabled: bool, done: int):
        self.iterable, self.total, self.label, self.enabled, self.done = iterable, total, label, enabled, done
        self.text = ""

    def update(self, text: str) -> None:
        """What stands beside the bar from now on: ``"loss 0.31"``."""
        self.text = text

    def __iter__(self) -> Iterator[T]:
        if not self.enabled:
            yield from self.iterable
        elif sys.stderr is not None and sys.stderr.isatty():
            yield from self._with_bar()
        else:
            yield from self._with_lines()

    def _with_bar(self) -> Iterator[T]:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("<"), TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
            task = progress.add_task(escape(printable(self.label)), total=self.total, completed=self.done, text="")
            drawn = 0.0
            for done, item in enumerate(self.iterable, self.done + 1):
                yield item
                now = time.monotonic()
                if now - drawn >= BAR_SECONDS or done == self.total:
                    drawn = now
                    progress.update(task, completed=done, text=escape(printable(self.text)), refresh=True)

    def _with_lines(self) -> Iterator[T]:
        begun = said = time.monotonic()
        for done, item in enumerate(self.iterable, self.done + 1):
            yield item
            now = time.monotonic()
            if now - said >= LINE_SECONDS:
                said = now
                say(self._line(done, now - begun))

    def _line(self, done: int, seconds: float) -> str:
        parts = [f"{self.label} {done}"]
        if self.total:
            left = (self.total - done) * seconds / max(1, done - self.done)
            parts = [f"{self.label} {done}/{self.total} ({done / self.total:.0%})", f"{_clock(left)} left"]
        return ", ".join([*parts, *filter(None, [self.text])])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
