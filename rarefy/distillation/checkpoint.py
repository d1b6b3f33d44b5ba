"""The checkpoint of a training: one safetensors file with JSON in its header, renamed into place.

Killed at any moment, the run goes on from the last one. The header says whose it is (``identity``): a file of another run is refused, not overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from rarefy.errors import FormatError, InputError

STATE_FILE = "state.safetensors"


class Store:
    """The checkpoint's folder: one file, replaced whole."""

    def __init__(self, folder: Path, identity: dict[str, Any], seconds: float, writes: bool):
        self.folder, self.seconds, self.writes = folder, seconds, writes
        self.identity = json.loads(json.dumps(identity))
        self.saved = time.monotonic()
        self.file = folder / STATE_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f".{STATE_FILE}.*") if writes else ():
                _remove(left)
        except OSError as error:
            raise InputError(
                f"checkpoint={folder}: can't be written ({error.strerror}); name a folder that can"
            ) from error
        self.header: dict[str, Any] | None = None
        self.loaded: dict[str, Tensor] = {}
        if self.file.exists():
            self.header, self.loaded = self._read()
            self._same(self.header["identity"])

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            with safetensors.safe_open(self.file, framework="pt") as opened:
                header = json.loads((opened.metadata() or {})["rarefy"])
                if not {"identity", "numbers", "record"} <= header.keys():
                    raise KeyError("identity, numbers or record")
                return header, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"{self.file}: is no checkpoint of a training ({type(error).__name__}: {error}); delete it, or name another folder"
            ) from error

    def _same(self, theirs: Mapping[str, Any]) -> None:
        for part, mine in self.identity.items():
            other = theirs.get(part)
            if mine == other:
                continue
            what = (
                f"{part} ({_changed(mine, other)})" if part in ("options", "task") and isinstance(other, dict) else part
            )
            raise InputError(
                f"{self.folder}: the checkpoint is of a run with another {what}; name another folder, or delete this one to start anew"
            )

    def finished(self) -> dict[str, Any] | None:
        return self.header["record"] if self.header is not None else None

    def numbers(self) -> dict[str, Any] | None:
        return self.header["numbers"] if self.header is not None else None

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self.loaded.items() if name.startswith(prefix)}

    def due(self) -> bool:
        return self.writes and time.monotonic() - self.saved >= self.seconds

    def save(self, state: Mapping[str, Tensor], numbers: dict[str, Any]) -> None:
        self._write(state, {"identity": self.identity, "numbers": numbers, "record": None})

    def finish(self, record: dict[str, Any], result: Mapping[str, Tensor]) -> None:
        tensors = {f"result.{name}": value for name, value in result.items()}
        self._write(tensors, {"identity": self.identity, "numbers": None, "record": record})

    def _write(self, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None:
        if not self.writes:
            return
        # A folder of its own: safetensors writes to a file with a name of its choice first, which a kill leaves.
        room = self.folder / f".{STATE_FILE}.{os.getpid()}"
        temporary = room / STATE_FILE
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            room.mkdir(exist_ok=True)
            safetensors.torch.save_file(plain, temporary, metadata={"rarefy": json.dumps(header)})
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, self.file)
            _remove(room)
        except (OSError, safetensors.SafetensorError) as error:
            _remove(room)
            raise InputError(
                f"checkpoint={self.folder}: can't be written ({error}); free some space, or name another folder"
            ) from error
        self.saved = time.monotonic()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def load_into(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors_of(model).items():
        tensor.copy_(values[name])


def digest(graph: fx.GraphModule) -> str:
    """sha256 of the graph's code and its tensors."""
    digest = hashlib.sha256(graph.code.encode())
    for name, value in sorted(tensors_of(graph).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _changed(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    names = [name for name in sorted(mine.keys() | other.keys()) if mine.get(name) != other.get(name)]
    return ", ".join(f"{name}={mine.get(name)!r}, there {other.get(name)!r}" for name in names)
