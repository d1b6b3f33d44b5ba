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

import rarefy.kernels  # noqa: F401  registers torch.ops.rarefy
from rarefy.deployment.onnx import (
    arithmetic,
    detection,
    indexing,
    layers,
    pooling,
    quantized,
    recurrent,
    reductions,
    shapes,
)  # fmt: skip
from rarefy.deployment.onnx.writer import BATCHES, CONTRIB, Message, Untranslated, Writer
from rarefy.graph.nodes import arguments, attribute, is_tensor
from rarefy.graph.signature import input_names
from rarefy.graph.signature import returned as returned_by

OPSET, IR_VERSION = 20, 10
OPSET_OF_4_BITS = 21  # INT4, UINT4, and scales of blocks

FAMILIES = (arithmetic, quantized, layers, recurrent, pooling, reductions, shapes, indexing, detection)


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


def onnx_model(onnx: ModuleType, graph: fx.GraphModule, four_bits: bool = False, contrib: bool = False) -> Message:
    """The ONNX model of ``graph`` (in eval mode, on the CPU, constants folded).

    onnx: the package. four_bits, contrib: as in ``rarefy.deployment.onnx.file.write``. Raises Untranslated.
    """
    writer = Writer(onnx, graph, four_bits, contrib)
    inputs: list[Message] = []
    placeholders = graph.graph.find_nodes(op="placeholder")
    for node, name in zip(placeholders, input_names(graph), strict=True):
        writer.names[node] = writer.fresh(name)
        inputs.append(_info(writer, node, writer.names[node], ["batch", *writer.known[node].shape[1:]]))
    returned = [(writer.fresh(name), node) for name, node in returned_by(graph) if is_tensor(writer.known[node])]
    called = {node: name for name, node in reversed(returned)}
    for node in graph.graph.nodes:
        writer.current = node.name
        if node.op == "get_attr":
            if isinstance(value := attribute(graph, node), Tensor):
                writer.names[node] = writer.stored(str(node.target), value)
        elif node.op == "call_function":
            _write(writer, node, called.get(node))
    outputs = [_output(writer, node, name) for name, node in returned]
    read, nodes = {info.name for info in outputs}, []
    for written in reversed(writer.nodes):  # what nothing reads is left out
        if read.intersection(written.output):
            read.update(written.input)
            nodes.append(written)
    domains = [onnx.helper.make_opsetid("", OPSET_OF_4_BITS if read & writer.in_4_bits else OPSET)]
    if any(written.domain == CONTRIB for written in nodes):
        domains.append(onnx.helper.make_opsetid(CONTRIB, 1))
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes[::-1], "main_graph", inputs, outputs), opset_imports=domains, ir_version=IR_VERSION
    )
    for name in writer.initializers:
        if name in read:
            writer.initializer(name, model.graph.initializer.add())
    return model


def _info(writer: Writer, node: fx.Node, name: str, shape: list[int | str]) -> Message:
    return writer.onnx.helper.make_tensor_value_info(name, writer.type_of(writer.dtype(node)), shape)


def _output(writer: Writer, node: fx.Node, name: str) -> Message:
    """An answer by its name: what the node has become, or, where that has another name, a copy of it."""
    if writer.names[node] != name:
        writer.nodes.append(writer.onnx.helper.make_node("Identity", [writer.names[node]], [name], name=name))
    sizes = zip(writer.known[node].shape, writer.moved[node].shape, strict=True)
    shape = [
        one if one == two else "batch" if (one, two) == BATCHES else f"{node.name}_{index}"
        for index, (one, two) in enumerate(sizes)
    ]
    return _info(writer, node, name, shape)


def _write(writer: Writer, node: fx.Node, called: str | None) -> None:
    """The node by its row. called: the name of the answer that it is."""
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
        own = called or writer.fresh(node.name)
        for written in added:
            for names in (written.input, written.output):
                names[:] = [own if name == result else name for name in names]
            if own in written.output:
                written.name = own
        result = own
    writer.names[node] = result
