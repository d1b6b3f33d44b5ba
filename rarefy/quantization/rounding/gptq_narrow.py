"""GPTQ of the layers of few inputs alone: a stem that reads three channels, depthwise kernels; nearest elsewhere.

Of few products, an output has no others in which an error of rounding averages out, and of 27 or 9 inputs second
moments are known and inverted in no time. At 8 bits other layers are as good by nearest rounding (docs/log.md).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.quantization.formats import Format
from rarefy.quantization.rounding.gptq import Gptq
from rarefy.quantization.rounding.nearest import Nearest
from rarefy.quantization.rounding_pass import Layer


@dataclasses.dataclass(frozen=True)
class GptqNarrow:
    """GPTQ for layers whose outputs are sums of at most ``inputs`` products, nearest for others and where no images
    are.

    The default, for 8 bits. Below, take descent, gptq or brecq, which look at all layers. Not the field's *narrow
    range* (codes of -127 to 127).
    """

    inputs: int = 32

    reads = frozenset[str]()

    def __post_init__(self) -> None:
        if self.inputs < 1:
            raise InputError(f"narrow: inputs={self.inputs} must be at least 1")

    def codes(self, scaled: Tensor, grid: Format, generator: torch.Generator) -> Tensor:
        return Nearest().codes(scaled, grid, generator)

    def layer_codes(self, layer: Layer, generator: torch.Generator) -> Tensor:
        if layer.weight.shape[2] <= self.inputs:
            return Gptq().layer_codes(layer, generator)
        return layer.nearest(layer.weight, layer.scale)
