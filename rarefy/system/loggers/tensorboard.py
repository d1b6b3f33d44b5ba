"""TensorBoard: a folder of event files, which ``tensorboard --logdir FOLDER`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.errors import InputError, MissingDependency
from rarefy.system.logs import Values, Writer


@dataclass(frozen=True)
class TensorBoard:
    """TensorBoard's event files in a folder."""

    folder: str = "runs"

    def open(self, run: str, first: int, about: Mapping[str, object]) -> Writer:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependency("tensorboard", "logs") from error
        _, *part = run.split("/")  # in a folder of its own: its steps are not those of the whole
        try:
            writer: Any = SummaryWriter(str(Path(self.folder, *part)), purge_step=first)
        except OSError as error:
            raise InputError(
                f"logs={self.folder}: can't be written ({error.strerror}); name a folder that can"
            ) from error
        return _Events(writer)


class _Events:
    def __init__(self, writer: Any):
        self.writer = writer

    def add(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
