"""Weights of few bits, activations in float: a weight is stored as codes and decoded where it is read. No images are
needed.

    y = layer(x, dequantize(codes, scale, zero))

A symmetric grid takes its scale from the calibration rule, one a channel or a group of inputs (``"int4:group=32"``); an
affine one (``"uint4:group=32"``, ``"int4:symmetric=no"``) covers the smallest to the largest weight, zero always being
a code; floats of 8 bits reach to the largest; block floats follow their own rules (``rarefy.kernels.fp4``). It saves
bytes on disk and in memory, and time only where a runtime multiplies by codes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.graph import history
from rarefy.graph.fold import fold
from rarefy.graph.layers import check_globs, layer_name, names, weighted
from rarefy.graph.nodes import argument, attribute, finish, set_argument, set_attribute
from rarefy.kernels import fp4, is_quantised
from rarefy.kernels.quantize import along
from rarefy.quantization import formats, qdq
from rarefy.quantization.observers import Calibration
from rarefy.quantization.rounding_pass import OfWeights, Rounding
from rarefy.tasks.detector import capture

OPERATORS = torch.ops.rarefy


def quantize_weights(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor] | None,
    assigned: formats.Assignment,
    rule: Calibration | None,
    rounder: Rounding,
    ignore: Sequence[str],
    seed: int,
) -> fx.GraphModule:
    """The graph of ``model`` with codes for weights: ``quantize`` with activations="float". ignore: globs of layers."""
    if is_quantised(model):
        raise InputError("the model is quantised already; start from its float original")
    graph = fold(capture(model, inputs))
    check_globs(graph, ignore=ignore, weights=[glob for glob, _ in assigned.rules])
    layers = [
        node
        for node in graph.graph.nodes
        if weighted(node) and not any(fnmatch.fnmatch(name, glob) for glob in ignore for name in names(node))
    ]
    chosen = {node: grid for node in layers if (grid := assigned.of(names(node))) is not None}
    if not chosen:
        raise InputError(
            "no weight is left to quantise: the model has no convolution or linear layer, or ignore and weights "
            "leave none"
        )
    facts = encode(graph, chosen, rule, rounder, torch.Generator().manual_seed(seed))
    options = {
        "weights": str(assigned),
        "activations": formats.FLOAT,
        "weight_calibration": None if rule is None else plugins.describe(rule),
        "rounding": plugins.describe(rounder),
        "ignore": list(ignore),
        "seed": seed,
    }
    history.append(graph, "quantize", options, {"layers": facts, "float": [], "ranges": {}})
    return graph.eval()


def encode(
    graph: fx.GraphModule,
    grids: Mapping[fx.Node, formats.Format],
    rule: Calibration | None,
    rounder: Rounding,
    generator: torch.Generator,
) -> list[dict[str, object]]:
    """Codes in place of the weights of ``grids``' layers, in place; facts of each.

    rule: None: minmax at 8 bits, else mse.
    """
    if not isinstance(rounder, OfWeights):
        raise InputError(
            f"rounding={plugins.describe(rounder)}: with activations in float a rule looks at weights alone; "
            "take nearest or stochastic"
        )
    facts: list[dict[str, object]] = []
    bits: dict[str, int] = dict(graph.meta.get("bits", {}))
    for node, grid in grids.items():
        source = argument(node, "weight")
        name, weight = str(source.target), attribute(graph, source).detach().float()
        chosen = rule or plugins.resolve("calibration", "minmax" if grid.bits == 8 else "mse")
        layer = layer_name(node)
        with graph.graph.inserting_before(node):
            if isinstance(grid, formats.Fp4):
                number, codes = _block_floats(graph, name, weight, grid)
            else:
                number, codes = _scaled(graph, name, weight, grid, chosen, rounder, generator)
        if grid.bits < 8:
            bits[f"{name}_codes"] = grid.bits
        lost = (qdq.decoded(graph, number) - weight).double().square().sum()
        error = lost / weight.double().square().sum().clamp_min(1e-30)
        set_argument(node, "weight", number)
        facts.append(
            {
                "name": layer,
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


def _scaled(
    graph: fx.GraphModule,
    name: str,
    weight: Tensor,
    grid: formats.Format,
    rule: Calibration,
    rounder: OfWeights,
    generator: torch.Generator,
) -> tuple[fx.Node, Tensor]:
    """The ``dequantize`` of a weight's codes, and the codes."""
    rows, group = formats.rows(weight, grid), grid.group or 0
    axis = 1 if group else grid.axis
    zero = torch.zeros((), dtype=grid.dtype, device=weight.device)
    if isinstance(grid, formats.Grid) and not (grid.symmetric and grid.signed):
        low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
        steps = ((high - low) / grid.levels).clamp_min(1e-12)
        scale = formats.shaped(steps, weight, grid)
        zero = formats.shaped(
            torch.round(grid.qmin - low / steps).clamp(grid.qmin, grid.qmax).to(grid.dtype), weight, grid
        )
        shifted = weight / along(scale, weight, axis, group) + along(zero, weight, axis, group).float()
        codes = rounder.codes(shifted, grid, generator)
    else:
        scale = formats.shaped(rule.weight_scale(rows, grid).float().clamp_min(1e-12).expand(len(rows)), weight, grid)
        codes = rounder.codes(weight / along(scale, weight, axis, group), grid, generator)
    zero = zero if group else zero.expand(scale.shape)  # ONNX wants one for each scale
    stored = (("codes", codes), ("scale", scale), ("zero_point", zero))
    parts = [_constant(graph, f"{name}_{key}", value.contiguous()) for key, value in stored]
    read = (*parts, axis, group) if group else (*parts, axis)
    return graph.graph.call_function(OPERATORS.dequantize.default, read), codes


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
