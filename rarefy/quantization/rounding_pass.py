"""The pass that rounds weights: layer by layer, or block by block, each on what those before it, rounded, yield.

A rule of rounding sees a layer in its unfolded form, y = W x, with samples of x from the rounded layers before it, or a
block of layers as a function of their weights' numbers (``blocks``). What it returns are codes; they are put into the
graph, and the layer's mean output is mended (``transforms/bias_correction``) before its successors run, so that each
rule mends the errors of those before along with its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from rarefy.graph import im2col
from rarefy.graph.interpreter import Resumable
from rarefy.graph.layers import layer_name
from rarefy.graph.nodes import Value, argument, attribute, device_of, set_attribute
from rarefy.graph.shapes import shapes
from rarefy.kernels import value_of
from rarefy.quantization import formats, qdq
from rarefy.quantization.blocks import Stretch, batch_of, together
from rarefy.quantization.formats import Format
from rarefy.quantization.observers import Calibration, Observed
from rarefy.quantization.transforms.bias_correction import correct_bias

MEMORY = 5e8  # bytes of activations of all images that the rounding of layers may keep
SAMPLES = 64  # for each input of a layer that learned rounding looks at
ENOUGH, LEAST = 16, 32  # places for each input that rounding to 8 bits has to see, and of so many images
TOGETHER = 2**20  # numbers of samples in one product: batches of 2 images are multiplied at a sixth of the speed


def images_of_rounding(graph: fx.GraphModule, grids: Mapping[fx.Node, formats.Grid], rounder: Rounding) -> float:
    """So many images show ``ENOUGH`` places of every layer; infinity where each image counts.

    A large picture has thousands of places: past these, more pictures move no answer, and each costs two runs a layer.
    """
    if isinstance(rounder, OfBlocks) or any(grid.bits < 8 for grid in grids.values()):
        return math.inf
    known = shapes(graph)
    most = 0.0
    for node in grids:
        weight = attribute(graph, argument(node, "weight"))
        places = known[node].numel() / len(known[node]) / weight.shape[0]  # of one image
        most = max(most, ENOUGH * math.prod(weight.shape[1:]) / places)
    return max(LEAST, math.ceil(most))


class RoundingPass:
    """Layers of ``graph`` one after the other, each on what the layers before it, rounded, make of the images that were
    kept."""

    def __init__(
        self,
        graph: fx.GraphModule,
        float_graph: fx.GraphModule,
        observed: Observed,
        rounder: Rounding,
        centered: bool,
        generator: torch.Generator,
    ) -> None:
        """graph: with grids of values in place (``qdq.insert``); float_graph: as it was before.

        centered: means of outputs are mended, by ``correct``; generator: of what is drawn.
        """
        self.graph, self.rounder, self.centered, self.generator = graph, rounder, centered, generator
        device = device_of(graph)
        self.prefix = Resumable(graph, observed.batches, MEMORY / 4, device)
        self.float_prefix = Resumable(float_graph, observed.batches, MEMORY / 4, device)
        self.twins = {node.name: node for node in float_graph.graph.nodes}
        self.read = {node.name: mean for node, mean in observed.read.items()}
        self.places = SAMPLES / sum(len(batch[0]) for batch in observed.batches)
        self.marks: frozenset[str] = frozenset()
        self.learned: dict[str, float] = {}  # value -> what its scale was multiplied by

    def blocks(self, layers: Sequence[fx.Node]) -> list[list[fx.Node]]:
        """``layers`` as they are rounded: one by one, or those of a block together."""
        if not isinstance(self.rounder, OfBlocks):
            return [[node] for node in layers]
        by_name = {node.name: node for node in layers}
        found, self.marks = together(self.float_prefix.graph, [self.twins[name] for name in by_name])
        return [[by_name[twin.name] for twin in block] for block in found]

    def round(
        self,
        block: Sequence[fx.Node],
        grids: Sequence[formats.Grid],
        rules: Sequence[Calibration],
        after: fx.Node | None,
    ) -> list[dict[str, object]]:
        """Codes in place of the layers' weights and biases; facts of each. after: the first layer behind the block."""
        steps = [self._scale(*one) for one in zip(block, grids, rules, strict=True)]
        if isinstance(self.rounder, OfBlocks):
            codes, steps = self._together(self.rounder, block, grids, steps, after)
        else:
            codes = [self._alone(self.rounder, block[0], grids[0], steps[0])]
        return [self._put(*one) for one in zip(block, grids, steps, codes, strict=True)]

    def correct(self, layer: fx.Node) -> bool:
        """What the rounding of a layer's weights moves in the mean, on what float reads, out of its bias, if both
        halves of the images say so."""
        twin = self.twins[layer.name]
        weight, bias = (
            attribute(self.float_prefix.graph, argument(twin, name)).detach() for name in ("weight", "bias")
        )
        return correct_bias(self.graph, layer, (weight, bias), self.read[layer.name])

    def _scale(self, layer: fx.Node, grid: formats.Grid, rule: Calibration) -> Tensor:
        weight = self._weight(layer)
        scale = rule.weight_scale(formats.rows(weight, grid), grid).float().expand(weight.shape[0])
        return torch.maximum(scale, qdq.least_scale(self.graph, layer))

    def _weight(self, layer: fx.Node) -> Tensor:
        """Of a layer that is not rounded yet."""
        weight: Tensor = attribute(self.graph, argument(layer, "weight"))
        return weight.detach()

    def _alone(self, rounder: OfWeights | OfLayers, layer: fx.Node, grid: formats.Grid, scale: Tensor) -> Tensor:
        weight = self._weight(layer)
        if not isinstance(rounder, OfLayers):
            return rounder.codes(weight.float() / _wide(scale, weight), grid, self.generator)
        groups = im2col.groups_of(layer)
        rows = weight.float().reshape(groups, weight.shape[0] // groups, -1)
        samples = self._samples(layer, weight.shape, groups, rounder.reads)
        unfolded = Layer(layer_name(layer), rows, scale.view(groups, -1, 1), grid, samples, self.centered)
        return rounder.layer_codes(unfolded, self.generator).reshape(weight.shape).to(grid.dtype)

    def _together(
        self,
        rounder: OfBlocks,
        layers: Sequence[fx.Node],
        grids: Sequence[formats.Grid],
        steps: Sequence[Tensor],
        after: fx.Node | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Codes and steps; biases and the scales of activations are put in place."""
        stretch = Stretch(self.graph, self.float_prefix.graph, layers, after, self.marks)
        inputs, float_inputs, outputs, images = stretch.gather(self.prefix, self.float_prefix, MEMORY)
        weights = [self._weight(layer).float() for layer in layers]
        biases = [attribute(self.graph, argument(layer, "bias")).detach().float() for layer in layers]
        scales = [attribute(self.graph, scale) for scale in stretch.scales]
        wide = [_wide(step, weight) for step, weight in zip(steps, weights, strict=True)]
        block = Block(
            layer_name(layers[0]), weights, wide, grids, biases, scales, inputs, float_inputs, outputs, images,
            self.centered, stretch.run, batch_of,
        )  # fmt: skip
        found = rounder.reconstruct(block, self.generator)
        for name, scale, value in zip(stretch.scales, scales, found.scales, strict=True):
            self.learned[value_of(name)] = float(value / scale)
            scale.copy_(value)
        for layer, bias in zip(layers, found.biases, strict=True):
            source = argument(layer, "bias")
            set_attribute(self.graph, source.target, bias.to(attribute(self.graph, source).dtype))
        codes = [code.to(grid.dtype) for code, grid in zip(found.codes, grids, strict=True)]
        return codes, [
            torch.maximum(step.reshape(-1), qdq.least_scale(self.graph, layer))
            for step, layer in zip(found.steps, layers, strict=True)
        ]

    def _put(self, layer: fx.Node, grid: formats.Grid, scale: Tensor, codes: Tensor) -> dict[str, object]:
        weight = self._weight(layer)
        lost = (codes.float() * _wide(scale, weight) - weight).double().square().sum()
        error = lost / weight.double().square().sum().clamp_min(1e-30)
        name = layer_name(layer)
        qdq.put_codes(self.graph, layer, codes, scale)
        return {"name": name, "bits": grid.bits, "error": float(error), "input": qdq.value_name(layer)}

    def _reads(self, layer: fx.Node) -> Iterator[tuple[Value, ...]]:
        """(what the layer reads,) from the rounded layers before it, for each batch."""
        return self.prefix.run(qdq.read_by(layer), (layer.all_input_nodes[0],))

    def _samples(
        self, layer: fx.Node, shape: Sequence[int], groups: int, reads: frozenset[str]
    ) -> Callable[[], Iterator[Sample]]:
        """``samples`` of a ``Layer``: what it reads in both graphs and makes in float, at the same few places."""
        twin = self.twins[layer.name]
        drawn: list[Tensor] = []
        most = min(im2col.PLACES, math.ceil(math.prod(shape[1:]) * self.places))

        def gathered() -> Iterator[Sample]:
            exact: Iterator[tuple[Value, ...]] = itertools.repeat((None, None))
            if reads:
                exact = self.float_prefix.run(twin.next, (twin.all_input_nodes[0], twin))
            room: _Room | None = None
            for index, ((inputs,), (float_inputs, float_outputs)) in enumerate(zip(self._reads(layer), exact)):
                if index == len(drawn):
                    drawn.append(im2col.draw(im2col.plane(layer, inputs, shape), self.generator, inputs.device, most))
                place = drawn[index]
                x = _columns(im2col.unfold(layer, inputs, shape, groups, place))
                other = y = None
                if "float_inputs" in reads:
                    other = _columns(im2col.unfold(twin, float_inputs, shape, groups, place))
                if "float_outputs" in reads:
                    bias = attribute(self.float_prefix.graph, argument(twin, "bias")).detach().float()
                    y = _columns(im2col.outputs(twin, float_outputs, groups, place)) - bias.view(groups, -1, 1)
                part = Sample(x, other, y, len(place))
                if room is not None and not room.takes(part):
                    yield room.filled()
                    room = None
                if room is None:
                    left = len(self.prefix.batches) - index
                    room = _Room(part, max(1, min(TOGETHER // max(x.numel(), 1), left)))
                room.add(part)
            if room is not None:
                yield room.filled()

        return gathered


def _wide(scale: Tensor, weight: Tensor) -> Tensor:
    """(outputs,) so that it broadcasts to the weight."""
    return scale.view(-1, *[1] * (weight.dim() - 1))


def _columns(x: Tensor) -> Tensor:
    """(N, groups, K, places) -> (groups, K, N places)"""
    return x.permute(1, 2, 0, 3).flatten(2).float()


class _Room:
    """Samples side by side: gathered bit by bit they would lie among activations, whose memory could not be used again
    (200 MB)."""

    def __init__(self, part: Sample, count: int) -> None:
        """For so many as large as ``part``."""
        columns = part.inputs.shape[2] * count
        self._all = [None if one is None else one.new_empty(*one.shape[:2], columns) for one in part[:3]]
        self._columns, self._used, self._places = columns, 0, part.places

    def takes(self, part: Sample) -> bool:
        return self._used + part.inputs.shape[2] <= self._columns

    def add(self, part: Sample) -> None:
        end = self._used + part.inputs.shape[2]
        for one, into in zip(part[:3], self._all, strict=True):
            if one is not None and into is not None:
                into[:, :, self._used : end].copy_(one)
        self._used = end

    def filled(self) -> Sample:
        inputs, float_inputs, outputs = (None if one is None else one[:, :, : self._used] for one in self._all)
        assert inputs is not None
        return Sample(inputs, float_inputs, outputs, self._places)


Mix = Callable[[Tensor, Tensor], Tensor]  # (rounded, exact) -> what stands for a rounded activation


class Sample(NamedTuple):
    """Of a batch, at a few places of each image.

    inputs: (groups, K, n) from the rounded layers before. float_inputs: the same from the float model.
    float_outputs: (groups, outputs, n), what the float layer makes, without its bias.
    places: so many of the n of each image, side by side.
    """

    inputs: Tensor
    float_inputs: Tensor | None
    float_outputs: Tensor | None
    places: int = 1


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or linear layer in its unfolded form.

    weight: (groups, outputs, K) float32. scale: its step, which broadcasts to that.
    samples: the batches anew at every call, the same places each time.
    centered: the mean of the output's error goes into the bias afterwards.
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
    """Layers between two values that all work passes through.

    weights: float32, as the layers read them. steps: their scales, which broadcast to that. biases: (outputs,).
    scales: () of the activations rounded inside.
    inputs: (images, ...) from the rounded blocks before (what is no tensor as it is). float_inputs: the same from the
        float model, None where there is no such value. outputs: (images, ...) of the float block.
    shifts: whether biases may move.
    run: the output for (part of the inputs, numbers for weights, biases, scales, mix), where mix(rounded, exact) stands
        for each rounded activation. part: of values, some images.
    """

    name: str
    weights: Sequence[Tensor]
    steps: Sequence[Tensor]
    grids: Sequence[Format]
    biases: Sequence[Tensor]
    scales: Sequence[Tensor]
    inputs: Sequence[Value]
    float_inputs: Sequence[Value]
    outputs: Tensor
    images: int
    shifts: bool
    run: Callable[[Sequence[Value], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Mix | None], Tensor]
    part: Callable[[Sequence[Value], Tensor, int], list[Value]]


class Rounded(NamedTuple):
    """What stands in place of a block's: codes of the weights, their steps, the biases, the scales of activations."""

    codes: Sequence[Tensor]
    steps: Sequence[Tensor]
    biases: Sequence[Tensor]
    scales: Sequence[Tensor]


@runtime_checkable
class OfWeights(Protocol):
    """A rule that looks at the weights alone."""

    def codes(self, scaled: Tensor, grid: Format, generator: torch.Generator) -> Tensor: ...


@runtime_checkable
class OfLayers(Protocol):
    """A rule that looks at what a layer reads. reads: which of the optional fields of ``Sample`` it wants."""

    reads: frozenset[str]

    def layer_codes(self, layer: Layer, generator: torch.Generator) -> Tensor: ...


@runtime_checkable
class OfBlocks(Protocol):
    """A rule for all that is rounded in a block; a mean that has moved is the rule's to mend, in the biases."""

    def reconstruct(self, block: Block, generator: torch.Generator) -> Rounded: ...


Rounding = OfWeights | OfLayers | OfBlocks
