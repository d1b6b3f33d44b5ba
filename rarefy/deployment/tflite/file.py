"""The .tflite file: the graph by a table, its codes on its own scales; and that file with codes as further outputs."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from rarefy.deployment import description
from rarefy.deployment.runtime import CARRIERS
from rarefy.deployment.tflite import arithmetic, layers, shapes
from rarefy.deployment.tflite.writer import SIGNED, Foreign, Ref, Untranslated, Writer
from rarefy.errors import FormatError, InputError, first_line
from rarefy.graph.fold import fold_constants
from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import argument, arguments, attribute, is_tensor
from rarefy.graph.signature import input_names, returned
from rarefy.kernels import qparams
from rarefy.system.dependencies import needs

aten = torch.ops.aten
OPERATORS = torch.ops.rarefy
EXTRA = "litert"
IDENTIFIER = b"TFL3"
VERSION = 3
CODES = "codes."  # how tensors of codes are called, before the value's name


def _operators(names: str) -> list[object]:
    found = []
    for name in names.split():
        head, _, tail = name.partition(".")
        found.append(getattr(getattr(aten, head), tail or "default"))
    return found


ROWS = {
    one: row
    for family in (arithmetic, layers, shapes)
    for names, row in family.ROWS.items()
    for one in _operators(names)
}
# that compute codes of codes on several grids
JOINS = frozenset(
    {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.cat.default, aten.adaptive_avg_pool2d.default}
)
LAYERS = frozenset({aten.conv2d.default, aten.conv2d.padding, aten.linear.default})
MOVES = frozenset(
    (CARRIERS & ROWS.keys()) | {aten.pad.default, aten.upsample_nearest2d.vec, aten.channel_shuffle.default,
                                aten.avg_pool2d.default, aten.unflatten.int}
)  # fmt: skip


def schema() -> Any:
    """The tables of the file format, which come with the runtime."""
    needs("flatbuffers", EXTRA)
    return needs("ai_edge_litert.schema_py_generated", EXTRA)


def write(graph: fx.GraphModule, path: str | os.PathLike[str], batch: int = 1) -> Path:
    """Write ``graph`` (in eval mode, layers as numbers) for that batch size; raises InputError for what has no row."""
    told = description.text_of(graph)
    graph = fold_constants(graph)
    try:
        writer, inputs, outputs = _written(graph, batch)
    except Untranslated as error:
        raise InputError(
            f"the graph can't be written for LiteRT: {error}; "
            "leave that layer out with core=, or choose another runtime"
        ) from error
    Path(path).write_bytes(_packed(_model(writer, inputs, outputs, told)))
    return Path(path)


def _written(graph: fx.GraphModule, batch: int) -> tuple[Writer, list[Ref], list[Ref]]:
    writer = Writer(schema(), graph, batch)
    inputs: list[Ref] = []
    for node, name in zip(graph.graph.find_nodes(op="placeholder"), input_names(graph), strict=True):
        dtype = str(writer.known[node].dtype).removeprefix("torch.")
        if dtype not in ("float32", "int32", "int64", "uint8"):
            raise Untranslated(f"{name}: an input of {dtype}")
        writer.refs[node] = writer.tensor(writer.shape(node), dtype, name=name)
        inputs.append(writer.refs[node])
    for node in graph.graph.nodes:
        writer.name = str(node.meta.get("stack") or node.name)
        if node.op == "call_function" and not is_decoded(node) and not _absorbed(graph, node):
            _write(writer, node)
    outputs = []
    for name, node in returned(graph):
        if is_tensor(writer.known[node]):
            ref = writer.plain(writer.value(node))
            if ref in inputs or ref in outputs or ref.place in writer.data:
                raise Untranslated(f"{name}: an output that nothing computes, or that is given twice")
            writer.tensors[ref.place].name = name
            outputs.append(ref)
    return writer, inputs, outputs


def _absorbed(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Is it computed in integers, with the rounding that alone reads it?"""
    if (
        node.op != "call_function"
        or len(node.users) != 1
        or next(iter(node.users)).target is not OPERATORS.quantize.default
    ):
        return False
    rounding = next(iter(node.users))
    if attribute(graph, qparams(rounding).scale).dim() or argument(rounding, "dtype") not in (torch.int8, torch.uint8):
        return False
    g = arguments(node)
    if node.target in LAYERS:
        weight, bias, x = g["weight"], g["bias"], g["input"]
        if not (is_decoded(weight) and is_decoded(x) and (bias is None or is_decoded(bias))):
            return False
        scale, zero = (attribute(graph, argument(weight, name)) for name in ("scale", "zero_point"))
        stored = attribute(graph, argument(weight, "q")) if argument(weight, "q").op == "get_attr" else None
        return stored is not None and stored.dtype == torch.int8 and scale.dim() <= 1 and not zero.any()
    reads = [one for one in node.all_input_nodes if is_tensor_node(one)]
    if not reads or not all(is_decoded(one) and not attribute(graph, argument(one, "scale")).dim() for one in reads):
        return False
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(g["output_size"]) in ([1, 1], [1])
    if node.target is aten.avg_pool2d.default:
        (read,) = reads
        scale = qparams(rounding).scale
        return bool(attribute(graph, scale) == attribute(graph, argument(read, "scale")))
    return node.target in JOINS or node.target in MOVES


def is_tensor_node(node: fx.Node) -> bool:
    """Not a size."""
    return is_decoded(node) or node.target is not aten.sym_size.int


def _write(writer: Writer, node: fx.Node) -> None:
    known = writer.known[node]
    if isinstance(known, (int, float, bool)):
        return  # a number: its readers ask for it
    if node.target is OPERATORS.quantize.default:
        writer.refs[node] = _codes(writer, node)
        return
    if node.target is operator.getitem and node.args[0] in writer.lists:
        writer.refs[node] = writer.lists[node.args[0]][node.args[1]]  # type: ignore[index]
        return
    result = _by_row(writer, node)
    if isinstance(result, list):
        writer.lists[node] = result
    else:
        writer.refs[node] = result


def _by_row(writer: Writer, node: fx.Node) -> Ref | list[Ref]:
    row = ROWS.get(node.target)
    if row is None:
        raise Untranslated(f"{writer.name}: {node.target} has no row in the table of LiteRT's operators")
    try:
        found: Ref | list[Ref] = row(writer, node, arguments(node))
        return found
    except KeyError as error:
        raise Untranslated(f"{writer.name}: {node.target} in a form that has no row ({error})") from error


def _codes(writer: Writer, node: fx.Node) -> Ref:
    """Of what a node rounds: in integers where that can be, else of numbers."""
    source, grid = argument(node, "x"), writer.grid(node)
    if _absorbed(writer.graph, source):
        writer.wanted = grid
        try:
            found = _by_row(writer, source)
        finally:
            writer.wanted = None
        assert isinstance(found, Ref)
    else:
        found = writer.value(source)
    ref = writer.rounded(found, grid)
    if ref is found and (ref.place in {one.place for one in writer.refs.values()}):
        return ref
    limits = (-128, 127)
    down = SIGNED if argument(node, "dtype") == torch.uint8 else 0
    low, high = argument(node, "qmin") - down, argument(node, "qmax") - down
    for kind, bound, limit in (("MAXIMUM", low, limits[0]), ("MINIMUM", high, limits[1])):
        if bound != limit:
            stop = writer.constant(np.array(bound, np.int8), "", grid)
            ref = writer.move(kind, ref, [stop], ref.shape, ref.last, table="MaximumMinimumOptions")
    one = writer.tensors[ref.place]
    if not str(one.name).startswith(CODES):
        one.name = f"{CODES}{qparams(node).value}" + (".last" if ref.last else "")
    return ref


def _model(writer: Writer, inputs: Sequence[Ref], outputs: Sequence[Ref], told: str) -> Foreign:
    tables = writer.schema
    part = tables.SubGraphT()
    part.tensors, part.operators, part.name = writer.tensors, writer.operators, "main"
    part.inputs, part.outputs = [ref.place for ref in inputs], [ref.place for ref in outputs]
    model = tables.ModelT()
    model.version, model.description, model.subgraphs = VERSION, "rarefy", [part]
    model.operatorCodes = []
    for code in writer.codes:
        one = tables.OperatorCodeT()
        one.builtinCode, one.deprecatedBuiltinCode, one.version = code, min(code, 127), 1
        model.operatorCodes.append(one)
    model.buffers = []
    for content in [*writer.buffers, told.encode()]:
        buffer = tables.BufferT()
        buffer.data = np.frombuffer(content, np.uint8) if content else None
        model.buffers.append(buffer)
    about = tables.MetadataT()
    about.name, about.buffer = description.KEY, len(model.buffers) - 1
    model.metadata = [about]
    return model


def _packed(model: Foreign) -> bytes:
    builder = needs("flatbuffers", EXTRA).Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def opened(path: str | os.PathLike[str]) -> Foreign:
    """The tables of a file. Raises FormatError."""
    content = Path(path).read_bytes()
    if content[4:8] != IDENTIFIER:
        raise FormatError(f"{path}: LiteRT can't open it (no TensorFlow Lite file)")
    try:
        return schema().ModelT.InitFromPackedBuf(content, 0)
    except Exception as error:
        raise FormatError(f"{path}: LiteRT can't open it ({first_line(error)})") from error


def tapped(path: str | os.PathLike[str], names: Sequence[str], into: Path) -> dict[str, bool]:
    """Write the file with the codes of the named values as further outputs, in that order.

    Returns which of them it has, and whether each is kept channels last.
    """
    model = opened(path)
    part = model.subgraphs[0]
    places: dict[str, int] = {}
    for index, one in enumerate(part.tensors):
        places.setdefault(_text(one.name), index)  # the first: what only carries the codes has the same name
    found = {}
    part.outputs = [int(place) for place in part.outputs]
    for name in names:  # what carries the codes on, in another order of axes, comes behind
        kept = [(places[full], ending) for ending in ("", ".last") if (full := f"{CODES}{name}{ending}") in places]
        if kept:
            place, ending = min(kept)
            found[name] = bool(ending)
            part.outputs.append(place)
    model.signatureDefs = None
    into.write_bytes(_packed(model))
    return found


def _text(name: bytes | str | None) -> str:
    return name.decode() if isinstance(name, bytes) else name or ""


def as_ours(codes: Tensor, last: bool, dtype: torch.dtype) -> Tensor:
    """Codes of the file in the order and type of the graph's."""
    codes = codes.permute(0, 3, 1, 2) if last else codes
    return (codes.to(torch.int16) + SIGNED).to(dtype) if dtype == torch.uint8 else codes.to(dtype)
