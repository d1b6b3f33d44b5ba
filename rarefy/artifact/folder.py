"""save() and load(): a compressed model is a folder that says all there is to know, and holds no code.

    graph.json            the graph: nodes, their arguments, what each tensor is
    weights.safetensors   the tensors; codes below 8 bits without gaps, entropy-coded where that is smaller; masked
                          weights without zeros
    manifest.json         recipe, seeds, hashes of data and teacher, measurements, environment; size and sha256 of every
                          other file
    model.onnx, report.html, ...   what the caller adds
    model.sig             the signature (rarefy.artifact.signing)

docs/format.md is the specification. ``load`` gives what ``capture`` gave: a module that trains on, with outputs equal
bit for bit, in a process that has never seen the model's class.

Nothing in the folder is believed. Names can't escape, operators are those of ``rarefy.artifact.allowlist``, every size
is compared with the bytes that are there before memory is taken, and whatever is wrong raises FormatError in one line.
``save`` builds from what it is about to write exactly as ``load`` would, so what was saved loads.

Writing is atomic: the folder is completed under another name beside the target, synced, and renamed. Same graph, same
bytes: graph.json and weights.safetensors hold no time, no path and no random order. ``content_hash`` is the hash of
these two; ``content_of`` knows it, and their sizes, before anything is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from io import BufferedReader
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, fx

from rarefy.artifact import graph_json, weights
from rarefy.artifact.graph_json import SCHEMA, check_schema
from rarefy.errors import FormatError, InputError
from rarefy.graph.nodes import is_graph
from rarefy.system import strict_json
from rarefy.system.files import replacing
from rarefy.system.strict_json import Json, expect, is_size, plain, restore, said

GRAPH, WEIGHTS, MANIFEST, SIGNATURE = "graph.json", "weights.safetensors", "manifest.json", "model.sig"

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


def save(
    graph: fx.GraphModule,
    folder: str | os.PathLike[str],
    *,
    manifest: Mapping[str, Json] | None = None,
    files: Mapping[str, bytes | str | os.PathLike[str]] | None = None,
    entropy: bool = True,
) -> Path:
    """Write ``graph`` to ``folder``, and return its path.

    manifest: what else to record (recipe, seeds, hashes, measurements, environment): JSON values.
    files: further files, by name: their bytes, or the path of a file to copy.
    entropy: entropy-code the codes that get smaller by it (weights stored so can't be read by other safetensors
        readers).

    A rarefy folder that is there already is replaced once the new one is complete; anything else there is left alone.
    Raises InputError for that, for a graph that can't be saved, and where writing fails; what was there before is then
    still there.
    """
    target = Path(os.path.realpath(folder))
    _check_replaceable(target)
    text, tensors = _files_of(graph, entropy, f"{target}: ")
    extra = _checked_manifest(manifest or {}, files or {})
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target, durable=True, check=lambda: _check_replaceable(target)) as temporary:
            temporary.mkdir()
            (temporary / GRAPH).write_bytes(text)
            safetensors.torch.save_file(tensors, temporary / WEIGHTS)
            for name, content in (files or {}).items():
                if isinstance(content, bytes):
                    (temporary / name).write_bytes(content)
                else:
                    shutil.copyfile(content, temporary / name)
            listed = {path.name: _listed(path) for path in sorted(temporary.iterdir())}
            whole = {**extra, "format": "rarefy", "schema": SCHEMA, "rarefy": _version(), "files": listed}
            whole |= {
                "content": _content({name: one["sha256"] for name, one in listed.items()}),
                "environment": {**_environment(), **extra["environment"]},
            }
            (temporary / MANIFEST).write_text(json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n")
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{target}: can't be written ({error}); what was there before is unchanged") from error
    return Path(folder)


@dataclass(frozen=True)
class Content:
    """What a graph is when saved.

    hash: ``content_hash`` of its folder. graph_bytes, weight_bytes: sizes of its two files.
    """

    hash: str
    graph_bytes: int
    weight_bytes: int


def content_of(graph: fx.GraphModule, *, entropy: bool = True) -> Content:
    """What ``save`` would write of ``graph``, without writing it. Raises InputError for a graph that can't be saved."""
    text, tensors = _files_of(graph, entropy, "")
    data = safetensors.torch.save(tensors)
    digests = {GRAPH: hashlib.sha256(text).hexdigest(), WEIGHTS: hashlib.sha256(data).hexdigest()}
    return Content(_content(digests), len(text), len(data))


def _files_of(graph: fx.GraphModule, entropy: bool, where: str) -> tuple[bytes, dict[str, Tensor]]:
    """graph.json, and the tensors of weights.safetensors, from which ``load`` can build the graph.

    Raises InputError.
    """
    if not is_graph(graph):
        raise InputError(f"{where}a {type(graph).__name__} is not a graph; capture() it first")
    try:
        entries, tensors = weights.described(graph, entropy)
        text = graph_json.write(graph, entries).encode()
        graph_json.build(graph_json.read(text, GRAPH), weights.stand_ins(graph), GRAPH)
    except FormatError as error:
        raise InputError(f"{where}the graph can't be saved: {str(error).removeprefix(GRAPH + ': ')}") from error
    return text, tensors


def _checked_manifest(manifest: Mapping[str, object], files: Collection[str]) -> dict[str, Json]:
    """What to record, as JSON values. Raises InputError for what has no place in a folder."""
    extra: dict[str, Json] = plain(dict(manifest), "manifest")
    environment = extra.setdefault("environment", {})
    if not isinstance(environment, dict):
        raise InputError(f"manifest.environment: {said(environment)} is not a dictionary")
    for name in files:
        if not _FILE_NAME.fullmatch(name) or name.lower() in (GRAPH, WEIGHTS, MANIFEST, SIGNATURE):
            raise InputError(
                f"files: {name!r} can't be a file of the folder; "
                "use letters, digits, '.', '_', '-', and no name of save's"
            )
    reserved = extra.keys() & {"format", "schema", "rarefy", "files", "content"}
    if reserved:
        raise InputError(f"manifest: {min(reserved)!r} is written by save; use another key")
    return extra


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
        tensors = weights.read(file, size, description["tensors"], path / WEIGHTS)
    return graph_json.build(description, tensors, str(path / GRAPH))


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Json]:
    """``manifest.json``. Raises FormatError if the folder is not a rarefy folder, or a newer rarefy wrote it."""
    path = Path(folder)
    if not path.is_dir():
        raise FormatError(f"{path}: no such folder; give one that rarefy saved")
    if not os.path.lexists(path / MANIFEST):
        raise FormatError(f"{path}: not a rarefy folder ({MANIFEST} is missing); give one that rarefy saved")
    with _opened(path / MANIFEST) as file:
        value: dict[str, Json] = restore(
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
    """sha256 over graph.json and weights.safetensors: equal for equal models, whatever was measured, and when."""
    digests = {}
    for name in (GRAPH, WEIGHTS):
        with _opened(Path(folder) / name) as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return _content(digests)


def is_artifact(folder: str | os.PathLike[str]) -> bool:
    """Does the folder claim to be one that ``save`` wrote?"""
    try:
        read_manifest(folder)
    except FormatError:
        return False
    return True


def _check_hash(path: Path, size: int, digest: str, listed: Mapping[str, Json]) -> None:
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
            "predict.py",
        }
    except FormatError as error:
        raise InputError(
            f"{target}: exists and is not a rarefy folder; choose another name, or move it away"
        ) from error
    if found - known:
        raise InputError(
            f"{target}: holds {min(found - known)!r}, which rarefy did not write; move it, or choose another name"
        )


def _listed(path: Path) -> dict[str, Json]:
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _content(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{digests[name]}  {name}\n" for name in (GRAPH, WEIGHTS)).encode()).hexdigest()


def _environment() -> dict[str, Json]:
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
