"""When to prune, and what to train meanwhile: the protocol of ``schedule=``.

Those that come with rarefy lie in ``rarefy/compression/schedules``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import fx

from rarefy.tasks.task import Task

Once = Callable[..., fx.GraphModule]
Asked = Mapping[str, float | Mapping[str, float]]


@dataclass(frozen=True)
class Setting:
    """task, device, checkpoint, progress: as ``distill`` takes them. ignore, heads: as ``couple`` takes them."""

    task: Task | None
    seed: int
    ignore: Sequence[str]
    heads: str
    device: str | torch.device | None
    checkpoint: str | Path | None
    progress: bool


class Schedule(Protocol):
    def run(self, graph: fx.GraphModule, once: Once, asked: Asked, setting: Setting) -> fx.GraphModule:
        """The pruned graph, with one new record of pruning in its history.

        once: ``once(graph, keep=0.5)`` prunes at once with all the caller's other options; ``was={layer: outputs}`` are
            those that its layers had first, of which ``floor`` is a share.
        asked: the target, such as {"macs": 0.5}.
        """
        ...
