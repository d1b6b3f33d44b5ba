"""quantize(): weights and activations on integer grids, chosen on a few unlabelled images, without training.

In order, each on the one graph:

1. fold batch norm, write operators in one form, equalise ranges across layers where that is exact (``rarefy.folding``);
2. choose which values become integers, from the runtime's table (``rarefy.placing``);
3. run the calibration images once and stream every such value into a histogram (``rarefy.observing``), from which the calibration rule
   chooses the range: affine, unsigned, one scale a tensor, and 0 is always a code;
4. weights: symmetric, one scale an output channel, by the same kind of rule, then rounded by the rounding rule; biases become 32-bit
   integers on the grid of the products, s_x s_w, as integer kernels add them;
5. put ``quantize``/``dequantize`` nodes into the graph; weights are stored as codes;
6. sequential bias correction (1906.04721, sec. 4.2): layer by layer, with everything before it already integer, the mean that the layer's
   output moved by, a channel, is taken out of its bias before its successors run;
7. write the layers as what an integer kernel computes (``rarefy.lowering``).

What is simulated is what runs: round half to even, saturation, and clips done by the grid's end.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import rarefy.kernels
from rarefy import grids, plugins
from rarefy.capturing import as_graph, attribute, finish, set_attribute
from rarefy.errors import InputError
from rarefy.folding import equalize as equalize_ranges
from rarefy.folding import fold, layer_name, put, simplify
from rarefy.lowering import to_integers
from rarefy.observing import in_lockstep, observe
from rarefy.placing import Placement, clip_bounds, place
from rarefy.progress import track

aten = torch.ops.aten
OPERATORS = torch.ops.rarefy

CORRECTION_IMAGES = 32
_BIAS_LIMIT = 2.0**30


def quantize(
    model: nn.Module,
    task: Any = None,
    *,
    inputs: Tensor | Sequence[Tensor] | None = None,
    batches: Iterable[Tensor | tuple[Tensor, ...]] | None = None,
    images: int = 128,
    batch_size: int = 16,
    weights: str | grids.Grid = "int8",
    activations: str | grids.Grid = "uint8",
    calibration: Any = "mse",
    weight_calibration: Any = None,
    rounding: Any = "nearest",
    runtime: Any = "onnxruntime",
    ignore: Sequence[str] = (),
    equalize: bool = True,
    correct_bias: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> fx.GraphModule:
    """The graph of ``model`` in integers, for inference on ``runtime``.

    task: where calibration images come from (its training split; labels are not read); or batches: (N, ...) inputs themselves.
    inputs: an example batch, where ``model`` is not captured yet.
    weights, activations: number formats, ``"int8"``, ``"uint8"``, ``"int4"``.
    weight_calibration: the rule for weight scales; None: minmax at 8 bits, where clipping the largest weights costs more than it saves, else mse.
    ignore: globs of layer names that stay float.

    Raises InputError for a contradiction, DataError without images, CheckFailed where the float model yields NaN.
    """
    runtime = plugins.resolve("runtimes", runtime)
    weight_grid = grids.parse(weights, symmetric=True, axis=0)
    rule = plugins.resolve("calibration", calibration)
    weight_rule = plugins.resolve("calibration", weight_calibration or ("minmax" if weight_grid.bits == 8 else "mse"))
    rounder = plugins.resolve("rounding", rounding)
    grid = grids.parse(activations, symmetric=False)
    if images < 1 or batch_size < 1:
        raise InputError(f"images={images}, batch_size={batch_size}: both must be at least 1")
    if isinstance(model, fx.GraphModule) and any(node.target in rarefy.kernels.OPERATORS for node in model.graph.nodes):
        raise InputError("the model is quantised already; start from its float original")
    graph = simplify(fold(as_graph(model, inputs)))
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    placement = place(graph, runtime.capabilities, ignore)
    if not placement.layers:
        raise InputError(
            f"no layer can be quantised for {plugins.describe(runtime)}; ignore={list(ignore)} leaves none, or the model has no convolution or linear layer"
        )
    for node in placement.layers:
        _own_bias(graph, node)
    pairs = equalize_ranges(graph) if equalize else 0
    stored = _stored_batches(graph, task, batches, images, batch_size, seed)
    total = math.ceil(images / batch_size) if batches is None else None
    seen, kept = itertools.tee(stored)
    histograms = observe(graph, placement.values, track(seen, total, "calibrate", progress))
    float_graph = _copy(graph)
    ranges = {}
    for value in placement.values:
        lo, hi = rule.activation_range(histograms[value], grid)
        ranges[value] = _clipped(placement, value, min(lo, 0.0), max(hi, 0.0))
    generator = torch.Generator().manual_seed(seed)
    scales = _insert(graph, placement, ranges, grid)
    facts = _round_weights(graph, placement, scales, weight_grid, grid.bits, weight_rule, rounder, generator)
    finish(graph)
    correction = _take(kept, CORRECTION_IMAGES)
    del kept, stored
    if correct_bias:
        _correct_biases(float_graph, graph, [node.name for node in placement.layers], correction)
    graph = to_integers(graph)
    if weight_grid.bits < 8:
        graph.meta["bits"] = {f"{fact['weight']}_codes": weight_grid.bits for fact in facts}
    names = {node.name for node in placement.layers}
    graph.meta.setdefault("history", []).append(
        {
            "step": "quantize",
            "options": {
                "images": images,
                "weights": str(weight_grid),
                "activations": str(grid),
                "calibration": plugins.describe(rule),
                "weight_calibration": plugins.describe(weight_rule),
                "rounding": plugins.describe(rounder),
                "runtime": plugins.describe(runtime),
                "ignore": list(ignore),
                "equalize": equalize,
                "correct_bias": correct_bias,
                "seed": seed,
            },
            "facts": {
                "layers": [{key: value for key, value in fact.items() if key != "weight"} for fact in facts],
                "equalized": pairs,
                "float": sorted(layer_name(node) for node in float_graph.graph.nodes if _is_layer(node) and node.name not in names),
                "ranges": {value.name: list(ranges[value]) for value in placement.values if value in ranges},
            },
        }
    )
    return graph.eval()


def _is_layer(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and node.target in (aten.conv2d.default, aten.conv2d.padding, aten.linear.default)
        and isinstance(node.args[1], fx.Node)
        and node.args[1].op == "get_attr"
    )


def _copy(graph: fx.GraphModule) -> fx.GraphModule:
    """Same nodes by name; the tensors are shared (they are replaced, never changed)."""
    nodes = fx.Graph()
    output = nodes.graph_copy(graph.graph, {})
    nodes.output(output)
    copied = fx.GraphModule(graph, nodes)
    copied.meta = dict(graph.meta)
    return copied


def _stored_batches(
    graph: fx.GraphModule, task: Any, batches: Any, images: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, ...]]:
    if batches is None:
        if task is None:
            raise InputError("no calibration images: pass a task, or batches=")
        batches = task.inputs("train", images, batch_size, seed=seed)
    shape = [spec["shape"] for spec in graph.meta["inputs"]]
    for batch in batches:
        given = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        if [list(value.shape[1:]) for value in given] != shape:
            raise InputError(
                f"calibration batch of shape {[list(value.shape) for value in given]}: the model takes (N, {', '.join(map(str, shape[0]))})"
            )
        yield given


def _take(batches: Iterable[tuple[Tensor, ...]], count: int) -> tuple[Tensor, ...]:
    """The first ``count`` samples as one batch."""
    taken: list[tuple[Tensor, ...]] = []
    while sum(len(batch[0]) for batch in taken) < count and (batch := next(iter(batches), None)) is not None:  # type: ignore[call-overload]
        taken.append(batch)
    return tuple(torch.cat(parts)[:count] for parts in zip(*taken, strict=True))


def _own_bias(graph: fx.GraphModule, node: fx.Node) -> None:
    """Every integer layer has a weight and a bias of its own."""
    weight = attribute(graph, node.args[1]).detach()
    bias = attribute(graph, node.args[2]).detach() if len(node.args) > 2 and node.args[2] is not None else weight.new_zeros(weight.shape[0])
    put(graph, node, weight.clone(), bias.clone())


def _clipped(placement: Placement, value: fx.Node, lo: float, hi: float) -> tuple[float, float]:
    """A range no wider than the clip whose work the grid's ends do."""
    if value in placement.fused:
        least, most = clip_bounds(value)
        lo, hi = max(lo, min(least, 0.0)), min(hi, max(most, 0.0))
    if value.target is aten.sigmoid.default:
        lo, hi = 0.0, 1.0
    if value.target is aten.hardsigmoid.default:
        lo, hi = 0.0, 6.0  # of x + 3, read as a sixth of it: see _open_gate
    return lo, hi


def _insert(
    graph: fx.GraphModule, placement: Placement, ranges: dict[fx.Node, tuple[float, float]], grid: grids.Grid
) -> dict[fx.Node, Tensor]:
    """Put quantize/dequantize after every value; returns the scale that each value's readers see."""
    seen_scale: dict[fx.Node, Tensor] = {}
    sources: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for value in placement.values:
        lo, hi = ranges[value]
        scale = torch.tensor(max((hi - lo) / grid.levels, 1e-8), dtype=torch.float32)
        zero = torch.tensor(min(max(round(grid.qmin - lo / float(scale)), grid.qmin), grid.qmax), dtype=grid.dtype)
        sources[value] = _after(graph, value, value, scale, zero, grid)
        seen_scale[value] = scale
        if value.target is aten.hardsigmoid.default:
            seen_scale[value] = _open_gate(graph, value, scale, grid)
    for carrier, value in placement.carried.items():
        if carrier.target is aten.pad.default:
            _pad_codes(graph, carrier)
        elif not _yields_tuple(carrier):
            scale, zero = seen_scale[value], attribute(graph, sources[value][1])
            _after(graph, carrier, value, scale, zero, grid)
    for clip, source in placement.fused.items():
        clip.replace_all_uses_with(source)
    return seen_scale


def _pad_codes(graph: fx.GraphModule, pad: fx.Node) -> None:
    """Padding with zeros, done on the codes: zero is the code of the zero point."""
    number = pad.args[0]
    codes, scale, zero, axis = number.args
    pad.args, pad.kwargs = (codes, pad.args[1], "constant", int(attribute(graph, zero))), {}
    with graph.graph.inserting_after(pad):
        padded = graph.graph.call_function(OPERATORS.dequantize.default, (pad, scale, zero, axis))
    pad.replace_all_uses_with(padded, delete_user_cb=lambda user: user is not padded)


def _yields_tuple(node: fx.Node) -> bool:
    return any(user.target is operator.getitem for user in node.users)


def _after(graph: fx.GraphModule, node: fx.Node, value: fx.Node, scale: Tensor, zero: Tensor, grid: grids.Grid) -> tuple[fx.Node, fx.Node]:
    """quantize and dequantize ``node``; everybody who read it reads the result. The grid's tensors are named after ``value``."""
    name = f"quantization.{value.name}"
    place_after = node
    with graph.graph.inserting_after(place_after):
        scale_node = _constant(graph, f"{name}.scale", scale)
    with graph.graph.inserting_after(scale_node):
        zero_node = _constant(graph, f"{name}.zero_point", zero)
    with graph.graph.inserting_after(zero_node):
        codes = graph.graph.call_function(OPERATORS.quantize.default, (node, scale_node, zero_node, None, grid.qmin, grid.qmax, grid.dtype))
    with graph.graph.inserting_after(codes):
        number = graph.graph.call_function(OPERATORS.dequantize.default, (codes, scale_node, zero_node, None))
    codes.meta["stack"] = number.meta["stack"] = node.meta.get("stack", "")
    node.replace_all_uses_with(number, delete_user_cb=lambda user: user is not codes)
    return scale_node, zero_node


def _constant(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    set_attribute(graph, name, value)
    return graph.graph.get_attr(name)


def _open_gate(graph: fx.GraphModule, gate: fx.Node, scale: Tensor, grid: grids.Grid) -> Tensor:
    """hardsigmoid(x) = clip(x + 3, 0, 6) / 6 as an integer addition: the grid of x + 3 clips it, and its codes are read on a grid six times finer."""
    name = f"quantization.{gate.name}"
    finer = scale / 6
    three = torch.tensor(grid.qmax, dtype=grid.dtype)
    with graph.graph.inserting_before(gate):
        codes = _constant(graph, f"{name}.three_codes", three)
        step = _constant(graph, f"{name}.three_scale", torch.tensor(3 / grid.qmax, dtype=torch.float32))
        zero = _constant(graph, f"{name}.three_zero_point", torch.zeros((), dtype=grid.dtype))
        number = graph.graph.call_function(OPERATORS.dequantize.default, (codes, step, zero, None))
        moved = graph.graph.call_function(aten.add.Tensor, (gate.args[0], number))
    moved.meta["stack"] = gate.meta.get("stack", "")
    gate.replace_all_uses_with(moved)
    quantized = next(user for user in moved.users if user.target is OPERATORS.quantize.default)
    read = next(user for user in quantized.users if user.target is OPERATORS.dequantize.default)
    with graph.graph.inserting_before(read):
        fine = _constant(graph, f"{name}.gate_scale", finer)
    read.args = (read.args[0], fine, *read.args[2:])
    return finer


def _round_weights(
    graph: fx.GraphModule,
    placement: Placement,
    scales: dict[fx.Node, Tensor],
    grid: grids.Grid,
    activation_bits: int,
    rule: Any,
    rounder: Any,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Codes in place of weights and biases; one fact a layer."""
    facts = []
    values = {value.name: value for value in placement.values}
    for node in placement.layers:
        entry = node.args[0]
        assert isinstance(entry, fx.Node)
        root = _root_of(entry, values)
        input_scale = scales[root].double()
        weight_node, bias_node = node.args[1], node.args[2]
        assert isinstance(weight_node, fx.Node) and isinstance(bias_node, fx.Node)
        weight, bias = attribute(graph, weight_node).detach(), attribute(graph, bias_node).detach()
        rows = weight.reshape(weight.shape[0], -1)
        scale = rule.weight_scale(rows, grid).to(torch.float32)
        least = (bias.double().abs() / (input_scale * _BIAS_LIMIT)).float().clamp_min(1e-12)  # so that the bias fits 32 bits
        scale = torch.maximum(scale, least)
        wide = scale.view(-1, *[1] * (weight.dim() - 1))
        codes = rounder.codes(weight.float() / wide, grid, generator)
        error = (codes.float() * wide - weight).double().square().sum() / weight.double().square().sum().clamp_min(1e-30)
        products = (input_scale * scale.double()).float()
        bias_codes = torch.round(bias.double() / products.double()).clamp(-_BIAS_LIMIT, _BIAS_LIMIT).to(torch.int32)
        name, bias_name = str(weight_node.target), str(bias_node.target)
        with graph.graph.inserting_before(node):
            number = _decoded(graph, name, codes, scale, torch.zeros((), dtype=grid.dtype))
            constant = _decoded(graph, bias_name, bias_codes, products, torch.zeros((), dtype=torch.int32))
        node.args = (node.args[0], number, constant, *node.args[3:])
        facts.append(
            {
                "name": name.rpartition(".")[0] or name,
                "weight": name,
                "bits": grid.bits,
                "activation_bits": activation_bits,
                "error": float(error),
                "input": root.name,
            }
        )
    return facts


def _root_of(entry: Any, values: dict[str, fx.Node]) -> fx.Node:
    """The value whose grid a dequantize node reads, found by the name of its scale."""
    while entry.target is not OPERATORS.dequantize.default:
        entry = entry.args[0]  # padding that melts into the layer
    name = str(entry.args[1].target).split(".")[1]
    return values[name]


def _decoded(graph: fx.GraphModule, name: str, codes: Tensor, scale: Tensor, zero: Tensor) -> fx.Node:
    return graph.graph.call_function(
        OPERATORS.dequantize.default,
        (
            _constant(graph, f"{name}_codes", codes),
            _constant(graph, f"{name}_scale", scale),
            _constant(graph, f"{name}_zero_point", zero),
            0,
        ),
    )


def _correct_biases(float_graph: fx.GraphModule, graph: fx.GraphModule, names: list[str], inputs: tuple[Tensor, ...]) -> None:
    """Take out of each layer's bias what its output's mean moved by, a channel, before its successors run."""
    nodes = {node.name: node for node in graph.graph.nodes}
    for name, wanted, value in in_lockstep(float_graph, graph, names, inputs):
        node = nodes[name]
        axis = 1 if node.target is not aten.linear.default else value.dim() - 1
        over = [dim for dim in range(value.dim()) if dim != axis]
        moved = (wanted - value).mean(over, dtype=torch.float64)
        bias = node.args[2]
        assert isinstance(bias, fx.Node)
        codes, scale = (attribute(graph, source) for source in bias.args[:2])
        mended = (codes.double() + torch.round(moved / scale.double())).clamp_(-_BIAS_LIMIT, _BIAS_LIMIT).to(torch.int32)
        change = (mended.double() - codes.double()) * scale.double()
        codes.copy_(mended)
        value += change.to(value.dtype).view([-1 if dim == axis else 1 for dim in range(value.dim())])
