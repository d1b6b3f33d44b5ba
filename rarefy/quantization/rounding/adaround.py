"""AdaRound (2004.10568): up or down is learned for each weight, layer by layer.

    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)          q = s clip(floor(w / s) + h, qmin, qmax)
    min over V   E ||y - q x||^2 / (s^2 a)  +  strength  sum 1 - |2 h - 1|^beta

y is what the float layer makes of the float model's inputs, x comes from the rounded layers before. The expectation is
the exact quadratic form over all samples (``_quadratic``), not a minibatch, so that no sample is kept and no draw
decides; what is given up is the activation behind the layer. Dividing by the square of the scale and a, the mean square
of an input, makes ``strength`` mean the same in every layer. beta falls from 20 to 2 after the first fifth of the
steps, in which the second term is off. An output that is not better than with nearest rounding stays with that.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.quantization.rounding._quadratic import Moments, Quadratic
from rarefy.quantization.rounding._soft import beta_at, initial, opened, undecided
from rarefy.quantization.rounding_pass import Layer


@dataclasses.dataclass(frozen=True)
class Adaround:
    """Up or down learned by gradient descent on the layer's output error.

    A layer at a time; brecq learns a block's layers together, with its scales and biases, and takes far longer.
    """

    steps: int = 1000
    lr: float = 0.01
    strength: float = 1.0

    reads = frozenset({"float_outputs"})

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lr < math.inf or not 0 <= self.strength < math.inf:
            raise InputError(
                f"adaround: steps={self.steps}, lr={self.lr}, strength={self.strength}: give positive numbers"
            )

    def layer_codes(self, layer: Layer, generator: torch.Generator) -> Tensor:
        moments = Moments.of(layer, "float_outputs")
        assert moments.cross is not None
        error = Quadratic(moments.gram, moments.cross)
        grid = layer.grid
        low = torch.floor(layer.weight / layer.scale)
        size = moments.gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None] * layer.scale.square().mean(
            2
        )  # (groups, outputs)
        with torch.enable_grad():
            free = initial(layer.weight / layer.scale - low).requires_grad_()
            adam = torch.optim.Adam([free], lr=self.lr)
            for step in range(self.steps):
                h = opened(free)
                q = layer.scale * (low + h).clamp(grid.qmin, grid.qmax)
                loss = (error.loss(q) / size).sum()
                beta = beta_at(step / self.steps)
                if beta is not None:
                    loss = loss + self.strength * undecided(h, beta).sum()
                adam.zero_grad()
                loss.backward()
                adam.step()
        made = (low + (opened(free.detach()) >= 0.5)).clamp(grid.qmin, grid.qmax) * layer.scale
        return layer.nearest(error.better(made, layer.nearest(layer.weight, layer.scale) * layer.scale), layer.scale)
