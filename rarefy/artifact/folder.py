"""save() and load(): a compressed model is a folder that says all there is to know, and holds no code.

    graph.json            the graph: nodes, their arguments, what each tensor is
    weights.safetensors   the tensors; codes below 8 bits without gaps, entropy-coded where that is smaller; masked weights without zeros
    manifest.json         recipe, seeds, hashes of data and teacher, measurements, environment; size and sha256 of every other file
    model.onnx, report.html, ...   what the caller adds
    model.sig             the signature (rarefy.artifact.signing)

docs/format.md is the specification. ``load`` gives what ``capture`` gave: a module that trains on, with outputs equal bit for
bit, in a process that has never seen the model's class.

Nothing in the folder is believed. Names can't escape, operators are those of ``rarefy.artifact.allowlist``, every size is compared with the
bytes that are there before memory is taken, and whatever is wrong raises FormatError in one line. ``save`` builds from what it is
about to write exactly as ``load`` would, so what was saved loads.

Writing is atomic: the folder is completed under another name beside the target, synced, and renamed. Same graph, same bytes:
graph.json and weights.safetensors hold no time, no path and no random order. ``content_hash`` is the hash of these two.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from io import BufferedReader
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn

from rarefy.artifact import graph_json, packing
from rarefy.artifact.graph_json import BY_NAME, DTYPES, MOST_AXES, SCHEMA, check_schema
from rarefy.errors import FormatError, InputError
from rarefy.graph.nodes import is_graph
from rarefy.system import strict_json
from rarefy.system.strict_json import expect, is_size, located, plain, restore, said

GRAPH, WEIGHTS, MANIFEST, SIGNATURE = "graph.json", "weights.safetensors", "manifest.json", "model.sig"

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


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
    if not is_graph(graph):
        raise InputError(f"{target}: a {type(graph).__name__} is not a graph; capture() it first")
    _check_replaceable(target)
    try:
        text, tensors = _described(graph, entropy)
        graph_json.build(graph_json.read(text.encode(), GRAPH), _meta_tensors(graph), GRAPH)
    except FormatError as error:
        raise InputError(f"{target}: the graph can't be saved: {str(error).removeprefix(GRAPH + ': ')}") from error
    extra = plain(dict(manifest or {}), "manifest")
    environment = extra.setdefault("environment", {})
    if not isinstance(environment, dict):
        raise InputError(f"manifest.environment: {said(environment)} is not a dictionary")
    for name in files or {}:
        if not _FILE_NAME.fullmatch(name) or name.lower() in (GRAPH, WEIGHTS, MANIFEST, SIGNATURE):
            raise InputError(
                f"files: {name!r} can't be a file of the folder; use letters, digits, '.', '_', '-', and no name of save's"
            )
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
        listed = {
            path.name: {"sha256": _sha256(path), "size": path.stat().st_size} for path in sorted(temporary.iterdir())
        }
        extra["environment"] = {**_environment(), **environment}
        whole = {
            **extra,
            "format": "rarefy",
            "schema": SCHEMA,
            "rarefy": _version(),
            "files": listed,
            "content": _content(listed),
        }
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
    description = graph_json.read(data, str(path / GRAPH))
    with _opened(path / WEIGHTS) as file:
        size = os.fstat(file.fileno()).st_size
        _check_hash(path / WEIGHTS, size, hashlib.file_digest(file, "sha256").hexdigest(), listed[WEIGHTS])
        tensors = _read_tensors(file, size, description, path / WEIGHTS)
    return graph_json.build(description, tensors, str(path / GRAPH))


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``manifest.json``. Raises FormatError if the folder is not a rarefy folder, or a newer rarefy wrote it."""
    path = Path(folder)
    if not path.is_dir():
        raise FormatError(f"{path}: no such folder; give one that rarefy saved")
    if not os.path.lexists(path / MANIFEST):
        raise FormatError(f"{path}: not a rarefy folder ({MANIFEST} is missing); give one that rarefy saved")
    with _opened(path / MANIFEST) as file:
        value: dict[str, Any] = restore(
            strict_json.parse(_read_json_bytes(file, path / MANIFEST), path / MANIFEST), path / MANIFEST
        )
    check_schema(value, path / MANIFEST)
    files = value.get("files")
    if not isinstance(files, dict):
        raise FormatError(f"{path / MANIFEST}: lists no files")
    for name, entry in files.items():
        good = isinstance(entry, dict) and entry.keys() == {"sha256", "size"} and is_size(entry["size"])
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


def _described(graph: fx.GraphModule, entropy: bool) -> tuple[str, dict[str, Tensor]]:
    """graph.json, and the tensors of weights.safetensors."""
    found = {
        **dict(graph.named_parameters(remove_duplicate=False)),
        **dict(graph.named_buffers(remove_duplicate=False)),
    }
    bits = {name: width for name, width in graph.meta.get("bits", {}).items() if name in found}
    sparse = {id(found[name]) for name in graph.meta.get("sparse", []) if name in found}
    entries: dict[str, dict[str, Any]] = {}
    stored: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name in sorted(found):
        value = found[name]
        entry = entries[name] = graph_json.tensor_entry(graph, name, value)
        if first.setdefault(id(value), name) != name:
            entries[name] = {"kind": entry["kind"], "same_as": first[id(value)]}
            continue
        if value.dtype not in DTYPES or value.layout != torch.strided:
            raise FormatError(
                f"{name}: a tensor of {value.dtype} ({value.layout}) has no place in safetensors; convert it first"
            )
        small = id(value) in sparse and value.is_floating_point() and packing.sparse_size(value) < value.nbytes
        if small:
            entry["stored"] = "sparse"
        stored[name] = packing.sparse_pack(value) if small else _stored(name, value, bits.get(name), entry, entropy)
    return graph_json.write(graph, entries), stored


def _stored(name: str, value: Tensor, bits: int | None, entry: dict[str, Any], entropy: bool) -> Tensor:
    """The tensor as safetensors holds it; says in ``entry`` how, where it is not as it is."""
    plain = value.detach().to(device="cpu", memory_format=torch.contiguous_format, copy=True)
    if bits is None and (
        not entropy or value.dtype not in (torch.int8, torch.uint8) or isinstance(value, nn.Parameter)
    ):
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


def _read_tensors(file: BufferedReader, size: int, description: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors, each read into memory of its own after its place and size were compared with the header and graph.json."""
    header, start = _read_header(file, size, path)
    entries = {name: entry for name, entry in description["tensors"].items() if "same_as" not in entry}
    for name in entries.keys() ^ header.keys():
        raise FormatError(f"{path}: tensor {said(name)} is {'missing' if name in entries else 'not one of graph.json'}")
    wanted = {name: _place(f"{path}: tensor {said(name)}", entry, header[name]) for name, entry in entries.items()}
    found = {}
    for name, (dtype, shape) in wanted.items():
        raw = torch.empty(shape, dtype=dtype)
        file.seek(start + header[name]["data_offsets"][0])
        if raw.numel():
            read = file.readinto(raw.reshape(-1).view(torch.uint8).numpy().data)
            expect(read == raw.nbytes, f"{path}: tensor {said(name)}", "ends too early")
        found[name] = _unstored(f"{path}: tensor {said(name)}", entries[name], raw)
    return found


def _read_header(file: BufferedReader, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, its offsets checked to cover the rest of the file exactly; and where that rest begins."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    good = size >= 8 and length <= min(size - 8, strict_json.MOST_BYTES)
    expect(good, path, f"is no safetensors file (a header of {length} bytes in {size})")
    header = strict_json.parse(file.read(length), path)
    header.pop("__metadata__", None)
    position = 0
    for name, entry in header.items():
        at = f"{path}: tensor {said(name)}"
        expect(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, at, "has other keys")
        offsets = entry["data_offsets"]
        expect(
            isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets)),
            at,
            f"has the offsets {said(offsets)}",
        )
        good = (
            isinstance(entry["shape"], list) and len(entry["shape"]) <= MOST_AXES and all(map(is_size, entry["shape"]))
        )
        expect(good, at, f"has the shape {said(entry['shape'])}")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        good = begin == position <= end <= size - 8 - length
        expect(
            good,
            f"{path}: tensor {said(name)}",
            f"has the offsets {begin} to {end}, after {position} of {size - 8 - length}",
        )
        position = end
    expect(position == size - 8 - length, path, f"holds {size - 8 - length} bytes, its tensors {position}")
    return header, 8 + length


def _place(at: str, entry: Mapping[str, Any], header: Mapping[str, Any]) -> tuple[torch.dtype, list[int]]:
    """dtype and shape in which the tensor is stored, compared with graph.json and with the bytes that are there."""
    dtype, shape = BY_NAME[entry["dtype"]], entry["shape"]
    if "stored" in entry:
        count = header["shape"][0] if header["shape"] else 0
        if entry["stored"] == "sparse":
            least = packing.packed_size(math.prod(shape), 1)
            expect(count >= least, at, f"has {count} bytes, the bits of its shape alone take {least}")
        if entry["stored"] == "packed":
            count = packing.packed_size(math.prod(shape), entry["bits"])
        dtype, shape = torch.uint8, [count]
    expect(header["dtype"] == DTYPES[dtype], at, f"is {said(header['dtype'])}, graph.json wants {DTYPES[dtype]}")
    expect(header["shape"] == shape, at, f"has the shape {said(header['shape'])}, graph.json wants {said(shape)}")
    begin, end = header["data_offsets"]
    needed = math.prod(shape) * dtype.itemsize
    expect(end - begin == needed, at, f"has {end - begin} bytes, its shape takes {needed}")
    return dtype, shape


def _unstored(at: str, entry: Mapping[str, Any], raw: Tensor) -> Tensor:
    dtype, shape = BY_NAME[entry["dtype"]], entry["shape"]
    if entry.get("stored") == "sparse":
        raw = located(at, packing.sparse_unpack, raw, shape, dtype)
    elif "stored" in entry:
        decode = packing.unpack if entry["stored"] == "packed" else packing.entropy_decode
        raw = located(at, decode, raw, entry["bits"], shape, dtype)
    if dtype == torch.bool and raw.numel():
        expect(int(raw.view(torch.uint8).max()) <= 1, at, "of bool holds a byte that is neither 0 nor 1")
    return raw.contiguous(memory_format=torch.channels_last) if "channels_last" in entry else raw


def _meta_tensors(graph: nn.Module) -> dict[str, Tensor]:
    """Stand-ins without memory, to build a graph that only has to be checked."""
    every = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    return {name: torch.empty_like(value.detach(), device="meta") for name, value in every}


def _check_hash(path: Path, size: int, digest: str, listed: Mapping[str, Any]) -> None:
    if size != listed["size"] or digest != listed["sha256"]:
        what = f"{size} bytes, listed {listed['size']}" if size != listed["size"] else "other bytes"
        raise FormatError(
            f"{path}: differs from what {MANIFEST} lists ({what}); it was damaged or edited: copy the folder again"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file, not through a link. Raises FormatError."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        why = "is a symbolic link" if path.is_symlink() else f"can't be read ({error.strerror})"
        raise FormatError(f"{path}: {why}; copy the whole folder again") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path}: is not a file; copy the whole folder again")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _read_json_bytes(file: BufferedReader, where: Path) -> bytes:
    data = file.read(strict_json.MOST_BYTES + 1)
    expect(len(data) <= strict_json.MOST_BYTES, where, f"is larger than {strict_json.MOST_BYTES} bytes")
    return data


def _check_replaceable(target: Path) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; choose a folder to save to")
    found = {path.name for path in target.iterdir()}
    if not found:
        return
    try:
        known = read_manifest(target)["files"].keys() | {
            MANIFEST,
            SIGNATURE,
            "model.onnx",
            "model.zip",
            "report.html",
            "report.json",
        }
    except FormatError as error:
        raise InputError(
            f"{target}: exists and is not a rarefy folder; choose another name, or move it away"
        ) from error
    if found - known:
        raise InputError(
            f"{target}: holds {min(found - known)!r}, which rarefy did not write; move it, or choose another name"
        )


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
        if not (target.is_dir() and _exchanged(temporary, target)):
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


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that a kill at any moment leaves one of them there; False where the system can't."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


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
    return hashlib.sha256(
        "".join(f"{listed[name]['sha256']}  {name}\n" for name in (GRAPH, WEIGHTS)).encode()
    ).hexdigest()


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "machine": platform.machine(),
    }


def _version() -> str:
    try:
        return metadata.version("rarefy")
    except metadata.PackageNotFoundError:
        return "0"  # run from a checkout that is not installed
