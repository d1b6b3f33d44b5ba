"""save() and load(): a compressed model is a folder that says all there is to know, and holds no code.

    graph.json            the graph: nodes, their arguments, what each tensor is
    weights.safetensors   the tensors; codes below 8 bits without gaps, entropy-coded where that is smaller
    manifest.json         recipe, seeds, hashes of data and teacher, measurements, environment; size and sha256 of every other file
    model.onnx, report.html, ...   what the caller adds
    model.sig             the signature (rarefy.signing)

docs/format.md is the specification. ``load`` gives what ``capture`` gave: a module that trains on, with outputs equal bit for
bit, in a process that has never seen the model's class.

Nothing in the folder is believed. Names can't escape, operators are those of ``rarefy.allowlist``, every size is compared with the
bytes that are there before memory is taken, and whatever is wrong raises FormatError in one line. ``save`` builds from what it is
about to write exactly as ``load`` would, so what was saved loads.

Writing is atomic: the folder is completed under another name beside the target, synced, and renamed. Same graph, same bytes:
graph.json and weights.safetensors hold no time, no path and no random order. ``content_hash`` is the hash of these two.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import keyword
import math
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from importlib import metadata
from io import BufferedReader
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn

from rarefy import allowlist, packing
from rarefy.capturing import dtype_name, set_attribute
from rarefy.errors import FormatError, InputError

SCHEMA = 1
GRAPH, WEIGHTS, MANIFEST, SIGNATURE = "graph.json", "weights.safetensors", "manifest.json", "model.sig"

# dtype -> its name in a safetensors header
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_BY_NAME = {dtype_name(dtype): dtype for dtype in [*DTYPES, torch.complex128]}
_MEMORY_FORMATS = {
    str(value).removeprefix("torch."): value for value in (torch.contiguous_format, torch.preserve_format, torch.channels_last)
}

# Limits of a file, far above any real model (the largest of torchvision: 0.5 MB of graph.json, 1,700 nodes).
MOST_JSON_BYTES = 16 * 2**20
MOST_JSON_VALUES = 2_000_000
DEEPEST_JSON = 64
LONGEST_TEXT = 10_000
MOST_AXES = 16

_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")
_PART = re.compile(r"(?!__)[A-Za-z0-9_]{1,200}")
_IDENTIFIER = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]{0,200}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
_NODE_KEYS = {"op", "name", "target", "args", "kwargs", "stack"}
# names the generated forward() reads
_TAKEN = {"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "math", "operator", "rarefy"}


# ------------------------------------------------------------------------------------------------------------------ public


def save(
    graph: fx.GraphModule,
    folder: str | os.PathLike[str],
    *,
    manifest: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | str | os.PathLike[str]] | None = None,
    entropy: bool = True,
) -> Path:
    """Write ``graph`` to ``folder``, and return its path.

    manifest: what else to record (recipe, seeds, hashes, measurements, environment): JSON values.
    files: further files, by name: their bytes, or the path of a file to copy.
    entropy: entropy-code the codes that get smaller by it (weights stored so can't be read by other safetensors readers).

    A rarefy folder that is there already is replaced once the new one is complete; anything else there is left alone. Raises
    InputError for that, for a graph that can't be saved, and where writing fails; what was there before is then still there.
    """
    target = Path(os.path.realpath(folder))
    _check_replaceable(target)
    try:
        text, tensors = _describe(graph, entropy)
        _build(_parse_graph(text.encode(), GRAPH), _meta_tensors(graph))
    except FormatError as error:
        raise InputError(f"{target}: the graph can't be saved: {str(error).removeprefix(GRAPH + ': ')}") from error
    extra = _plain(dict(manifest or {}), "manifest")
    for name in files or {}:
        if not _FILE_NAME.fullmatch(name) or name in (GRAPH, WEIGHTS, MANIFEST, SIGNATURE):
            raise InputError(f"files: {name!r} can't be a file of the folder; use letters, digits, '.', '_', '-', and no name of save's own")
    reserved = extra.keys() & {"format", "schema", "rarefy", "files", "content"}
    if reserved:
        raise InputError(f"manifest: {min(reserved)!r} is written by save; use another key")

    with _written(target) as temporary:
        (temporary / GRAPH).write_bytes(text.encode())
        safetensors.torch.save_file(tensors, temporary / WEIGHTS)
        for name, content in (files or {}).items():
            if isinstance(content, bytes):
                (temporary / name).write_bytes(content)
            else:
                shutil.copyfile(content, temporary / name)
        listed = {path.name: {"sha256": _sha256(path), "size": path.stat().st_size} for path in sorted(temporary.iterdir())}
        extra["environment"] = {**_environment(), **extra.get("environment", {})}
        whole = {**extra, "format": "rarefy", "schema": SCHEMA, "rarefy": _version(), "files": listed, "content": _content(listed)}
        (temporary / MANIFEST).write_text(json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return Path(folder)


def load(folder: str | os.PathLike[str]) -> fx.GraphModule:
    """The graph ``save`` was given, on the CPU, in eval mode. Takes memory for the weights, and little else.

    Raises FormatError if the folder is not what ``save`` writes, or was damaged since.
    """
    path = Path(folder)
    listed = read_manifest(path)["files"]
    for name in (GRAPH, WEIGHTS):
        if name not in listed:
            raise FormatError(f"{path / MANIFEST}: does not list {name}")
    with _opened(path / GRAPH) as file:
        data = _read_json_bytes(file, path / GRAPH)
        _check_hash(path / GRAPH, len(data), hashlib.sha256(data).hexdigest(), listed[GRAPH])
    description = _parse_graph(data, str(path / GRAPH))
    with _opened(path / WEIGHTS) as file:
        size = os.fstat(file.fileno()).st_size
        _check_hash(path / WEIGHTS, size, hashlib.file_digest(file, "sha256").hexdigest(), listed[WEIGHTS])
        tensors = _read_tensors(file, size, description, path / WEIGHTS)
    return _build(description, tensors, str(path / GRAPH))


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``manifest.json``. Raises FormatError if the folder is not a rarefy folder, or a newer rarefy wrote it."""
    path = Path(folder)
    if not path.is_dir():
        raise FormatError(f"{path}: no such folder; give one that rarefy saved")
    if not os.path.lexists(path / MANIFEST):
        raise FormatError(f"{path}: not a rarefy folder ({MANIFEST} is missing); give one that rarefy saved")
    with _opened(path / MANIFEST) as file:
        value: dict[str, Any] = _restore(_json(_read_json_bytes(file, path / MANIFEST), path / MANIFEST), path / MANIFEST)
    _check_schema(value, path / MANIFEST)
    files = value.get("files")
    if not isinstance(files, dict):
        raise FormatError(f"{path / MANIFEST}: lists no files")
    for name, entry in files.items():
        good = isinstance(entry, dict) and entry.keys() == {"sha256", "size"} and _is_size(entry["size"])
        if not _FILE_NAME.fullmatch(name) or not good or not re.fullmatch("[0-9a-f]{64}", str(entry["sha256"])):
            raise FormatError(f"{path / MANIFEST}: the entry of file {name[:80]!r} is not a name with size and sha256")
    return value


def content_hash(folder: str | os.PathLike[str]) -> str:
    """sha256 over graph.json and weights.safetensors: equal for equal models, whatever was measured and whenever it was saved."""
    path, found = Path(folder), {}
    for name in (GRAPH, WEIGHTS):
        with _opened(path / name) as file:
            found[name] = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return _content(found)


def is_artifact(folder: str | os.PathLike[str]) -> bool:
    """Does the folder claim to be one that ``save`` wrote?"""
    try:
        read_manifest(folder)
    except FormatError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------- graph -> text


def _describe(graph: fx.GraphModule, entropy: bool) -> tuple[str, dict[str, Tensor]]:
    """graph.json, and the tensors of weights.safetensors."""
    found = {**dict(graph.named_parameters(remove_duplicate=False)), **dict(graph.named_buffers(remove_duplicate=False))}
    bits = {name: width for name, width in graph.meta.get("bits", {}).items() if name in found}
    entries: dict[str, dict[str, Any]] = {}
    stored: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name in sorted(found):
        value = found[name]
        entry = entries[name] = _tensor_entry(graph, name, value)
        if first.setdefault(id(value), name) != name:
            entries[name] = {"kind": entry["kind"], "same_as": first[id(value)]}
            continue
        if value.dtype not in DTYPES or value.layout != torch.strided:
            raise FormatError(f"{name}: a tensor of {value.dtype} ({value.layout}) has no place in safetensors; convert it first")
        stored[name] = _stored(name, value, bits.get(name), entry, entropy)
    meta = _plain({**graph.meta, **({"bits": bits} if "bits" in graph.meta else {})}, "graph.meta")
    lines = [
        "{",
        '"format":"rarefy",',
        f'"schema":{SCHEMA},',
        f'"meta":{_line(meta)},',
        '"nodes":[',
        ",\n".join(_line(_node_entry(node)) for node in graph.graph.nodes),
        "],",
        '"tensors":{',
        ",\n".join(f"{_line(name)}:{_line(entry)}" for name, entry in entries.items()),
        "}",
        "}",
    ]
    return "\n".join(lines) + "\n", stored


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _tensor_entry(graph: nn.Module, name: str, value: Tensor) -> dict[str, Any]:
    entry: dict[str, Any] = {"dtype": dtype_name(value.dtype), "shape": list(value.shape)}
    if isinstance(value, nn.Parameter):
        entry.update(kind="parameter", requires_grad=value.requires_grad)
    else:
        owner, _, leaf = name.rpartition(".")
        entry.update(kind="buffer", persistent=leaf not in graph.get_submodule(owner)._non_persistent_buffers_set)
    if value.dim() == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last):
        entry["channels_last"] = True
    return entry


def _stored(name: str, value: Tensor, bits: int | None, entry: dict[str, Any], entropy: bool) -> Tensor:
    """The tensor as safetensors holds it; says in ``entry`` how, where it is not as it is."""
    plain = value.detach().to(device="cpu", memory_format=torch.contiguous_format, copy=True)
    if bits is None and (not entropy or value.dtype not in (torch.int8, torch.uint8) or isinstance(value, nn.Parameter)):
        return plain
    try:
        packed = packing.pack(plain, 8 if bits is None else bits)
        coded = packing.entropy_encode(plain, 8 if bits is None else bits) if entropy else None
    except InputError as error:
        raise FormatError(f"{name}: {error}") from error
    if coded is not None and coded.numel() < packed.numel():
        entry["stored"], entry["bits"] = "zstd", 8 if bits is None else bits
        return coded
    if bits is None or bits == 8:
        return plain
    entry["stored"], entry["bits"] = "packed", bits
    return packed


def _node_entry(node: fx.Node) -> dict[str, Any]:
    entry: dict[str, Any] = {"op": node.op, "name": node.name}
    if node.op == "call_function":
        entry["target"] = _located(f"{node.meta.get('stack') or node.name}", allowlist.name_of, node.target)
    elif node.op != "output":
        entry["target"] = node.target
    if node.args:
        entry["args"] = [_encode(value, node.name) for value in node.args]
    if node.kwargs:
        entry["kwargs"] = {key: _encode(value, node.name) for key, value in node.kwargs.items()}
    if node.meta.get("stack"):
        entry["stack"] = node.meta["stack"]
    return entry


def _encode(value: Any, where: str) -> Any:
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


def _plain(value: Any, where: str) -> Any:
    """JSON of JSON values: tuples become lists, NaN and infinity ``{"$float": "nan"}``. Raises InputError for anything else."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str or key.startswith("$"):
                raise InputError(f"{where}: the key {key!r} is not text that JSON can hold (and '$' is kept for rarefy)")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise InputError(f"{where}: a value of type {type(value).__name__} is not JSON; convert it to text, numbers, lists and dictionaries")


def _restore(value: Any, where: str | Path) -> Any:
    """What ``_plain`` was given."""
    if isinstance(value, list):
        return [_restore(item, where) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"$float"}:
            return _special_float(value["$float"], where)
        return {key: _restore(item, where) for key, item in value.items()}
    return value


def _special_float(text: Any, where: str | Path) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise FormatError(f"{where}: {_said(text)} is not nan, inf or -inf")
    return float(text)


# ----------------------------------------------------------------------------------------------------------- text -> graph


def _parse_graph(data: bytes, where: str) -> dict[str, Any]:
    """graph.json, checked as far as it can be without building anything: keys, tensors, meta."""
    value = _json(data, where)
    _check_schema(value, where)
    _expect(value.keys() == {"format", "schema", "meta", "nodes", "tensors"}, where, f"has the keys {_said(sorted(value))}")
    tensors = value["tensors"]
    _expect(isinstance(tensors, dict), where, "tensors is not an object")
    for name, entry in tensors.items():
        _check_tensor_entry(name, entry, tensors, where)
    inner = {".".join(parts[:count]) for parts in (name.split(".") for name in tensors) for count in range(1, len(parts))}
    for name in tensors.keys() & inner:
        raise FormatError(f"{where}: {_said(name)} is a tensor and a module at once")
    value["meta"] = _restore(value["meta"], where)
    _check_meta(value["meta"], tensors, where)
    _expect(isinstance(value["nodes"], list), where, "nodes is not a list")
    return value


def _check_tensor_entry(name: str, entry: Any, tensors: Mapping[str, Any], where: str) -> None:
    at = f"{where}: tensor {_said(name)}"
    parts = name.split(".")
    _expect(all(_PART.fullmatch(part) and not keyword.iskeyword(part) for part in parts), at, "is not a dotted name")
    taken = hasattr(fx.GraphModule, parts[0]) or any(hasattr(nn.Module, part) for part in parts) or parts[-1] in ("training", *vars(nn.Module()))
    _expect(not taken, at, "has the name of an attribute that modules have")
    _expect(isinstance(entry, dict), at, "is not described by an object")
    kind = entry.get("kind")
    _expect(kind in ("parameter", "buffer"), at, f"is neither parameter nor buffer but {_said(kind)}")
    if "same_as" in entry:
        other = entry["same_as"]
        _expect(entry.keys() == {"kind", "same_as"}, at, f"is another one and has keys of its own: {_said(sorted(entry))}")
        original = tensors.get(other) if isinstance(other, str) else None
        _expect(isinstance(original, dict), at, f"is the same as {_said(other)}, which is not there")
        assert original is not None
        _expect("same_as" not in original and original.get("kind") == kind, at, f"can't be the same as {_said(other)}")
        return
    flag = "requires_grad" if kind == "parameter" else "persistent"
    required, optional = {"kind", "dtype", "shape", flag}, {"stored", "bits", "channels_last"}
    _expect(required <= entry.keys() <= required | optional, at, f"has the keys {_said(sorted(entry))}")
    _expect(type(entry[flag]) is bool, at, f"{flag} is {_said(entry[flag])}")
    dtype = _BY_NAME.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    _expect(dtype in DTYPES, at, f"has the dtype {_said(entry['dtype'])}")
    assert dtype is not None
    shape = entry["shape"]
    _expect(isinstance(shape, list) and len(shape) <= MOST_AXES and all(map(_is_size, shape)), at, f"has the shape {_said(shape)}")
    _expect(math.prod(size for size in shape if size) < 2**48, at, f"has the shape {_said(shape)}, which no memory holds")
    floats = dtype.is_floating_point or dtype.is_complex
    _expect(floats or entry.get("requires_grad") is not True, at, f"of {entry['dtype']} can't require gradients")
    _expect(entry.get("channels_last", True) is True and (len(shape) == 4 or "channels_last" not in entry), at, "can't be channels_last")
    if "stored" in entry or "bits" in entry:
        good = entry.get("stored") in ("packed", "zstd") and type(entry.get("bits")) is int and entry["bits"] in packing.WIDTHS
        what = f"is stored as {_said(entry.get('stored'))} of {_said(entry.get('bits'))} bits"
        _expect(good and dtype in (torch.int8, torch.uint8), at, what)


def _check_meta(meta: Any, tensors: Mapping[str, Any], where: str) -> None:
    _expect(isinstance(meta, dict) and isinstance(meta.get("inputs"), list), where, "meta.inputs is not a list")
    for entry in meta["inputs"]:
        good = isinstance(entry, dict) and isinstance(entry.get("shape"), list) and all(map(_is_size, entry["shape"]))
        good = good and isinstance(entry.get("dtype"), str) and entry["dtype"] in _BY_NAME
        _expect(good, where, f"meta.inputs has the entry {_said(entry)}")
        small = len(entry["shape"]) < MOST_AXES and math.prod(entry["shape"]) <= allowlist.MOST_ELEMENTS
        _expect(small, where, f"an input of shape {_said(entry['shape'])} is too large")
    _expect(meta.get("core") is None or isinstance(meta["core"], str), where, f"meta.core is {_said(meta.get('core'))}")
    history = meta.get("history", [])
    _expect(isinstance(history, list) and all(isinstance(record, dict) for record in history), where, "meta.history is not a list of records")
    bits = meta.get("bits", {})
    _expect(isinstance(bits, dict), where, "meta.bits is not an object")
    for name, width in bits.items():
        good = name in tensors and type(width) is int and width in packing.WIDTHS
        _expect(good, where, f"meta.bits gives {_said(name)} the width {_said(width)}")


def _build(description: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str = GRAPH) -> fx.GraphModule:
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
    return module.eval()


def _build_graph(entries: list[Any], tensors: Mapping[str, Any], inputs: int, where: str) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    yields: dict[fx.Node, str] = {}
    for index, entry in enumerate(entries):
        at = f"{where}: node {index}"
        _expect(isinstance(entry, dict) and {"op", "name"} <= entry.keys() <= _NODE_KEYS, at, "has other keys")
        name, op, target, stack = entry["name"], entry["op"], entry.get("target"), entry.get("stack", "")
        _expect(isinstance(name, str) and _IDENTIFIER.fullmatch(name) and not keyword.iskeyword(name), at, f"can't be named {_said(name)}")
        _expect(name not in nodes and name not in _TAKEN, at, f"has the name {_said(name)}, which is taken")
        at = f"{where}: node {name}"
        _expect(isinstance(stack, str) and len(stack) <= LONGEST_TEXT, at, "stack is not a name")
        args = [_decode(value, nodes, at) for value in _expected(entry.get("args", []), list, at, "args")]
        kwargs = {key: _decode(value, nodes, at) for key, value in _expected(entry.get("kwargs", {}), dict, at, "kwargs").items()}
        _expect(not kwargs or op == "call_function", at, "has keyword arguments, which only operators have")
        _expect(not args or op in ("call_function", "output"), at, "has arguments, which only operators have")
        if op == "call_function":
            function = _located(at, allowlist.function_named, _expected(target, str, at, "target"))
            kind = _located(at, allowlist.check_call, function, args, kwargs, yields)
            node = graph.create_node(op, function, tuple(args), kwargs, name=name)
        elif op == "get_attr":
            known = isinstance(target, str) and (target in tensors or target == "training")
            _expect(known, at, f"reads {_said(target)}, which is no tensor of the file")
            kind = allowlist.NUMBER if target == "training" else allowlist.TENSOR
            node = graph.create_node(op, target, name=name)
        elif op == "placeholder":
            same = isinstance(target, str) and _IDENTIFIER.fullmatch(target) and re.fullmatch(re.escape(target) + r"(_\d+)?", name)
            _expect(same and target not in _TAKEN and not keyword.iskeyword(target), at, f"is an input of another name, {_said(target)}")
            others = {node.target for node in nodes.values() if node.op == "placeholder"}
            _expect(target not in others, at, f"is a second input {_said(target)}")
            kind = allowlist.TENSOR
            node = graph.create_node(op, target, name=name)
        else:
            _expect(op == "output" and target is None, at, f"does {_said(op)}, which is no operation of a graph")
            _expect(len(args) == 1 and index == len(entries) - 1, at, "is not one output at the end")
            kind = allowlist.ANY
            node = graph.output(args[0])
            node.name = name
        _expect(node.name == name, at, f"can't be named {_said(name)}")
        node.meta = {"stack": stack}
        nodes[name], yields[node] = node, kind
    _expect(bool(entries) and entries[-1]["op"] == "output", where, "has no output")
    found = sum(node.op == "placeholder" for node in nodes.values())
    _expect(found == inputs, where, f"has {found} inputs, meta.inputs has {inputs}")
    return graph


def _decode(value: Any, nodes: Mapping[str, fx.Node], at: str) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes, at) for item in value]
    if isinstance(value, str):
        _expect(len(value) <= LONGEST_TEXT, at, "has an argument of more than 10,000 letters")
        return value
    if not isinstance(value, dict):
        _expect(type(value) is not int or abs(value) < 2**63, at, f"has the argument {_said(value)}, which is no 64-bit number")
        return value
    _expect(len(value) == 1, at, f"has the argument {_said(value)}")
    ((kind, inner),) = value.items()
    if kind == "node":
        _expect(isinstance(inner, str) and inner in nodes, at, f"reads {_said(inner)}, which no earlier node is")
        return nodes[inner]
    if kind == "float":
        return _special_float(inner, at)
    if kind == "tuple":
        return tuple(_decode(item, nodes, at) for item in _expected(inner, list, at, "tuple"))
    if kind == "slice":
        _expect(len(_expected(inner, list, at, "slice")) == 3, at, "has a slice without three parts")
        return slice(*(_decode(item, nodes, at) for item in inner))
    if kind == "dict":
        pairs = _expected(inner, list, at, "dict")
        good = all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs)
        _expect(good, at, "has a dict without text keys")
        return {key: _decode(item, nodes, at) for key, item in pairs}
    if kind == "device":
        _expect(inner == "cpu", at, f"names the device {_said(inner)}")
        return torch.device("cpu")
    if kind == "layout":
        _expect(inner == "strided", at, f"names the layout {_said(inner)}")
        return torch.strided
    table: Mapping[str, Any] = _BY_NAME if kind == "dtype" else _MEMORY_FORMATS if kind == "memory_format" else {}
    _expect(isinstance(inner, str) and inner in table, at, f"has the argument {_said(value)}")
    return table[inner]


# ----------------------------------------------------------------------------------------------------------------- tensors


def _read_tensors(file: BufferedReader, size: int, description: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors, each read into memory of its own after its place and size were compared with the header and graph.json."""
    header, start = _read_header(file, size, path)
    entries = {name: entry for name, entry in description["tensors"].items() if "same_as" not in entry}
    for name in entries.keys() ^ header.keys():
        raise FormatError(f"{path}: tensor {_said(name)} is {'missing' if name in entries else 'not one of graph.json'}")
    wanted = {name: _place(f"{path}: tensor {_said(name)}", entry, header[name]) for name, entry in entries.items()}
    found = {}
    for name, (dtype, shape) in wanted.items():
        raw = torch.empty(shape, dtype=dtype)
        file.seek(start + header[name]["data_offsets"][0])
        if raw.numel():
            read = file.readinto(raw.reshape(-1).view(torch.uint8).numpy())
            _expect(read == raw.nbytes, f"{path}: tensor {_said(name)}", "ends too early")
        found[name] = _unstored(f"{path}: tensor {_said(name)}", entries[name], raw)
    return found


def _read_header(file: BufferedReader, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, its offsets checked to cover the rest of the file exactly; and where that rest begins."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    _expect(size >= 8 and length <= min(size - 8, MOST_JSON_BYTES), path, f"is no safetensors file (a header of {length} bytes in {size})")
    header = _json(file.read(length), path)
    header.pop("__metadata__", None)
    position = 0
    for name, entry in header.items():
        at = f"{path}: tensor {_said(name)}"
        _expect(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, at, "has other keys")
        offsets = entry["data_offsets"]
        _expect(isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets)), at, f"has the offsets {_said(offsets)}")
        good = isinstance(entry["shape"], list) and len(entry["shape"]) <= MOST_AXES and all(map(_is_size, entry["shape"]))
        _expect(good, at, f"has the shape {_said(entry['shape'])}")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        good = begin == position <= end <= size - 8 - length
        _expect(good, f"{path}: tensor {_said(name)}", f"has the offsets {begin} to {end}, after {position} of {size - 8 - length}")
        position = end
    _expect(position == size - 8 - length, path, f"holds {size - 8 - length} bytes, its tensors {position}")
    return header, 8 + length


def _place(at: str, entry: Mapping[str, Any], header: Mapping[str, Any]) -> tuple[torch.dtype, list[int]]:
    """dtype and shape in which the tensor is stored, compared with graph.json and with the bytes that are there."""
    dtype, shape = _BY_NAME[entry["dtype"]], entry["shape"]
    if "stored" in entry:
        count = header["shape"][0] if header["shape"] else 0
        if entry["stored"] == "packed":
            count = packing.packed_size(math.prod(shape), entry["bits"])
        dtype, shape = torch.uint8, [count]
    _expect(header["dtype"] == DTYPES[dtype], at, f"is {_said(header['dtype'])}, graph.json wants {DTYPES[dtype]}")
    _expect(header["shape"] == shape, at, f"has the shape {_said(header['shape'])}, graph.json wants {_said(shape)}")
    begin, end = header["data_offsets"]
    needed = math.prod(shape) * dtype.itemsize
    _expect(end - begin == needed, at, f"has {end - begin} bytes, its shape takes {needed}")
    return dtype, shape


def _unstored(at: str, entry: Mapping[str, Any], raw: Tensor) -> Tensor:
    dtype, shape = _BY_NAME[entry["dtype"]], entry["shape"]
    if "stored" in entry:
        decode = packing.unpack if entry["stored"] == "packed" else packing.entropy_decode
        raw = _located(at, decode, raw, entry["bits"], shape, dtype)
    if dtype == torch.bool and raw.numel():
        _expect(int(raw.view(torch.uint8).max()) <= 1, at, "of bool holds a byte that is neither 0 nor 1")
    return raw.contiguous(memory_format=torch.channels_last) if "channels_last" in entry else raw


def _meta_tensors(graph: nn.Module) -> dict[str, Tensor]:
    """Stand-ins without memory, to build a graph that only has to be checked."""
    every = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    return {name: torch.empty_like(value.detach(), device="meta") for name, value in every}


# ------------------------------------------------------------------------------------------------------------------- files


def _check_schema(value: Any, where: str | Path) -> None:
    _expect(isinstance(value, dict) and value.get("format") == "rarefy", where, "is not rarefy's")
    schema = value.get("schema")
    _expect(type(schema) is int and schema >= 1, where, f"has the schema {_said(schema)}")
    _expect(schema <= SCHEMA, where, f"was written by a newer rarefy (schema {schema}, this one reads up to {SCHEMA}); pip install -U rarefy")


def _check_hash(path: Path, size: int, digest: str, listed: Mapping[str, Any]) -> None:
    if size != listed["size"] or digest != listed["sha256"]:
        what = f"{size} bytes, listed {listed['size']}" if size != listed["size"] else "other bytes"
        raise FormatError(f"{path}: differs from what {MANIFEST} lists ({what}); it was damaged or edited: copy the folder again")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file, not through a link. Raises FormatError."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        why = "is a symbolic link" if path.is_symlink() else f"can't be read ({error.strerror})"
        raise FormatError(f"{path}: {why}; copy the whole folder again") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FormatError(f"{path}: is not a file; copy the whole folder again")
        yield file


def _read_json_bytes(file: BufferedReader, where: Path) -> bytes:
    data = file.read(MOST_JSON_BYTES + 1)
    _expect(len(data) <= MOST_JSON_BYTES, where, f"is larger than {MOST_JSON_BYTES} bytes")
    return data


def _json(data: bytes, where: str | Path) -> dict[str, Any]:
    """Parsed, once it is known to be neither deep nor of many values; a key may stand once, numbers are finite."""
    bare = _STRINGS.sub(b"", data)
    _expect(bare.count(b",") + bare.count(b"[") + bare.count(b"{") <= MOST_JSON_VALUES, where, f"holds more than {MOST_JSON_VALUES} values")
    depth = deepest = 0
    for bracket in _BRACKETS.finditer(bare):
        depth += 1 if bracket[0] in b"[{" else -1
        deepest = max(deepest, depth)
    _expect(deepest <= DEEPEST_JSON, where, f"is nested {deepest} deep")
    try:
        value: dict[str, Any] = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: is not JSON ({str(error)[:100]!r}); copy it again") from error
    _expect(isinstance(value, dict), where, "is not a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:40]} is too large")
    return float(text)


def _check_replaceable(target: Path) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; choose a folder to save to")
    found = {path.name for path in target.iterdir()}
    if not found:
        return
    try:
        known = read_manifest(target)["files"].keys() | {MANIFEST, SIGNATURE, "model.onnx", "report.html", "report.json"}
    except FormatError as error:
        raise InputError(f"{target}: exists and is not a rarefy folder; choose another name, or move it away") from error
    if found - known:
        raise InputError(f"{target}: holds {min(found - known)!r}, which rarefy did not write; move it, or choose another name")


@contextlib.contextmanager
def _written(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place when the block ends well, and is gone otherwise."""
    token = secrets.token_hex(4)
    temporary, previous = (target.with_name(f".{target.name}.{token}.{word}") for word in ("saving", "previous"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        _check_replaceable(target)
        try:
            if target.is_dir():
                target.rename(previous)
            temporary.rename(target)
        except BaseException:
            if previous.exists() and not target.exists():
                previous.rename(target)
            raise
        _sync(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{target}: can't be written ({error}); what was there before is unchanged") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.is_dir():
            shutil.rmtree(previous, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle of a folder to sync
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(listed: Mapping[str, Mapping[str, Any]]) -> str:
    return hashlib.sha256("".join(f"{listed[name]['sha256']}  {name}\n" for name in (GRAPH, WEIGHTS)).encode()).hexdigest()


def _environment() -> dict[str, Any]:
    return {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system(), "machine": platform.machine()}


def _version() -> str:
    try:
        return metadata.version("rarefy")
    except metadata.PackageNotFoundError:
        return "0"  # run from a checkout that is not installed


# ------------------------------------------------------------------------------------------------------------------ checks


def _expect(good: Any, where: str | Path, what: str) -> None:
    if not good:
        raise FormatError(f"{where}: {what}")


def _expected(value: Any, kind: type, at: str, what: str) -> Any:
    _expect(isinstance(value, kind), at, f"{what} is not a {kind.__name__}")
    return value


def _located(at: str, function: Any, *args: Any) -> Any:
    """``function(*args)``, whose FormatError then says where."""
    try:
        return function(*args)
    except FormatError as error:
        raise FormatError(f"{at}: {error}") from error


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _said(value: Any) -> str:
    return repr(value)[:80]
