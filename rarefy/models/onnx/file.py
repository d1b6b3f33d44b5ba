"""``onnx:model.onnx``: an ONNX file as a model.

The file is data: it is parsed by the ``onnx`` package, its tensors are compared with the sizes that they state before
they are read, weights in files beside it are read from its own folder only, and what has no row in the table of
operators is refused by name.
"""

from __future__ import annotations

import keyword
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from rarefy.errors import FormatError, InputError, RarefyError, first_line
from rarefy.graph.nodes import Value
from rarefy.models.onnx import arithmetic, indexing, layers, pooling, reductions, shapes
from rarefy.models.onnx.arithmetic import TYPES
from rarefy.models.onnx.batch import settle
from rarefy.models.onnx.budget import Budget
from rarefy.models.onnx.network import Network, assemble, fold, join_bias, needed, path_of
from rarefy.models.onnx.step import Row, Step
from rarefy.models.source import FORMS, Request, Source
from rarefy.system.dependencies import needs
from rarefy.system.failures import refusal
from rarefy.system.files import content, opened
from rarefy.system.memory import afford
from rarefy.system.text import printable

FAMILIES = (arithmetic, layers, pooling, reductions, shapes, indexing)
ROWS: dict[str, Row] = {kind: row for family in FAMILIES for kind, row in family.ROWS.items()}

# What there can be no row for, and the way out.
_CUT = (
    "cut the file before that node: onnx.utils.extract_model('model.onnx', 'cut.onnx', [inputs], [outputs before it])"
)
_FLOAT = "rarefy starts from float models: give the file from before it was quantised"
REFUSED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("If", "Loop", "Scan"), ("chooses by values what is computed", _CUT)),
    **dict.fromkeys(
        ("NonMaxSuppression", "NonZero", "Unique", "Compress", "RoiAlign", "MaxRoiPool"),
        ("yields as much as the values say", _CUT),
    ),
    **dict.fromkeys(
        ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
         "MatMulInteger"),
        ("is of a model in few bits", _FLOAT),
    ),
    **dict.fromkeys(
        ("StringNormalizer", "TfIdfVectorizer", "StringConcat", "StringSplit", "RegexFullMatch", "LabelEncoder"),
        ("works on texts", _CUT),
    ),
    **dict.fromkeys(
        ("SequenceConstruct", "SequenceAt", "SequenceEmpty", "SequenceInsert", "SplitToSequence", "ConcatFromSequence",
         "SequenceLength", "SequenceErase", "SequenceMap", "Optional", "OptionalGetElement", "OptionalHasElement"),
        ("works on lists of tensors", _CUT),
    ),
    **dict.fromkeys(
        ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"),
        ("is drawn at random", _CUT),
    ),
}  # fmt: skip
OLDEST, NEWEST = 7, 25  # opsets whose rules the rows keep
LENGTH = 16  # of a sequence that may have any, in an example
MOST_NODES = 20_000  # as in graph.json: what is read is saved
LARGEST = 2**31 - 1  # bytes of one protobuf message
DOMAINS = ("", "ai.onnx")


def onnx(request: Request) -> Source | None:
    """``onnx:model.onnx`` or ``model.onnx``; input names and sizes are the file's."""
    path = request.rest if request.prefix == "onnx" else request.text
    if request.prefix != "onnx" and not path.endswith(".onnx"):
        return None
    network, inputs = read(path)
    if request.classes is not None:
        raise InputError(f"{request.text}: an ONNX file has the outputs that it has; leave out --classes")
    names = {"inputs": _identifiers(network.input_names), "outputs": _identifiers(network.output_names)}
    if len(inputs) == 1 and inputs[0][1].is_floating_point:
        free = any(size is None for size in inputs[0][0])
        return Source(request.text, network, None if free else tuple(size or 0 for size in inputs[0][0]), names=names)
    named = [(tuple(size or LENGTH for size in sizes), dtype) for sizes, dtype in inputs]
    return Source(request.text, network, named[0][0], inputs=named, names=names)


def _identifiers(names: Sequence[str]) -> list[str]:
    """``input.1`` -> ``input_1``: what a keyword argument and a saved graph may be called, each another."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        plain = f"_{plain}" if not plain or plain[0].isdigit() or keyword.iskeyword(plain) else plain
        while plain in found:
            plain += "_"
        found.append(plain)
    return found


def read(path: str | os.PathLike[str]) -> tuple[Network, list[tuple[list[int | None], torch.dtype]]]:
    """The file's network, and of each input the sizes without batch (None: free) and the type."""
    library, file = needs("onnx"), Path(path)
    try:
        return _read(library, file)
    except RarefyError as error:  # with names of the file's choice
        raise type(error)(printable(error, keep="")) from error
    except Exception as error:  # an operator with too few inputs, sizes that contradict: a file may say anything
        refused = refusal(error)
        told = str(refused) if refused else f"is damaged, or of a form that is not read ({first_line(error)})"
        raise FormatError(f"{file}: {told}; export it again") from error


def _read(library: ModuleType, file: Path) -> tuple[Network, list[tuple[list[int | None], torch.dtype]]]:
    if not os.path.exists(file):
        raise InputError(f"{file}: no such file; give {FORMS}")
    model = _parsed(library, file)
    graph = model.graph
    opsets = {one.domain: one.version for one in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    if not OLDEST <= opset <= NEWEST:
        raise FormatError(
            f"{file}: is of opset {opset}, read are {OLDEST} to {NEWEST}; "
            "convert it: onnx.version_converter.convert_version(model, 17)"
        )
    if model.functions:
        model = library.inliner.inline_local_functions(model)
        graph = model.graph
    constants = {one.name: _array(library, one, file) for one in graph.initializer}
    if len(graph.node) > MOST_NODES:
        raise FormatError(f"{file}: has {len(graph.node)} operators, read are at most {MOST_NODES}; export it again")
    if graph.sparse_initializer:
        raise FormatError(f"{file}: holds sparse weights; store them dense")
    infos = [info for info in graph.input if info.name not in constants]
    specs = [_spec(info, file) for info in infos]
    network = Network([info.name for info in infos], [info.name for info in graph.output])
    try:
        steps, folded = _steps(library, graph, opset, network.input_names, constants, file)
        made = {*folded, *network.input_names, *(name for step in steps for name in step.writes)}
        for name in network.output_names:
            if name not in made:
                raise FormatError(
                    f"{file}: nothing makes {name!r}, which is read; the file is damaged: export it again"
                )
        steps = needed(join_bias(steps, folded, network.output_names), network.output_names)
        network.constants = {name: folded[name] for name in network.output_names if name in folded}
        assemble(network, steps, folded)
        network.eval()
        settle(network, specs)
    except InputError as error:
        raise type(error)(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from error
    return network, [(sizes[1:], TYPES[kind]) for sizes, kind in specs]


def _parsed(library: ModuleType, file: Path) -> Value:
    size = os.stat(file).st_size
    if size > LARGEST:
        raise FormatError(f"{file}: has {size / 1e9:.1f} GB, an ONNX file at most 2.1; store its weights beside it")
    afford(2 * size, str(file), "store its weights beside it")
    data = content(file, LARGEST)
    try:
        model = library.load_model_from_string(data)
    except Exception as error:
        raise FormatError(f"{file}: is no ONNX file ({first_line(error)}); export or copy it again") from error
    if not model.opset_import or not model.graph.node or not model.graph.output:
        raise FormatError(f"{file}: is no ONNX file with a graph in it; export or copy it again")
    return model


def _spec(info: Value, file: Path) -> tuple[list[int | None], int]:
    """Sizes of an input (None: free), and its ONNX type."""
    kind = info.type.tensor_type
    if not info.type.HasField("tensor_type") or kind.elem_type not in TYPES:
        raise FormatError(f"{file}: input {info.name!r} is no tensor of numbers; {_CUT}")
    sizes = [one.dim_value if one.HasField("dim_value") and one.dim_value > 0 else None for one in kind.shape.dim]
    if not sizes:
        raise FormatError(
            f"{file}: input {info.name!r} is a single number, without a batch axis; "
            "store its value as an initializer of that name, or cut the file behind it (onnx.utils.extract_model)"
        )
    return sizes, kind.elem_type


_CUT = "cut the file behind it (onnx.utils.extract_model)"


def _steps(
    library: ModuleType, graph: Value, opset: int, inputs: list[str], constants: dict[str, np.ndarray], file: Path
) -> tuple[list[Step], dict[str, np.ndarray]]:
    """The nodes that read inputs, and the constants with those that the others make."""
    steps: list[Step] = []
    constants, budget = dict(constants), Budget()
    for weight in constants.values():
        budget.grant(weight)
    made = {*constants, *inputs}
    for index, node in enumerate(graph.node):
        kind, label = node.op_type, f"{node.name or node.output[0]} ({node.op_type})"
        attributes = {one.name: _attribute(library, one, label, file) for one in node.attribute}
        if kind == "Constant" and node.domain in DOMAINS:
            constants[node.output[0]] = _constant(attributes, label)
            budget.grant(constants[node.output[0]])
            made.add(node.output[0])
            continue
        row = ROWS.get(kind) if node.domain in DOMAINS else None
        if row is None:
            known = REFUSED.get(kind, ("has no row in the table of operators", _BEFORE))
            where = f"{node.domain}.{kind}" if node.domain not in DOMAINS else kind
            raise InputError(f"{node.name or node.output[0]}: operator {where} {known[0]}; {known[1]}")
        for name in node.input:
            if name and name not in made:
                raise FormatError(f"{label}: nothing before it makes {name!r}; the file is damaged: export it again")
        made.update(node.output)
        step = Step(kind, label, attributes, opset, row)
        scopes = {one.key: one.value for one in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
        step.path = path_of(node.name, kind, index, scopes)
        step.reads, step.writes = [name or None for name in node.input], list(node.output)
        if all(name is None or name in constants for name in step.reads):
            constants.update(fold(step, [None if name is None else constants[name] for name in step.reads], budget))
        else:
            steps.append(step)
    return steps, constants


_BEFORE = "cut the file before that node (onnx.utils.extract_model), or start from the PyTorch model"


def _constant(attributes: dict[str, Value], label: str) -> np.ndarray:
    for name in ("value", "value_int", "value_ints", "value_float", "value_floats"):
        if name in attributes:
            value = attributes[name]
            kind = np.float32 if "float" in name else np.int64
            return value if isinstance(value, np.ndarray) else np.array(value, kind)
    raise InputError(f"{label}: holds texts or a sparse tensor; {_BEFORE}")


def _attribute(library: ModuleType, one: Value, label: str, file: Path) -> Value:
    kinds = library.AttributeProto
    if one.type == kinds.TENSOR:
        return _array(library, one.t, file)
    if one.type in (kinds.GRAPH, kinds.GRAPHS):
        return None  # its operator is refused by name
    if one.type not in (kinds.FLOAT, kinds.INT, kinds.STRING, kinds.FLOATS, kinds.INTS, kinds.STRINGS):
        raise InputError(f"{label}: {one.name} is of a kind that is not read; {_BEFORE}")
    value = library.helper.get_attribute_value(one)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if one.type == kinds.STRINGS:
        return [text.decode("utf-8", "replace") for text in value]
    return list(value) if one.type in (kinds.FLOATS, kinds.INTS) else value


def _array(library: ModuleType, tensor: Value, file: Path) -> np.ndarray:
    """A tensor of the file, checked before it is read; half precision becomes single."""
    name, sizes = tensor.name or "a constant", list(tensor.dims)
    if tensor.data_type not in TYPES:
        raise FormatError(
            f"{file}: {name} is of ONNX's type {tensor.data_type}; rarefy reads plain numbers: export it as float32"
        )
    kind = library.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if any(size < 0 for size in sizes):
        raise FormatError(f"{file}: {name} has sizes {sizes}; export or copy the file again")
    wanted = math.prod(sizes) * kind.itemsize
    if tensor.data_location == library.TensorProto.EXTERNAL:
        raw = _beside(tensor, file, name, wanted)
        value = np.frombuffer(raw, kind.newbyteorder("<") if kind.kind != "V" else kind).reshape(sizes)
    else:
        if tensor.HasField("raw_data") and len(tensor.raw_data) != wanted:
            raise FormatError(
                f"{file}: {name} has {len(tensor.raw_data)} bytes where its sizes {sizes} need {wanted}; "
                "export or copy it again"
            )
        try:
            value = library.numpy_helper.to_array(tensor)
        except Exception as error:
            raise FormatError(f"{file}: {name} can't be read ({first_line(error)}); export or copy it again") from error
    half = tensor.data_type in (library.TensorProto.FLOAT16, library.TensorProto.BFLOAT16)
    return np.array(value, np.float32) if half else np.array(value)


def _beside(tensor: Value, file: Path, name: str, wanted: int) -> bytes:
    """The bytes of a tensor in a file beside: in the same folder or below, and as many as its sizes say."""
    told = {one.key: one.value for one in tensor.external_data}
    folder = file.resolve().parent
    place = (folder / told.get("location", "")).resolve()
    if folder not in place.parents or not os.path.exists(place):
        raise FormatError(
            f"{file}: the weights of {name} lie in {told.get('location')!r}, no file in its folder; put it there"
        )
    try:
        offset, length = int(told.get("offset", 0)), int(told.get("length", wanted))
    except ValueError as error:
        raise FormatError(f"{file}: {name} has a place that is no number; export it again") from error
    if length != wanted or offset < 0 or offset + length > place.stat().st_size:
        raise FormatError(f"{file}: {place.name} does not hold the {wanted} bytes of {name}; copy both files again")
    with opened(place) as beside:
        beside.seek(offset)
        return beside.read(length)
