"""Knowledge review (2104.09044): each stage of the teacher is learned from that of the student and all deeper ones.

    fused_i = attention-weighted sum of P·s_i and fused_{i+1} (enlarged like s_i)      from the deepest stage up
    loss = sum over the stages of HCL(R·fused_i, t_i)

HCL, the hierarchical context loss, is the squared distance of the maps and of their averages over 4x4, 2x2 and 1x1
cells, weighted 1, 1/2, 1/4, 1/8. P, R and the attention are convolutions trained along and thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.distillation.objective import Features, Shapes
from rarefy.errors import InputError

CELLS = (4, 2, 1)


@dataclass(frozen=True)
class Reviewkd:
    """Each stage of the teacher from that and all deeper stages of the student (knowledge review).

    For convolutional networks of equal resolutions, where ``mse`` stage by stage asks too much of the early ones; its
    adapters are the dearest to train.

    width: channels of the fused maps. on: stages, or pairs of nodes.
    """

    width: int = 64
    on: str = "stages"

    def __post_init__(self) -> None:
        if self.on in ("logits", "embedding"):
            raise InputError(f"reviewkd: {self.on} is no map; on=stages, or name the pairs")
        if self.width < 1:
            raise InputError(f"reviewkd: width={self.width} must be at least 1")

    def adapter(self, shapes: Shapes) -> nn.Module | None:
        for name, (ours, theirs) in shapes.items():
            if len(ours) != 3 or ours[1:] != theirs[1:]:
                raise InputError(
                    f"reviewkd: {name} is {ours} in the student and {theirs} in the teacher; "
                    "it needs maps (c, h, w) of equal resolution"
                )
        return _Review(shapes, self.width)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, features: Features) -> Tensor:
        return torch.stack([_context(s, t) for s, t in features.values()]).sum()


def _context(s: Tensor, t: Tensor) -> Tensor:
    total, weights = F.mse_loss(s, t), 1.0
    for power, cells in enumerate(CELLS, 1):
        if cells < s.shape[-1]:
            share = 0.5**power
            total = total + share * F.mse_loss(F.adaptive_avg_pool2d(s, cells), F.adaptive_avg_pool2d(t, cells))
            weights += share
    return total / weights


class _Review(nn.Module):
    """{stage: (N, c, h, w)} -> {stage: the fused maps, in the teacher's channels}; stages run from shallow to deep."""

    def __init__(self, shapes: Shapes, width: int):
        super().__init__()
        self.inward = nn.ModuleDict({name: _unit(ours[0], width, 1) for name, (ours, _) in shapes.items()})
        self.attention = nn.ModuleDict({name: nn.Conv2d(2 * width, 2, 1) for name in list(shapes)[:-1]})
        self.outward = nn.ModuleDict({name: _unit(width, theirs[0], 3) for name, (_, theirs) in shapes.items()})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fused: Tensor | None = None
        outputs: dict[str, Tensor] = {}
        for name in reversed(list(self.inward)):
            value = self.inward[name](features[name])
            if fused is not None:
                fused = F.interpolate(fused, value.shape[-2:], mode="nearest")
                a, b = self.attention[name](torch.cat([value, fused], 1)).sigmoid().split(1, 1)
                value = value * a + fused * b
            fused = value
            outputs[name] = self.outward[name](value)
        return {name: outputs[name] for name in features}


def _unit(inputs: int, outputs: int, kernel: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs))
