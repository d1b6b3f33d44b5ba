from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx

Once = Callable[..., fx.GraphModule]
Asked = Mapping[str, float]


@dataclass(frozen=True)
class Setting:
    """task, device, checkpoint, progress: as ``distill`` takes them. ignore, heads: as ``couple`` takes them."""

    task: Any
    seed: int
    ignore: Sequence[str]
    heads: str
    device: str | torch.device | None
    checkpoint: str | Path | None
    progress: bool


class Schedule(Protocol):
    def run(self, graph: fx.GraphModule, once: Once, asked: Asked, setting: Setting) -> fx.GraphModule: ...
