"""Grids into the graph: which nodes stand for a rounded value, a rounded weight, a rounded bias.

A value becomes ``quantize`` followed by ``dequantize``, and whoever read it reads the result; a carrier's result is read on the grid of what it carries;
a clip whose work the grid's end does goes; padding is done on the codes. A weight and its bias become codes and ``dequantize``. All of it in place.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy.graph.fold import put
from rarefy.graph.layers import padding_of
from rarefy.graph.nodes import attribute, device_of, set_attribute
from rarefy.kernels.int_linear import BIAS_LIMIT
from rarefy.quantization import formats
from rarefy.quantization.placement import Placement, clip_bounds

aten = torch.ops.aten

OPERATORS = torch.ops.rarefy


def free_names(graph: fx.GraphModule) -> None:
    """A value's grid is stored in a module of its name, so that a name may not be one that every module has (``to``)."""
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "call_function") and node.name in dir(nn.Module):
            node._rename(f"{node.name}_value")


def own_bias(graph: fx.GraphModule, node: fx.Node) -> None:
    """Every integer layer has a weight and a bias of its own."""
    weight = attribute(graph, node.args[1]).detach()
    bias = (
        attribute(graph, node.args[2]).detach()
        if len(node.args) > 2 and node.args[2] is not None
        else weight.new_zeros(weight.shape[0])
    )
    put(graph, node, weight.clone(), bias.clone())


def grid_of(placement: Placement, value: fx.Node, grid: formats.Grid) -> formats.Grid:
    """The grid that ``value`` is on where values in general are on ``grid``."""
    return dataclasses.replace(grid, signed=True, symmetric=False) if value in placement.centered else grid


def clipped(placement: Placement, value: fx.Node, lo: float, hi: float, grid: formats.Grid) -> tuple[float, float]:
    """A range no wider than the clip whose work the grid's ends do, and with zero in the middle where it has to be."""
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


def insert(
    graph: fx.GraphModule,
    placement: Placement,
    ranges: dict[fx.Node, tuple[float, float]],
    own: dict[fx.Node, formats.Grid],
) -> None:
    """Put quantize/dequantize after every value and every carrier of one."""
    seen_scale: dict[fx.Node, Tensor] = {}
    sources: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for value in placement.values:
        (lo, hi), grid = ranges[value], own[value]
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
            _pad_codes(graph, carrier, own[value])
        elif not _yields_tuple(carrier):
            scale, zero = seen_scale[value], attribute(graph, sources[value][1])
            _after(graph, carrier, value, scale, zero, own[value])
    for clip, source in placement.fused.items():
        clip.replace_all_uses_with(source)
        graph.graph.erase_node(clip)


def _whole(scale: Tensor) -> Tensor:
    """The next larger scale, up to 1, that is one over a whole number: ONNX Runtime's integer softmax rounds 1 / scale down."""
    steps = torch.floor(1 / scale.double()).clamp_min(1.0)
    whole = (1 / steps).to(scale.dtype)
    return torch.where(torch.floor(1 / whole) < steps, torch.nextafter(whole, torch.zeros_like(whole)), whole)


def read_by(layer: fx.Node) -> fx.Node:
    """The ``dequantize`` whose numbers a layer multiplies, before padding that melts into the layer."""
    entry: Any = layer.args[0]
    while entry.target is not OPERATORS.dequantize.default:
        entry = entry.args[0]
    return entry


def value_name(layer: fx.Node) -> str:
    """Name of the value whose grid a layer's input is on."""
    return str(read_by(layer).args[1].target).split(".")[1]


def least_scale(graph: fx.GraphModule, layer: fx.Node) -> Tensor:
    """(outputs,) float32: with a finer weight scale than this the bias would not fit its codes."""
    bias = attribute(graph, layer.args[2]).detach()
    input_scale = attribute(graph, read_by(layer).args[1])
    return (bias.double().abs() / (input_scale.double() * BIAS_LIMIT)).float().clamp_min(1e-12)


def put_codes(graph: fx.GraphModule, layer: fx.Node, codes: Tensor, scale: Tensor) -> None:
    """Codes in place of a layer's weight; its bias goes to 32-bit integers on the grid of the products, s_x s_w, as integer kernels add it."""
    weight, bias = layer.args[1:3]
    products = attribute(graph, read_by(layer).args[1]).double() * scale.double()
    values = attribute(graph, bias).detach()
    bias_codes = torch.round(values.double() / products.float().double()).clamp(-BIAS_LIMIT, BIAS_LIMIT).to(torch.int32)
    with graph.graph.inserting_before(layer):
        number = _decoded(graph, str(weight.target), codes, scale)
        constant = _decoded(graph, str(bias.target), bias_codes, products.float())
    layer.args = (layer.args[0], number, constant, *layer.args[3:])


def shift_bias(graph: fx.GraphModule, layer: fx.Node, by: Tensor) -> None:
    """Add ``by`` (outputs,) to the bias of a layer in codes, to the nearest code."""
    codes, scale = (attribute(graph, source) for source in layer.args[2].args[:2])
    codes.copy_((codes.double() + torch.round(by.double() / scale.double())).clamp_(-BIAS_LIMIT, BIAS_LIMIT))


def scale_output(graph: fx.GraphModule, layer: fx.Node, by: float) -> None:
    """Multiply what a layer in codes makes, by its scales."""
    scale = attribute(graph, layer.args[1].args[1])
    scale.mul_(by)
    codes, products = (attribute(graph, source) for source in layer.args[2].args[:2])
    values = codes.double() * products.double() * by
    products.copy_(attribute(graph, read_by(layer).args[1]).double() * scale.double())
    codes.copy_(torch.round(values / products.double()).clamp_(-BIAS_LIMIT, BIAS_LIMIT))


def _decoded(graph: fx.GraphModule, name: str, codes: Tensor, scale: Tensor) -> fx.Node:
    parts = (
        _constant(graph, f"{name}_codes", codes),
        _constant(graph, f"{name}_scale", scale),
        _constant(graph, f"{name}_zero_point", torch.zeros((), dtype=codes.dtype, device=codes.device)),
    )
    return graph.graph.call_function(OPERATORS.dequantize.default, (*parts, 0))


def _pad_codes(graph: fx.GraphModule, pad: fx.Node, grid: formats.Grid) -> None:
    """Padding done on the codes: zero is the code of the zero point, and -inf, before max pooling, is the lowest."""
    number = pad.args[0]
    codes, scale, zero, axis = number.args
    around = int(attribute(graph, zero)) if padding_of(pad) == 0 else grid.qmin
    pad.args, pad.kwargs = (codes, pad.args[1], "constant", around), {}
    with graph.graph.inserting_after(pad):
        padded = graph.graph.call_function(OPERATORS.dequantize.default, (pad, scale, zero, axis))
    pad.replace_all_uses_with(padded, delete_user_cb=lambda user: user is not padded)


def _yields_tuple(node: fx.Node) -> bool:
    return any(user.target is operator.getitem for user in node.users)


def _after(
    graph: fx.GraphModule, node: fx.Node, value: fx.Node, scale: Tensor, zero: Tensor, grid: formats.Grid
) -> tuple[fx.Node, fx.Node]:
    """quantize and dequantize ``node``; everybody who read it reads the result. The grid's tensors are named after ``value``."""
    name = f"quantization.{value.name}"
    place_after = node
    with graph.graph.inserting_after(place_after):
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
