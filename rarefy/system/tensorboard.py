"""What TensorBoard shows of a run: numbers over steps. ``tensorboard --logdir FOLDER`` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rarefy.errors import InputError, MissingDependency


class Logs:
    """A folder of event files.

    first: the step a run starts or goes on from; what an earlier, killed run said of later ones is hidden.
    """

    def __init__(self, folder: str | Path, first: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependency("tensorboard", "logs") from error
        try:
            self.writer: Any = SummaryWriter(str(folder), purge_step=first)
        except OSError as error:
            raise InputError(f"logs={folder}: can't be written ({error.strerror}); name a folder that can") from error

    def add(self, step: int, **values: float | None) -> None:
        """One point of each curve that has a value. values: by the curve's name."""
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
