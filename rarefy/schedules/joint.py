"""Joint: prune, distil and quantise in one training (as GETA, arXiv 2502.18030, and OCSPruner, 2501.13439, do, with the parts that are here).

    fold ─▶ quantise ─▶ train codes, channels pulled to zero ─▶ cut ─▶ quantise ─▶ train codes

What is to go is chosen before the first step, as ``prune`` chooses it. The first ``shrink`` of the steps train the whole network through its fake-quantised
form (``trainable.py``), while the groups that are to go fade: of K steps, the k-th leaves

    w_k = w_0 (K - k) / K        of every weight coupled to such a channel, which learns no more

so the rest adapts to rounding and to their absence at once, and the cut changes nothing. The smaller network is calibrated anew, and the rest of the steps train
its codes. The original teaches throughout. The result is quantised: it needs no further step. (Group sparsity's penalty in place of fading leaves
something of each group after so few steps, and the cut breaks what batch norm is no longer there to mend.)

Given up: a choice that training could revise; batch norm, which is folded before the first step; the learned scales of the first part, which are calibrated anew on the smaller network;
and speed, for the first part's steps are those of the whole network. ``bench/joint.py`` sets it beside prune, distil, quantise at equal steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.coupling import Coupling, couple
from rarefy.errors import InputError
from rarefy.folding import fold
from rarefy.schedules import Asked, Once, Setting, check_data, check_training, joined, last, trained
from rarefy.surgery import share_copy
from rarefy.survivors import unpacked


@dataclass(frozen=True)
class Joint:
    """Prune, distil and quantise in one training; the result is quantised.

    epochs, batch_size, lr: of the training, both parts together; steps wins over epochs. shrink: share of the steps before the cut.
    loss: how the original teaches, or none. weights, activations: the grids. images: to calibrate on.
    """

    epochs: int = 20
    steps: int | None = None
    batch_size: int = 128
    lr: float = 0.01
    shrink: float = 0.5
    loss: str = "lskd"
    weights: str = "int8"
    activations: str = "uint8"
    images: int = 128

    def __post_init__(self) -> None:
        check_training(self)
        if not 0 < self.shrink < 1 or (self.steps is not None and self.steps < 2) or self.images < 1:
            raise ValueError(
                f"shrink={self.shrink} lies between 0 and 1, steps={self.steps} is at least 2, and images={self.images} at least 1"
            )

    def run(self, graph: fx.GraphModule, once: Once, asked: Asked, setting: Setting) -> fx.GraphModule:
        """Raises InputError where there is no training data, for a graph that is quantised already, or for what ``prune`` refuses."""
        from rarefy.quantizing import quantize  # once asked for: `prune` alone needs none of it
        from rarefy.trainable import is_quantized, to_trainable

        if is_quantized(graph):
            raise InputError("schedule 'joint' quantises by itself; pass the float network")
        check_data("joint", setting)
        whole = fold(graph).eval()
        chosen = once(whole, **asked)  # and a target out of reach is told before the training, not after
        options = {"batch_size": self.batch_size, "lr": self.lr, "clip": 1.0, "validate_every": 0}
        length = setting.task.length("train")
        total = self.steps or max(2, self.epochs * (length // min(self.batch_size, length)))
        first = min(max(1, round(self.shrink * total)), total - 1)

        def coded(model: fx.GraphModule) -> fx.GraphModule:
            grids: dict[str, Any] = {"weights": self.weights, "activations": self.activations}
            return quantize(model, setting.task, images=self.images, seed=setting.seed, progress=setting.progress, **grids)

        penalty = Fade(couple(share_copy(whole), setting.ignore), last(chosen, "prune")["facts"]["kept"], first)
        shrunk = trained("joint", coded(whole), graph, self.loss, setting, part="shrink", penalty=penalty, steps=first, **options)
        numbers = dict(to_trainable(shrunk).named_parameters())
        with torch.no_grad():
            for name, value in whole.named_parameters():
                value.copy_(numbers[name])
        small = once(whole, **asked)
        taught = trained("joint", coded(small), graph, self.loss, setting, part="settle", steps=total - first, **options)
        trainings = [last(one, "train", "distill")["facts"] for one in (shrunk, taught)]
        return joined(graph, taught, plugins.describe(self), trainings, {"steps": [first, total - first]})


class Fade:
    """The penalty, as the training loop takes it: what is to go shrinks in equal steps to nothing.

    kept: name of a weight -> which of its outputs stay, as the record of ``prune`` tells it. steps: how many it takes.
    """

    def __init__(self, coupling: Coupling, kept: Mapping[str, str], steps: int):
        self.steps, self.done = steps, 0
        gone = torch.zeros(coupling.count, dtype=torch.bool)
        for row in coupling.rows:
            if row.produces and row.names[0] in kept:
                leaves = torch.ones(len(row.classes), dtype=torch.bool)
                leaves[unpacked(kept[row.names[0]], len(leaves))] = False
                gone[row.classes[leaves]] = True
        gone[0] = False
        self.places: dict[str, list[tuple[int, Tensor]]] = {}
        for row in coupling.rows:
            if bool(gone[row.classes].any()):
                self.places.setdefault(row.names[0], []).append((row.axis, gone[row.classes]))
        self.masks: list[tuple[nn.Parameter, Tensor]] = []

    def describe(self) -> str:
        return f"joint steps={self.steps}"

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.masks = []
        for name, places in self.places.items():
            if name in parameters:
                one = parameters[name]
                mask = torch.zeros_like(one, dtype=torch.bool)
                for axis, gone in places:
                    mask |= gone.to(one.device).reshape([-1 if index == axis else 1 for index in range(one.dim())])
                self.masks.append((one, mask))

    @torch.no_grad()
    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        left = max(0, self.steps - self.done - 1) / max(1, self.steps - self.done)
        self.done += 1
        for one, mask in self.masks:
            one.copy_(torch.where(mask, one * left, one))
            if one.grad is not None:
                one.grad.masked_fill_(mask, 0.0)

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.done)}

    def restore(self, state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        self.done = int(state["done"])
        self.begin(parameters)
