"""The ONNX file that runtimes read: the graph by a table (``model``), or, where it lacks a row, by torch's exporter.

Opset 20 (21 where codes of 4 bits are stored), batch free, int8 codes as initialisers; its metadata says what the model
is for (``rarefy.deployment.description``), and nothing of when and where: the same graph gives the same bytes. A
mean over the plane is GlobalAveragePool (runtimes have no integer ReduceMean), and zeros that only convolutions read
are their own padding.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import fx

from rarefy.deployment import description
from rarefy.deployment.onnx.model import OPSET, onnx_model
from rarefy.deployment.onnx.writer import Message, Untranslated
from rarefy.errors import InputError
from rarefy.graph.fold import fold_constants
from rarefy.graph.nodes import attribute, device_of, example_inputs
from rarefy.graph.signature import input_names, output_names
from rarefy.system.dependencies import needs
from rarefy.system.quiet import quiet

LARGEST = 2**31 - 2**24  # bytes of weights: what protobuf takes in one message, less room for the nodes


def write(
    graph: fx.GraphModule,
    path: str | os.PathLike[str],
    zero_points: bool = True,
    four_bits: bool = False,
    contrib: bool = False,
) -> Path:
    """Write ``graph`` (in eval mode, layers as numbers: ``lowering.to_numbers``); returns the path.

    zero_points: False leaves those out that are 0 throughout, as weights' are.
    four_bits: linear layers of floats whose weights have up to 4 bits store them two a byte (opset 21), which a runtime
        may multiply by as they are.
    contrib: SiLU between two roundings is one operator of ONNX Runtime's own, which it would not find again by itself.

    Raises InputError for an operator ONNX has no form of, and for more weights than a file holds.
    """
    onnx = needs("onnx")
    graph = fold_constants(graph if device_of(graph).type == "cpu" else copy.deepcopy(graph).cpu())
    _fits(graph)
    lacking = ""
    try:
        try:
            model = onnx_model(onnx, graph, four_bits, contrib)
        except Untranslated as untranslated:
            lacking = str(untranslated)
            model = _exported(graph, optimize=True)
            if not _is_valid(onnx, model):  # its optimiser gives the bounds of two clips of one value the same names
                model = _exported(graph, optimize=False)
    except Exception as error:
        why = lacking or next((line.strip() for line in str(error).splitlines()[::-1] if line.strip()), repr(error))
        out = "leave that layer out with core=, or choose another runtime"
        if "BFloat16" in why:
            out = "capture it without torch.autocast, or as model.float()"
        raise InputError(f"the graph can't be written as ONNX: {why[:300]}; {out}") from error
    if not zero_points:
        _drop_zero_points(onnx, model.graph)
    _tidy(onnx, model)
    told = model.metadata_props.add()
    told.key, told.value = description.KEY, description.text_of(graph)
    return _stored(model, Path(path))


def _stored(model: Message, path: Path) -> Path:
    """The file, one tensor after the other: serialised as a whole, 1.5 GB of weights take three times as much.

    The model is left without them.
    """
    tensors = list(model.graph.initializer)
    sizes = [tensor.ByteSize() for tensor in tensors]
    heads = [_head(model.graph, "initializer", size) for size in sizes]
    del model.graph.initializer[:]
    rest = model.graph.SerializeToString(deterministic=True)
    model.ClearField("graph")
    with open(path, "wb") as file:
        file.write(model.SerializeToString(deterministic=True))
        file.write(_head(model, "graph", len(rest) + sum(map(len, heads)) + sum(sizes)) + rest)
        for head, tensor in zip(heads, tensors, strict=True):
            file.write(head + tensor.SerializeToString(deterministic=True))
    return path


def _head(owner: Message, field: str, size: int) -> bytes:
    """What stands before a message of so many bytes in protobuf's wire format: number and kind of the field, size."""
    head = bytearray()
    for number in (owner.DESCRIPTOR.fields_by_name[field].number << 3 | 2, size):
        while number > 127:
            head.append(number & 127 | 128)
            number >>= 7
        head.append(number)
    return bytes(head)


def _fits(graph: fx.GraphModule) -> None:
    """Raises InputError for more weights than one file holds, before the time is spent on writing it."""
    values = {str(node.target): attribute(graph, node) for node in graph.graph.nodes if node.op == "get_attr"}
    read = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    total = sum(value.nbytes for value in read.values())
    if total > LARGEST:
        name, largest = max(read.items(), key=lambda item: item[1].nbytes)
        raise InputError(
            f"the graph holds {total / 1e9:.2f} GB of weights (most of all {name}: {largest.nbytes / 1e9:.2f}), "
            f"an ONNX file at most {LARGEST / 1e9:.2f} (protobuf's limit); "
            "quantise or prune it first, or leave a part out with core="
        )


def _is_valid(onnx: ModuleType, model: Message) -> bool:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return False
    return True


def _exported(graph: fx.GraphModule, optimize: bool) -> Message:
    """The ONNX model, by torch's exporter, with our two operators as ONNX's."""
    operators = getattr(needs("onnxscript"), f"opset{OPSET}")

    def quantized(
        x: Message, scale: Message, zero_point: Message, axis: int | None, qmin: int, qmax: int, dtype: int
    ) -> Message:
        return operators.QuantizeLinear(x, scale, zero_point, **({} if axis is None else {"axis": axis}))

    def dequantized(q: Message, scale: Message, zero_point: Message, axis: int | None) -> Message:
        return operators.DequantizeLinear(q, scale, zero_point, **({} if axis is None else {"axis": axis}))

    examples = example_inputs(graph)
    loggers = ("torch.onnx", "onnxscript", "torch.export", "torch.fx.experimental.symbolic_shapes")
    with (
        quiet(*loggers),
        warnings.catch_warnings(),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            examples,
            dynamo=True,
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in examples),
            input_names=input_names(graph),
            output_names=output_names(graph),
            opset_version=OPSET,
            optimize=optimize,
            verbose=False,
            custom_translation_table={
                torch.ops.rarefy.quantize.default: quantized,
                torch.ops.rarefy.dequantize.default: dequantized,
            },
        )
    assert program is not None
    return program.model_proto


def _tidy(onnx: ModuleType, model: Message) -> None:
    """Global pooling by its name; no metadata of others; the batch axis named."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: node.attribute[0].t
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in [*graph.value_info, *graph.input]}
    for node in graph.node:
        if node.op_type == "ReduceMean" and len(node.input) == 2 and node.input[1] in constants:
            axes = sorted(int(axis) for axis in onnx.numpy_helper.to_array(constants[node.input[1]]).reshape(-1))
            keeps = all(attribute.i for attribute in node.attribute if attribute.name == "keepdims")
            if keeps and (axes == [-2, -1] or (axes == [2, 3] and ranks.get(node.input[0], 4) == 4)):
                node.op_type = "GlobalAveragePool"
                del node.input[1:], node.attribute[:]
    _melt_padding(onnx, graph, constants)
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for node in [node for node in graph.node if node.op_type == "Constant" and node.output[0] not in read]:
        graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
    del graph.value_info[:]
    for item in [model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer]:
        del item.metadata_props[:]
        item.doc_string = ""
    for info in graph.input:
        info.type.tensor_type.shape.dim[0].dim_param = "batch"
    for info in graph.output:
        dims = info.type.tensor_type.shape.dim
        if len(dims) and dims[0].dim_param:
            dims[0].dim_param = "batch"
    model.producer_name, model.producer_version = "rarefy", ""


def _drop_zero_points(onnx: ModuleType, graph: Message) -> None:
    """Of stored codes: those of weights and biases."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        codes, _, *zero_points = node.input if node.op_type == "DequantizeLinear" else ("", "")
        if codes not in stored or not zero_points or zero_points[0] not in stored:
            continue
        if not onnx.numpy_helper.to_array(stored[zero_points[0]]).any():
            del node.input[2]


def _melt_padding(onnx: ModuleType, graph: Message, constants: dict[str, Message]) -> None:
    """Zeros around the plane that only convolutions read become the convolutions' own padding."""
    for pad in [node for node in graph.node if node.op_type == "Pad" and node.input[1] in constants]:
        mode = next((attribute.s.decode() for attribute in pad.attribute if attribute.name == "mode"), "constant")
        sizes = [int(size) for size in onnx.numpy_helper.to_array(constants[pad.input[1]]).reshape(-1)]
        value = pad.input[2] if len(pad.input) > 2 else ""
        zero = not value or (value in constants and not onnx.numpy_helper.to_array(constants[value]).any())
        readers = [node for node in graph.node if pad.output[0] in node.input]
        plain = all(node.op_type == "Conv" and node.input[0] == pad.output[0] for node in readers)
        around_plane = len(sizes) == 8 and not any(sizes[:2] + sizes[4:6]) and min(sizes) >= 0
        if mode != "constant" or not (zero and plain and around_plane):
            continue
        around = sizes[2:4] + sizes[6:8]
        for node in readers:
            present = {attribute.name: attribute for attribute in node.attribute}
            own = list(present["pads"].ints) if "pads" in present else [0] * 4
            for name in ("pads", "auto_pad"):
                if name in present:
                    node.attribute.remove(present[name])
            node.attribute.append(
                onnx.helper.make_attribute("pads", [one + two for one, two in zip(own, around, strict=True)])
            )
            node.input[0] = pad.input[0]
        graph.node.remove(pad)
