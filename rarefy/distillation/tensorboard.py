"""What TensorBoard shows of a training: loss and learning rate, accuracy on the validation data, images a second. ``tensorboard --logdir FOLDER`` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rarefy.errors import InputError, MissingDependency


class Logs:
    """A folder of event files. first: the step a run starts or goes on from; what an earlier, killed run said of later ones is hidden."""

    def __init__(self, folder: str | Path, first: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependency("tensorboard", "logs") from error
        try:
            self.writer: Any = SummaryWriter(str(folder), purge_step=first)  # type: ignore[no-untyped-call]
        except OSError as error:
            raise InputError(f"logs={folder}: can't be written ({error.strerror}); name a folder that can") from error

    def add(self, step: int, **values: float | None) -> None:
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
