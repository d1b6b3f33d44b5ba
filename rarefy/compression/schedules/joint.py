"""Joint: prune, distil and quantise in one training, as GETA (arXiv 2502.18030) and OCSPruner (2501.13439) do.

    [channels pulled to zero ─▶] cut ─▶ the rest trained ─▶ quantise ─▶ train codes, batch norm live, then frozen

What is to go is chosen before the first step, as ``prune`` chooses it. In the first ``shrink`` of the steps the groups
that are to go fade: of K steps, the k-th leaves

    w_k = w_0 (K - k) / K        of every weight coupled to such a channel, which learns no more

so the rest adapts to their absence step by step, and the cut changes nothing. The smaller network trains on in float;
for the last ``codes`` of the steps it is quantised and trains its codes, with batch norm put back behind its layers
(distillation/qat_batch_norm.py) and frozen for the last quarter of these steps. The original teaches throughout. The
result is quantised: it needs no further step. (Group sparsity's penalty in place of fading leaves something of each
group after so few steps.)

Rounding comes late because it is cheap to mend and dear to train through: a step in codes takes twice the time of one
in float, and bears a smaller rate. Given up: a choice that training could revise. Fading is off unless asked for
(``shrink=0.2``): its steps are those of the whole network, and over 200 steps cutting at once came out ahead.
``bench/joint.py`` sets it beside prune, distil, quantise at equal steps.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.compression.schedules._training import Options, check_training, facts_of, joined, task_of, trained
from rarefy.errors import InputError
from rarefy.graph.nodes import share_copy
from rarefy.kernels import is_quantised
from rarefy.pruning.groups.groups import Coupling, couple
from rarefy.pruning.records import unpacked
from rarefy.pruning.schedule import Asked, Once, Setting


@dataclass(frozen=True)
class Joint:
    """Prune, distil and quantise in one training; the result is quantised.

    For when the training has few steps, and all of it is to end in codes. Not for the steps of ``compress``, which undo
    what does not pay.

    epochs, batch_size: of the training, all parts together; steps wins over epochs.
    lr, code_lr: rates in float and in codes.
    shrink, codes: shares of the steps, the first in which channels fade, and the last in codes.
    loss: how the original teaches, or none.
    weights, activations: the grids. images: to calibrate on.
    """

    epochs: int = 20
    steps: int | None = None
    batch_size: int = 128
    lr: float = 0.05
    code_lr: float = 0.03
    shrink: float = 0.0
    codes: float = 0.2
    loss: str = "auto"
    weights: str = "int8"
    activations: str = "uint8"
    images: int = 128

    def __post_init__(self) -> None:
        check_training(self.epochs, self.batch_size, self.lr)
        shares = 0 <= self.shrink < 1 and 0 < self.codes < 1 and self.shrink + self.codes < 1
        if (
            not shares
            or not 0 < self.code_lr < float("inf")
            or (self.steps is not None and self.steps < 3)
            or self.images < 1
        ):
            raise ValueError(
                f"shrink={self.shrink} and codes={self.codes} are shares whose sum is below 1, "
                f"code_lr={self.code_lr} is positive, steps={self.steps} at least 3, "
                f"and images={self.images} at least 1"
            )

    def run(self, graph: fx.GraphModule, once: Once, asked: Asked, setting: Setting) -> fx.GraphModule:
        """Raises InputError without training data, for a graph that is quantised, or for what ``prune`` refuses."""
        from rarefy.distillation.qat import CLIP, FREEZE  # once asked for: the list of schedules needs none of it
        from rarefy.quantization.quantize import quantize

        if is_quantised(graph):
            raise InputError("schedule 'joint' quantises by itself; pass the float network")
        task = task_of("joint", setting)
        chosen = once(graph, **asked)  # a target out of reach is told before the training, not after
        length = task.data.length("train")
        total = self.steps or max(3, self.epochs * (length // min(self.batch_size, length)))
        parts = self._parts(total)
        learn = functools.partial(
            trained, "joint", teacher=graph, loss=self.loss, setting=setting, batch_size=self.batch_size
        )
        trainings, small = [], chosen
        if parts[0]:
            penalty = Fade(
                couple(share_copy(graph).eval(), setting.ignore, setting.heads),
                facts_of(chosen, "prune")["kept"],
                parts[0],
            )
            shrunk = learn(graph, part="shrink", penalty=penalty, options=Options(steps=parts[0], lr=self.lr))
            trainings.append(facts_of(shrunk, "train", "distill"))
            small = once(shrunk.train(graph.training), **asked)
        taught = learn(small, part="settle", options=Options(steps=parts[1], lr=self.lr))
        coded = quantize(
            taught,
            task,
            weights=self.weights,
            activations=self.activations,
            images=self.images,
            seed=setting.seed,
            progress=setting.progress,
        )
        late = Options(steps=parts[2], lr=self.code_lr, clip=CLIP, freeze=FREEZE, live_norm="yes")
        done = learn(coded, part="codes", options=late)
        trainings += [facts_of(one, "train", "distill") for one in (taught, done)]
        return joined(graph, done, plugins.describe(self), trainings, {"steps": parts})

    def _parts(self, total: int) -> list[int]:
        """Steps of the three parts."""
        first = round(self.shrink * total)
        rest = min(max(1, round(self.codes * total)), total - first - 1)
        return [first, total - first - rest, rest]


class Fade:
    """The penalty, as the training loop takes it: what is to go shrinks in equal steps to nothing.

    left: name of a weight -> which of its outputs stay, as the record of ``prune`` tells it. steps: how many it takes.
    """

    def __init__(self, coupling: Coupling, left: Mapping[str, str], steps: int):
        self.steps, self.done = steps, 0
        gone = torch.zeros(coupling.count, dtype=torch.bool)
        for row in coupling.rows:
            if row.produces and row.names[0] in left:
                leaves = torch.ones(len(row.classes), dtype=torch.bool)
                leaves[unpacked(left[row.names[0]], len(leaves))] = False
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
