"""graph.json: the graph as text, and back.

    nodes      one object a node, in order: op, name, target, args, kwargs, and the module that made it (stack)
    tensors    one object a parameter or buffer: dtype, shape, does it train, how is it stored, which is it the same as
    meta       the graph's own (inputs, core, history, bits, sparse, shared)

An argument that JSON has a form for is written as it is; any other is an object of one key that names its type:
``{"node": "conv2d"}``, ``{"dtype": "float32"}``, ``{"tuple": [...]}``. docs/format.md lists them.

``read`` and ``build`` believe nothing: the module is made by torch.fx, which writes a Python function from the names of
the nodes, so a name is an identifier that function does not use, a tensor's name can't hide one of the module's
attributes, a node reads only nodes before it, and every call passes ``rarefy.artifact.allowlist``.
"""

from __future__ import annotations

import json
import keyword
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from rarefy.artifact import allowlist, words
from rarefy.artifact.coding import joined, packing, text
from rarefy.artifact.operators import schema as kinds
from rarefy.artifact.operators import trial
from rarefy.artifact.words import MOST_NODES, check_names, is_identifier, is_range, store_of
from rarefy.errors import FormatError
from rarefy.graph.nodes import Value, dtype_name, set_attribute
from rarefy.graph.signature import attach
from rarefy.system.strict_json import (
    Json,
    expect,
    expected,
    is_size,
    located,
    parse,
    plain,
    restore,
    said,
    special_float,
)

SCHEMA = 2  # the highest that is read
SCHEMAS = {"smallest": 2}  # by how it is stored; else 1
Entry = dict[str, Json]  # what graph.json says of a node or a tensor
# dtype -> its name in a safetensors header
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
BY_NAME = {dtype_name(dtype): dtype for dtype in [*DTYPES, torch.complex128]}
_MEMORY_FORMATS = {
    str(value).removeprefix("torch."): value
    for value in (torch.contiguous_format, torch.preserve_format, torch.channels_last)
}

LISTS = ("sparse", "shared")  # of names of tensors, in meta

# Limits of a file; the largest model of torchvision and timm has 6,000 nodes and 2,000 tensors in 1,500 modules.
MOST_TENSORS = 20_000
MOST_AXES = 16
LONGEST_TEXT = 10_000
LONGEST_NAME = 500

_PART = re.compile(r"(?!__)[A-Za-z0-9_-]{1,200}")  # RegNet's stages are named block1-0
_MODULE_ATTRIBUTES = {*dir(nn.Module), *vars(nn.Module())}
_GRAPH_ATTRIBUTES = {*dir(fx.GraphModule), *vars(fx.GraphModule(nn.Module(), fx.Graph()))}
_KEYS = {"format", "schema", "meta", "nodes", "tensors"}
_NODE_KEYS = {"op", "name", "target", "args", "kwargs", "stack"}
# names the generated forward() reads
_TAKEN = {"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "math", "operator", "rarefy"}


def write(graph: fx.GraphModule, tensors: Mapping[str, Entry], store: str = "readable") -> bytes:
    """graph.json, one line a node and a tensor; ``tensors`` are its entries. Compressed, where ``store`` is smallest.

    Raises FormatError for what has no form in it.
    """
    meta = {**graph.meta, "store": store} if store != "readable" else {**graph.meta}
    if store == "readable":
        meta.pop("store", None)
    if "bits" in meta:
        meta["bits"] = {name: width for name, width in meta["bits"].items() if name in tensors}
    for key in meta.keys() & {*LISTS}:
        meta[key] = [name for name in meta[key] if name in tensors]
    lines = [
        "{",
        '"format":"rarefy",',
        f'"schema":{SCHEMAS.get(store, 1)},',
        f'"meta":{_line(plain(meta, "graph.meta"))},',
        '"nodes":[',
        ",\n".join(_line(_node_entry(node)) for node in graph.graph.nodes),
        "],",
        '"tensors":{',
        ",\n".join(f"{_line(name)}:{_line(tensors[name])}" for name in sorted(tensors)),
        "}",
        "}",
    ]
    whole = ("\n".join(lines) + "\n").encode()
    return text.folded(whole) if store == "smallest" else whole


def tensor_entry(graph: nn.Module, name: str, value: Tensor) -> Entry:
    entry: Entry = {"dtype": dtype_name(value.dtype), "shape": list(value.shape)}
    if isinstance(value, nn.Parameter):
        entry.update(kind="parameter", requires_grad=value.requires_grad)
    else:
        owner, _, leaf = name.rpartition(".")
        entry.update(kind="buffer", persistent=leaf not in graph.get_submodule(owner)._non_persistent_buffers_set)
    if value.dim() == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last):
        entry["channels_last"] = True
    return entry


def _node_entry(node: fx.Node) -> Entry:
    entry: Entry = {"op": node.op, "name": node.name}
    if node.op == "call_function":
        entry["target"] = located(f"{node.meta.get('stack') or node.name}", allowlist.name_of, node.target)
    elif node.op != "output":
        entry["target"] = node.target
    if node.args:
        entry["args"] = [_encode(value, node.name) for value in node.args]
    if node.kwargs:
        entry["kwargs"] = {key: _encode(value, node.name) for key, value in node.kwargs.items()}
    if node.meta.get("stack"):
        entry["stack"] = node.meta["stack"]
    return entry


def _encode(value: Value, where: str) -> Json:
    """An argument as JSON. What JSON has no form for is an object of one key that names its type."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list):
        return [_encode(item, where) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, where) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(key, where), _encode(item, where)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encode(item, where) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if value is torch.strided:
        return {"layout": "strided"}
    raise FormatError(f"node {where}: an argument of type {type(value).__name__} has no form in the file")


def _line(value: Json) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def read(data: bytes, where: str) -> dict[str, Json]:
    """graph.json, checked as far as it can be without building anything: keys, tensors, meta."""
    value = parse(text.unfolded(data, where), where)
    check_schema(value, where)
    expect(value.keys() == _KEYS, where, f"has the keys {said(sorted(value))}")
    tensors, store = value["tensors"], store_of(value["meta"], where)
    wanted = SCHEMAS.get(store, 1)
    expect(value["schema"] == wanted, where, f"has the schema {value['schema']}, and is stored as that of {wanted}")
    good = isinstance(tensors, dict) and len(tensors) <= MOST_TENSORS
    expect(good, where, f"tensors is no object of at most {MOST_TENSORS}")
    for name, entry in tensors.items():
        _check_tensor_entry(name, entry, tensors, store, where)
    split = [name.split(".") for name in tensors]
    inner = {".".join(parts[:count]) for parts in split for count in range(1, len(parts))}
    expect(len(inner) <= MOST_TENSORS, where, f"has its tensors in {len(inner)} modules (at most {MOST_TENSORS})")
    for name in tensors.keys() & inner:
        raise FormatError(f"{where}: {said(name)} is a tensor and a module at once")
    value["meta"] = restore(value["meta"], where)
    _check_meta(value["meta"], tensors, where)
    good = isinstance(value["nodes"], list) and len(value["nodes"]) <= MOST_NODES
    expect(good, where, f"nodes is no list of at most {MOST_NODES}")
    return value


def _check_tensor_entry(name: str, entry: Json, tensors: Mapping[str, Json], store: str, where: str) -> None:
    at = f"{where}: tensor {said(name)}"
    parts = name.split(".")
    good = len(name) <= LONGEST_NAME and all(_PART.fullmatch(part) and not keyword.iskeyword(part) for part in parts)
    expect(good, at, "is not a dotted name")
    taken = parts[0] in _GRAPH_ATTRIBUTES or any(part in _MODULE_ATTRIBUTES for part in parts)
    expect(not taken, at, "has the name of an attribute that modules have")
    expect(isinstance(entry, dict), at, "is not described by an object")
    kind = entry.get("kind")
    expect(kind in ("parameter", "buffer"), at, f"is neither parameter nor buffer but {said(kind)}")
    if "same_as" in entry:
        other = entry["same_as"]
        alone = entry.keys() == {"kind", "same_as"}
        expect(alone, at, f"is another one and has keys of its own: {said(sorted(entry))}")
        original = tensors.get(other) if isinstance(other, str) else None
        expect(isinstance(original, dict), at, f"is the same as {said(other)}, which is not there")
        assert original is not None
        expect("same_as" not in original and original.get("kind") == kind, at, f"can't be the same as {said(other)}")
        return
    flag = "requires_grad" if kind == "parameter" else "persistent"
    required, optional = {"kind", "dtype", "shape", flag}, {"stored", "bits", "values", "channels_last"}
    expect(required <= entry.keys() <= required | optional, at, f"has the keys {said(sorted(entry))}")
    expect(type(entry[flag]) is bool, at, f"{flag} is {said(entry[flag])}")
    dtype = BY_NAME.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    expect(dtype in DTYPES, at, f"has the dtype {said(entry['dtype'])}")
    assert dtype is not None
    shape = entry["shape"]
    expect(is_shape(shape), at, f"has the shape {said(shape)}")
    expect(math.prod(size for size in shape if size) < 2**48, at, f"has the shape {said(shape)}, which no memory holds")
    floats = dtype.is_floating_point or dtype.is_complex
    expect(floats or entry.get("requires_grad") is not True, at, f"of {entry['dtype']} can't require gradients")
    last = "channels_last" not in entry or (entry["channels_last"] is True and len(shape) == 4)
    expect(last, at, "can't be channels_last")
    stored, bits = entry.get("stored"), entry.get("bits")
    if store == "smallest":
        joined.check_entry(entry, dtype, at)
        return
    expect("values" not in entry, at, f"is stored as {said(stored)} with values")
    if stored == "sparse":
        good = dtype.is_floating_point and "bits" not in entry
        expect(good, at, f"of {entry['dtype']} can't be stored as sparse weights")
    elif "stored" in entry or "bits" in entry:
        good = stored in ("packed", "zstd") and _is_width(bits) and dtype in (torch.int8, torch.uint8)
        expect(good, at, f"is stored as {said(stored)} of {said(bits)} bits")


def is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MOST_AXES and all(map(is_size, value))


def _is_width(value: object) -> bool:
    return type(value) is int and value in packing.WIDTHS


def _check_meta(meta: Json, tensors: Mapping[str, Entry], where: str) -> None:
    expect(isinstance(meta, dict) and isinstance(meta.get("inputs"), list), where, "meta.inputs is not a list")
    for entry in meta["inputs"]:
        good = isinstance(entry, dict) and isinstance(entry.get("shape"), list) and all(map(is_size, entry["shape"]))
        good = good and isinstance(entry.get("dtype"), str) and entry["dtype"] in BY_NAME
        expect(good, where, f"meta.inputs has the entry {said(entry)}")
        small = len(entry["shape"]) < MOST_AXES and math.prod(entry["shape"]) <= allowlist.MOST_ELEMENTS
        expect(small, where, f"an input of shape {said(entry['shape'])} is too large")
        expect(is_range(entry.get("range", [0, 0])), where, f"an input has the range {said(entry.get('range'))}")
    check_names(meta, where)
    words.check(meta, where)
    history = meta.get("history", [])
    good = isinstance(history, list) and all(isinstance(record, dict) for record in history)
    expect(good, where, "meta.history is not a list of records")
    for key in LISTS:
        listed = meta.get(key, [])
        expect(isinstance(listed, list), where, f"meta.{key} is not a list")
        for name in listed:
            good = isinstance(name, str) and name in tensors
            expect(good, where, f"meta.{key} has {said(name)}, which is no tensor of the file")
    bits = meta.get("bits", {})
    expect(isinstance(bits, dict), where, "meta.bits is not an object")
    for name, width in bits.items():
        expect(name in tensors and _is_width(width), where, f"meta.bits gives {said(name)} the width {said(width)}")


def build(description: Mapping[str, Json], tensors: Mapping[str, Tensor], where: str) -> fx.GraphModule:
    """The module. ``tensors`` holds one for each entry that is not ``same_as`` another."""
    entries = description["tensors"]
    root = nn.Module()
    values: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if "same_as" not in entry:
            value = tensors[name]
            values[name] = nn.Parameter(value, entry["requires_grad"]) if entry["kind"] == "parameter" else value
    for name, entry in entries.items():
        set_attribute(root, name, values[entry.get("same_as", name)])
    graph = _build_graph(description["nodes"], entries, len(description["meta"]["inputs"]), where)
    try:
        module = fx.GraphModule(root, graph)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise FormatError(f"{where}: no program can be made of the nodes ({type(error).__name__})") from error
    for name, entry in entries.items():
        original = entry if "same_as" not in entry else entries[entry["same_as"]]
        set_attribute(module, name, values[entry.get("same_as", name)])
        if original.get("persistent") is False:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._non_persistent_buffers_set.add(leaf)
    module.meta = dict(description["meta"])
    attach(module)
    trial.check(module.eval(), where)
    return module


def _build_graph(entries: list[Json], tensors: Mapping[str, Entry], wanted: int, where: str) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    yields: dict[fx.Node, str] = {}
    inputs: set[str] = set()
    for index, entry in enumerate(entries):
        at = f"{where}: node {index}"
        expect(isinstance(entry, dict) and {"op", "name"} <= entry.keys() <= _NODE_KEYS, at, "has other keys")
        name, op, target, stack = entry["name"], entry["op"], entry.get("target"), entry.get("stack", "")
        expect(is_identifier(name), at, f"can't be named {said(name)}")
        expect(name not in nodes and name not in _TAKEN, at, f"has the name {said(name)}, which is taken")
        at = f"{where}: node {name}"
        expect(isinstance(stack, str) and len(stack) <= LONGEST_NAME and stack.isprintable(), at, "stack is not a name")
        args = [_decode(value, nodes, at) for value in expected(entry.get("args", []), list, at, "args")]
        kwargs = {
            key: _decode(value, nodes, at)
            for key, value in expected(entry.get("kwargs", {}), dict, at, "kwargs").items()
        }
        expect(not kwargs or op == "call_function", at, "has keyword arguments, which only operators have")
        expect(not args or op in ("call_function", "output"), at, "has arguments, which only operators have")
        if op == "call_function":
            target = located(at, allowlist.function_named, expected(target, str, at, "target"))
            kind = located(at, allowlist.check_call, target, args, kwargs, yields)
        elif op == "get_attr":
            known = isinstance(target, str) and (target in tensors or target == "training")
            expect(known, at, f"reads {said(target)}, which is no tensor of the file")
            kind = kinds.NUMBER if target == "training" else kinds.TENSOR
        elif op == "placeholder":
            same = is_identifier(target) and re.fullmatch(re.escape(target) + r"(_\d+)?", name)
            expect(same and target not in _TAKEN, at, f"is an input of another name, {said(target)}")
            expect(target not in inputs, at, f"is a second input {said(target)}")
            inputs.add(target)
            kind = kinds.TENSOR
        else:
            expect(op == "output" and target is None, at, f"does {said(op)}, which is no operation of a graph")
            expect(len(args) == 1 and index == len(entries) - 1, at, "is not one output at the end")
            target, kind = "output", kinds.ANY
        node = graph.create_node(op, target, tuple(args), kwargs, name=name)
        expect(node.name == name, at, f"can't be named {said(name)}")
        nodes[name], yields[node], node.meta = node, kind, {"stack": stack}
    expect(bool(entries) and entries[-1]["op"] == "output", where, "has no output")
    expect(len(inputs) == wanted, where, f"has {len(inputs)} inputs, meta.inputs has {wanted}")
    return graph


def _decode(value: Json, nodes: Mapping[str, fx.Node], at: str) -> Value:
    if isinstance(value, list):
        return [_decode(item, nodes, at) for item in value]
    if isinstance(value, str):
        expect(len(value) <= LONGEST_TEXT, at, "has an argument of more than 10,000 letters")
        return value
    if not isinstance(value, dict):
        good = type(value) is not int or abs(value) < 2**63
        expect(good, at, f"has the argument {said(value)}, which is no 64-bit number")
        return value
    expect(len(value) == 1, at, f"has the argument {said(value)}")
    ((kind, inner),) = value.items()
    if kind == "node":
        expect(isinstance(inner, str) and inner in nodes, at, f"reads {said(inner)}, which no earlier node is")
        return nodes[inner]
    if kind == "float":
        return special_float(inner, at)
    if kind == "tuple":
        return tuple(_decode(item, nodes, at) for item in expected(inner, list, at, "tuple"))
    if kind == "slice":
        expect(len(expected(inner, list, at, "slice")) == 3, at, "has a slice without three parts")
        return slice(*(_decode(item, nodes, at) for item in inner))
    if kind == "dict":
        pairs = expected(inner, list, at, "dict")
        good = all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs)
        expect(good, at, "has a dict without text keys")
        return {key: _decode(item, nodes, at) for key, item in pairs}
    if kind == "device":
        expect(inner == "cpu", at, f"names the device {said(inner)}")
        return torch.device("cpu")
    if kind == "layout":
        expect(inner == "strided", at, f"names the layout {said(inner)}")
        return torch.strided
    table: Mapping[str, object] = BY_NAME if kind == "dtype" else _MEMORY_FORMATS if kind == "memory_format" else {}
    expect(isinstance(inner, str) and inner in table, at, f"has the argument {said(value)}")
    return table[inner]


def check_schema(value: Json, where: str | Path) -> None:
    expect(isinstance(value, dict) and value.get("format") == "rarefy", where, "is not rarefy's")
    schema = value.get("schema")
    expect(type(schema) is int and schema >= 1, where, f"has the schema {said(schema)}")
    expect(
        schema <= SCHEMA,
        where,
        f"has schema {schema}, of a newer rarefy (this one reads {SCHEMA}); pip install -U rarefy",
    )
