"""Group sparse: train with a penalty that drives whole groups to zero, then prune (DepGraph, arXiv 2301.12900, 3.3).

    I_k = sum of the squares of all weights coupled to channel k
    gradient of each such weight w  +=  reg * 2^(alpha (I_max - I_k) / (I_max - I_min)) * w

A class of the coupling is such a group: what leaves together is shrunk together, in the layer that makes the channel,
the norms on it, and all that read it. I_max and I_min are of the channels that the same layer makes; so the weakest of
them is pulled 2^alpha times as hard as the strongest, and what pruning takes is then close to zero already. A weight
lies along several axes and is pulled by the group of each. I_k is taken anew at each epoch's start. Frozen channels are
not pulled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.compression.schedules._training import Options, check_training, facts_of, joined, trained
from rarefy.graph.nodes import share_copy
from rarefy.pruning.groups.groups import Coupling, Row, couple
from rarefy.pruning.schedule import Asked, Once, Setting


@dataclass(frozen=True)
class GroupSparse:
    """A training that shrinks the least important channels, then one pruning.

    For when much has to go and there is time for one whole training before. Not ``iterative``, which prunes between
    short trainings.

    epochs, batch_size, lr: of the training.
    reg: pull on the strongest channel of a layer. alpha: the weakest is pulled 2^alpha times as hard.
    loss: how the original teaches meanwhile, or none.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.01
    reg: float = 5e-4
    alpha: float = 4.0
    loss: str = "none"

    def __post_init__(self) -> None:
        check_training(self.epochs, self.batch_size, self.lr)
        if not 0 < self.reg < float("inf") or not 0 <= self.alpha <= 64:
            raise ValueError(f"reg={self.reg} must be positive, and alpha={self.alpha} lie between 0 and 64")

    def run(self, graph: fx.GraphModule, once: Once, asked: Asked, setting: Setting) -> fx.GraphModule:
        """Raises InputError where there is no training data, or for what ``prune`` refuses."""
        once(graph, **asked)  # a target out of reach is told before the training, not after
        penalty = Pull(couple(share_copy(graph).eval(), setting.ignore, setting.heads), self.reg, self.alpha)
        options = Options(epochs=self.epochs, lr=self.lr)
        shrunk = trained(
            "group_sparse", graph, graph, self.loss, setting, options,
            batch_size=self.batch_size, part="group-sparse", penalty=penalty,
        )  # fmt: skip
        training = facts_of(shrunk, "train", "distill")
        small = once(shrunk.train(graph.training), **asked)
        return joined(graph, small, plugins.describe(self), [training], {"weight_left": penalty.share(shrunk, graph)})


class Pull:
    """The penalty, as the training loop takes it.

    family: (classes,) int64, which layer makes the class.
    strength: (classes,) float64, reg * 2^(...) of each group, 0 for the frozen one.
    """

    def __init__(self, coupling: Coupling, reg: float, alpha: float):
        self.coupling, self.reg, self.alpha = coupling, reg, alpha
        self.rows: dict[str, list[Row]] = {}
        for row in coupling.rows:
            self.rows.setdefault(row.names[0], []).append(row)
        self.family = coupling.producers().unique(return_inverse=True)[1]
        self.strength = torch.zeros(coupling.count, dtype=torch.float64)
        self.factors: dict[str, Tensor] = {}

    def describe(self) -> str:
        return f"group_sparse reg={self.reg} alpha={self.alpha}"

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """New strengths, from the weights as they are."""
        size = self._sizes(parameters)
        none = torch.zeros(int(self.family.max()) + 1, dtype=size.dtype)
        least, most = (none.scatter_reduce(0, self.family, size, way, include_self=False) for way in ("amin", "amax"))
        spread = (most - least)[self.family]
        self.strength = self.reg * torch.exp2(
            self.alpha * (most[self.family] - size) / torch.where(spread > 0, spread, 1.0)
        )
        self.strength[0] = 0
        self._spread(parameters)

    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        pulled = [(parameters[name], factor) for name, factor in self.factors.items()]
        gradients = [(one.grad, one.detach(), factor) for one, factor in pulled if one.grad is not None]
        if gradients:
            torch._foreach_addcmul_(*map(list, zip(*gradients)))

    def state(self) -> dict[str, Tensor]:
        return {"strength": self.strength}

    def restore(self, state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        self.strength = state["strength"].cpu()
        self._spread(parameters)

    def share(self, after: fx.GraphModule, before: fx.GraphModule) -> float:
        """Median over the groups of what is left of I_k."""
        left, whole = (self._sizes(dict(model.named_parameters()))[1:] for model in (after, before))
        return float((left / whole.clamp_min(1e-30)).median())

    def _sizes(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """(classes,) I_k."""
        return self.coupling.gather({name: one.detach().square() for name, one in parameters.items()}, reduce="sum")

    def _spread(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """``factors``: name -> what each element of the parameter is multiplied by, the sum over its axes."""
        self.factors = {}
        for name, one in parameters.items():
            total = torch.zeros((1,) * one.dim(), dtype=torch.float64)
            for row in self.rows.get(name, ()):
                total = total + self.strength[row.classes].reshape(
                    [-1 if axis == row.axis else 1 for axis in range(one.dim())]
                )
            if bool(total.any()):
                self.factors[name] = torch.empty_like(one).copy_(total.to(one.device, one.dtype).expand_as(one))
