"""A saved folder, held open: what is checked and what is used are the same bytes.

All files are opened at one moment, relative to the folder's own handle. Another process may then save another version
(the handles keep the old one) or write into the files: what is read is compared with the manifest by the hash of the
very bytes that were read, so it is the whole old version, or refused. With a public key the manifest is one that its
owner signed, and every file is as it was signed.

Files of a folder are regular files that the manifest lists, each of the size that it lists; nothing else lies there but
the signature. What another one wrote into the folder is refused rather than passed on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from io import BufferedReader
from pathlib import Path
from typing import Self

from torch import fx

from rarefy.artifact import graph_json, signature, weights
from rarefy.artifact.directory import Directory, read_at_most
from rarefy.artifact.graph_json import check_schema
from rarefy.errors import FormatError, SignatureRefused
from rarefy.system import strict_json
from rarefy.system.strict_json import Json, expect, is_size, restore

GRAPH, WEIGHTS, MANIFEST, SIGNATURE = "graph.json", "weights.safetensors", "manifest.json", "model.sig"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
MOST_FILES = 100
ATTEMPTS = 100  # to open a folder that others save again and again
PATIENCE, PAUSE = 20, 0.01  # of these while somebody puts a file into it, and seconds between them
CHUNK = 2**20  # bytes hashed at a time
# What rarefy writes before a file takes its place (rarefy/system/files.py), and what a kill may leave behind.
UNFINISHED = re.compile(r"\..{1,120}\.[0-9a-f]{8}\.(part|previous)(\.[A-Za-z0-9]{1,20})?")


# name -> words, in the order in which they are tried: what docs/format.md calls a refusal that says so
REFUSALS: Mapping[str, re.Pattern[str]] = {
    name: re.compile(words)
    for name, _, words in (
        line.partition(": ")
        for line in resources.files("rarefy.artifact").joinpath("refusals.txt").read_text(encoding="utf-8").splitlines()
    )
}


@contextlib.contextmanager
def named() -> Iterator[None]:
    """A FormatError gets the name of its refusal at its end, ``[tensor-name]``, where it has none."""
    try:
        yield
    except FormatError as error:
        text = str(error)
        name = next((name for name, words in REFUSALS.items() if words.search(text)), None)
        if name is None or text.rpartition(" [")[2].removesuffix("]") in REFUSALS:
            raise
        raise FormatError(f"{text} [{name}]") from error


class Snapshot:
    """A folder as it was when it was opened.

    path: for messages. manifest: what manifest.json says. is_signed: with the key that was given.
    """

    def __init__(
        self, path: Path, files: Mapping[str, BufferedReader], manifest: Mapping[str, Json], is_signed: bool
    ) -> None:
        self.path, self.manifest, self.is_signed = path, manifest, is_signed
        self._files = dict(files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    @named()
    def graph(self) -> fx.GraphModule:
        """The model. Takes memory for its weights, and little else. Raises FormatError or SignatureRefused."""
        description = graph_json.read(self.read(GRAPH, strict_json.MOST_BYTES), str(self.path / GRAPH))
        one, other = description["schema"], self.manifest["schema"]
        expect(one == other, self.path / MANIFEST, f"has the schema {other}, {GRAPH} {one}")
        file, size = self._files[WEIGHTS], self.manifest["files"][WEIGHTS]["size"]
        check = _Once(lambda digest: self._check(WEIGHTS, size, digest))
        try:
            tensors = weights.read(file, size, description, self.path / WEIGHTS, check)
        except FormatError:
            if not check.passed:
                self.check(WEIGHTS)  # a damaged file is told as such, not by what the damage looks like
            raise
        return graph_json.build(description, tensors, str(self.path / GRAPH))

    def read(self, name: str, most: int) -> bytes:
        """A file's bytes, which are those that the manifest lists. Raises FormatError or SignatureRefused."""
        file = self._files[name]
        file.seek(0)
        data = read_at_most(file, most, self.path / name)
        self._check(name, len(data), hashlib.sha256(data).hexdigest())
        return data

    def copy(self, name: str, target: Path) -> None:
        """A private copy, for libraries that open files by name; it is what the manifest lists, or gone."""
        try:
            with open(target, "wb") as copy:
                self._hash(name, copy.write)
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def check(self, *names: str) -> None:
        """Are the files as the manifest lists them? All of them, without names. Raises as ``read`` does."""
        for name in names or self.manifest["files"]:
            self._hash(name, lambda _: None)

    def _hash(self, name: str, take: Callable[[bytes], object]) -> None:
        file, digest, size = self._files[name], hashlib.sha256(), 0
        file.seek(0)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            take(chunk)
            size += len(chunk)
            if size > self.manifest["files"][name]["size"]:
                break
        self._check(name, size, digest.hexdigest())

    def _check(self, name: str, size: int, digest: str) -> None:
        listed = self.manifest["files"][name]
        if size == listed["size"] and digest == listed["sha256"]:
            return
        if self.is_signed:
            raise SignatureRefused(f"{self.path}: changed since it was signed: {name} [signed-changed]")
        raise _differs(self.path / name, size, listed["size"])


class _Once:
    """A check that is known to have passed."""

    def __init__(self, check: Callable[[str], None]) -> None:
        self.check, self.passed = check, False

    def __call__(self, digest: str) -> None:
        self.check(digest)
        self.passed = True


@named()
def hold(folder: str | os.PathLike[str], key: str | os.PathLike[str] | None = None) -> Snapshot:
    """The folder, held open.

    key: public, of who must have signed it. Raises FormatError for what ``save`` does not write, SignatureRefused for
    what that key did not sign.
    """
    path = Path(folder)
    if key is not None:
        signature.load_public(key)  # what is no key is told first
    for attempt in range(ATTEMPTS):
        with _directory(path) as directory:
            manifest = _identity(directory)
            try:
                return _held(directory, key)
            except FormatError:
                if not directory.was_replaced() and manifest == _identity(directory):
                    if attempt >= PATIENCE or not _is_written(directory):
                        raise
                    time.sleep(PAUSE)
    raise FormatError(f"{path}: was replaced {ATTEMPTS} times while it was being read; try again [folder-busy]")


@named()
def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Json]:
    """``manifest.json`` alone. Raises FormatError if the folder is not rarefy's, or a newer rarefy wrote it."""
    path = Path(folder)
    for _ in range(ATTEMPTS):
        with _directory(path) as directory:
            try:
                with _opened_manifest(directory) as file:
                    return _manifest(read_at_most(file, strict_json.MOST_BYTES, path / MANIFEST), path)
            except FormatError:
                if not directory.was_replaced():
                    raise
    raise FormatError(f"{path}: was replaced {ATTEMPTS} times while it was being read; try again [folder-busy]")


def is_saved(folder: str | os.PathLike[str]) -> bool:
    """Does the folder claim to be one that ``save`` wrote?"""
    try:
        read_manifest(folder)
    except FormatError:
        return False
    return True


def check_content(manifest: Mapping[str, Json], path: Path) -> None:
    """Does the manifest's ``content`` follow from the hashes that it lists? Raises FormatError."""
    found = content_of_files(manifest["files"])
    told = manifest.get("content")
    expect(told == found, path / MANIFEST, f"says content {str(told)[:20]!r}, its files give {found[:12]} [content]")


def content_of_files(files: Mapping[str, Mapping[str, Json]]) -> str:
    """The hash of a model, from those that a manifest lists of its two files."""
    lines = (f"{files[name]['sha256']}  {name}\n" for name in (GRAPH, WEIGHTS))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _directory(path: Path) -> Directory:
    try:
        return Directory(path)
    except FormatError as error:
        if os.path.isdir(path):
            raise
        raise FormatError(f"{path}: no such folder; give one that rarefy saved [folder-missing]") from error


def _identity(directory: Directory) -> tuple[int, ...]:
    """Which file its manifest is: another one, once a file was added."""
    try:
        found = os.stat(directory.path / MANIFEST, follow_symlinks=False)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _is_written(directory: Directory) -> bool:
    """Is somebody about to put a file into the folder?"""
    try:
        return any(map(UNFINISHED.fullmatch, os.listdir(directory.path)))
    except OSError:
        return True


def _held(directory: Directory, key: str | os.PathLike[str] | None) -> Snapshot:
    path, names = directory.path, directory.names(MOST_FILES)
    if MANIFEST not in names:
        _opened_manifest(directory).close()  # says so
    kept = [name for name in names if key is not None or not UNFINISHED.fullmatch(name)]
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(_opened(directory, name)) for name in kept}
        signed = None if key is None else _signed(path, files, key)
        data = read_at_most(files[MANIFEST], strict_json.MOST_BYTES, path / MANIFEST)
        if signed is not None:
            _compare(path, {MANIFEST: hashlib.sha256(data).hexdigest()}, signed)
        manifest = _manifest(data, path)
        listed = manifest["files"]
        if signed is not None:
            _compare(path, {name: one["sha256"] for name, one in listed.items()}, signed)
        for name in (GRAPH, WEIGHTS, *listed):
            expect(name in listed, path / MANIFEST, f"does not list {name} [manifest-files]")
            expect(name in files, path / name, f"is listed in {MANIFEST} and missing; copy the whole folder again "
                   "[file-missing]")  # fmt: skip
            size = os.fstat(files[name].fileno()).st_size
            if size != listed[name]["size"]:
                raise _differs(path / name, size, listed[name]["size"])
        for name in kept:
            if name not in listed and name not in (MANIFEST, SIGNATURE):
                raise FormatError(
                    f"{path}: holds {name[:80]!r}, which {MANIFEST} does not list; move it out of the folder "
                    "[file-unlisted]"
                )
        held = Snapshot(path, files, manifest, signed is not None)
        if signed is not None:
            check_content(manifest, path)
            held.check(*(name for name in listed if name != WEIGHTS))
        stack.pop_all()
    return held


def _opened(directory: Directory, name: str) -> BufferedReader:
    """A file of the folder. Links and folders are told as such."""
    shown = repr(str(directory.path / name))[1:-1]
    try:
        kind = directory.kind(name)
    except OSError as error:
        raise FormatError(f"{shown}: can't be read ({error.strerror}) [file-missing]") from error
    expect(kind == "file", shown, f"is a {kind}; a saved folder holds files only: copy the whole folder again "
           "[file-kind]")  # fmt: skip
    return directory.open(name)


def _opened_manifest(directory: Directory) -> BufferedReader:
    missing = f"{directory.path}: not a rarefy folder ({MANIFEST} is missing); give one that rarefy saved"
    if not os.path.lexists(directory.path / MANIFEST):
        raise FormatError(f"{missing} [manifest-missing]")
    return _opened(directory, MANIFEST)


def _manifest(data: bytes, folder: Path) -> dict[str, Json]:
    path = folder / MANIFEST
    value: dict[str, Json] = restore(strict_json.parse(data, path), path)
    check_schema(value, path)
    files = value.get("files")
    if not isinstance(files, dict):
        raise FormatError(f"{path}: lists no files [manifest-files]")
    for name, entry in files.items():
        good = isinstance(entry, dict) and entry.keys() == {"sha256", "size"} and is_size(entry["size"])
        named = FILE_NAME.fullmatch(name) and name.lower() not in (MANIFEST, SIGNATURE)
        if not named or not good or not re.fullmatch("[0-9a-f]{64}", str(entry["sha256"])):
            raise FormatError(
                f"{path}: the entry of file {name[:80]!r} is not a name with size and sha256 [manifest-entry]"
            )
    return value


def _signed(path: Path, files: Mapping[str, BufferedReader], key: str | os.PathLike[str]) -> dict[str, str]:
    """{file: sha256} as the key's owner signed it, of which there are as many as there are files."""
    if SIGNATURE not in files:
        raise SignatureRefused(f"{path}: is not signed ({SIGNATURE} is missing) [signature-missing]")
    signed = signature.by_key(signature.read(files[SIGNATURE], path / SIGNATURE), key, path / SIGNATURE)
    added, removed = sorted(files.keys() - signed.keys() - {SIGNATURE}), sorted(signed.keys() - files.keys())
    told = signature.differences({"added": added, "removed": removed})
    if told:
        raise SignatureRefused(f"{path}: {told}")
    return signed


def _compare(path: Path, found: Mapping[str, str], signed: Mapping[str, str]) -> None:
    told = signature.differences({"changed": sorted(name for name in found if found[name] != signed.get(name))})
    if told:
        raise SignatureRefused(f"{path}: {told}")


def _differs(path: Path, size: int, listed: int) -> FormatError:
    what = f"{size} bytes, listed {listed}" if size != listed else "other bytes"
    return FormatError(
        f"{path}: differs from what {MANIFEST} lists ({what}); it was damaged or edited: copy the folder again "
        "[file-hash]"
    )


def listed_file(path: Path) -> dict[str, Json]:
    """What a manifest says of a file of ours."""
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}
