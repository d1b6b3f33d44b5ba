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
from rarefy.errors import DataError, InputError
from rarefy.graph.canonical import simplify
from rarefy.graph.capture import as_graph
from rarefy.graph.fold import fold, normed
from rarefy.graph.layers import check_globs, layer_name, names, weighted
from rarefy.graph.lowering import to_integers
from rarefy.graph.nodes import device_of, finish, is_graph, share_copy
from rarefy.graph.shapes import shapes
from rarefy.kernels import is_quantised
from rarefy.quantization import explain, formats, latency_gate, mixed_precision, qdq, weight_only
from rarefy.quantization.observers import Observed, observe
from rarefy.quantization.placement import Placement, place
from rarefy.quantization.rounding_pass import MEMORY, OfBlocks, OfLayers, _Rounding
from rarefy.quantization.transforms import equalize as equalize_module
from rarefy.quantization.transforms import smoothquant, split_channels
from rarefy.system.memory import release
from rarefy.system.progress import track

EQUALIZED = 16  # images that tell how large a stream's channels get
SMOOTHED = 32  # images that tell how large a norm's channels get
GATES = (None, "latency")
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
            raise InputError(
                "activations=float: mixed widths and the gate look at integer layers; write a format such as int4:group=32"
            )
        return _weights_only(model, inputs, assigned, given_rule, rounder, ignore, seed)
    grid = activation_grids.default
    if not isinstance(grid, formats.Grid):
        raise InputError(
            f"activations={activation_grids}: integer kernels take uint8 or int8, and simulation fewer bits; write uint4, say"
        )
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
        graph,
        ignore=ignore,
        weights=[glob for glob, _ in assigned.rules],
        activations=[glob for glob, _ in activation_grids.rules],
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
        if (
            not isinstance(own := own_grid[node], formats.Grid)
            or own.group is not None
            or not own.symmetric
            or not own.signed
        ):
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
        equalized = equalize_module.equalize(graph, few, value_grids, layer_grids)
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
            facts.append(
                fact | {"activation_bits": read.bits, "grid": str(own_grid[node]), "activation_grid": str(read)}
            )
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
                "float": sorted(
                    layer_name(node) for node in float_graph.graph.nodes if weighted(node) and node.name not in integer
                ),
                "reasons": _reasons(
                    placement,
                    {node for node, own in own_grid.items() if own is None},
                    verdict["undone"] if verdict else (),
                ),
                "float_sqnr_db": {
                    layer_name(node): noise[node.name]
                    for node in float_graph.graph.nodes
                    if weighted(node) and node.name in noise and node.name not in integer
                },
                "ranges": {
                    value.name: [end * learned.get(value.name, 1.0) for end in ranges[value]]
                    for value in placement.values
                },
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


def _ranges(
    placement: Placement, seen: Observed, rule: Any, own: Mapping[fx.Node, formats.Grid]
) -> dict[fx.Node, tuple[float, float]]:
    found = {}
    for value in placement.values:
        lo, hi = rule.activation_range(seen.histograms[value], own[value])
        found[value] = qdq.clipped(placement, value, min(lo, 0.0), max(hi, 0.0), own[value])
    return found


def _weights_only(
    model: nn.Module,
    inputs: Any,
    assigned: formats.Assignment,
    rule: Any,
    rounder: Any,
    ignore: Sequence[str],
    seed: int,
) -> fx.GraphModule:
    """Codes for weights, floats for the rest (``rarefy.quantization.weight_only``)."""
    if is_quantised(model):
        raise InputError("the model is quantised already; start from its float original")
    graph = fold(as_graph(model, inputs))
    check_globs(graph, ignore=ignore, weights=[glob for glob, _ in assigned.rules])
    layers = [
        node
        for node in graph.graph.nodes
        if weighted(node) and not any(fnmatch.fnmatch(n, glob) for glob in ignore for n in names(node))
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
            raise InputError(
                f"{value.name}: activations={assigned}: integer kernels take uint8 or int8, and simulation fewer bits"
            )
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
