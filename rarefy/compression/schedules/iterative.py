"""Iterative: several rounds of pruning, with a short training between two of them (the cubic schedule of arXiv 1710.01878).

    what is gone after round k of K:  s_k = s (1 - (1 - k / K)^3),   s = 1 - target

Much goes early, when what is left can still make up for it, and little at the end. The share is of the original's MACs, parameters or
channels, whatever the target counts. Scores are taken anew in each round, from weights that have adapted. Each training is taught by the
original (``loss="none"``: by labels alone). After the last round nothing is trained: that is ``distill``'s to do. ``floor`` is of the original's layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rarefy import plugins
from rarefy.compression.schedules._training import check_training, joined, last, trained
from rarefy.errors import InputError
from rarefy.graph.macs import count_macs, count_parameters
from rarefy.pruning.records import followed, packed
from rarefy.pruning.schedule import Asked, Once, Setting


@dataclass(frozen=True)
class Iterative:
    """Rounds of pruning, less in each, with a short training between two.

    rounds: how many prunings.  epochs, batch_size, lr: of each training.  loss: how the original teaches, or none.
    """

    rounds: int = 5
    epochs: int = 1
    batch_size: int = 128
    lr: float = 0.01
    loss: str = "lskd"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")
        check_training(self)

    def shares(self, target: float) -> list[float]:
        """What remains after each round, of which the last is ``target``."""
        return [*(1 - (1 - target) * (1 - (1 - k / self.rounds) ** 3) for k in range(1, self.rounds)), target]

    def run(self, graph: fx.GraphModule, once: Once, asked: Asked, setting: Setting) -> fx.GraphModule:
        """Raises InputError for a target that is not counted, or where there is no training data."""
        ((kind, value),) = asked.items()
        whole = {"macs": count_macs, "params": count_parameters}
        if kind not in (*whole, "keep"):
            raise InputError(f"schedule 'iterative' goes by keep, macs or params, not by {kind}; give one of these")
        target = value if value <= 1 else value / whole[kind](graph)
        if target > 1:
            return once(graph, **asked)  # nothing has to go
        once(graph, **asked)  # a target out of reach is told before the first training, not after
        small, rounds, trainings = graph, [], []
        reached: dict[str, float] = {}
        first: dict[str, Any] = {}
        records: list[dict[str, Any]] = []
        for index, share in enumerate(self.shares(target), 1):
            final = index == self.rounds
            was = {name: before for name, (before, _) in first.get("channels", {}).items()}
            small = once(
                small, **{kind: value if final and value > 1 else min(1.0, share / reached.get(kind, 1.0))}, was=was
            )
            facts = last(small, "prune")["facts"]
            records.append(facts)
            reached = {name: reached.get(name, 1.0) * left for name, left in facts["reached"].items()}
            first = first or {name: facts[name] for name in ("macs", "params")} | {"channels": facts["channels"]}
            rounds.append(
                {"asked": share, "reached": reached[kind], "macs": facts["macs"][1], "params": facts["params"][1]}
            )
            if not final:
                options = {"epochs": self.epochs, "batch_size": self.batch_size, "lr": self.lr}
                small = trained("iterative", small, graph, self.loss, setting, part=f"round-{index}", **options)
                trainings.append(last(small, "train", "distill")["facts"])
                small.train(graph.training)
        record = last(small, "prune")
        record["options"] = {**asked, **{key: option for key, option in record["options"].items() if key != kind}}
        facts = record["facts"]
        kept = {
            name: torch.zeros(first["channels"][name][0], dtype=torch.bool).index_fill(0, own, True)
            for name, own in followed(records).items()
        }
        told = {
            "asked": dict(asked),
            "reached": reached,
            **{name: [first[name][0], facts[name][1]] for name in ("macs", "params")},
            "channels": {name: [first["channels"][name][0], after] for name, (_, after) in facts["channels"].items()},
            "kept": {name: packed(mask) for name, mask in kept.items()},
            "rounds": rounds,
        }
        return joined(graph, small, plugins.describe(self), trainings, told)
