"""The teachers' answers on disk: computed once, and read in every later epoch and run.

They are worth it where the same pictures come again:

* an image is always the same picture (no augmentation, no mixing): one file, a row an image, of use from the second
  epoch on;
* pictures vary, but by seed: a file an epoch, a row a picture, of use to a later run with the same seed and batch size
  (another loss, another student).

A file is safetensors, written row by row, so that memory stays small, and renamed into place when it is whole. Its name
is the hash of all that the answers depend on (the teachers' digest, the data's fingerprint, precision, layout, and what
draws the pictures), which stands in its header too and is checked when it is read.

Given up: the answers are stored as the teachers give them, features included, which for whole stages is large (three
stages of a CIFAR ResNet in
float32: 115 kB an image); and a data set that draws random numbers of its own is out of reach, as it is for an exact
    resume.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils import _pytree as pytree

from rarefy.data.augmentation import sent
from rarefy.distillation.batches import Batches
from rarefy.distillation.objective import Answer, Objective
from rarefy.errors import FormatError, InputError
from rarefy.system.files import check_room, replacing

_MOST_OF_A_GPU = 0.125  # of its memory, for answers that stay there
_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Region(TypedDict):
    """One tensor's entry in the header of a safetensors file; offsets in bytes, from the header's end."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


class Answers:
    """A folder of them, for one run. like: answers to a few pictures, which say what a row is."""

    def __init__(self, folder: str | Path, identity: Mapping[str, object], like: Answer, device: torch.device):
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
        name = json.dumps([self.identity, part], sort_keys=True)
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def write(self, part: str, rows: int, batches: Iterable[Answer]) -> None:
        """batches: answers to the pictures, in order; ``rows`` of them in all."""
        file = self.file(part)
        metadata = {"__metadata__": {"rarefy": json.dumps({"identity": self.identity, "part": part})}}
        layout: dict[str, Region] = {}
        place = 0
        for index, one in enumerate(self.like):
            size = rows * math.prod(one.shape[1:]) * one.element_size()
            layout[str(index)] = {
                "dtype": _NAMES[one.dtype],
                "shape": [rows, *one.shape[1:]],
                "data_offsets": [place, place + size],
            }
            place += size
        header = json.dumps({**metadata, **layout}).encode()
        header += b" " * (-len(header) % 8)
        check_room(self.folder, place, "a cache of answers", "compare less (loss='lskd'), or leave the cache out")
        try:
            with replacing(file) as partial:
                with open(partial, "wb") as written:
                    written.write(struct.pack("<Q", len(header)) + header)
                    written.truncate(8 + len(header) + place)
                self._fill(partial, 8 + len(header), layout, rows, batches)
        except OSError as error:
            raise InputError(
                f"cache={self.folder}: can't be written ({error.strerror}); free some space, or leave it out"
            ) from error

    def _fill(self, file: Path, begin: int, layout: Mapping[str, Region], rows: int, batches: Iterable[Answer]) -> None:
        whole = np.memmap(file, np.uint8, "r+")
        regions = [whole[begin:][slice(*one["data_offsets"])].reshape(rows, -1) for one in layout.values()]
        row = 0
        for batch in batches:
            leaves = pytree.tree_leaves(batch)
            for region, leaf in zip(regions, leaves):
                region[row : row + len(leaf)] = _bytes(leaf)
            row += len(leaves[0])
        if row != rows:
            raise InputError(
                f"cache: {row} pictures came, {rows} were announced; unreadable images can't be left out here: "
                "mend them, or leave cache out"
            )
        whole.flush()

    def read(self, part: str, rows: Tensor) -> Answer:
        """Answers to the pictures in those rows, on the run's device. rows: int64, on the CPU."""
        file = self.file(part)
        if self.opened is None or self.opened[0] != file:
            self.opened = file, self._open(file, part)
        whole = self.opened[1]
        places = {one.device: sent(rows, one.device) for one in whole}
        values = [sent(one[places[one.device]], self.device) for one in whole]
        return cast(Answer, pytree.tree_unflatten(values, self.shape))

    def _open(self, file: Path, part: str) -> list[Tensor]:
        """Mapped into memory, not read; on a GPU with room, copied there."""
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                metadata = json.loads((opened.metadata() or {})["rarefy"])
                if metadata != {"identity": self.identity, "part": part}:
                    raise ValueError("it is of another teacher or other data")
                tensors = [opened.get_tensor(str(index)) for index in range(len(self.like))]
            for one, like in zip(tensors, self.like):
                if one.shape[1:] != like.shape[1:] or one.dtype != like.dtype:
                    raise ValueError(f"it holds {tuple(one.shape)}, a row is {tuple(like.shape[1:])}")
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{file}: are no answers of these teachers ({type(error).__name__}: {error}); delete it"
            ) from error
        size = sum(one.nbytes for one in tensors)
        if self.device.type == "cuda" and size < _MOST_OF_A_GPU * torch.cuda.mem_get_info(self.device)[1]:
            return [one.to(self.device) for one in tensors]
        return tensors


class Memory:
    """The answers that a training needs, an epoch after the other.

    teachers: their digests. fixed: an image is the same picture in every epoch.
    """

    def __init__(
        self,
        folder: str | Path,
        objective: Objective,
        batches: Batches,
        teachers: Sequence[str],
        accelerator: Accelerator,
    ):
        self.objective, self.batches, self.accelerator = objective, batches, accelerator
        task, training, device = batches.task, batches.training, batches.device
        self.fixed = self._order(0) is not None and not (training.mixup or training.cutmix)
        drawn = {name: getattr(training, name) for name in ("seed", "batch_size", "mixup", "cutmix")}
        identity = {
            "teachers": list(teachers),
            "taps": objective.matched,
            "data": task.data.fingerprint("train"),
            "task": {key: value for key, value in task.describe().items() if key not in ("train", "val")},
            "layout": [objective.bf16, batches.channels_last, device.type],
            "draws": None if self.fixed else drawn,
        }
        like = self._asked(torch.zeros(2, *task.data.input_shape, device=device))
        self.answers = Answers(folder, identity, like, device)

    def rows(self, epoch: int) -> Sequence[Tensor]:
        """Which rows each of the epoch's batches has in its file, which is written now if it is not there yet."""
        if not self.answers.file(self._part(epoch)).exists() and self.accelerator.is_main_process:
            self._write(epoch)
        self.accelerator.wait_for_everyone()
        size = self.batches.training.batch_size
        order = self._order(epoch) if self.fixed else None
        return order if order is not None else torch.arange(self.batches.per_epoch * size).split(size)

    def read(self, epoch: int, rows: Tensor) -> Answer:
        """Answers to the pictures in those rows of the epoch's file."""
        return self.answers.read(self._part(epoch), rows)

    def _write(self, epoch: int) -> None:
        data, size = self.batches.task.data, self.batches.training.batch_size
        if self.fixed:
            count = data.length("train")
            pictures = data.batches("train", size, device=self.batches.device, labelled=False)
        else:
            count = self.batches.per_epoch * size
            pictures = itertools.islice(self.batches.of_epoch(epoch), self.batches.per_epoch)
        self.answers.write(self._part(epoch), count, (self._asked(inputs) for inputs, _ in pictures))

    def _part(self, epoch: int) -> str:
        return "all" if self.fixed else f"epoch {epoch}"

    def _asked(self, inputs: Tensor) -> Answer:
        return self.objective.answers(self.batches.laid_out(inputs))

    def _order(self, epoch: int) -> Sequence[Tensor] | None:
        """Which images each batch holds."""
        training = self.batches.training
        return self.batches.task.data.rows("train", training.batch_size, shuffle_seed=training.seed, epoch=epoch)


def _bytes(rows: Tensor) -> npt.NDArray[np.uint8]:
    """(N, ...) -> (N, bytes of a row)."""
    flat: npt.NDArray[np.uint8] = rows.detach().cpu().contiguous().view(len(rows), -1).view(torch.uint8).numpy()
    return flat
