"""Files of weights: what tensors lie in one, by name, without running anything that the file says.

=============================  ====================================================================================
``*.safetensors``              named tensors
``*.index.json``               of weights in several files, as Hugging Face writes them; these lie beside it
anything else                  ``torch.save``: the zip form, and the one before it
=============================  ====================================================================================

``torch.load(weights_only=True)`` reads what is of torch. Beside the tensors training code leaves objects: arguments, a
configuration, a path. Their classes are not looked up: for each name that torch does not know an inert class stands in
(``StandIn``), which takes what it is given and does nothing, so that the tensors can be had and no code of the file or
of its author runs. A file that *calls* something of Python's own but plain data is refused as hostile.
"""

from __future__ import annotations

import _compat_pickle
import contextlib
import os
import pickletools
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, Self, cast

import torch
from torch import Tensor

from rarefy.errors import FormatError, InputError, first_line
from rarefy.system import strict_json
from rarefy.system.files import content, plain
from rarefy.system.memory import afford
from rarefy.system.strict_json import said

# What torch.load raises for a file that is no checkpoint.
_BROKEN = (
    RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, zipfile.BadZipFile,
    OverflowError, AssertionError, NotImplementedError, OSError, RecursionError, struct.error, MemoryError,
)  # fmt: skip
_PYTHONS = sys.stdlib_module_names | _compat_pickle.IMPORT_MAPPING.keys()  # modules, of Python 2 too
# Of Python itself, what a file may ask to be made: plain data. The stand-in is made in its place all the same.
_PLAIN = ("argparse", "collections", "datetime", "decimal", "enum", "fractions", "pathlib", "types", "uuid")
_PLAIN_NAMES = {"functools.partial", "builtins.dict", "builtins.list", "builtins.tuple", "builtins.frozenset"}
_MOST_PICKLED = 1 << 28  # bytes of names and numbers; tensors lie outside
_MOST_UNPACKED = 1 << 24  # bytes beside the tensors, which torch does not compress
_MOST_NESTED = 6  # dictionaries in dictionaries
_MOST_KINDS = 16  # of dictionaries: for each the file is read once more
_SAVE = "torch.save(model.state_dict(), 'weights.pth')"


class _Inert(type):
    """Of a class that stands in: to make an object of it is no call of what its name says."""

    def __call__(cls, *_: object, **__: object) -> object:
        root = cls.__qualname__.partition(".")[0]
        if root in _PYTHONS and root not in _PLAIN and cls.__qualname__ not in _PLAIN_NAMES:
            raise UnpicklingError(f"calls {cls.__qualname__}")
        made: object = cls.__new__(cls)  # type: ignore[call-overload]
        return made

    def __repr__(cls) -> str:
        return cls.__qualname__


class StandIn(list[object], metaclass=_Inert):
    """In place of an object of a class that torch does not know; ``__qualname__`` of the class is what it was.

    A list, since torch lets a file append to nothing else.
    """

    def __new__(cls, *_: object, **__: object) -> Self:
        return list.__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


class _Dictionary(StandIn):
    """In place of one of a dictionary's kind: torch lets a file set items of its own dictionaries alone."""

    def __new__(cls, *_: object, **__: object) -> Self:
        return OrderedDict()  # type: ignore[return-value]


def entries(path: Path) -> dict[str, dict[str, Tensor]]:
    """The file's tensors: those of each dictionary under its place there, ``{"": {...}, "ema.module": {...}}``.

    Raises InputError where there is no such file, FormatError for one that is broken, hostile or holds no named
    tensors.
    """
    if not os.path.exists(path):  # unlike path.exists(), it raises for no name
        raise InputError(
            f"{path}: no such file; --weights takes a .safetensors file or a checkpoint of model.state_dict()"
        )
    if os.path.isdir(path):
        inside = next((one.name for one in sorted(path.iterdir()) if one.name.endswith(_SHOWN)), None)
        told = f"; pass --weights {path / inside}" if inside else ""
        raise InputError(
            f"{path}: is a folder; --weights takes a file (a folder saved by rarefy is given as the model itself){told}"
        )
    plain(path)
    afford(path.stat().st_size, str(path), "end other programs, or give a smaller file")
    if _is_safetensors(path):
        return {"": _safetensors(path)}
    if path.name.endswith(".index.json"):
        return {"": _sharded(path)}
    held = _loaded(path)
    found = dict(_dictionaries(held))
    if not found:
        raise FormatError(f"{path}: {_why_empty(held)}")
    return found


def _is_safetensors(path: Path) -> bool:
    """Also of another name: by a length of 8 bytes, then JSON."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


_SHOWN = (".safetensors", ".index.json", ".pth", ".pt", ".ckpt", ".bin")


def _dictionaries(held: object, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if not isinstance(held, Mapping) or depth > _MOST_NESTED:
        return
    tensors = {str(key): value for key, value in held.items() if isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in held.items():
        yield from _dictionaries(value, f"{place}.{key}" if place else str(key), depth + 1)


def _why_empty(held: object) -> str:
    whole = held if isinstance(held, StandIn) else None
    if isinstance(held, Mapping):
        whole = next((value for value in held.values() if isinstance(value, StandIn)), None)
    if whole is not None:
        return (
            f"holds a pickled object ({type(whole).__qualname__}) in place of named tensors, and loading it would run "
            f"code; where its code is: {_SAVE}, and give that file"
        )
    return "no named tensors in it; save model.state_dict() (alone, or under the key 'state_dict' or 'model')"


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        with path.open("rb") as file:
            torchs = file.read(4).startswith((b"PK\x03\x04", b"\x80\x02"))
        way_out = f"torch.save wrote it: call it {path.stem}.pth" if torchs else "download or write it again"
        raise FormatError(f"{path}: is no safetensors file ({error}); {way_out}") from error
    return tensors


def _sharded(path: Path) -> dict[str, Tensor]:
    """``{"weight_map": {name: file}}``: the files lie in the same folder."""
    try:
        files = strict_json.parse(content(path, strict_json.MOST_BYTES), path)["weight_map"]
        names = sorted(set(files.values()))
    except (FormatError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path}: is no index of weights (no 'weight_map' of names and files); download it again"
        ) from error
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name or name.endswith(".json"):
            raise FormatError(f"{path}: {said(name)} is no file beside it; download it again")
    parts = [entries(path.with_name(name)) for name in names]
    return {name: value for part in parts for tensors in part.values() for name, value in tensors.items()}


def _loaded(path: Path) -> object:
    """What the file holds, with stand-ins for what is not torch's."""
    _check_members(path)
    try:
        return _load(path)
    except UnpicklingError:
        pass
    except _BROKEN as error:
        raise _broken(path, error) from error
    try:
        return _load_beside(path)
    except UnpicklingError as error:
        raise FormatError(
            f"{path}: holds more than tensors, and loading it would run code of the file ({_reason(error)}); "
            "save the weights alone: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error
    except _BROKEN as error:
        raise _broken(path, error) from error


def _check_members(path: Path) -> None:
    """torch stores: members that are compressed, or share their bytes, would take more than the file."""
    if not _is_zip(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise _broken(path, error) from error
    unpacked, stored = sum(one.file_size for one in members), path.stat().st_size
    if unpacked > stored + _MOST_UNPACKED:
        raise FormatError(
            f"{path}: would take {unpacked:,} bytes, and has {stored:,}, where torch stores tensors as they are; "
            f"write it again: {_SAVE}"
        )


def _is_zip(path: Path) -> bool:
    """Also one that is damaged where Python looks for its end."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def _load_beside(path: Path) -> object:
    kinds: dict[str, type[StandIn]] = dict.fromkeys(_asked_for(path), StandIn)
    while True:
        inert: list[Any] = [(_Inert(name, (kind,), {}), name) for name, kind in kinds.items()]
        try:
            with torch.serialization.safe_globals(inert):
                return _load(path)
        except UnpicklingError as error:
            name = str(error).rpartition("but got ")[2].split()[0]  # torch's word of what is no dictionary to it
            if (
                "SETITEM" not in str(error)
                or kinds.get(name) is not StandIn
                or sum(kind is _Dictionary for kind in kinds.values()) == _MOST_KINDS
            ):
                raise
            kinds[name] = _Dictionary


def _load(path: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of what it then refuses
        held: object = torch.load(path, map_location="cpu", weights_only=True)
    return held


def _broken(path: Path, error: Exception) -> FormatError:
    if "TorchScript" in str(error):
        return FormatError(
            f"{path}: is a TorchScript program; give its weights: "
            "torch.save(torch.jit.load(file).state_dict(), 'weights.pth')"
        )
    if path.suffix == ".npz" or ".npy" in str(error):
        return FormatError(
            f"{path}: holds arrays of NumPy, not weights of torch; "
            "safetensors.numpy.save_file(dict(numpy.load(file)), 'weights.safetensors'), and give that file"
        )
    return FormatError(
        f"{path}: is no checkpoint torch can read ({first_line(error)}); "
        "give .safetensors or torch.save(model.state_dict())"
    )


def _reason(error: Exception) -> str:
    """What torch refused, without its advice to load the file anyway."""
    said = str(error).rpartition("WeightsUnpickler error: ")[2]
    return next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__).split(". ")[0][:120]


def _asked_for(path: Path) -> list[str]:
    """Names of the classes and functions that the file's pickles name; none is looked up."""
    found: dict[str, None] = {}
    with contextlib.suppress(ValueError):  # the end of what is a pickle
        for pickled in _pickles(path):
            for operator, argument, _ in pickletools.genops(cast(IO[bytes], pickled)):
                if operator.name == "GLOBAL":
                    module, _, name = str(argument).partition(" ")
                    now = _compat_pickle.NAME_MAPPING.get((module, name))  # torch saves names of Python 2
                    module, name = now or (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
                    found |= {str(argument).replace(" ", "."): None, f"{module}.{name}": None}
    return list(found)


class _Bounded:
    """A file that is asked for no more bytes at once than it has: room for them is taken first."""

    def __init__(self, file: IO[bytes], size: int):
        self.file, self.size = file, size

    def read(self, count: int = -1) -> bytes:
        return self.file.read(min(count, self.size))

    def readline(self, count: int = -1) -> bytes:
        return self.file.readline(count)

    def tell(self) -> int:
        return self.file.tell()


def _pickles(path: Path) -> Iterator[_Bounded]:
    if _is_zip(path):
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                if part.filename.endswith("data.pkl") and part.file_size <= _MOST_PICKLED:
                    with archive.open(part) as pickled:
                        yield _Bounded(pickled, part.file_size)
        return
    with path.open("rb") as file:
        for _ in range(4):  # number, version and machine, then the content
            yield _Bounded(file, path.stat().st_size)
