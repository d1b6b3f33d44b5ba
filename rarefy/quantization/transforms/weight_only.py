"""Weights of few bits, activations in float: a layer's weight is kept as codes and decoded where it is read. No images are needed.

    y = layer(x, dequantize(codes, scale, zero))

A symmetric grid takes its scale from the calibration rule, one a channel or a group of inputs (``"int4:group=32"``); an affine one (``"uint4:group=32"``,
``"int4:symmetric=no"``) covers the smallest to the largest weight, zero always being a code; floats of 8 bits reach to the largest; block floats follow their own
rules (``rarefy.kernels.fp4``). It saves bytes on disk and in memory, and time only where a runtime multiplies by codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.graph.nodes import attribute, finish, set_attribute
from rarefy.kernels import fp4
from rarefy.kernels.quantize import along
from rarefy.quantization import formats
from rarefy.quantization.rounding_pass import OfWeights

OPERATORS = torch.ops.rarefy


def encode(
    graph: fx.GraphModule, own: Mapping[fx.Node, formats.Format], rule: Any, rounder: Any, generator: torch.Generator
) -> list[dict[str, Any]]:
    """Codes in place of the weights of ``own``'s layers, in place; one fact a layer. rule: None: minmax at 8 bits, else mse."""
    if not isinstance(rounder, OfWeights):
        raise InputError(
            f"rounding={plugins.describe(rounder)}: with activations in float a rule looks at weights alone; take nearest or stochastic"
        )
    facts, bits = [], dict(graph.meta.get("bits", {}))
    for node, grid in own.items():
        source: Any = node.args[1]
        name, weight = str(source.target), attribute(graph, source).detach().float()
        chosen = rule or plugins.resolve("calibration", "minmax" if grid.bits == 8 else "mse")
        with graph.graph.inserting_before(node):
            if isinstance(grid, formats.Fp4):
                number, codes = _block_floats(graph, name, weight, grid)
            else:
                number, codes = _scaled(graph, name, weight, grid, chosen, rounder, generator)
        if grid.bits < 8:
            bits[f"{name}_codes"] = grid.bits
        decoded: Tensor = number.target(
            *(attribute(graph, one) if isinstance(one, fx.Node) else one for one in number.args)
        )  # type: ignore[operator]
        error = (decoded - weight).double().square().sum() / weight.double().square().sum().clamp_min(1e-30)
        node.args = (node.args[0], number, *node.args[2:])
        facts.append(
            {
                "name": name.rpartition(".")[0] or name,
                "bits": grid.bits,
                "grid": str(grid),
                "activation_bits": 32,
                "error": float(error),
                "codes": codes.numel(),
            }
        )
    graph.meta["bits"] = bits
    finish(graph)
    return facts


def chosen_layers(
    graph: fx.GraphModule, layers: list[fx.Node], own: Mapping[fx.Node, Any]
) -> dict[fx.Node, formats.Format]:
    """The layers that get codes. Raises InputError where there are none."""
    found = {node: own[node] for node in layers if own[node] is not None}
    if not found:
        raise InputError(
            "no weight is left to quantise: the model has no convolution or linear layer, or ignore and weights leave none"
        )
    return found


def _scaled(
    graph: fx.GraphModule, name: str, weight: Tensor, grid: Any, rule: Any, rounder: Any, generator: torch.Generator
) -> tuple[fx.Node, Tensor]:
    rows = formats.rows(weight, grid)
    axis = 1 if grid.group else grid.axis
    zero = torch.zeros((), dtype=grid.dtype, device=weight.device)
    if isinstance(grid, formats.Grid) and not (grid.symmetric and grid.signed):
        low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
        steps = ((high - low) / grid.levels).clamp_min(1e-12)
        scale = formats.shaped(steps, weight, grid)
        zero = formats.shaped(
            torch.round(grid.qmin - low / steps).clamp(grid.qmin, grid.qmax).to(grid.dtype), weight, grid
        )
        shifted = (
            weight / along(scale, weight, axis, grid.group or 0) + along(zero, weight, axis, grid.group or 0).float()
        )
        codes = rounder.codes(shifted, grid, generator)
    else:
        scale = formats.shaped(rule.weight_scale(rows, grid).float().clamp_min(1e-12).expand(len(rows)), weight, grid)
        codes = rounder.codes(weight / along(scale, weight, axis, grid.group or 0), grid, generator)
    zero = zero if grid.group else zero.expand(scale.shape)  # ONNX wants one for each scale
    stored = (("codes", codes), ("scale", scale), ("zero_point", zero))
    parts = [_constant(graph, f"{name}_{key}", value.contiguous()) for key, value in stored]
    group = (grid.group,) if grid.group else ()
    return graph.graph.call_function(OPERATORS.dequantize.default, (*parts, axis, *group)), codes


def _block_floats(graph: fx.GraphModule, name: str, weight: Tensor, grid: formats.Fp4) -> tuple[fx.Node, Tensor]:
    scale, whole = grid.scales(weight)
    step = along(fp4.block_scale(scale) * whole, weight, 1, grid.group)
    codes = grid.codes(grid.snap(weight / step))
    parts = [
        _constant(graph, f"{name}_{key}", value)
        for key, value in (("codes", codes), ("scale", scale), ("tensor_scale", whole))
    ]
    return graph.graph.call_function(OPERATORS.dequantize_fp4.default, (*parts, grid.group)), codes


def _constant(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    set_attribute(graph, name, value)
    return graph.graph.get_attr(name)
