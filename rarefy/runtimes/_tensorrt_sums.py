"""How TensorRT's file is read where it can't be run: products on codes, as tensor cores take them.

ONNX Runtime takes most products of decoded numbers in float32, whose sums depend on their order: one code in a hundred
thousand is its neighbour, from which on the answers of a network with tight margins drift apart. Tensor cores sum codes
in 32 bits. So what is read is, in place of ``y = conv(s_x x, s_w w) + c``,

    y = (round(conv(x, w)) + b) (s_x s_w)        x, w, b = round(c / (s_x s_w)): whole numbers

which is exact while sums stay below 2^24; where y is rounded at once, the factor is (s_x s_w / s), as the simulation
takes it. The rounding of sums changes no number: it keeps ONNX Runtime from melting the factor into the weights again.
All else is computed as the file says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rarefy.deployment.tensorrt_rules import PASSING
from rarefy.system.dependencies import needs

Message = Any  # of protobuf
Numbers = NDArray[Any]

FORMS = ("Conv", "Gemm", "MatMul")


class _Model:
    """A model that is rewritten: who makes and who reads each tensor, and its constants."""

    def __init__(self, model: Message):
        self.onnx, self.graph = needs("onnx"), model.graph
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[Message]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.stored = {tensor.name: tensor for tensor in self.graph.initializer}
        self.outputs = {one.name for one in self.graph.output}

    def array(self, name: str) -> Numbers:
        found: Numbers = self.onnx.numpy_helper.to_array(self.stored[name])
        return found

    def constant(self, name: str, values: Numbers) -> str:
        self.graph.initializer.append(self.onnx.numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def decoded(self, name: str) -> Message | None:
        """The node that decodes a tensor, its codes moved or padded in between or not."""
        node = self.makers.get(name)
        while node is not None and node.op_type in (*PASSING, "Pad"):
            node = self.makers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def only_reader(self, name: str) -> Message | None:
        found = self.readers.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outputs else None


def on_codes(model: Message) -> int:
    """Rewrite the products of codes in place; how many there were.

    model: of the package onnx, as ``TensorRT.export`` writes it.
    """
    state, nodes = _Model(model), []
    gone: set[str] = set()
    changed = 0
    for node in model.graph.node:
        new = _rewritten(state, node, gone) if node.op_type in FORMS else None
        changed += new is not None
        nodes += [node] if new is None else new
    kept = [node for node in nodes if not gone.intersection(node.output) or node.name.endswith("/numbers")]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return changed


def _rewritten(state: _Model, node: Message, gone: set[str]) -> list[Message] | None:
    """What stands for a product; None where it stays. gone: outputs of nodes that are part of it."""
    weight, entry = state.makers.get(node.input[1]), state.decoded(node.input[0])
    after = state.only_reader(node.output[0])
    if weight is None or entry is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in state.stored:
        return None
    step, scales = state.array(entry.input[1]), state.array(weight.input[1])
    if step.size != 1 or scales.ndim > 1:
        return None
    bias, result = node.input[2] if len(node.input) > 2 else "", node.output[0]
    if node.op_type == "MatMul" and after is not None and after.op_type == "Add":
        bias = next((name for name in after.input if name in state.stored), "")
        if bias and state.array(bias).ndim == 1:
            result = after.output[0]
            gone.add(result)
            after = state.only_reader(result)
        else:
            bias = ""
    factor: Numbers = step.reshape(()).astype(np.float32) * scales.astype(np.float32)
    wide = (1, -1, 1, 1) if node.op_type == "Conv" else (-1,)
    base, make = node.output[0], state.onnx.helper.make_node
    read = state.constant(f"{base}/step", step.reshape(()))
    codes = state.constant(f"{base}/codes", state.array(weight.input[0]))
    whole = state.constant(f"{base}/whole", np.zeros(()))
    if bias:
        numbers = state.array(bias).astype(np.float64) / factor.astype(np.float64)
        whole = state.constant(f"{base}/bias", np.rint(numbers).reshape(wide))
    if after is not None and after.op_type == "QuantizeLinear":
        factor = factor / state.array(after.input[1])
        after.input[1] = state.constant(f"{base}/one", np.ones(()))
    product = make(node.op_type, [f"{base}/x", codes], [f"{base}/product"], f"{base}/product")
    product.attribute.extend(node.attribute)
    return [
        make("Div", [node.input[0], read], [f"{base}/parts"], f"{base}/parts"),
        make("Round", [f"{base}/parts"], [f"{base}/x"], f"{base}/x"),
        product,
        make("Round", [f"{base}/product"], [f"{base}/sums"], f"{base}/sums"),
        make("Add", [f"{base}/sums", whole], [f"{base}/total"], f"{base}/total"),
        make(
            "Mul",
            [f"{base}/total", state.constant(f"{base}/factor", factor.reshape(wide))],
            [result],
            f"{base}/numbers",
        ),
    ]
