from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from rarefy.graph import im2col
from rarefy.graph.interpreter import Resumable
from rarefy.graph.layers import layer_name
from rarefy.graph.nodes import attribute, device_of, set_attribute
from rarefy.quantization import blocks as blocks_module
from rarefy.quantization import formats, qdq
from rarefy.quantization.formats import Format
from rarefy.quantization.observers import Average, Observed

MEMORY = 5e8  # bytes of activations of all images that the rounding of layers may keep
SAMPLES = 64  # for each input of a layer that learned rounding looks at
TOGETHER = (
    2**20
)  # numbers of samples that go into one product: batches of 2 images are multiplied at a sixth of the speed


class _Rounding:
    """Layers of ``graph`` one after the other, each on what the layers before it, rounded, make of the images that were kept."""

    def __init__(
        self,
        graph: fx.GraphModule,
        float_graph: fx.GraphModule,
        seen: Observed,
        rounder: Any,
        centered: bool,
        generator: torch.Generator,
    ):
        self.graph, self.rounder, self.centered, self.generator = graph, rounder, centered, generator
        device = device_of(graph)
        self.prefix = Resumable(graph, seen.batches, MEMORY / 4, device)
        self.float_prefix = Resumable(float_graph, seen.batches, MEMORY / 4, device)
        self.twins = {node.name: node for node in float_graph.graph.nodes}
        self.means = {node.name: mean for node, mean in seen.means.items()}
        self.spreads = {node.name: spread for node, spread in seen.spreads.items()}
        self.places = SAMPLES / sum(len(batch[0]) for batch in seen.batches)
        self.marks: frozenset[str] = frozenset()
        self.read_means: dict[str, im2col.Mean] = {}  # of layers whose samples were read: for the bias
        self.learned: dict[str, float] = {}  # value -> what its scale was multiplied by

    def blocks(self, layers: Sequence[fx.Node]) -> list[list[fx.Node]]:
        """``layers`` as they are rounded: one by one, or those of a block together."""
        if not isinstance(self.rounder, OfBlocks):
            return [[node] for node in layers]
        own = {node.name: node for node in layers}
        found, self.marks = blocks_module.together(self.float_prefix.graph, [self.twins[name] for name in own])
        return [[own[twin.name] for twin in block] for block in found]

    def round(
        self, block: Sequence[fx.Node], chosen: Sequence[tuple[formats.Format, Any]], before: fx.Node | None
    ) -> list[dict[str, Any]]:
        """Codes in place of the layers' weights and biases; facts about each. chosen: grid and scale rule of each; before: the layer after them."""
        steps = [self._scale(node, grid, rule) for node, (grid, rule) in zip(block, chosen, strict=True)]
        own = [grid for grid, _ in chosen]
        if isinstance(self.rounder, OfBlocks):
            codes, steps = self._together(block, own, steps, before)
        else:
            codes = [self._alone(block[0], own[0], steps[0])]
        return [self._put(*one) for one in zip(block, own, steps, codes, strict=True)]

    def _scale(self, node: fx.Node, grid: formats.Format, rule: Any) -> Tensor:
        weight = attribute(self.graph, node.args[1]).detach()
        scale: Tensor = rule.weight_scale(formats.rows(weight, grid), grid).float().expand(weight.shape[0])
        return torch.maximum(scale, qdq.least_scale(self.graph, node))

    def _alone(self, node: fx.Node, grid: formats.Format, scale: Tensor) -> Tensor:
        weight = attribute(self.graph, node.args[1]).detach()
        if not isinstance(self.rounder, OfLayers):
            return self.rounder.codes(weight.float() / _wide(scale, weight), grid, self.generator)  # type: ignore[no-any-return]
        groups = im2col.groups_of(node)
        rows = weight.float().reshape(groups, weight.shape[0] // groups, -1)
        samples = self._samples(node, weight.shape, groups, self.rounder.reads)
        layer = Layer(layer_name(node), rows, scale.view(groups, -1, 1), grid, samples, self.centered)
        return self.rounder.layer_codes(layer, self.generator).reshape(weight.shape).to(grid.dtype)

    def _together(
        self, block: Sequence[fx.Node], own: Sequence[formats.Format], steps: Sequence[Tensor], before: fx.Node | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Codes and steps; biases and the scales of activations are put in place."""
        stretch = blocks_module.Stretch(self.graph, self.float_prefix.graph, block, before, self.marks)
        inputs, float_inputs, outputs, images = stretch.gather(self.prefix, self.float_prefix, MEMORY)
        weights, biases = ([attribute(self.graph, node.args[at]).detach().float() for node in block] for at in (1, 2))
        scales = [attribute(self.graph, quantize.args[1]) for quantize in stretch.scales.values()]
        wide = [_wide(step, weight) for step, weight in zip(steps, weights, strict=True)]
        task = Block(
            layer_name(block[0]), weights, wide, own, biases, scales, inputs, float_inputs, outputs, images, self.centered,
            stretch.run, blocks_module.batch_of,
        )  # fmt: skip
        made = self.rounder.reconstruct(task, self.generator)
        for name, scale, value in zip(stretch.scales, scales, made.scales, strict=True):
            self.learned[name.split(".")[1]] = float(value / scale)
            scale.copy_(value)
        for node, bias in zip(block, made.biases, strict=True):
            source: Any = node.args[2]
            set_attribute(self.graph, source.target, bias.to(attribute(self.graph, source).dtype))
        codes = [code.to(grid.dtype) for code, grid in zip(made.codes, own, strict=True)]
        return codes, [
            torch.maximum(step.reshape(-1), qdq.least_scale(self.graph, node))
            for step, node in zip(made.steps, block, strict=True)
        ]

    def _put(self, node: fx.Node, grid: formats.Format, scale: Tensor, codes: Tensor) -> dict[str, Any]:
        source: Any = node.args[1]
        weight = attribute(self.graph, source).detach()
        error = (
            codes.float() * _wide(scale, weight) - weight
        ).double().square().sum() / weight.double().square().sum().clamp_min(1e-30)
        name = layer_name(node)
        qdq.put_codes(self.graph, node, codes, scale)
        return {
            "name": name,
            "weight": str(source.target),
            "bits": grid.bits,
            "error": float(error),
            "input": qdq.value_name(node),
        }

    def correct_spread(self, node: fx.Node) -> None:
        """Of a last layer: the scale with which its output varies as much around its mean as in float."""
        if node.name not in self.spreads:
            return
        average = Average(spreads=True)
        for (value,) in self.prefix.run(node.next, (node,), keep=False):
            average.add(node, value)
        if average.spread > 0 and self.spreads[node.name] > 0:
            qdq.scale_output(self.graph, node, self.spreads[node.name] / average.spread)

    def correct_bias(self, node: fx.Node) -> None:
        """On the mean of what the layer reads: its sums are linear in it, so that it need not run."""
        shape = attribute(self.graph, node.args[1].args[0]).shape  # type: ignore[union-attr]
        average = self._mean(node, shape)
        weight, bias = (
            source.target(*(attribute(self.graph, part) if isinstance(part, fx.Node) else part for part in source.args))
            for source in node.args[1:3]
        )  # type: ignore[union-attr]
        groups = im2col.groups_of(node)
        rows = weight.double().reshape(groups, shape[0] // groups, -1)
        mean = (rows @ average.value(groups)).flatten() + bias.double()
        qdq.shift_bias(self.graph, node, self.means[node.name] - mean)

    def _mean(self, node: fx.Node, shape: Sequence[int]) -> im2col.Mean:
        """Of what the layer reads."""
        average = self.read_means.pop(node.name, None)
        if average is None:
            average = im2col.Mean(node, shape)
            for (inputs,) in self._reads(node):
                average.add(inputs)
        return average

    def _reads(self, node: fx.Node) -> Iterator[tuple[Any, ...]]:
        """(what the layer reads,) from the rounded layers before it, for each batch."""
        return self.prefix.run(qdq.read_by(node), (node.args[0],))  # type: ignore[arg-type]

    def _samples(self, node: fx.Node, shape: Sequence[int], groups: int, reads: frozenset[str]) -> Any:
        """``samples`` of a ``Layer``: what the layer reads in both graphs and makes in float, at the same few places."""
        twin = self.twins[node.name]
        drawn: list[Tensor] = []
        most = min(im2col.PLACES, math.ceil(math.prod(shape[1:]) * self.places))

        def gathered() -> Iterator[Sample]:
            exact: Iterator[Any] = iter(lambda: (None, None), 0)
            if reads:
                exact = self.float_prefix.run(twin.next, (twin.args[0], twin))
            average = im2col.Mean(node, shape)
            room: Sample | None = None
            filled = 0
            for index, ((inputs,), (float_inputs, float_outputs)) in enumerate(zip(self._reads(node), exact)):
                average.add(inputs)
                if index == len(drawn):
                    drawn.append(im2col.draw(im2col.plane(node, inputs, shape), self.generator, inputs.device, most))
                place = drawn[index]
                x = _columns(im2col.read(node, inputs, shape, groups, place))
                other = (
                    _columns(im2col.read(twin, float_inputs, shape, groups, place)) if "float_inputs" in reads else None
                )
                y = None
                if "float_outputs" in reads:
                    bias = attribute(self.float_prefix.graph, twin.args[2]).detach().float().view(groups, -1, 1)
                    y = _columns(im2col.made(twin, float_outputs, groups, place)) - bias
                part = Sample(x, other, y, len(place))
                if room is not None and filled + x.shape[2] > room.inputs.shape[2]:
                    yield _columns_of(room, 0, filled)
                    room = None
                if room is None:
                    room, filled = (
                        _room(
                            part,
                            x.shape[2] * max(1, min(TOGETHER // max(x.numel(), 1), len(self.prefix.batches) - index)),
                        ),
                        0,
                    )
                for piece, into in zip(part[:3], _columns_of(room, filled, x.shape[2])[:3], strict=True):
                    if piece is not None and into is not None:
                        into.copy_(piece)
                filled += x.shape[2]
            if room is not None:
                yield _columns_of(room, 0, filled)
            if self.centered:
                self.read_means[node.name] = average

        return gathered


def _wide(scale: Tensor, weight: Tensor) -> Tensor:
    """(outputs,) so that it broadcasts to the weight."""
    return scale.view(-1, *[1] * (weight.dim() - 1))


def _columns(x: Tensor) -> Tensor:
    """(N, groups, K, places) -> (groups, K, N places)"""
    return x.permute(1, 2, 0, 3).flatten(2).float()


def _room(part: Sample, columns: int) -> Sample:
    """For so many: what is gathered bit by bit would lie scattered among activations, and their memory could not be used again (200 MB)."""
    return Sample._make(
        [*(None if one is None else one.new_empty(*one.shape[:2], columns) for one in part[:3]), part.places]
    )


def _columns_of(sample: Sample, begun: int, count: int) -> Sample:
    return Sample._make(
        [*(None if one is None else one[:, :, begun : begun + count] for one in sample[:3]), sample.places]
    )


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
    run: Callable[
        [
            Sequence[Any],
            Sequence[Tensor],
            Sequence[Tensor],
            Sequence[Tensor],
            Callable[[Tensor, Tensor], Tensor] | None,
        ],
        Tensor,
    ]
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
