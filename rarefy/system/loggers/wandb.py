"""Weights & Biases: a run of a project, sent as it goes, or kept in a folder for ``wandb sync``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rarefy.errors import InputError, first_line
from rarefy.system.dependencies import needs
from rarefy.system.logs import Values, Writer


@dataclass(frozen=True)
class Wandb:
    """A run of Weights & Biases. folder: of its files; "": its own choice. name: of the run; "": what is done."""

    project: str = "rarefy"
    name: str = ""
    folder: str = ""
    mode: Literal["online", "offline"] = "online"

    def open(self, run: str, first: int, about: Mapping[str, object]) -> Writer:
        wandb = needs("wandb", "wandb")
        try:
            opened = wandb.init(
                project=self.project,
                name=self.name or run,
                dir=self.folder or None,
                mode=self.mode,
                config={**about, "first_step": first},
                reinit="create_new",
            )
        except Exception as error:  # no login, no network, no right to the project
            raise InputError(
                f"logs=wandb: no run can be opened ({first_line(error)}); `wandb login` once, or "
                "wandb:mode=offline keeps it in a folder"
            ) from error
        return _Run(opened)


class _Run:
    def __init__(self, run: Any):
        self.run = run

    def add(self, step: int, values: Values) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()
