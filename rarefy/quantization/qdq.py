"""Grids into the graph: which nodes stand for a rounded value, a rounded weight, a rounded bias.

A value becomes ``quantize`` followed by ``dequantize``, and whoever read it reads the result; a carrier's result is
read on the grid of what it carries; a clip whose work the grid's end does goes; padding is done on the codes. A weight
and its bias become codes and ``dequantize``. All of it in place.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from rarefy.errors import InputError
from rarefy.graph.fold import put
from rarefy.graph.interpreter import call
from rarefy.graph.layers import layer_name, names, padding_of
from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import argument, attribute, device_of, set_argument, set_attribute
from rarefy.kernels import value_of
from rarefy.kernels.int_linear import BIAS_LIMIT
from rarefy.quantization import formats
from rarefy.quantization.observers import ByAnswers, Calibration, Histogram
from rarefy.quantization.placement import Placement, clip_bounds

aten = torch.ops.aten

OPERATORS = torch.ops.rarefy

Ranges = dict[fx.Node, tuple[float, float]]


def free_names(graph: fx.GraphModule) -> None:
    """A value's grid is stored in a module of its name, which may not be that of what all modules have (``to``)."""
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "call_function") and node.name in dir(nn.Module):
            node._rename(f"{node.name}_value")


def own_bias(graph: fx.GraphModule, node: fx.Node) -> None:
    """Every integer layer has a weight and a bias of its own."""
    weight, source = attribute(graph, argument(node, "weight")).detach(), argument(node, "bias")
    bias = weight.new_zeros(weight.shape[0]) if source is None else attribute(graph, source).detach()
    put(graph, node, weight.clone(), bias.clone())


def grid_of(placement: Placement, value: fx.Node, grid: formats.Grid) -> formats.Grid:
    """The grid that ``value`` is on where values in general are on ``grid``."""
    if value in placement.halved:
        return dataclasses.replace(grid, bits=min(grid.bits, 7), signed=False, symmetric=False)
    return dataclasses.replace(grid, signed=True, symmetric=False) if value in placement.centered else grid


def clipped(placement: Placement, value: fx.Node, lo: float, hi: float, grid: formats.Grid) -> tuple[float, float]:
    """A range no wider than the clip whose work the grid's ends do, and with zero in the middle where it has to be."""
    if value in placement.halved:
        lo = 0.0
    if value in placement.centered:
        scale = max(lo / grid.qmin, hi / grid.qmax)
        return scale * grid.qmin, scale * grid.qmax
    if value in placement.fused:
        least, most = clip_bounds(value)
        lo, hi = max(lo, min(least, 0.0)), min(hi, max(most, 0.0))
    if value.target is aten.sigmoid.default:
        lo, hi = 0.0, 1.0
    if value.target is aten.hardsigmoid.default and value in placement.integer:
        lo, hi = 0.0, 6.0  # of x + 3, read as a sixth of it: see _open_gate
    return lo, hi


def value_grids(placement: Placement, assigned: formats.Assignment) -> dict[fx.Node, formats.Grid]:
    """The grid of each rounded value: by its own name, or by that of a layer that reads it.

    Raises InputError for a value that is to stay in float.
    """
    values = set(placement.values)
    readers: dict[fx.Node, list[str]] = {value: [value.name] for value in placement.values}
    for layer in placement.layers:
        source = layer.all_input_nodes[0]
        while source not in values:
            source = placement.carried.get(source, source.all_input_nodes[0])
        readers[source] += names(layer)
    grids: dict[fx.Node, formats.Grid] = {}
    for value, known in readers.items():
        grid = assigned.of(known)
        if not isinstance(grid, formats.Grid):
            raise InputError(
                f"{value.name}: activations={assigned}: integer kernels take uint8 or int8, and simulation fewer bits"
            )
        grids[value] = grid_of(placement, value, grid)
    return grids


def weight_grid(layer: fx.Node, format: formats.Format | None, most: int) -> formats.Grid:
    """The grid of a layer's weights, of at most ``most`` bits.

    Raises InputError for a format that no integer kernel takes.
    """
    if isinstance(format, formats.Grid) and format.group is None and format.symmetric and format.signed:
        return dataclasses.replace(format, bits=min(format.bits, most))
    raise InputError(
        f"{layer_name(layer)}: weights={format}: integer kernels take int2 to int8 with one scale a channel; "
        "write int4, say"
    )


def ranges(
    placement: Placement,
    histograms: Mapping[fx.Node, Histogram],
    rule: Calibration,
    grids: Mapping[fx.Node, formats.Grid],
) -> Ranges:
    """(lo, hi) of each rounded value, zero inside, as ``rule`` and what is done by the grid's ends have it."""
    read = [(histograms[value], grids[value]) for value in placement.values]
    if isinstance(rule, ByAnswers):
        chosen = rule.activation_ranges(*map(list, zip(*read, strict=True))) if read else []
    else:
        chosen = [rule.activation_range(histogram, grid) for histogram, grid in read]
    found = {}
    for value, (lo, hi) in zip(placement.values, chosen, strict=True):
        found[value] = clipped(placement, value, min(lo, 0.0), max(hi, 0.0), grids[value])
    return found


def insert(
    graph: fx.GraphModule,
    placement: Placement,
    ranges: Mapping[fx.Node, tuple[float, float]],
    grids: Mapping[fx.Node, formats.Grid],
) -> None:
    """Put quantize/dequantize after every value and every carrier of one. ranges, grids: of each value."""
    seen_scale: dict[fx.Node, Tensor] = {}
    sources: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for value in placement.values:
        (lo, hi), grid = ranges[value], grids[value]
        scale = torch.tensor(max((hi - lo) / grid.levels, 1e-8), dtype=torch.float32)
        if value.target is aten.softmax.int:
            scale = _whole(scale)
        zero = torch.tensor(min(max(round(grid.qmin - lo / float(scale)), grid.qmin), grid.qmax), dtype=grid.dtype)
        sources[value] = _after(graph, value, value, scale, zero, grid)
        seen_scale[value] = scale
        if value.target is aten.hardsigmoid.default and value in placement.integer:
            seen_scale[value] = _open_gate(graph, value, scale, grid)
    for carrier, value in placement.carried.items():
        if carrier.target is aten.pad.default:
            _pad_codes(graph, carrier, grids[value])
        elif not _yields_tuple(carrier):
            scale, zero = seen_scale[value], attribute(graph, sources[value][1])
            _after(graph, carrier, value, scale, zero, grids[value])
    for clip, source in placement.fused.items():
        clip.replace_all_uses_with(source)
        graph.graph.erase_node(clip)


def _whole(scale: Tensor) -> Tensor:
    """The next larger scale, up to 1, that is one over a whole number: ONNX Runtime's integer softmax rounds 1 / scale
    down."""
    steps = torch.floor(1 / scale.double()).clamp_min(1.0)
    whole = (1 / steps).to(scale.dtype)
    return torch.where(torch.floor(1 / whole) < steps, torch.nextafter(whole, torch.zeros_like(whole)), whole)


def numbers(layer: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The ``dequantize`` of a layer's weight, and that of its bias."""
    return argument(layer, "weight"), argument(layer, "bias")


def decoded(graph: fx.GraphModule, number: fx.Node) -> Tensor:
    """What a ``dequantize`` of stored codes yields."""
    found: Tensor = call(number, {source: attribute(graph, source) for source in number.all_input_nodes})
    return found


def codes_name(layer: fx.Node) -> str:
    """Name of the tensor that holds the codes of a layer's weight."""
    return str(numbers(layer)[0].all_input_nodes[0].target)


def read_by(layer: fx.Node) -> fx.Node:
    """The ``dequantize`` whose numbers a layer multiplies, before padding that melts into the layer."""
    entry = layer.all_input_nodes[0]
    while not is_decoded(entry):
        entry = entry.all_input_nodes[0]
    return entry


def value_name(layer: fx.Node) -> str:
    """Name of the value whose grid a layer's input is on."""
    return value_of(argument(read_by(layer), "scale"))


def _input_scale(graph: fx.GraphModule, layer: fx.Node) -> Tensor:
    """() float64: of what a layer reads."""
    scale: Tensor = attribute(graph, argument(read_by(layer), "scale"))
    return scale.double()


def least_scale(graph: fx.GraphModule, layer: fx.Node) -> Tensor:
    """(outputs,) float32: with a finer weight scale than this the bias would not fit its codes."""
    bias: Tensor = attribute(graph, argument(layer, "bias")).detach()
    return (bias.double().abs() / (_input_scale(graph, layer) * BIAS_LIMIT)).float().clamp_min(1e-12)


def put_codes(graph: fx.GraphModule, layer: fx.Node, codes: Tensor, scale: Tensor) -> None:
    """Codes in place of a layer's weight; its bias goes to 32-bit integers on the grid of the products, s_x s_w, as
    integer kernels add it."""
    weight, bias = argument(layer, "weight"), argument(layer, "bias")
    products = _input_scale(graph, layer) * scale.double()
    values = attribute(graph, bias).detach()
    bias_codes = torch.round(values.double() / products.float().double()).clamp(-BIAS_LIMIT, BIAS_LIMIT).to(torch.int32)
    with graph.graph.inserting_before(layer):
        number = _codes(graph, str(weight.target), codes, scale)
        constant = _codes(graph, str(bias.target), bias_codes, products.float())
    set_argument(layer, "weight", number)
    set_argument(layer, "bias", constant)


def shift_bias(graph: fx.GraphModule, layer: fx.Node, by: Tensor) -> None:
    """Add ``by`` (outputs,) to the bias of a layer in codes, to the nearest code."""
    codes, scale = (attribute(graph, source) for source in numbers(layer)[1].all_input_nodes[:2])
    codes.copy_((codes.double() + torch.round(by.double() / scale.double())).clamp_(-BIAS_LIMIT, BIAS_LIMIT))


def scale_output(graph: fx.GraphModule, layer: fx.Node, by: float) -> None:
    """Multiply what a layer in codes makes, by its scales."""
    weight, bias = numbers(layer)
    scale = attribute(graph, argument(weight, "scale"))
    scale.mul_(by)
    codes, products = (attribute(graph, source) for source in bias.all_input_nodes[:2])
    values = codes.double() * products.double() * by
    products.copy_(_input_scale(graph, layer) * scale.double())
    codes.copy_(torch.round(values / products.double()).clamp_(-BIAS_LIMIT, BIAS_LIMIT))


def _codes(graph: fx.GraphModule, name: str, codes: Tensor, scale: Tensor) -> fx.Node:
    parts = (
        _constant(graph, f"{name}_codes", codes),
        _constant(graph, f"{name}_scale", scale),
        _constant(graph, f"{name}_zero_point", torch.zeros((), dtype=codes.dtype, device=codes.device)),
    )
    return graph.graph.call_function(OPERATORS.dequantize.default, (*parts, 0))


def _pad_codes(graph: fx.GraphModule, pad: fx.Node, grid: formats.Grid) -> None:
    """Padding done on the codes: zero is the code of the zero point, and -inf, before max pooling, is the lowest."""
    codes, scale, zero = pad.all_input_nodes[0].all_input_nodes
    around = int(attribute(graph, zero)) if padding_of(pad) == 0 else grid.qmin
    pad.args, pad.kwargs = (codes, argument(pad, "pad"), "constant", around), {}
    with graph.graph.inserting_after(pad):
        padded = graph.graph.call_function(OPERATORS.dequantize.default, (pad, scale, zero, None))
    pad.replace_all_uses_with(padded, delete_user_cb=lambda user: user is not padded)


def _yields_tuple(node: fx.Node) -> bool:
    return any(user.target is operator.getitem for user in node.users)


def _after(
    graph: fx.GraphModule, node: fx.Node, value: fx.Node, scale: Tensor, zero: Tensor, grid: formats.Grid
) -> tuple[fx.Node, fx.Node]:
    """quantize and dequantize ``node``; everybody who read it reads the result.

    The grid's tensors are named after ``value``.
    """
    name = f"quantization.{value.name}"
    with graph.graph.inserting_after(node):
        scale_node = _constant(graph, f"{name}.scale", scale)
    with graph.graph.inserting_after(scale_node):
        zero_node = _constant(graph, f"{name}.zero_point", zero)
    with graph.graph.inserting_after(zero_node):
        codes = graph.graph.call_function(
            OPERATORS.quantize.default, (node, scale_node, zero_node, None, grid.qmin, grid.qmax, grid.dtype)
        )
    with graph.graph.inserting_after(codes):
        number = graph.graph.call_function(OPERATORS.dequantize.default, (codes, scale_node, zero_node, None))
    codes.meta["stack"] = number.meta["stack"] = node.meta.get("stack", "")
    node.replace_all_uses_with(number, delete_user_cb=lambda user: user is not codes)
    return scale_node, zero_node


def _constant(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    set_attribute(graph, name, value.to(device_of(graph)))
    return graph.graph.get_attr(name)


def _open_gate(graph: fx.GraphModule, gate: fx.Node, scale: Tensor, grid: formats.Grid) -> Tensor:
    """hardsigmoid(x) = clip(x + 3, 0, 6) / 6 as an integer addition: the grid of x + 3 clips it, and its codes are read
    on a grid six times finer, whose scale this is."""
    name = f"quantization.{gate.name}"
    finer = scale / 6
    three = torch.tensor(grid.qmax, dtype=grid.dtype)
    with graph.graph.inserting_before(gate):
        codes = _constant(graph, f"{name}.three_codes", three)
        step = _constant(graph, f"{name}.three_scale", torch.tensor(3 / grid.qmax, dtype=torch.float32))
        zero = _constant(graph, f"{name}.three_zero_point", torch.zeros((), dtype=grid.dtype))
        number = graph.graph.call_function(OPERATORS.dequantize.default, (codes, step, zero, None))
        moved = graph.graph.call_function(aten.add.Tensor, (gate.all_input_nodes[0], number))
    moved.meta["stack"] = gate.meta.get("stack", "")
    gate.replace_all_uses_with(moved)
    quantized = next(user for user in moved.users if user.target is OPERATORS.quantize.default)
    read = next(user for user in quantized.users if is_decoded(user))
    with graph.graph.inserting_before(read):
        set_argument(read, "scale", _constant(graph, f"{name}.gate_scale", finer))
    return finer
