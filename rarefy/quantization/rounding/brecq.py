"""Block reconstruction (BRECQ, 2102.05426) with dropped rounding of activations (QDrop, 2203.05740).

All layers of a block are rounded together, towards what the float block makes of the float model's inputs, on what the
rounded blocks before it yield:

    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)          q = s clip(floor(w / s_0) + h(V), qmin, qmax)
    min over V, s, s_x, b   E ||block(x; q, s_x, b) - y||^2 / e  +  strength  mean 1 - |2 h - 1|^beta

e is the error that rounding the weights alone to nearest makes, so that ``strength`` means the same in every block and
at every width of the activations; beta falls from 20 to 2 after the first fifth of the steps, in which the second term
is off (``_soft``). The scales of activations (LSQ) and weights and the biases learn along, and once more alone for a
fifth as many steps when the codes are decided, with nothing dropped and rates that fall to 0 as a half cosine: a mean
that moved by the rounding of all elements is not seen where half of them stay unrounded. So the means are mended in the
block's own objective, and sequential bias correction is not done after it: shifting each sum inside the block to its
float mean undoes what was learned (ResNet-20 loses 2 to 4 dB by it). In each step every element of an activation, the
block's input included, stays unrounded with probability ``drop``, which makes a flatter minimum. A network without
residuals goes layer by layer, the activation behind each included. The result is kept where its error on these images,
nothing dropped and all rounded, is below that of nearest rounding.

Given up: the weighting of errors by squared gradients (Fisher), which needs labels or gradients of the whole network
for little; and 20,000 steps a block at the authors' rates of 1e-3 and 4e-5. ``lr`` is ten times theirs for as many
fewer steps; ``scale_lr`` is relative to a scale, ``lr`` of biases to the layer's mean bias. What is learned fits its
images better than others (W4A4, 128 images: the answers stand at 18 dB on these, at 14 on others): more images help
more than more steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.graph.nodes import Value
from rarefy.quantization.rounding._soft import beta_at, initial, opened, undecided
from rarefy.quantization.rounding_pass import Block, Mix, Rounded

_RANGE = 4.0  # a learned scale stays within this factor of where it started
_SETTLING = 0.2  # of the steps, for scales and biases alone
_AT_ONCE = 64  # images whose error is measured together


@dataclasses.dataclass(frozen=True)
class Brecq:
    """Up or down learned for all weights of a block together, with its scales and biases.

    For few bits, where others lose too much; by far the slowest, and more images help it more than more steps.
    """

    steps: int = 1000
    batch: int = 32
    lr: float = 0.01
    scale_lr: float = 0.001
    drop: float = 0.5
    strength: float = 4.0

    def __post_init__(self) -> None:
        if (
            self.steps < 1
            or self.batch < 1
            or not 0 < self.lr < math.inf
            or not 0 <= self.scale_lr < math.inf
            or not 0 <= self.strength < math.inf
            or not 0 <= self.drop < 1
        ):
            raise InputError(
                f"brecq: steps={self.steps}, batch={self.batch}, lr={self.lr}, scale_lr={self.scale_lr}, "
                f"strength={self.strength}: give positive numbers; drop={self.drop}: a probability below 1"
            )

    def reconstruct(self, block: Block, generator: torch.Generator) -> Rounded:
        device = block.outputs.device
        random = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        codes = [grid.snap(w / step) for w, step, grid in zip(block.weights, block.steps, block.grids)]
        nearest = Rounded(codes, block.steps, block.biases, block.scales)
        size = max(_error(block, nearest, lambda rounded, exact: exact), 1e-30)
        floors = [torch.floor(w / step) for w, step in zip(block.weights, block.steps)]
        units = [torch.maximum(bias.abs().mean(), w.abs().mean()) for bias, w in zip(block.biases, block.weights)]

        def mix(rounded: Tensor, exact: Tensor) -> Tensor:
            return torch.where(torch.rand(exact.shape, generator=random, device=device) < self.drop, exact, rounded)

        def error(state: Rounded, dropped: bool) -> Tensor:
            chosen = torch.randint(block.images, (min(self.batch, block.images),), generator=generator)
            drop = mix if dropped else None
            inputs, wanted = _batch(block, chosen, drop)
            return torch.mean((_answer(block, inputs, state, drop) - wanted).square()).div(size)

        def moved(codes: Sequence[Tensor]) -> Rounded:
            biases = (
                [bias + unit * shift for bias, unit, shift in zip(block.biases, units, shifts)]
                if shifts
                else block.biases
            )
            return Rounded(codes, _moved(block.steps, shares), biases, _moved(block.scales, logs))

        def codes_at(opening: Sequence[Tensor]) -> list[Tensor]:
            return [(low + h).clamp(grid.qmin, grid.qmax) for low, h, grid in zip(floors, opening, block.grids)]

        with torch.enable_grad():
            free = [
                initial(w / step - low).requires_grad_() for w, step, low in zip(block.weights, block.steps, floors)
            ]
            logs = [torch.zeros_like(scale).requires_grad_() for scale in block.scales]
            shares = [torch.zeros_like(step).requires_grad_() for step in block.steps]
            shifts = [torch.zeros_like(bias).requires_grad_() for bias in block.biases] if block.shifts else []
            deciding = torch.optim.Adam(free, lr=self.lr)
            moving = torch.optim.Adam(
                [{"params": [*logs, *shares], "lr": self.scale_lr}, {"params": shifts, "lr": self.lr}]
            )
            count = sum(value.numel() for value in free)
            for step in range(self.steps):
                opening = [opened(value) for value in free]
                loss = error(moved(codes_at(opening)), self.drop > 0)
                beta = beta_at(step / self.steps)
                if beta is not None:
                    loss = loss + self.strength * torch.stack([undecided(h, beta).sum() for h in opening]).sum() / count
                _step(loss, deciding, moving)
            codes = codes_at([(opened(value.detach()) >= 0.5).float() for value in free])
            settling = round(_SETTLING * self.steps)
            for step in range(settling):
                for group, lr in zip(moving.param_groups, (self.scale_lr, self.lr)):
                    group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / settling))
                _step(error(moved(codes), False), moving)
        with torch.no_grad():
            made = moved(codes)
        return made if _error(block, made) < _error(block, nearest) else nearest


def _step(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    for one in optimizers:
        one.zero_grad()
    loss.backward()
    for one in optimizers:
        one.step()


def _moved(scales: Sequence[Tensor], logs: Sequence[Tensor]) -> list[Tensor]:
    return [scale * log.exp().clamp(1 / _RANGE, _RANGE) for scale, log in zip(scales, logs)]


def _batch(block: Block, chosen: Tensor, mix: Mix | None) -> tuple[list[Value], Tensor]:
    """What the block reads of some images, mixed with what it reads in float; what the float block makes of them."""
    inputs = block.part(block.inputs, chosen, block.images)
    if mix is not None:
        exact = block.part(block.float_inputs, chosen, block.images)
        inputs = [x if y is None or not isinstance(x, Tensor) else mix(x, y) for x, y in zip(inputs, exact)]
    return inputs, block.part([block.outputs], chosen, block.images)[0]


def _answer(block: Block, inputs: Sequence[Value], state: Rounded, mix: Mix | None) -> Tensor:
    numbers = [code * step for code, step in zip(state.codes, state.steps)]
    return block.run(inputs, numbers, state.biases, state.scales, mix)


@torch.no_grad()
def _error(block: Block, state: Rounded, mix: Mix | None = None) -> float:
    """Mean square of the difference to the float block's output."""
    total = 0.0
    for chosen in torch.arange(block.images).split(_AT_ONCE):
        inputs = (
            block.float_inputs
            if mix is not None and not any(value is None for value in block.float_inputs)
            else block.inputs
        )
        made = _answer(block, block.part(inputs, chosen, block.images), state, mix)
        (wanted,) = block.part([block.outputs], chosen, block.images)
        total += float((made - wanted).double().square().sum())
    return total / block.outputs.numel()
