"""Rules that turn weights into codes, one a file; the file name is what ``rounding="..."`` takes. A rule is a frozen dataclass with one of

    codes(scaled, grid, generator) -> codes                  looks at the weights only: scaled = w / s
    layer_codes(layer, generator) -> codes                   looks at what a layer reads and should make (``Layer``)
    reconstruct(block, generator) -> Rounded                 rounds all layers of a block together (``Block``)

The layers before have been rounded already, so that each rule mends their errors along with its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from rarefy.quantization.formats import Format


class Sample(NamedTuple):
    """Of a batch, at a few places of each image. inputs: (groups, K, n) from the rounded layers before. float_inputs: the same from the
    float model. float_outputs: (groups, outputs, n), what the float layer makes, without its bias. places: so many of the n of each image, side by side."""

    inputs: Tensor
    float_inputs: Tensor | None
    float_outputs: Tensor | None
    places: int = 1


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or linear layer in its unfolded form. weight: (groups, outputs, K) float32; scale: its step, which broadcasts to that.

    samples: the batches anew at every call, the same places each time. centered: the mean of the output's error goes into the bias afterwards.
    """

    name: str
    weight: Tensor
    scale: Tensor
    grid: Format
    samples: Callable[[], Iterator[Sample]]
    centered: bool = False

    def nearest(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest multiples of ``scale`` to the numbers ``weight``, in float32."""
        return self.grid.snap(weight / scale)


@dataclasses.dataclass(frozen=True)
class Block:
    """Layers between two values that all work passes through. weights: float32, as the layers read them; steps: their scales, which broadcast to that; biases: (outputs,).

    scales: () of the activations rounded inside. inputs: (images, ...) from the rounded blocks before (what is no tensor as it is); float_inputs: the same from the
    float model, None where there is no such value; outputs: (images, ...) of the float block. shifts: whether biases may move.
    run: the output for (part of the inputs, numbers for weights, biases, scales, mix), where mix(rounded, exact) stands for each rounded activation; part: of values,
    some images.
    """

    name: str
    weights: Sequence[Tensor]
    steps: Sequence[Tensor]
    grids: Sequence[Format]
    biases: Sequence[Tensor]
    scales: Sequence[Tensor]
    inputs: Sequence[Any]
    float_inputs: Sequence[Any]
    outputs: Tensor
    images: int
    shifts: bool
    run: Callable[[Sequence[Any], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Callable[[Tensor, Tensor], Tensor] | None], Tensor]
    part: Callable[[Sequence[Any], Tensor, int], list[Any]]


class Rounded(NamedTuple):
    """What stands in place of a block's: codes of the weights, their steps, the biases, the scales of activations."""

    codes: Sequence[Tensor]
    steps: Sequence[Tensor]
    biases: Sequence[Tensor]
    scales: Sequence[Tensor]


@runtime_checkable
class OfWeights(Protocol):
    def codes(self, scaled: Tensor, grid: Format, generator: torch.Generator) -> Tensor: ...


@runtime_checkable
class OfLayers(Protocol):
    """reads: which of the optional fields of ``Sample`` the rule wants."""

    reads: frozenset[str]

    def layer_codes(self, layer: Layer, generator: torch.Generator) -> Tensor: ...


@runtime_checkable
class OfBlocks(Protocol):
    """All that is rounded in a block; a mean that has moved is the rule's to mend, in the biases."""

    def reconstruct(self, block: Block, generator: torch.Generator) -> Rounded: ...
