"""quantize(): weights and activations on integer grids, chosen on a few unlabelled images, without training.

In order, each on the one graph:

1. fold batch norm, write operators in one form (``rarefy.graph.fold``);
2. choose which values become integers, from the runtime's table (``rarefy.quantization.placement``), equalise their channels where that is exact (``rarefy.quantization.transforms.equalize``),
   and let dead channels carry the noisiest a second time (``rarefy.quantization.transforms.split_channels``);
3. run the calibration images once and stream every such value into a histogram (``rarefy.quantization.observers``), from which the calibration rule
   chooses the range: affine, unsigned, one scale a tensor, and 0 is always a code; put them into the graph (``rarefy.quantization.qdq``);
4. layer by layer, on what the rounded layers before it yield (``rarefy.graph.interpreter``): the weights, symmetric, one scale an output channel by the same kind
   of rule, are rounded by the rounding rule, on a grid of the layer's own; then the mean that the layer's output moved by, a channel, is taken
   out of its bias before its successors run (sequential bias correction, 1906.04721, sec. 4.2). Means right, what varies around them still shrinks from layer
   to layer, as noise at the ends of ReLUs fills up what was off: the last layers' scales are raised until their outputs deviate as much as in float;
5. write the layers as what an integer kernel computes (``rarefy.graph.lowering``).

What is simulated is what runs: round half to even, saturation, and clips done by the grid's end.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.distillation.qat_batch_norm import normed
from rarefy.errors import DataError, InputError
from rarefy.graph import im2col
from rarefy.graph.capture import as_graph, attribute, device_of, finish, is_graph, set_attribute, shapes, share_copy
from rarefy.graph.fold import check_globs, fold, layer_name, names, simplify, weighted
from rarefy.graph.interpreter import Prefix
from rarefy.graph.lowering import to_integers
from rarefy.kernels import is_quantised
from rarefy.quantization import blocks as blocks_
from rarefy.quantization import explain, formats, latency_gate, mixed_precision, qdq, weight_only
from rarefy.quantization.observers import Average, Observed, observe
from rarefy.quantization.placement import Placement, place
from rarefy.quantization.rounding import Block, Layer, OfBlocks, OfLayers, Sample
from rarefy.quantization.transforms import equalize as equalize_
from rarefy.quantization.transforms import smoothquant, split_channels
from rarefy.system.memory import release
from rarefy.system.progress import track

EQUALIZED = 16  # images that tell how large a stream's channels get
SMOOTHED = 32  # images that tell how large a norm's channels get
GATES = (None, "latency")
MEMORY = 5e8  # bytes of activations of all images that the rounding of layers may keep
SAMPLES = 64  # for each input of a layer that learned rounding looks at
TOGETHER = 2**20  # numbers of samples that go into one product: batches of 2 images are multiplied at a sixth of the speed
PIECE = 27e6  # bytes of the largest activation of a batch on a CPU: from 32 MiB on each is mapped anew at its use, which takes a tenth to a third of the time


def quantize(
    model: nn.Module,
    task: Any = None,
    *,
    inputs: Tensor | Sequence[Tensor] | None = None,
    batches: Iterable[Tensor | tuple[Tensor, ...]] | None = None,
    images: int = 128,
    batch_size: int = 16,
    weights: str | formats.Format | Mapping[str, str] | mixed_precision.Mixed = "int8",
    activations: str | formats.Format | Mapping[str, str] = "uint8",
    calibration: Any = "mse",
    weight_calibration: Any = None,
    rounding: Any = "narrow",
    runtime: Any = "onnxruntime",
    ignore: Sequence[str] = (),
    equalize: bool = True,
    correct_bias: bool = True,
    smooth: float | None = None,
    gate: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> fx.GraphModule:
    """The graph of ``model`` in integers, for inference on ``runtime``.

    task: where calibration images come from (its training split; labels are not read); or batches: (N, ...) inputs themselves.
    inputs: an example batch, where ``model`` is not captured yet.
    weights, activations: number formats, ``"int8"``, ``"uint8"``, ``"int4"``; weights also a layer, by globs of names of which the last that
    matches holds: ``"int4;stem.*=int8;head=float"`` or ``{"*": "int4", "stem.*": "int8", "head": "float"}``; or ``"mixed:bits=4"``: widths chosen a layer
        for an average, a size, bit-operations or a latency (``rarefy.quantization.mixed_precision``). activations="float" rounds the weights alone, to any format
        (``"int4:group=32"``, ``"mxfp4"``), without images (``rarefy.quantization.weight_only``). Activations go by their own names or those of layers that read them.
    weight_calibration: the rule for weight scales; None: minmax at 8 bits, where clipping the largest weights costs more than it saves, else mse.
    ignore: globs of layer names that stay float; one that matches nothing is an error, as in weights and activations.
    equalize: channels of values between layers brought to one range (``rarefy.quantization.transforms.equalize``), and the noisiest carried twice where others are dead
        (``rarefy.quantization.transforms.split_channels``), where that is exact and lowers the noise.
    correct_bias: means of all layers' outputs, and the deviation of the last ones', brought back to float's; block reconstruction does both in its own objective.
    smooth: SmoothQuant before linear layers that read a norm, with this alpha, such as 0.5 (``rarefy.quantization.transforms.smoothquant``); None: not done.
    gate: "latency" times each stretch of layers in integers and in float on the runtime, and keeps only what pays (``rarefy.quantization.latency_gate``); where nothing does, the
    model comes back in float, and its history says so.

    Raises InputError for a contradiction, DataError without images, CheckFailed where the float model yields NaN.
    """
    runtime = plugins.resolve("runtimes", runtime)
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    mixed = mixed_precision.parse(weights)
    assigned = formats.assign("int8" if mixed is not None else weights, symmetric=True, axis=0)  # type: ignore[arg-type]
    rule = plugins.resolve("calibration", calibration)
    given_rule = None if weight_calibration is None else plugins.resolve("calibration", weight_calibration)
    rounder = plugins.resolve("rounding", rounding)
    activation_grids = formats.assign(activations, symmetric=False, default="uint8")
    if activations == formats.FLOAT:
        if mixed is not None or gate is not None:
            raise InputError("activations=float: mixed widths and the gate look at integer layers; write a format such as int4:group=32")
        return _weights_only(model, inputs, assigned, given_rule, rounder, ignore, seed)
    grid = activation_grids.default
    if not isinstance(grid, formats.Grid):
        raise InputError(f"activations={activation_grids}: integer kernels take uint8 or int8, and simulation fewer bits; write uint4, say")
    if gate not in GATES:
        raise InputError(f"gate={gate!r}: choose latency, or none")
    if images < 1 or batch_size < 1:
        raise InputError(f"images={images}, batch_size={batch_size}: both must be at least 1")
    if is_quantised(model):
        raise InputError("the model is quantised already; start from its float original")
    graph = share_copy(model) if is_graph(model) else as_graph(model, inputs)  # type: ignore[arg-type]  # folding copies
    for name, tensor in graph.named_parameters():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise InputError(
                f"quantize: {name} is {str(tensor.dtype).removeprefix('torch.')}, and codes are made of float32; capture model.float()"
            )
    norms = normed(graph)
    graph = simplify(fold(graph), runtime.capabilities.whole)
    qdq.free_names(graph)
    check_globs(
        graph, ignore=ignore, weights=[glob for glob, _ in assigned.rules], activations=[glob for glob, _ in activation_grids.rules]
    )
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    smoothed = 0
    if smooth is not None:
        first, batches = _first(graph, task, batches, SMOOTHED, seed)
        smoothed = smoothquant.smooth(graph, zip(*(one.split(8) for one in first), strict=True), smooth)
    allocation = None
    timing: dict[str, Any] = {}
    if mixed is not None:
        begun = time.monotonic()
        first, batches = _first(graph, task, batches, mixed.images, seed)
        open_to = place(graph, runtime.capabilities, ignore).layers
        assigned, allocation = mixed_precision.allocate(graph, open_to, first, mixed, grid, runtime, ignore)
        timing["allocation"] = time.monotonic() - begun
        if "measured" in allocation:
            timing["latency"] = allocation.pop("measured")
    own_grid = {node: assigned.of(names(node)) for node in graph.graph.nodes if weighted(node)}
    left_out = [*ignore, *(layer_name(node) for node, own in own_grid.items() if own is None)]
    placement = place(graph, runtime.capabilities, left_out)
    if not placement.layers:
        raise InputError(
            f"no layer can be quantised for {plugins.describe(runtime)}; ignore={list(ignore)} and weights={assigned} leave none, "
            "or the model has no convolution or linear layer"
        )
    layer_grids: dict[fx.Node, formats.Grid] = {}
    for node in placement.layers:
        if not isinstance(own := own_grid[node], formats.Grid) or own.group is not None or not own.symmetric or not own.signed:
            raise InputError(
                f"{layer_name(node)}: weights={own}: integer kernels take int2 to int8 with one scale a channel; write int4, say"
            )
        own_grid[node] = layer_grids[node] = dataclasses.replace(own, bits=min(own.bits, runtime.weight_bits))
        qdq.own_bias(graph, node)
    value_grids = _value_grids(placement, activation_grids)
    equalized = doubled = 0
    if equalize:
        first, batches = _first(graph, task, batches, EQUALIZED, seed)
        few = list(_pieces(graph, [tuple(value[:EQUALIZED] for value in first)]))
        doubled = split_channels.double(graph, few, value_grids, layer_grids)
        equalized = equalize_.equalize(graph, few, value_grids, layer_grids)
    walks = correct_bias or isinstance(rounder, (OfLayers, OfBlocks))
    total = math.ceil(images / batch_size) if batches is None else None
    checked = track(_checked_batches(graph, task, batches, images, batch_size, seed), total, "calibrate", progress)
    seen = observe(
        graph,
        placement.values,
        _pieces(graph, checked),
        placement.layers if correct_bias else (),
        lambda samples: walks and samples * _input_bytes(graph) <= MEMORY / 2,
        _last(placement.layers) if correct_bias else (),
    )
    release()
    float_graph = share_copy(graph)
    ranges = _ranges(placement, seen, rule, value_grids)
    verdict = None
    if gate is not None:
        by_name = {value.name: span for value, span in ranges.items()}
        verdict = latency_gate.judge(graph, placement, by_name, left_out, runtime, grid, progress)
        timing["gate"] = verdict.pop("timed")
        placement = place(graph, runtime.capabilities, [*left_out, *verdict["undone"]])
        value_grids = _value_grids(placement, activation_grids)
        ranges = _ranges(placement, seen, rule, value_grids)
    qdq.insert(graph, placement, ranges, value_grids)
    run = _Rounding(graph, float_graph, seen, rounder, correct_bias, torch.Generator().manual_seed(seed))
    facts = []
    grid_of = {value.name: own for value, own in value_grids.items()}
    blocks = run.blocks(placement.layers)
    for index, block in enumerate(track(blocks, len(blocks), "round", progress and walks)):
        chosen: list[tuple[formats.Format, Any]] = []
        for node in block:
            own = own_grid[node]
            assert own is not None
            chosen.append((own, given_rule or plugins.resolve("calibration", "minmax" if own.bits == 8 else "mse")))
        made = run.round(block, chosen, blocks[index + 1][0] if index + 1 < len(blocks) else None)
        for node, fact in zip(block, made, strict=True):
            read = grid_of[fact["input"]]
            facts.append(fact | {"activation_bits": read.bits, "grid": str(own_grid[node]), "activation_grid": str(read)})
        for node in block if correct_bias and not isinstance(rounder, OfBlocks) else ():
            run.correct_spread(node)
            run.correct_bias(node)
    learned = run.learned
    del run  # and the values that it keeps
    release()
    noise = explain.noise(float_graph, graph, seen.batches)
    graph = to_integers(finish(graph))
    if any(fact["bits"] < 8 for fact in facts):
        graph.meta["bits"] = {f"{fact['weight']}_codes": fact["bits"] for fact in facts if fact["bits"] < 8}
    integer = {node.name for node in placement.layers}
    graph.meta.setdefault("history", []).append(
        {
            "step": "quantize",
            "options": {
                "images": images,
                "weights": str(assigned),
                "activations": str(activation_grids),
                "calibration": plugins.describe(rule),
                "weight_calibration": None if given_rule is None else plugins.describe(given_rule),
                "rounding": plugins.describe(rounder),
                "runtime": plugins.describe(runtime),
                "ignore": list(ignore),
                "equalize": equalize,
                "correct_bias": correct_bias,
                "smooth": smooth,
                "gate": gate,
                "seed": seed,
            },
            "facts": {
                "layers": [
                    {**{key: value for key, value in fact.items() if key != "weight"}, "sqnr_db": noise[node.name]}
                    for node, fact in zip(placement.layers, facts, strict=True)
                ],
                "images_of_rounding": sum(len(batch[0]) for batch in seen.batches) if walks else 0,
                "equalized": equalized,
                "doubled": doubled,
                "batch_norm": norms,
                **({} if smooth is None else {"smoothed": smoothed}),
                **({"allocation": allocation} if allocation is not None else {}),
                "float": sorted(layer_name(node) for node in float_graph.graph.nodes if weighted(node) and node.name not in integer),
                "reasons": _reasons(
                    placement, {node for node, own in own_grid.items() if own is None}, verdict["undone"] if verdict else ()
                ),
                "float_sqnr_db": {
                    layer_name(node): noise[node.name]
                    for node in float_graph.graph.nodes
                    if weighted(node) and node.name in noise and node.name not in integer
                },
                "ranges": {value.name: [end * learned.get(value.name, 1.0) for end in ranges[value]] for value in placement.values},
                **({} if verdict is None else {"gate": verdict}),
                **({"timing": timing} if timing else {}),
            },
        }
    )
    return graph.eval()


def _reasons(placement: Placement, left_out: set[fx.Node], undone: Sequence[str]) -> list[list[str]]:
    """[name, why] of each operator that stays in float, in order."""
    found: dict[str, str] = {}
    for node, why in placement.floats.items():
        name = names(node)[0]
        if node in left_out:
            why = "weights=float for this layer"
        elif name in undone:
            why = "gate: faster in float"
        found[name if name not in found else node.name] = why
    return [[name, why] for name, why in found.items()]


def _last(layers: Sequence[fx.Node]) -> list[fx.Node]:
    """Those behind which there is no layer."""
    before: set[fx.Node] = set()  # of a layer
    waiting = [source for node in layers for source in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node not in before:
            before.add(node)
            waiting += node.all_input_nodes
    return [node for node in layers if node not in before]


def _ranges(placement: Placement, seen: Observed, rule: Any, own: Mapping[fx.Node, formats.Grid]) -> dict[fx.Node, tuple[float, float]]:
    found = {}
    for value in placement.values:
        lo, hi = rule.activation_range(seen.histograms[value], own[value])
        found[value] = qdq.clipped(placement, value, min(lo, 0.0), max(hi, 0.0), own[value])
    return found


class _Rounding:
    """Layers of ``graph`` one after the other, each on what the layers before it, rounded, make of the images that were kept."""

    def __init__(
        self, graph: fx.GraphModule, float_graph: fx.GraphModule, seen: Observed, rounder: Any, centered: bool, generator: torch.Generator
    ):
        self.graph, self.rounder, self.centered, self.generator = graph, rounder, centered, generator
        device = device_of(graph)
        self.prefix = Prefix(graph, seen.batches, MEMORY / 4, device)
        self.float_prefix = Prefix(float_graph, seen.batches, MEMORY / 4, device)
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
        found, self.marks = blocks_.together(self.float_prefix.graph, [self.twins[name] for name in own])
        return [[own[twin.name] for twin in block] for block in found]

    def round(self, block: Sequence[fx.Node], chosen: Sequence[tuple[formats.Format, Any]], before: fx.Node | None) -> list[dict[str, Any]]:
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
        stretch = blocks_.Stretch(self.graph, self.float_prefix.graph, block, before, self.marks)
        inputs, float_inputs, outputs, images = stretch.gather(self.prefix, self.float_prefix, MEMORY)
        weights, biases = ([attribute(self.graph, node.args[at]).detach().float() for node in block] for at in (1, 2))
        scales = [attribute(self.graph, quantize.args[1]) for quantize in stretch.scales.values()]
        wide = [_wide(step, weight) for step, weight in zip(steps, weights, strict=True)]
        task = Block(
            layer_name(block[0]), weights, wide, own, biases, scales, inputs, float_inputs, outputs, images, self.centered,
            stretch.run, blocks_.batch_of,
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
            torch.maximum(step.reshape(-1), qdq.least_scale(self.graph, node)) for step, node in zip(made.steps, block, strict=True)
        ]

    def _put(self, node: fx.Node, grid: formats.Format, scale: Tensor, codes: Tensor) -> dict[str, Any]:
        source: Any = node.args[1]
        weight = attribute(self.graph, source).detach()
        error = (codes.float() * _wide(scale, weight) - weight).double().square().sum() / weight.double().square().sum().clamp_min(1e-30)
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
                other = _columns(im2col.read(twin, float_inputs, shape, groups, place)) if "float_inputs" in reads else None
                y = None
                if "float_outputs" in reads:
                    bias = attribute(self.float_prefix.graph, twin.args[2]).detach().float().view(groups, -1, 1)
                    y = _columns(im2col.made(twin, float_outputs, groups, place)) - bias
                part = Sample(x, other, y, len(place))
                if room is not None and filled + x.shape[2] > room.inputs.shape[2]:
                    yield _columns_of(room, 0, filled)
                    room = None
                if room is None:
                    room, filled = _room(part, x.shape[2] * max(1, min(TOGETHER // max(x.numel(), 1), len(self.prefix.batches) - index))), 0
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
    return Sample._make([*(None if one is None else one.new_empty(*one.shape[:2], columns) for one in part[:3]), part.places])


def _columns_of(sample: Sample, begun: int, count: int) -> Sample:
    return Sample._make([*(None if one is None else one[:, :, begun : begun + count] for one in sample[:3]), sample.places])


def _weights_only(
    model: nn.Module, inputs: Any, assigned: formats.Assignment, rule: Any, rounder: Any, ignore: Sequence[str], seed: int
) -> fx.GraphModule:
    """Codes for weights, floats for the rest (``rarefy.quantization.weight_only``)."""
    if is_quantised(model):
        raise InputError("the model is quantised already; start from its float original")
    graph = fold(as_graph(model, inputs))
    check_globs(graph, ignore=ignore, weights=[glob for glob, _ in assigned.rules])
    layers = [
        node for node in graph.graph.nodes if weighted(node) and not any(fnmatch.fnmatch(n, glob) for glob in ignore for n in names(node))
    ]
    own = weight_only.chosen_layers(graph, layers, {node: assigned.of(names(node)) for node in layers})
    facts = weight_only.encode(graph, own, rule, rounder, torch.Generator().manual_seed(seed))
    options = {
        "weights": str(assigned),
        "activations": formats.FLOAT,
        "weight_calibration": None if rule is None else plugins.describe(rule),
        "rounding": plugins.describe(rounder),
        "ignore": list(ignore),
        "seed": seed,
    }
    graph.meta.setdefault("history", []).append(
        {"step": "quantize", "options": options, "facts": {"layers": facts, "float": [], "ranges": {}}}
    )
    return graph.eval()


def _value_grids(placement: Placement, assigned: formats.Assignment) -> dict[fx.Node, formats.Grid]:
    """The grid of each rounded value: by its own name, or by that of a layer that reads it. Raises InputError for a value in float."""
    values = set(placement.values)
    readers: dict[fx.Node, list[str]] = {value: [value.name] for value in placement.values}
    for layer in placement.layers:
        source: Any = layer.args[0]
        while source not in values:
            source = placement.carried.get(source, source.args[0])
        readers[source] += names(layer)
    found = {value: assigned.of(known) for value, known in readers.items()}
    for value, grid in found.items():
        if not isinstance(grid, formats.Grid):
            raise InputError(f"{value.name}: activations={assigned}: integer kernels take uint8 or int8, and simulation fewer bits")
        found[value] = qdq.grid_of(placement, value, grid)
    return found  # type: ignore[return-value]


def _first(graph: fx.GraphModule, task: Any, batches: Any, images: int, seed: int) -> tuple[tuple[Tensor, ...], Any]:
    """A few samples, and batches that still begin with them."""
    if batches is None:
        return next(_checked_batches(graph, task, None, images, images, seed)), None
    left = iter(batches)
    taken = list(itertools.islice(left, 1))
    if not taken:
        raise DataError("no calibration images; give at least one batch (128 images are a good number)")
    return next(_checked_batches(graph, task, taken, images, images, seed)), itertools.chain(taken, left)


def _input_bytes(graph: fx.GraphModule) -> int:
    """Of one sample."""
    return sum(math.prod(spec["shape"]) * getattr(torch, spec["dtype"]).itemsize for spec in graph.meta["inputs"])


def _pieces(graph: fx.GraphModule, batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The same samples as a CPU likes them: few at a time."""
    if device_of(graph).type != "cpu":
        yield from batches
        return
    values = [value for node, value in shapes(graph, 2).items() if node.op != "get_attr" and isinstance(value, Tensor)]
    most = max(1, int(PIECE // max(value.numel() * value.element_size() / 2 for value in values)))
    for batch in batches:
        yield from zip(*(value.split(most) for value in batch), strict=True)


def _checked_batches(
    graph: fx.GraphModule, task: Any, batches: Any, images: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, ...]]:
    """The first ``images`` samples."""
    if batches is None:
        if task is None:
            raise InputError("no calibration images: pass a task, or batches=")
        batches = task.inputs("train", images, batch_size, seed=seed)
    shape = [spec["shape"] for spec in graph.meta["inputs"]]
    left, device = images, device_of(graph)
    for batch in batches:
        given = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        if [list(value.shape[1:]) for value in given] != shape:
            raise InputError(
                f"calibration batch of shape {[list(value.shape) for value in given]}: the model takes (N, {', '.join(map(str, shape[0]))})"
            )
        yield tuple(value[:left].to(device) for value in given)
        left -= len(given[0])
        if left <= 0:
            return
