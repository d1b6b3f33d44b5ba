"""Weights from a file: safetensors, or a checkpoint that ``torch.load(weights_only=True)`` can read.

A checkpoint is a state_dict, or one under ``state_dict`` or ``model``; the prefixes of DataParallel and torch.compile
are taken off. Every tensor must find its place.
"""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from rarefy.errors import FormatError, InputError, first_line
from rarefy.models.source import Source, by

# What torch.load raises for a file that is no checkpoint.
_BROKEN = (
    RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, zipfile.BadZipFile,
)  # fmt: skip


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put the tensors of ``path`` into ``model``, every one at its place.

    Raises InputError where a tensor is missing, unexpected or of another shape (the first of each kind is named, and
    how many there are); FormatError for a file that is broken or that holds objects.
    """
    given, wanted = _strip(read_weights(path)), model.state_dict()
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in wanted]
    shapes = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    wrong = []
    if shapes:
        there, here = given[shapes[0]].shape, wanted[shapes[0]].shape
        hint = "; pass --classes" if there[1:] == here[1:] else ""
        wrong.append(f"{shapes[0]} is {by(there)} there and {by(here)} in the model{_more(shapes)}{hint}")
    if missing:
        wrong.append(f"{missing[0]} is missing there{_more(missing)}")
    if unexpected:
        wrong.append(f"{unexpected[0]} is not in the model{_more(unexpected)}")
    if wrong:
        raise InputError(
            f"{path}: does not fit the model: {'; '.join(wrong)}; give the weights of this very architecture"
        )
    model.load_state_dict(given, strict=False)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The named tensors of a safetensors file or of a checkpoint, without running anything the file says."""
    file = Path(path)
    if not file.exists():
        raise InputError(
            f"{file}: no such file; --weights takes a .safetensors file or a checkpoint of model.state_dict()"
        )
    if file.is_dir():
        raise InputError(
            f"{file}: is a folder; --weights takes a file (a folder saved by rarefy is given as the model itself)"
        )
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors: dict[str, Tensor] = load_file(file)
            return tensors
        except SafetensorError as error:
            raise FormatError(f"{file}: is no safetensors file ({error}); download or write it again") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what it then refuses
            content = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise FormatError(
            f"{file}: holds more than tensors, and loading it would run code of the file; "
            "save the weights alone: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error
    except _BROKEN as error:
        raise FormatError(
            f"{file}: is no checkpoint torch can read ({first_line(error)}); "
            "give .safetensors or torch.save(model.state_dict())"
        ) from error
    content = content if isinstance(content, dict) else {}
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise FormatError(
            f"{file}: no named tensors in it; save model.state_dict() (alone, or under the key 'state_dict' or 'model')"
        )
    return tensors


def check_finite(source: Source) -> None:
    """Raises InputError for weights that are NaN or infinite."""
    for name, value in source.model.state_dict().items():
        if value.is_floating_point() and not math.isfinite(value.sum(dtype=torch.float64).item()):
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise InputError(
                    f"{source.weights or source.text}: {name} holds {bad} values that are NaN or infinite; "
                    "give weights from before the training diverged"
                )


def _strip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
