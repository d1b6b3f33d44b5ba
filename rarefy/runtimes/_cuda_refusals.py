"""What a GPU refuses, in one line with the way out: none that this runs on, too little memory, any other failure."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rarefy.errors import InputError, RarefyError, first_line

AMPERE = (8, 0)


def devices_of(text: str) -> list[torch.device]:
    """Raises InputError where there is no GPU that this runs on, in one line with the way out."""
    reason = ""
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as error:
        reason, count = first_line(error), 0
    if not count:
        raise InputError(no_gpu(reason or "torch finds no GPU"))
    numbers = range(count) if text == "all" else [int(text)]
    for number in numbers:
        if number >= count:
            there = "there is one GPU, number 0" if count == 1 else f"there are {count} GPUs, 0 to {count - 1}"
            raise InputError(f"cuda: devices={text}: {there}")
        if torch.cuda.get_device_capability(number) < AMPERE:
            name = torch.cuda.get_device_name(number)
            raise InputError(
                f"cuda: {name} is older than Ampere (compute capability 8.0), whose int8 kernels these are; "
                "use --runtime inductor:device=cuda"
            )
    return [torch.device("cuda", number) for number in numbers]


def no_gpu(told: str) -> str:
    """In one line. told: by torch, which in some places asks for a newer driver in several."""
    way = "use --runtime onnxruntime or openvino on this machine"
    if "not compiled with CUDA" in told:
        way = "pip install torch --index-url https://download.pytorch.org/whl/cu130"
    elif "driver" in told and ("too old" in told or "insufficient" in told):
        way = "install a newer NVIDIA driver, or a torch built for this one (pytorch.org/get-started)"
        told = told.partition(" Please ")[0].rstrip(". ")
    return f"cuda: no usable NVIDIA GPU ({told}); {way}"


def is_memory(error: BaseException | None) -> bool:
    """Is it, or was it caused by, too little of the GPU's memory? Compilers and libraries wrap what torch raises."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def reported(path: str | os.PathLike[str], given: Sequence[Tensor]) -> Iterator[None]:
    """What goes wrong on the GPU, in one line."""
    try:
        yield
    except RarefyError:
        raise
    except Exception as error:
        if is_memory(error):
            torch.cuda.empty_cache()
            way = "give a smaller batch" if len(given[0]) > 1 else "free memory that others hold, or use a larger GPU"
            raise InputError(
                f"{path}: a batch of {len(given[0])} does not fit into the GPU's memory "
                f"({first_line(error)[:80]}); {way}"
            ) from error
        shapes = " and ".join(str(list(one.shape)) for one in given)
        raise InputError(
            f"{path}: can't be run on the GPU on inputs of {shapes} ({first_line(error)}); "
            "give inputs of the shapes that it was captured with, or use --runtime inductor:device=cuda"
        ) from error
