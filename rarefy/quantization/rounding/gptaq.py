"""GPTAQ (2504.02692): GPTQ towards what the float model makes of its own inputs, so that errors of earlier layers are
mended too.

With x from the rounded layers before and x~ from the float model, H = E x x' as in GPTQ and D = E (x~ - x) x',

    P = share * triu(D U', 1) U,    w_k <- w_k - e U_jk + w_j P_jk   for k > j

``share`` below 1 trusts few samples less (0.25 as the authors do). An output whose error E (w x~ - q x)^2 is not below
nearest rounding's stays with that.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.quantization.rounding._quadratic import Moments, Quadratic
from rarefy.quantization.rounding.gptq import rounded
from rarefy.quantization.rounding_pass import Layer


@dataclasses.dataclass(frozen=True)
class Gptaq:
    """GPTQ against the float model's own inputs.

    In place of gptq where errors of earlier layers add up. descent chooses its share on images that did not fit it.
    """

    share: float = 0.25
    block: int = 128
    order: bool = True

    reads = frozenset({"float_inputs"})

    def __post_init__(self) -> None:
        if self.block < 1 or not 0 <= self.share <= 1:
            raise InputError(f"gptaq: block={self.block} must be at least 1, share={self.share} from 0 to 1")

    def layer_codes(self, layer: Layer, generator: torch.Generator) -> Tensor:
        moments = Moments.of(layer, "float_inputs")
        assert moments.cross is not None
        drift = self.share * (moments.cross - moments.gram)
        return rounded(
            layer, Quadratic(moments.gram, layer.weight @ (moments.gram + drift)), drift, self.block, self.order
        )
