"""The teachers' answers on disk: computed once, and read in every later epoch and run.

They are worth it where the same pictures come again:

* an image is always the same picture (no augmentation, no mixing): one file, a row an image, of use from the second epoch on;
* pictures vary, but by seed: a file an epoch, a row a picture, of use to a later run with the same seed and batch size (another loss, another student).

A file is safetensors, written row by row, so that memory stays small, and renamed into place when it is whole. Its name is the hash of all that the answers depend on
(the teachers' digest, the data's fingerprint, precision, layout, and what draws the pictures), which stands in its header too and is checked when it is read.

Given up: the answers are stored as the teachers give them, features included, which for whole stages is large (three stages of a CIFAR ResNet in float32: 115 kB an
image); and a data set that draws random numbers of its own is out of reach, as it is for an exact resume.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rarefy.data.transfer import sent
from rarefy.errors import FormatError, InputError

_MOST_OF_A_GPU = 0.125  # of its memory, for answers that stay there
_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Answers:
    """A folder of them, for one run. like: answers to a few pictures, which say what a row is."""

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], like: Any, device: torch.device):
        self.folder, self.identity, self.device = Path(folder), json.loads(json.dumps(identity)), device
        self.like, self.shape = pytree.tree_flatten(like)
        if any(not isinstance(one, Tensor) or one.dim() == 0 or len(one) != len(self.like[0]) for one in self.like):
            raise InputError("cache: a teacher's answers are not one a picture, so they can't be kept; leave cache out")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cache={folder}: can't be written ({error.strerror}); name a folder that can") from error
        self.opened: tuple[Path, list[Tensor]] | None = None

    def file(self, part: str) -> Path:
        """part: what beside the identity a file is of, such as an epoch."""
        return (
            self.folder
            / f"{hashlib.sha256(json.dumps([self.identity, part], sort_keys=True).encode()).hexdigest()[:32]}.safetensors"
        )

    def write(self, part: str, rows: int, batches: Iterable[Any]) -> None:
        """batches: answers to the pictures, in order; ``rows`` of them in all."""
        file = self.file(part)
        temporary = file.with_suffix(f".{os.getpid()}")
        layout: dict[str, Any] = {"__metadata__": {"rarefy": json.dumps({"identity": self.identity, "part": part})}}
        place = 0
        for index, one in enumerate(self.like):
            size = rows * math.prod(one.shape[1:]) * one.element_size()
            layout[str(index)] = {
                "dtype": _NAMES[one.dtype],
                "shape": [rows, *one.shape[1:]],
                "data_offsets": [place, place + size],
            }
            place += size
        header = json.dumps(layout).encode()
        header += b" " * (-len(header) % 8)
        free = shutil.disk_usage(self.folder).free
        if place > free:
            raise InputError(
                f"cache={self.folder}: the answers take {place / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; compare less (loss='lskd'), or leave it out"
            )
        try:
            with open(temporary, "wb") as written:
                written.write(struct.pack("<Q", len(header)) + header)
                written.truncate(8 + len(header) + place)
            self._fill(temporary, 8 + len(header), layout, rows, batches)
            os.replace(temporary, file)
        except OSError as error:
            raise InputError(
                f"cache={self.folder}: can't be written ({error.strerror}); free some space, or leave it out"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _fill(self, file: Path, begin: int, layout: Mapping[str, Any], rows: int, batches: Iterable[Any]) -> None:
        whole = np.memmap(file, np.uint8, "r+")
        regions = [
            whole[begin:][slice(*layout[str(index)]["data_offsets"])].reshape(rows, -1)
            for index in range(len(self.like))
        ]
        row = 0
        for batch in batches:
            leaves = pytree.tree_leaves(batch)
            for region, leaf in zip(regions, leaves):
                region[row : row + len(leaf)] = _bytes(leaf)
            row += len(leaves[0])
        if row != rows:
            raise InputError(
                f"cache: {row} pictures came, {rows} were announced; unreadable images can't be left out here: mend them, or leave cache out"
            )
        whole.flush()

    def read(self, part: str, rows: Tensor) -> Any:
        """Answers to the pictures in those rows, on the run's device. rows: int64, on the CPU."""
        file = self.file(part)
        if self.opened is None or self.opened[0] != file:
            self.opened = file, self._open(file, part)
        found = self.opened[1]
        places = {one.device: sent(rows, one.device) for one in found}
        return pytree.tree_unflatten([sent(one[places[one.device]], self.device) for one in found], self.shape)

    def _open(self, file: Path, part: str) -> list[Tensor]:
        """Mapped into memory, not read; on a GPU with room, copied there."""
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                told = json.loads((opened.metadata() or {})["rarefy"])
                if told != {"identity": self.identity, "part": part}:
                    raise ValueError("it is of another teacher or other data")
                found = [opened.get_tensor(str(index)) for index in range(len(self.like))]
            for one, like in zip(found, self.like):
                if one.shape[1:] != like.shape[1:] or one.dtype != like.dtype:
                    raise ValueError(f"it holds {tuple(one.shape)}, a row is {tuple(like.shape[1:])}")
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{file}: are no answers of these teachers ({type(error).__name__}: {error}); delete it"
            ) from error
        size = sum(one.nbytes for one in found)
        if self.device.type == "cuda" and size < _MOST_OF_A_GPU * torch.cuda.mem_get_info(self.device)[1]:
            return [one.to(self.device) for one in found]
        return found


def _bytes(rows: Tensor) -> Any:
    """(N, ...) -> (N, bytes of a row)."""
    return rows.detach().cpu().contiguous().view(len(rows), -1).view(torch.uint8).numpy()
