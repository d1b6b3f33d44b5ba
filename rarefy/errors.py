"""Every error rarefy raises on purpose.

::

    RarefyError                    one line: what, where, with what value, and the way out
     ├── InputError                the request is wrong                                  exit 2
     │    ├── CaptureError         the model can't be turned into a graph
     │    ├── DataError            the data is missing, broken or does not fit the model
     │    ├── FormatError          a file or folder is not what it claims to be
     │    └── MissingDependency    an extra is not installed; carries the pip line
     ├── WorkerLost                one of several processes ended, so the others do too  exit 2
     └── CheckFailed               a check said no                                       exit 1
          ├── SelfCheckFailed      a step's result differs from what it must equal
          ├── GoalMissed           a budget was not reached; what was found is kept
          ├── SignatureRefused     a file was changed, added or removed, or the key is wrong
          └── TrainingDiverged     NaN or infinity in training; the last good state is kept

``exit_code`` is what the command line exits with. Anything else that escapes is a bug of ours. Each class has a section
of docs/errors.md, by its name: ``section``.
"""

from __future__ import annotations

from typing import Any


class RarefyError(Exception):
    exit_code = 2

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # one line, whatever a file's names and other packages say


class InputError(RarefyError):
    pass


class CaptureError(InputError):
    pass


class DataError(InputError):
    pass


class FormatError(InputError):
    pass


class MissingDependency(InputError):
    """``package``: the import that failed; ``extra``: the extra of rarefy that brings it."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed; pip install 'rarefy[{extra}]'")


class WorkerLost(RarefyError):
    pass


class CheckFailed(RarefyError):
    exit_code = 1


class SelfCheckFailed(CheckFailed):
    pass


class GoalMissed(CheckFailed):
    pass


class SignatureRefused(CheckFailed):
    pass


class TrainingDiverged(CheckFailed):
    """``graph``: the last good state."""

    graph: Any = None


def section(error: BaseException) -> str | None:
    """The section of docs/errors.md on such an error: that of its class, or of the nearest one above with its own."""
    for kind in type(error).__mro__:
        if kind.__module__ == __name__:
            return f"errors.md#{kind.__name__.lower()}"
    return None


def first_line(error: BaseException, most: int | None = 200) -> str:
    """What another package's error says, in one line of at most so many characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:most]
