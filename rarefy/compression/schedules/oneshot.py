"""Oneshot: everything that has to go goes at once, and nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rarefy.pruning.schedule import Asked, Once, Setting


@dataclass(frozen=True)
class Oneshot:
    """All at once, without training.

    For little that has to go, and where there are no images to train on; what follows may train (``distill``).
    """

    def run(self, graph: fx.GraphModule, once: Once, asked: Asked, setting: Setting) -> fx.GraphModule:
        return once(graph, **asked)
