"""Iterative: several rounds of pruning, a short training between two (the cubic schedule of arXiv 1710.01878).

    what is gone after round k of K:  s_k = s (1 - (1 - k / K)^3),   s = 1 - target

Much goes early, when what is left can still make up for it, and little at the end. The share is of the original's MACs,
parameters or channels, whatever the target counts. Scores are taken anew in each round, from weights that have adapted.
Each training is taught by the original (``loss="none"``: by labels alone). After the last round nothing is trained:
that is ``distill``'s to do. ``floor`` is of the original's layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from rarefy import plugins
from rarefy.compression.schedules._training import Facts, Options, check_training, facts_of, joined, trained
from rarefy.errors import InputError
from rarefy.graph import history
from rarefy.graph.macs import count_macs, count_parameters
from rarefy.pruning.options import Target
from rarefy.pruning.records import followed, packed
from rarefy.pruning.schedule import Asked, Once, Setting


@dataclass(frozen=True)
class Iterative:
    """Rounds of pruning, less in each, with a short training between two.

    For when much has to go: what is left makes up for a part before the next part goes. Not ``group_sparse``, which
    trains first and prunes once.

    rounds: how many prunings. epochs, batch_size, lr: of each training. loss: how the original teaches, or none.
    """

    rounds: int = 5
    epochs: int = 1
    batch_size: int = 128
    lr: float = 0.01
    loss: str = "auto"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")
        check_training(self.epochs, self.batch_size, self.lr)

    def shares(self, target: float) -> list[float]:
        """What remains after each round, of which the last is ``target``."""
        return [*(1 - (1 - target) * (1 - (1 - k / self.rounds) ** 3) for k in range(1, self.rounds)), target]

    def run(self, graph: fx.GraphModule, once: Once, asked: Asked, setting: Setting) -> fx.GraphModule:
        """Raises InputError for a target that is not counted, or where there is no training data."""
        ((kind, amount),) = asked.items()
        value = Target(kind, amount).number
        whole = {"macs": count_macs, "params": count_parameters}
        if kind not in (*whole, "keep"):
            raise InputError(f"schedule 'iterative' goes by keep, macs or params, not by {kind}; give one of these")
        target = value if value <= 1 else value / whole[kind](graph)
        if target > 1:
            return once(graph, **asked)  # nothing has to go
        once(graph, **asked)  # a target out of reach is told before the first training, not after
        shares = self.shares(target)
        small, trainings = graph, []
        prunings: list[Facts] = []
        rounds: list[dict[str, float]] = []
        reached: dict[str, float] = {}
        for index, share in enumerate(shares, 1):
            final = index == self.rounds
            widths = prunings[0]["channels"] if prunings else {}
            goal = value if final and value > 1 else min(1.0, share / reached.get(kind, 1.0))
            small = once(small, **{kind: goal}, was={name: before for name, (before, _) in widths.items()})
            facts = facts_of(small, "prune")
            prunings.append(facts)
            reached = {name: reached.get(name, 1.0) * left for name, left in facts["reached"].items()}
            rounds.append(
                {"asked": share, "reached": reached[kind], "macs": facts["macs"][1], "params": facts["params"][1]}
            )
            if not final:
                options = Options(epochs=self.epochs, lr=self.lr)
                part, size = f"round-{index}", self.batch_size
                small = trained("iterative", small, graph, self.loss, setting, options, batch_size=size, part=part)
                trainings.append(facts_of(small, "train", "distill"))
                small.train(graph.training)
        last = history.last(small, "prune")
        assert last is not None
        others = {key: option for key, option in last["options"].items() if key != kind}
        facts = {**_overall(prunings), "asked": dict(asked), "reached": reached, "rounds": rounds}
        return joined(graph, small, plugins.describe(self), trainings, facts, {**asked, **others})


def _overall(prunings: Sequence[Facts]) -> Facts:
    """What several prunings in a row did, as one would tell it."""
    first, final = prunings[0], prunings[-1]
    widths = {name: before for name, (before, _) in first["channels"].items()}
    left = {
        name: torch.zeros(widths[name], dtype=torch.bool).index_fill(0, places, True)
        for name, places in followed(prunings).items()
    }
    return {
        **{name: [first[name][0], final[name][1]] for name in ("macs", "params")},
        "channels": {name: [widths[name], after] for name, (_, after) in final["channels"].items()},
        "kept": {name: packed(mask) for name, mask in left.items()},
    }
