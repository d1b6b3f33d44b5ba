"""Block reconstruction (BRECQ, 2102.05426) with dropped rounding of activations (QDrop, 2203.05740).

All layers of a block are rounded together, towards what the float block makes of the float model's inputs, on what the rounded blocks before it yield:

    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)          q = s clip(floor(w / s) + h(V), qmin, qmax)
    min over V, s_x   E ||block(x; q, s_x) - y||^2 / e  +  strength  mean 1 - |2 h - 1|^beta

e is the error with nearest rounding, so that ``strength`` means the same in every block; beta falls from 20 to 2 after the first fifth of the steps, in which the second
term is off (``_soft``). The scales of activations learn along (LSQ). In each step every element of an activation, the block's input included, stays unrounded with
probability ``drop``, which makes a flatter minimum. A network without residuals goes layer by layer, the activation behind each included. The
result is kept where its error on these images, nothing dropped and all rounded, is below that of nearest rounding.

Given up: the weighting of errors by squared gradients (Fisher), which needs labels or gradients of the whole network for little; and 20,000 steps a block
at the authors' rates of 1e-3 and 4e-5. ``lr`` is ten times theirs for as many fewer steps; ``scale_lr`` is relative to the scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.rounding import Block
from rarefy.rounding._soft import beta_at, initial, opened, undecided

_RANGE = 4.0  # a learned scale stays within this factor of where it started
_AT_ONCE = 64  # images whose error is measured together


@dataclasses.dataclass(frozen=True)
class Brecq:
    """Up or down learned for all weights of a block together, with the scales of its activations."""

    steps: int = 1000
    batch: int = 32
    lr: float = 0.01
    scale_lr: float = 0.001
    drop: float = 0.5
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.lr <= 0 or self.scale_lr < 0 or self.strength < 0 or not 0 <= self.drop < 1:
            raise InputError(
                f"brecq: steps={self.steps}, batch={self.batch}, lr={self.lr}, scale_lr={self.scale_lr}, strength={self.strength}: give positive numbers; "
                f"drop={self.drop}: a probability below 1"
            )

    def reconstruct(self, block: Block, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        device = block.outputs.device
        random = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        nearest = [grid.snap(w / step) for w, step, grid in zip(block.weights, block.steps, block.grids)]
        at_nearest = _error(block, nearest, block.scales)
        size = max(at_nearest, 1e-30)
        floors = [torch.floor(w / step) for w, step in zip(block.weights, block.steps)]

        def mix(rounded: Tensor, exact: Tensor) -> Tensor:
            return torch.where(torch.rand(exact.shape, generator=random, device=device) < self.drop, exact, rounded)

        with torch.enable_grad():
            free = [initial(w / step - low).requires_grad_() for w, step, low in zip(block.weights, block.steps, floors)]
            logs = [torch.zeros_like(scale).requires_grad_() for scale in block.scales]
            adam = torch.optim.Adam([{"params": free, "lr": self.lr}, {"params": logs, "lr": self.scale_lr}])
            count = sum(value.numel() for value in free)
            for step in range(self.steps):
                chosen = torch.randint(block.images, (min(self.batch, block.images),), generator=generator)
                inputs = block.part(block.inputs, chosen, block.images)
                exact = block.part(block.float_inputs, chosen, block.images)
                if self.drop:
                    inputs = [x if y is None or not isinstance(x, Tensor) else mix(x, y) for x, y in zip(inputs, exact)]
                (wanted,) = block.part([block.outputs], chosen, block.images)
                opening = [opened(value) for value in free]
                numbers = [s * (low + h).clamp(grid.qmin, grid.qmax) for s, low, h, grid in zip(block.steps, floors, opening, block.grids)]
                made = block.run(inputs, numbers, _moved(block.scales, logs), mix if self.drop else None)
                loss = (made - wanted).square().mean() / size
                beta = beta_at(step / self.steps)
                if beta is not None:
                    loss = loss + self.strength * torch.stack([undecided(h, beta).sum() for h in opening]).sum() / count
                adam.zero_grad()
                loss.backward()
                adam.step()
        codes = [(low + (opened(value.detach()) >= 0.5)).clamp(grid.qmin, grid.qmax) for low, value, grid in zip(floors, free, block.grids)]
        scales = [scale.detach() for scale in _moved(block.scales, logs)]
        return (codes, scales) if _error(block, codes, scales) < at_nearest else (nearest, list(block.scales))


def _moved(scales: Sequence[Tensor], logs: Sequence[Tensor]) -> list[Tensor]:
    return [scale * log.exp().clamp(1 / _RANGE, _RANGE) for scale, log in zip(scales, logs)]


@torch.no_grad()
def _error(block: Block, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> float:
    """Mean square of the difference to the float block's output."""
    numbers = [code * step for code, step in zip(codes, block.steps)]
    total = 0.0
    for chosen in torch.arange(block.images).split(_AT_ONCE):
        made = block.run(block.part(block.inputs, chosen, block.images), numbers, scales, None)
        (wanted,) = block.part([block.outputs], chosen, block.images)
        total += float((made - wanted).double().square().sum())
    return total / block.outputs.numel()
