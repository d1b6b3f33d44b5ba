"""What a Q/DQ ONNX file must look like for TensorRT to run it in integers: rules by name, and who breaks them.

From NVIDIA's guide (Working with Quantized Types, Explicit Quantization; Q/DQ Layer-Placement Recommendations):

    symmetric     codes are int8, their zero points 0: TensorRT has no other grid
    per-channel   a weight's scales stand along its output channels, or there is one; its zero point is 0
    bias          is float: TensorRT rounds it to the product's scale by itself
    residual      of a sum, what does not come out of a convolution is decoded from codes, else that branch stays float
    fused-sum     no pair stands between a convolution and the sum that it ends in, which are one kernel
    concat        what is put together is decoded with one scale, else each part is rounded again

A finding says the rule, the node, and what it has instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from rarefy.system.dependencies import needs

Message = Any  # of protobuf

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
AXES = {"Conv": (0,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (1,)}
PASSING = (
    "Relu",
    "Clip",
    "MaxPool",
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Identity",
)


class Finding(NamedTuple):
    """rule: its name. node: of the file. what: it has instead."""

    rule: str
    node: str
    what: str

    def __str__(self) -> str:
        return f"{self.node}: {self.what} ({self.rule})"


class _File:
    """Who makes and who reads each tensor of a model, and its constants."""

    def __init__(self, model: Message):
        self.nodes = list(model.graph.node)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Message]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.stored = {tensor.name: tensor for tensor in model.graph.initializer}

    def array(self, name: str) -> Any:
        return needs("onnx").numpy_helper.to_array(self.stored[name])

    def decodes(self, name: str) -> Message | None:
        """The node that decodes a tensor, its codes moved or not."""
        node = self.makers.get(name)
        while node is not None and node.op_type in PASSING:
            node = self.makers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def rounded_product(self, decoding: Message) -> Message | None:
        """The convolution whose sums were rounded to the codes that are decoded, by nobody else in between."""
        rounding = self.makers.get(decoding.input[0])
        if rounding is None or rounding.op_type != "QuantizeLinear":
            return None
        product = self.makers.get(rounding.input[0])
        return product if product is not None and product.op_type in ("Conv", "ConvTranspose") else None


def findings(model: Message) -> list[Finding]:
    """Where a model breaks the rules, in the order of its nodes. model: of the package onnx."""
    file = _File(model)
    found: list[Finding] = []
    for node in file.nodes:
        for rule in (_symmetric, _per_channel, _bias, _sum, _concat):
            found += rule(file, node)
    return found


def _symmetric(file: _File, node: Message) -> Iterator[Finding]:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    if len(node.input) < 3:
        if node.op_type == "QuantizeLinear":
            yield Finding("symmetric", node.name, "rounds to uint8, ONNX's default without a zero point")
        return
    zero = file.array(node.input[2])
    if str(zero.dtype) == "uint8":
        yield Finding("symmetric", node.name, "has unsigned codes")
    elif zero.any():
        yield Finding("symmetric", node.name, f"has the zero point {int(zero.reshape(-1)[0])}")


def _per_channel(file: _File, node: Message) -> Iterator[Finding]:
    if node.op_type not in PRODUCTS:
        return
    weight = file.makers.get(node.input[1])
    if weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in file.stored:
        return
    scale = file.array(weight.input[1])
    axis = next((one.i for one in weight.attribute if one.name == "axis"), 1)
    if scale.ndim > 1:
        yield Finding("per-channel", weight.name, "has scales for groups of inputs")
    elif scale.size > 1 and axis not in AXES[node.op_type]:
        yield Finding("per-channel", weight.name, f"has its scales along axis {axis}")


def _bias(file: _File, node: Message) -> Iterator[Finding]:
    if node.op_type in PRODUCTS and len(node.input) > 2 and node.input[2]:
        maker = file.makers.get(node.input[2])
        if maker is not None and maker.op_type == "DequantizeLinear":
            yield Finding("bias", node.name, "has a bias in codes")


def _sum(file: _File, node: Message) -> Iterator[Finding]:
    if node.op_type != "Add" or any(name in file.stored for name in node.input):
        return
    makers = [file.makers.get(name) for name in node.input]
    direct = [
        maker is not None and maker.op_type in ("Conv", "ConvTranspose") and file.decodes(maker.input[0]) is not None
        for maker in makers
    ]
    decoded = [file.decodes(name) for name in node.input]
    for place in (0, 1):
        if direct[1 - place] and not direct[place] and decoded[place] is None:
            yield Finding("residual", node.name, "adds a branch that is not decoded from codes")
    if not any(direct):
        for one in decoded:
            product = None if one is None else file.rounded_product(one)
            if product is not None and len(file.readers[one.input[0]]) == 1:  # type: ignore[union-attr]
                yield Finding("fused-sum", node.name, f"adds what {product.name} made, rounded in between")
                return


def _concat(file: _File, node: Message) -> Iterator[Finding]:
    if node.op_type != "Concat":
        return
    decoding = [file.decodes(name) for name in node.input if name not in file.stored]
    scales = [file.array(one.input[1]) for one in decoding if one is not None]
    if scales and len(scales) == len(decoding) and len({float(one.reshape(-1)[0]) for one in scales}) > 1:
        yield Finding("concat", node.name, f"puts together codes of {len(scales)} scales")
