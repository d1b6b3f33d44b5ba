"""``model.pt2``: a file of ``torch.export.save``.

``torch.export.load`` unpickles objects (it falls back to the full unpickler for sample inputs, and evaluates
expressions of the file), so the file is looked through first, and one that holds more than tensors, ATen operators and
plain size expressions is refused; torch gets the members that were looked through, written anew. An expression goes to
sympy, which computes numbers in full: how large one may get is counted before (``_bits``).
"""

from __future__ import annotations

import ast
import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rarefy.errors import CaptureError, FormatError, InputError, first_line
from rarefy.models.source import FORMS, Request, Source
from rarefy.system import strict_json
from rarefy.system.files import content
from rarefy.system.memory import afford
from rarefy.system.quiet import quiet

# What a .pt2 may hold: operators by these names, and sizes written with these characters (torch hands them to sympify).
_OPERATORS = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+|torch\._sym_\w+")
_EXPRESSION = re.compile(r"[A-Za-z0-9_ +\-*/%(),<>=!&|~]{1,1000}")
_MOST_BITS = 1024  # of a number that an expression may come to
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
    data = _checked(text)
    try:
        with quiet("torch"):
            program = torch.export.load(io.BytesIO(data))
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
    """The file's members, written anew, if nothing in them is more than data."""
    if not os.path.exists(text):
        raise InputError(f"{text}: no such file; give {FORMS}")
    size = os.stat(text).st_size
    afford(3 * size, text, "end other programs, or give a smaller model")
    data = content(text, size)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = _parts(archive, text, size)
    except _BROKEN as error:
        raise FormatError(f"{text}: is no .pt2 file ({first_line(error)}); write one with torch.export.save") from error
    if not any(part.startswith("models/") for part in parts):
        raise FormatError(f"{text}: holds no model; write one with torch.export.save")
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for part, value in parts.items():
            archive.writestr(zipfile.ZipInfo(f"model/{part}"), value)
    return written.getvalue()


# What zipfile raises for a damaged file.
_BROKEN = (
    zipfile.BadZipFile, ValueError, KeyError, IndexError, OSError, NotImplementedError, EOFError, RuntimeError,
    OverflowError, struct.error,
)  # fmt: skip


def _parts(archive: zipfile.ZipFile, text: str, size: int) -> dict[str, bytes]:
    """Its members below the root, by name. Raises FormatError for one that can't be trusted."""
    members = archive.infolist()
    packed = next((one.filename for one in members if one.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None or sum(one.file_size for one in members) > size:
        what = repr(packed)[:80] if packed is not None else "what it holds"
        raise FormatError(
            f"{text}: {what} would take more bytes than the file has; save it again with torch.export.save"
        )
    names = [one.filename for one in members]
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or len(set(names)) != len(names):
        raise FormatError(f"{text}: is not laid out as torch.export.save does; save it again")
    parts = {}
    for one in members:
        part = one.filename.partition("/")[2]
        try:
            parts[part] = archive.read(one)
        except _BROKEN as error:
            raise FormatError(f"{text}: {part!r} is damaged; copy or write the file again") from error
        unsafe = _why_unsafe(part, parts[part])
        if unsafe:
            raise FormatError(
                f"{text}: {part}: {unsafe}; "
                "save it again with torch.export.save from a model of tensors and ATen operators only"
            )
    return parts


def _why_unsafe(part: str, data: bytes) -> str | None:
    """Why a part of a .pt2 can't be trusted, or None."""
    if part.startswith("data/aotinductor/"):
        return "is compiled code, not a model"
    if part.startswith(("data/weights/", "data/constants/")) and part.endswith(".pt"):
        return "is of the old format that unpickles objects"
    if part.startswith("data/sample_inputs/"):
        try:
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception:
            return "holds objects that would run code when loaded"
    if not part.endswith("_config.json") and not part.startswith("models/"):
        return None
    try:
        if len(data) > strict_json.MOST_BYTES:
            return f"is larger than {strict_json.MOST_BYTES:,} bytes"
        value = strict_json.parse(data, "it")
    except FormatError as error:
        return str(error)
    return _why_pickled(value) if part.endswith("_config.json") else _why_no_program(value)


def _why_pickled(value: Mapping[str, object]) -> str | None:
    payloads = value.get("config")
    if not isinstance(payloads, dict) or not all(isinstance(one, dict) for one in payloads.values()):
        return "lists no weights"
    for one in payloads.values():
        if one.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", str(one.get("path_name"))):
            return f"{str(one.get('path_name'))[:80]!r} is pickled"
    return None


def _why_no_program(value: Mapping[str, object]) -> str | None:
    for key, said in _strings(value):
        if key == "target" and not _OPERATORS.fullmatch(said):
            return f"operator {said[:80]!r} is none of torch's"
        if key == "expr_str" and not _is_size(said):
            return f"{said[:80]!r} is no size expression"
    return None


def _is_size(expression: str) -> bool:
    expression = re.sub(r"'([su]\d+)'", r"\1", expression)
    names = re.findall(r"[A-Za-z_]\w*", expression)
    if not _EXPRESSION.fullmatch(expression) or not all(
        re.fullmatch(r"[su]\d+", name) or name in _SYMPY_NAMES for name in names
    ):
        return False
    try:
        return _bits(ast.parse(expression.strip(), mode="eval").body) <= _MOST_BITS
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _bits(node: ast.AST) -> float:
    """A bound of the bits of what the expression comes to, where a symbol has 64; infinity for what is none."""
    if isinstance(node, ast.Constant):
        return float(int(node.value).bit_length()) if isinstance(node.value, int) else math.inf
    if isinstance(node, ast.Name):
        return 64.0
    inner = [_bits(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    function = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    power: Sequence[ast.AST] = ()
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        power = (node.left, node.right)
    elif isinstance(node, ast.Call) and function == "Pow":
        power = node.args
    if power:
        exponent = _whole(power[1]) if len(power) == 2 else None
        return math.inf if exponent is None else max(64.0, _bits(power[0]) * abs(exponent))
    if isinstance(node, ast.BinOp) or function in ("Mul", "Add"):
        return sum(inner) + 1
    return max(inner, default=0.0) + 1


def _whole(node: ast.AST) -> int | None:
    """The whole number that stands there: ``2``, ``-1``, ``Integer(2)``."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _whole(node.operand)
        return None if inner is None else -inner
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Integer"
        and len(node.args) == 1
    ):
        return _whole(node.args[0])
    return node.value if isinstance(node, ast.Constant) and type(node.value) is int else None


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
