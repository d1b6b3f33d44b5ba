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
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, fx

from rarefy.artifact import graph_json, weights
from rarefy.artifact.directory import Directory
from rarefy.artifact.graph_json import SCHEMAS
from rarefy.artifact.snapshot import (
    FILE_NAME,
    GRAPH,
    MANIFEST,
    MOST_FILES,
    SIGNATURE,
    UNFINISHED,
    WEIGHTS,
    content_of_files,
    hold,
    is_saved,
    listed_file,
    read_manifest,
)
from rarefy.artifact.words import STORES
from rarefy.errors import FormatError, InputError
from rarefy.graph.nodes import is_graph
from rarefy.system.files import check_room, opened, replacing
from rarefy.system.strict_json import Json, plain, said

__all__ = [
    "GRAPH", "MANIFEST", "SIGNATURE", "WEIGHTS", "Content",
    "add", "content_hash", "content_of", "is_artifact", "load", "placing", "read_manifest", "save",
]  # fmt: skip


def save(
    graph: fx.GraphModule,
    folder: str | os.PathLike[str],
    *,
    manifest: Mapping[str, Json] | None = None,
    files: Mapping[str, bytes | str | os.PathLike[str]] | None = None,
    store: str | None = None,
) -> Path:
    """Write ``graph`` to ``folder``, and return its path.

    manifest: what else to record (recipe, seeds, hashes, measurements, environment): JSON values.
    files: further files, by name: their bytes, or the path of a file to copy.
    store: "readable" (the graph as text, an entry a tensor), "smallest" (entropy-coded throughout, the graph
        compressed), "fastest" (codes packed as kernels read them, nothing to decode); None: as it was loaded, else
        readable.

    A rarefy folder that is there already is replaced once the new one is complete; anything else there is left alone.
    Raises InputError for that, for a graph that can't be saved, and where writing fails; what was there before is then
    still there.
    """
    target = Path(os.path.realpath(folder))
    check_replaceable(target)
    store = store_of(graph, store)
    text, tensors = _files_of(graph, store, f"{target}: ")
    extra = _checked_manifest(manifest or {}, files or {})
    try:
        room = len(text) + sum(one.numel() * one.element_size() for one in tensors.values())
        room += sum(len(one) if isinstance(one, bytes) else os.stat(one).st_size for one in (files or {}).values())
        check_room(target, room, "the model", "make room, or save elsewhere; what was there before is unchanged")
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target, durable=True, folder=True, check=lambda: check_replaceable(target)) as temporary:
            (temporary / GRAPH).write_bytes(text)
            safetensors.torch.save_file(tensors, temporary / WEIGHTS)
            shutil.copymode(temporary / GRAPH, temporary / WEIGHTS)  # as the user's umask has it; theirs is 0600
            for name, content in (files or {}).items():
                _write(content, temporary / name)
            listed = {path.name: listed_file(path) for path in sorted(temporary.iterdir())}
            whole = {
                **extra,
                "format": "rarefy",
                "schema": SCHEMAS.get(store, 1),
                "rarefy": _version(),
                "files": listed,
            }
            whole |= {"content": content_of_files(listed), "environment": {**_environment(), **extra["environment"]}}
            (temporary / MANIFEST).write_text(_text(whole))
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{target}: can't be written ({error}); what was there before is unchanged") from error
    return Path(folder)


def add(folder: str | os.PathLike[str], files: Mapping[str, bytes | str | os.PathLike[str]]) -> None:
    """Put files into a saved folder, and into its manifest; those of the same names are replaced.

    files: by name, their bytes or the path of a file to copy. Raises InputError for a signed folder and for a name that
    is save's, FormatError for a folder that is not as it was saved.
    """
    target = Path(os.path.realpath(folder))
    check_open(target)
    _checked_manifest({}, files)
    with hold(target) as held:
        whole = plain(dict(held.manifest), "manifest")
    if len(whole["files"].keys() | files.keys()) + 2 > MOST_FILES:
        raise InputError(f"{target}: would hold more than {MOST_FILES} files; write {min(files)!r} elsewhere")
    try:
        with contextlib.ExitStack() as stack:  # the manifest takes its place first, the files right behind it
            for name, content in sorted(files.items()):
                partial = stack.enter_context(replacing(target / name, durable=True))
                _write(content, partial)
                whole["files"][name] = listed_file(partial)
            with replacing(target / MANIFEST, durable=True) as partial:
                partial.write_text(_text(whole))
    except OSError as error:
        raise InputError(f"{target}: can't be written ({error}); remove what was written, or save it again") from error


@contextlib.contextmanager
def placing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a file that is meant for ``path``: there, or, if that lies in a saved folder, elsewhere.

    What was written then, and what else lies beside it, gets into the folder and into its manifest at the end. Raises
    InputError for a signed folder.
    """
    target = Path(path)
    parent = target.absolute().parent
    if not is_artifact(parent):
        yield target
        return
    check_open(parent)
    with tempfile.TemporaryDirectory(prefix="rarefy-") as place:
        yield Path(place) / target.name
        add(parent, {one.name: one for one in sorted(Path(place).iterdir())})


def check_open(folder: Path) -> None:
    """Raises InputError for a signed folder, to which nothing can be added."""
    if os.path.lexists(folder / SIGNATURE):
        raise InputError(
            f"{folder}: is signed, and nothing can be added to it; write to another place, or remove its {SIGNATURE}, "
            "add, and sign it again"
        )


@dataclass(frozen=True)
class Content:
    """What a graph is when saved.

    hash: ``content_hash`` of its folder. graph_bytes, weight_bytes: sizes of its two files.
    """

    hash: str
    graph_bytes: int
    weight_bytes: int


def content_of(graph: fx.GraphModule, *, store: str | None = None) -> Content:
    """What ``save`` would write of ``graph``, without writing it. Raises InputError for a graph that can't be saved."""
    text, tensors = _files_of(graph, store_of(graph, store), "")
    data = safetensors.torch.save(tensors)
    digests = {GRAPH: hashlib.sha256(text).hexdigest(), WEIGHTS: hashlib.sha256(data).hexdigest()}
    return Content(content_of_files({name: {"sha256": one} for name, one in digests.items()}), len(text), len(data))


def store_of(graph: fx.GraphModule, store: str | None) -> str:
    """How it is to be stored: as asked, else as it was loaded. Raises InputError."""
    found = store or (graph.meta.get("store") if is_graph(graph) else None) or STORES[0]
    if found not in STORES:
        raise InputError(f"store={found!r} is none of {', '.join(STORES)}; leave it out for {STORES[0]}")
    return str(found)


def _files_of(graph: fx.GraphModule, store: str, where: str) -> tuple[bytes, dict[str, Tensor]]:
    """graph.json, and the tensors of weights.safetensors, from which ``load`` can build the graph.

    Raises InputError.
    """
    if not is_graph(graph):
        raise InputError(f"{where}a {type(graph).__name__} is not a graph; capture() it first")
    try:
        entries, tensors = weights.described(graph, store)
        text = graph_json.write(graph, entries, store)
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
        if not FILE_NAME.fullmatch(name) or name.lower() in (GRAPH, WEIGHTS, MANIFEST, SIGNATURE):
            raise InputError(
                f"files: {name!r} can't be a file of the folder; "
                "use letters, digits, '.', '_', '-', and no name of save's"
            )
    reserved = extra.keys() & {"format", "schema", "rarefy", "files", "content"}
    if reserved:
        raise InputError(f"manifest: {min(reserved)!r} is written by save; use another key")
    return extra


def load(folder: str | os.PathLike[str], *, key: str | os.PathLike[str] | None = None) -> fx.GraphModule:
    """The graph ``save`` was given, on the CPU, in eval mode. Takes memory for the weights, and little else.

    key: the public key (a file, PEM) of who must have signed the folder; the bytes that were checked are loaded.

    Raises FormatError if the folder is not what ``save`` writes, or was damaged since; with a key SignatureRefused for
    whatever its owner did not sign.
    """
    with hold(folder, key) as held:
        return held.graph()


def content_hash(folder: str | os.PathLike[str]) -> str:
    """sha256 over graph.json and weights.safetensors: equal for equal models, whatever was measured, and when."""
    found = {}
    with Directory(folder) as directory:
        for name in (GRAPH, WEIGHTS):
            with directory.open(name) as file:
                found[name] = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return content_of_files(found)


def is_artifact(folder: str | os.PathLike[str]) -> bool:
    """Does the folder claim to be one that ``save`` wrote?"""
    return is_saved(folder)


def check_replaceable(target: Path) -> None:
    """Raises InputError for what is there and is not ours."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; choose a folder to save to")
    found = {path.name for path in target.iterdir() if not UNFINISHED.fullmatch(path.name)}
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
            "README.md",
        }
    except FormatError as error:
        raise InputError(
            f"{target}: exists and is not a rarefy folder; choose another name, or move it away"
        ) from error
    if found - known:
        raise InputError(
            f"{target}: holds {min(found - known)!r}, which rarefy did not write; move it, or choose another name"
        )


def _write(content: bytes | str | os.PathLike[str], target: Path) -> None:
    """Its bytes, or those of the file of that name."""
    if isinstance(content, bytes):
        target.write_bytes(content)
        return
    with opened(content) as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy)


def _text(manifest: Mapping[str, Json]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"


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
