"""Layers as steps for CUDA, with all that one kernel does behind their sums."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import argument, arguments, attribute
from rarefy.kernels.cuda.convolution import epilogue, int8_conv
from rarefy.kernels.cuda.convolution.layer import Layer
from rarefy.kernels.cuda.convolution.timing import Remembered
from rarefy.runtimes._cuda_codes import Codes, Step, constant_pad, lined, planes

aten = torch.ops.aten
RAREFY = torch.ops.rarefy
SUMS = frozenset({RAREFY.conv2d.default, RAREFY.linear.default})
CODED = frozenset({RAREFY.conv2d_codes.default, RAREFY.linear_codes.default})
NAMES = {
    aten.relu.default: "relu", aten.silu.default: "silu", aten.hardswish.default: "hardswish",
    aten.sigmoid.default: "sigmoid", aten.hardsigmoid.default: "hardsigmoid", aten.tanh.default: "tanh",
    aten.gelu.default: "gelu",
}  # fmt: skip
# Move codes and read nothing else.


@dataclasses.dataclass
class Fused:
    """A layer and what is melted into it: node, which yields the result, and what it reads."""

    node: fx.Node
    layer: fx.Node
    activation: str = "none"
    residual: fx.Node | None = None
    post: fx.Node | None = None


class Layers:
    """Steps of the layers of a graph."""

    def __init__(self, codes: Codes, remembered: Remembered):
        self.codes, self.graph, self.remembered = codes, codes.graph, remembered

    def fused(self, node: fx.Node) -> Fused | None:
        """The layer whose sums ``node`` rounds, behind an activation and a residual."""
        source, activation = argument(node, "x"), "none"
        residual = post = None
        if source.target is aten.mul.Tensor and len(source.users) == 1 and self._is_of_channels(source):
            source, post = source.args
        if source.target in NAMES and len(source.users) == 1 and exact_gelu(source):
            activation, source = NAMES[source.target], source.args[0]
        if source.target is aten.add.Tensor and len(source.users) == 1 and not source.kwargs:
            parts = [one for one in source.args if isinstance(one, fx.Node)]
            for layer, other in (parts, parts[::-1]) if len(parts) == 2 else ():
                if layer.target in SUMS and len(layer.users) == 1 and self._is_residual(other):
                    source, residual = layer, other
                    break
        if source.target not in SUMS or len(source.users) != 1 or (post and source.target is RAREFY.linear.default):
            return None
        return Fused(node, source, activation, residual, post)

    def _is_of_channels(self, node: fx.Node) -> bool:
        """Is it times a stored number for each channel of a picture?"""
        x, factor = node.args
        if not isinstance(x, fx.Node) or not isinstance(factor, fx.Node) or factor.op != "get_attr":
            return False
        shape = attribute(self.graph, factor).shape
        return len(shape) >= 3 and shape[-3] == shape.numel()

    def _is_residual(self, node: fx.Node) -> bool:
        return (
            is_decoded(node)
            and argument(node, "axis") is None
            and argument(node, "q").op != "get_attr"
            and self.codes.kept(argument(node, "q")) is not None
        )

    def step(self, fused: Fused) -> Step | None:
        given = arguments(fused.layer)
        x, weight = given["x"], attribute(self.graph, given["weight"])
        if weight.dtype != torch.int8 or attribute(self.graph, given["x_scale"]).dim() or self.codes.kept(x) is None:
            return None
        top = left = bottom = right = 0
        if "stride" not in given:
            weight, places = weight[:, :, None, None], int8_conv.Places()
        else:
            if x.target is aten.pad.default and (around := constant_pad(x)) is not None:
                value = argument(x, "value") or 0
                if value == int(self.codes.number(given["x_zero_point"])):
                    (left, right, top, bottom), x = around, x.args[0]
            rows, columns = given["padding"]
            padding = (top + rows, bottom + rows, left + columns, right + columns)
            places = int8_conv.Places(tuple(given["stride"]), padding, tuple(given["dilation"]), given["groups"])
        kept = self.codes.kept(x)
        assert kept is not None
        zero = int(self.codes.number(given["x_zero_point"])) - kept[0]
        result, residual = self._result(fused, weight, zero), fused.residual
        if residual is None and self._is_stem(x, weight, places):
            grid = self.codes.grid(x)
            picture = (float(grid["scale"]), int(grid["zero"]), int(grid["qmin"]), int(grid["qmax"]))
            layer = Layer(weight, result, places, zero, picture)
            return Step((fused.node,), (argument(x, "x"),), lambda p: [planes(layer(p, None, self.remembered))])
        layer = Layer(weight, result, places, zero)
        reads = (x,) if residual is None else (x, argument(residual, "q"))
        run = self._convolve if "stride" in given else self._multiply
        return Step((fused.node,), reads, lambda *values: [run(layer, *values)])

    def _is_stem(self, x: fx.Node, weight: Tensor, places: int8_conv.Places) -> bool:
        return (
            x.target is RAREFY.quantize.default
            and weight.shape[1] <= 4
            and places.groups == 1
            and places.dilation == (1, 1)
            and weight.shape[2] > 1
            and argument(x, "x").op == "placeholder"
        )

    def _result(self, fused: Fused, weight: Tensor, zero: int) -> epilogue.Result:
        """zero: of the input, as its codes are kept."""
        given, node = arguments(fused.layer), fused.node
        bias = attribute(self.graph, given["bias"]).to(torch.int64)
        bias = (bias - zero * weight.to(torch.int64).flatten(1).sum(1)).to(torch.int32)
        factor = attribute(self.graph, given["x_scale"]) * attribute(self.graph, given["weight_scale"])
        if node.target in SUMS:
            return epilogue.Result(bias, factor.float().contiguous(), codes=False)
        grid = self.codes.grid(node)
        ends = (int(grid["zero"]), int(grid["qmin"]), int(grid["qmax"]))
        if node is fused.layer:
            factor = (factor / attribute(self.graph, given["scale"])).contiguous()
            return epilogue.Result(bias, factor, "none", True, 1.0, *ends)
        post, residual = None, (1.0, 0)
        if fused.post is not None:
            post = attribute(self.graph, fused.post).float().reshape(-1).contiguous()
        if fused.residual is not None:
            kept = self.codes.kept(argument(fused.residual, "q"))
            assert kept is not None
            residual_zero = int(self.codes.number(argument(fused.residual, "zero_point"))) - kept[0]
            residual = (self.codes.number(argument(fused.residual, "scale")), residual_zero)
        scale = float(grid["scale"])
        return epilogue.Result(bias, factor.contiguous(), fused.activation, True, scale, *ends, *residual, post)

    def _convolve(self, layer: Layer, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return planes(layer(lined(x), None if residual is None else lined(residual), self.remembered))

    def _multiply(self, layer: Layer, x: Tensor, residual: Tensor | None = None) -> Tensor:
        shape = (1, x.numel() // x.shape[-1], 1, x.shape[-1])
        other = None if residual is None else residual.reshape(*shape[:3], layer.outputs)
        return layer(x.reshape(shape), other, self.remembered).reshape(*x.shape[:-1], layer.outputs)


def exact_gelu(node: fx.Node) -> bool:
    return node.target is not aten.gelu.default or argument(node, "approximate") in (None, "none")
