"""Magnitude: |w|, all layers in one ranking.

Little beats it once the network trains on (arXiv 1902.09574).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from rarefy.tasks.task import Task


@dataclass(frozen=True)
class Magnitude:
    """|w|: needs no data; all layers compete.

    The default: where the network trains on, little is better. Not the magnitude of ``prune``, which is of channels.
    """

    scope: ClassVar[str] = "global"

    def scores(
        self, graph: fx.GraphModule, weights: Mapping[str, Sequence[fx.Node]], task: Task | None, seed: int
    ) -> dict[str, Tensor]:
        return {name: graph.get_parameter(name).detach().abs() for name in weights}
