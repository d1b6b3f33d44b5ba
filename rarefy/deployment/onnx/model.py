"""A graph as an ONNX model, by a table: one row an ATen operator.

torch's own exporter traces the graph again, decomposes it and translates what is left, 20 to 60 s for a MobileNetV3;
the table takes one. Constants are computed beforehand (``rarefy.graph.fold.fold_constants``). An operator without a row
raises ``Untranslated``; ``rarefy.deployment.onnx.file`` then falls back to torch's exporter.

Given up: forms of an operator nobody uses in a network for inference (complex numbers, indexing by masks, sizes that
depend on values).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import rarefy.kernels  # noqa: F401  registers torch.ops.rarefy
from rarefy.deployment.onnx import arithmetic, indexing, layers, pooling, quantized, reductions, shapes
from rarefy.deployment.onnx.writer import BATCHES, Message, Untranslated, Writer
from rarefy.graph.nodes import arguments, attribute, is_tensor

OPSET, IR_VERSION = 20, 10
OPSET_OF_4_BITS = 21  # INT4, UINT4, and scales of blocks

FAMILIES = (arithmetic, quantized, layers, pooling, reductions, shapes, indexing)


def operators(names: str) -> Iterator[object]:
    """The operators that a row is for, by their names.

    ``"clamp clamp.Tensor rarefy.quantize operator.add"``: ATen's default overload and another, one of ours, Python's.
    """
    for name in names.split():
        head, _, tail = name.partition(".")
        if head == "operator":
            yield getattr(operator, tail)
        elif head == "rarefy":
            yield getattr(torch.ops.rarefy, tail).default
        else:
            yield getattr(getattr(torch.ops.aten, head), tail or "default")


ROWS = {one: row for family in FAMILIES for names, row in family.ROWS.items() for one in operators(names)}


def onnx_model(onnx: ModuleType, graph: fx.GraphModule, four_bits: bool = False) -> Message:
    """The ONNX model of ``graph`` (in eval mode, on the CPU, constants folded).

    onnx: the package. four_bits: as in ``rarefy.deployment.onnx.file.write``. Raises Untranslated.
    """
    writer = Writer(onnx, graph, four_bits)
    inputs: list[Message] = []
    outputs: list[Message] = []
    writer.taken |= {node.name for node in graph.graph.nodes}
    for node in graph.graph.nodes:
        writer.current = node.name
        if node.op == "placeholder":
            writer.names[node] = node.name
            inputs.append(_info(writer, node, node.name, ["batch", *writer.known[node].shape[1:]]))
        elif node.op == "get_attr":
            if isinstance(value := attribute(graph, node), Tensor):
                writer.names[node] = writer.stored(str(node.target), value)
        elif node.op == "call_function":
            _write(writer, node)
        elif node.op == "output":
            outputs += _outputs(writer, node, {info.name for info in inputs})
    read, nodes = {info.name for info in outputs}, []
    for written in reversed(writer.nodes):  # what nothing reads is left out
        if read.intersection(written.output):
            read.update(written.input)
            nodes.append(written)
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes[::-1], "main_graph", inputs, outputs),
        opset_imports=[onnx.helper.make_opsetid("", OPSET_OF_4_BITS if read & writer.in_4_bits else OPSET)],
        ir_version=IR_VERSION,
    )
    for name in writer.initializers:
        if name in read:
            writer.initializer(name, model.graph.initializer.add())
    return model


def _info(writer: Writer, node: fx.Node, name: str, shape: list[int | str]) -> Message:
    return writer.onnx.helper.make_tensor_value_info(name, writer.type_of(writer.dtype(node)), shape)


def _outputs(writer: Writer, node: fx.Node, taken: set[str]) -> list[Message]:
    """One for each tensor of the answer. taken: names of the inputs."""
    infos: list[Message] = []
    for leaf in pytree.tree_leaves(node.args[0]):
        if not isinstance(leaf, fx.Node) or not is_tensor(writer.known[leaf]):
            continue
        name = writer.names[leaf]
        if name in taken or leaf.op == "get_attr":
            name = writer.op("Identity", [name])
        taken.add(name)
        sizes = zip(writer.known[leaf].shape, writer.moved[leaf].shape, strict=True)
        shape = [
            one if one == two else "batch" if (one, two) == BATCHES else f"{leaf.name}_{index}"
            for index, (one, two) in enumerate(sizes)
        ]
        infos.append(_info(writer, leaf, name, shape))
    return infos


def _write(writer: Writer, node: fx.Node) -> None:
    known = writer.known[node]
    if isinstance(known, (int, float, bool)) and writer.moved[node] == known:
        return  # a number: its readers ask for it
    row = ROWS.get(node.target)
    if row is None:
        where = node.meta.get("stack") or node.name
        raise Untranslated(f"{where}: {node.target} has no row in the table of ONNX operators")
    begun = len(writer.nodes)
    result = row(writer, node, arguments(node))
    if isinstance(result, list):
        writer.lists[node] = result
        return
    added = writer.nodes[begun:]
    if any(result in written.output for written in added):  # named after the node, as its codes and weights are
        for written in added:
            for names in (written.input, written.output):
                names[:] = [node.name if name == result else name for name in names]
            if node.name in written.output:
                written.name = node.name
        result = node.name
    writer.names[node] = result
