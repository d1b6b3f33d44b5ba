"""``model.pt2``: a file of ``torch.export.save``.

``torch.export.load`` unpickles objects (it falls back to the full unpickler for sample inputs, and evaluates
expressions of the file), so the file is looked through first, and one that holds more than tensors, ATen operators and
plain size expressions is refused.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from rarefy.errors import CaptureError, FormatError, InputError, first_line
from rarefy.models.source import FORMS, Request, Source
from rarefy.system.quiet import quiet

# What a .pt2 may hold: operators by these names, and sizes written with these characters (torch hands them to sympify).
_OPERATORS = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+|torch\._sym_\w+")
_EXPRESSION = re.compile(r"[A-Za-z0-9_ +\-*/%(),<>=!&|~]*")
_SYMPY_NAMES = set(
    "Symbol Integer Add Mul Pow Max Min Mod FloorDiv CeilDiv CleanDiv PythonMod ModularIndexing IntTrueDiv Where "
    "Eq Ne Ge Gt Le Lt And Or Not Equality Unequality GreaterThan LessThan StrictGreaterThan StrictLessThan "
    "positive nonnegative integer True False oo int_oo".split()
)


def exported(request: Request) -> Source | None:
    """A program of one image tensor whose batch is free."""
    text = request.text
    if not text.endswith(".pt2"):
        return None
    content = _checked(text)
    try:
        with quiet("torch"):
            program = torch.export.load(io.BytesIO(content))
        module = program.module(check_guards=False)
    except Exception as error:
        raise FormatError(
            f"{text}: torch {torch.__version__} can't read it ({first_line(error)}); "
            "save it again with torch.export.save"
        ) from error
    for name in ("train", "eval"):  # they refuse; the graph that capture makes of it has working ones
        vars(module).pop(name, None)
    signature, nodes = program.graph_signature, program.graph.nodes
    inputs = [node.meta["val"] for node in nodes if node.op == "placeholder" and node.name in signature.user_inputs]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise InputError(f"{text}: takes {len(inputs)} inputs; rarefy's commands take models of one image tensor")
    if isinstance(inputs[0].shape[0], int):
        raise CaptureError(
            f"{text}: was exported for batches of {inputs[0].shape[0]} only; "
            "export it again with dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)"
        )
    if request.classes is not None:
        outputs = [node.meta["val"] for node in nodes if node.name in signature.user_outputs]
        request.check_classes([tuple(value.shape[1:]) for value in outputs])
    sizes = inputs[0].shape[1:]
    return Source(text, module, tuple(sizes) if all(isinstance(size, int) for size in sizes) else None)


def _checked(text: str) -> bytes:
    """The file's bytes, if nothing in it is more than data."""
    path = Path(text)
    if not path.is_file():
        raise InputError(f"{text}: no such file; give {FORMS}")
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = _parts(archive, text)
    except (zipfile.BadZipFile, ValueError, KeyError, OSError, NotImplementedError) as error:
        raise FormatError(f"{text}: is no .pt2 file ({first_line(error)}); write one with torch.export.save") from error
    if not any(part.startswith("models/") for part in parts):
        raise FormatError(f"{text}: holds no model; write one with torch.export.save")
    return content


def _parts(archive: zipfile.ZipFile, text: str) -> list[str]:
    """Names of its members below the root. Raises FormatError for one that can't be trusted."""
    damaged = archive.testzip()
    if damaged is not None:
        raise FormatError(f"{text}: {damaged} is damaged; copy or write the file again")
    names = archive.namelist()
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or len(set(names)) != len(names):
        raise FormatError(f"{text}: is not laid out as torch.export.save does; save it again")
    parts = [name.partition("/")[2] for name in names]
    for name, part in zip(names, parts, strict=True):
        why = _why_unsafe(part, lambda name=name: archive.read(name))  # type: ignore[misc]
        if why:
            raise FormatError(
                f"{text}: {part}: {why}; "
                "save it again with torch.export.save from a model of tensors and ATen operators only"
            )
    return parts


def _why_unsafe(part: str, read: Callable[[], bytes]) -> str | None:
    """Why a part of a .pt2 can't be trusted, or None."""
    if part.startswith("data/aotinductor/"):
        return "is compiled code, not a model"
    if part.startswith(("data/weights/", "data/constants/")) and part.endswith(".pt"):
        return "is of the old format that unpickles objects"
    if part.startswith("data/sample_inputs/"):
        try:
            torch.load(io.BytesIO(read()), map_location="cpu", weights_only=True)
        except Exception:
            return "holds objects that would run code when loaded"
    if part.endswith("_config.json"):
        for payload in json.loads(read()).get("config", {}).values():
            if payload.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", str(payload.get("path_name"))):
                return f"{payload.get('path_name')} is pickled"
    if part.startswith("models/"):
        for key, value in _strings(json.loads(read())):
            if key == "target" and not _OPERATORS.fullmatch(value):
                return f"operator {value!r} is none of torch's"
            if key == "expr_str" and not _is_size(value):
                return f"{value!r} is no size expression"
    return None


def _is_size(expression: str) -> bool:
    expression = re.sub(r"'([su]\d+)'", r"\1", expression)
    names = re.findall(r"[A-Za-z_]\w*", expression)
    return bool(_EXPRESSION.fullmatch(expression)) and all(
        re.fullmatch(r"[su]\d+", name) or name in _SYMPY_NAMES for name in names
    )


def _strings(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every text in JSON."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
