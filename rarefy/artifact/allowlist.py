"""What a saved graph may call. ``save`` writes nothing else, and ``load`` runs nothing else.

A call is checked before a graph is built from it: its overload stands in aten.txt or the tables below; its arguments
are those of the operator's own schema, in number and in type; they keep the rules of its row; and a literal size among
them stays below ``MOST_ELEMENTS``. What takes shapes to say (lengths, memory, the type of a divisor) is checked when
the graph is tried on an example without numbers: ``rarefy.artifact.operators.trial``.

* aten overloads by name (aten.txt). An operator is there only if torch itself compares all that it reads with what is
  there, for any input and in any process; tests/artifact/test_drawn_operators.py draws arguments until one would not.
* rarefy's own operators: ``rarefy.kernels.OPERATORS``.
* arithmetic on sizes, from ``operator``, ``math`` and ``torch``.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources

import torch
from torch import fx

from rarefy.artifact.operators.schema import ANY, LIST, NUMBER, TENSOR, TENSORS, row_of
from rarefy.errors import FormatError
from rarefy.graph.nodes import Value
from rarefy.kernels import OPERATORS

# Elements a literal size may ask for: 8 GiB of float32.
MOST_ELEMENTS = 2**31
# Positions a literal padding, stride, dilation or kernel may span.
WIDEST = 2**16

# Letters of a text among the arguments: a mode, or einsum's formula.
_TEXT = re.compile(r"[A-Za-z0-9_.,> -]{0,200}")
# Numbers in a list, and tensors that one tensor is cut into.
MOST_NUMBERS = 4096

Target = Callable[..., Value]


def _table() -> dict[str, dict[str, str]]:
    """aten.txt: ``aten.NAME.OVERLOAD`` -> argument -> its rule. A row stands for the overloads that torch has."""
    rows: dict[str, dict[str, str]] = {}
    text = resources.files("rarefy.artifact").joinpath("aten.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        names, _, rest = line.partition("#")[0].partition("|")
        overloads, _, rules = rest.partition("|")
        rule = dict(pair.split(":", 1) for pair in rules.split())
        rows |= {f"aten.{name}.{overload}": rule for name in names.split() for overload in overloads.split()}
    return rows


ATEN = _table()

# name -> (function, number of arguments)
_OF_TWO = "add sub mul floordiv truediv mod pow eq ne lt le gt ge and_ or_".split()
FUNCTIONS: dict[str, tuple[Target, int]] = {
    "operator.getitem": (operator.getitem, 2),
    **{f"operator.{name}": (getattr(operator, name), 2) for name in _OF_TWO},
    **{f"operator.{name}": (getattr(operator, name), 1) for name in ("neg", "pos")},
    **{f"math.{name}": (getattr(math, name), 1) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": (getattr(torch, name), 1) for name in ("sym_float", "sym_int", "sym_not")},
    **{f"torch.{name}": (getattr(torch, name), 2) for name in ("sym_max", "sym_min")},
}
_NAME_OF: dict[object, str] = {function: name for name, (function, _) in FUNCTIONS.items()}
_OVERLOAD = re.compile(r"(aten|rarefy)\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z][A-Za-z0-9_]*)")

_SCALARS: dict[str, Callable[[object], bool]] = {
    "Tensor": lambda value: type(value) in (int, float, bool),  # a number stands for a tensor of one element
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),
    "number": lambda value: type(value) in (int, float, bool),
    "bool": lambda value: type(value) is bool,
    "str": lambda value: isinstance(value, str) and _TEXT.fullmatch(value) is not None,
    "ScalarType": lambda value: isinstance(value, torch.dtype),
    "Layout": lambda value: value is torch.strided,
    "MemoryFormat": lambda value: isinstance(value, torch.memory_format),
    "Device": lambda value: isinstance(value, torch.device),
}
_FROM_NODE: Mapping[str, Sequence[str]] = {
    "Tensor": (TENSOR, NUMBER, ANY),
    **dict.fromkeys(("int", "float", "number", "bool"), (NUMBER, ANY)),
}

_SIZES = {"size", "sizes", "shape", "repeats", "dims", "output_size"}
_SPANS = {"pad", "padding", "output_padding", "dilation", "kernel_size"}


def name_of(target: object) -> str:
    """``aten.conv2d.default``, ``operator.add``: the text ``function_named`` takes back.

    Raises FormatError if it would not.
    """
    name = str(target) if isinstance(target, torch._ops.OpOverload) else _NAME_OF.get(target, "")
    try:
        known = bool(name) and function_named(name) is target
    except FormatError:
        known = False
    if not known:
        raise FormatError(
            f"calls {target}, which is not in the list of operators a saved graph may call; export() writes such a "
            "graph, and torch.save(graph.state_dict()) its weights"
        )
    return name


@functools.cache
def rules_of(target: object) -> Mapping[str, str]:
    """Argument -> its rule, of an operator of aten.txt."""
    return ATEN.get(str(target), {})


@functools.cache
def function_named(name: str) -> Target:
    """The operator of that name. Raises FormatError if it is not in the list, or this torch has none such."""
    if name in FUNCTIONS:
        return FUNCTIONS[name][0]
    match = _OVERLOAD.fullmatch(name)
    if match and match[1] == "rarefy":
        for found in OPERATORS:
            if str(found) == name:
                return found
    if not match or match[1] == "rarefy" or name not in ATEN:
        raise FormatError(f"calls {name[:80]!r}, which is not in the list of operators a saved graph may call")
    packet = getattr(torch.ops.aten, match[2], None)
    if packet is None or match[3] not in packet.overloads():
        raise FormatError(
            f"calls {name}, which torch {torch.__version__} does not have; load with the torch that manifest.json names"
        )
    overload: torch._ops.OpOverload = getattr(packet, match[3])
    if overload._schema.is_mutable:
        raise FormatError(f"calls {name}, which changes its argument")
    return overload


def check_call(
    target: Target, args: Sequence[Value], kwargs: Mapping[str, Value], yields: Mapping[fx.Node, str]
) -> str:
    """Does the operator take these arguments?

    Returns what it yields; ``yields`` says so of the nodes among the arguments.

    Raises FormatError.
    """
    if target in _NAME_OF:
        return _check_function(_NAME_OF[target], args, kwargs, yields)
    assert isinstance(target, torch._ops.OpOverload)
    row = row_of(target)
    if len(args) > len(row.places):
        raise FormatError(f"{target} takes {len(row.places)} arguments, not {len(args)}")
    given = dict(zip(row.places, args, strict=False))
    twice = given.keys() & kwargs.keys()
    unknown = kwargs.keys() - row.names
    if twice or unknown:
        raise FormatError(f"{target} takes no argument {min(twice | unknown)[:80]!r}{' twice' if twice else ''}")
    given.update(kwargs)
    for name, kind, _, optional in row.parameters:
        if name not in given:
            if not optional:
                raise FormatError(f"{target} lacks its argument {name!r}")
            continue
        value = given[name]
        numeral = kind != "Tensor" or isinstance(value, fx.Node) or name in _NUMERALS
        if not _fits(value, kind, yields) or not numeral:
            raise FormatError(f"{target}: {name} must be {kind}, not {_said(value)}")
        _check_sizes(target, row.name, name, value, kind)
    if row.name == "arange":
        _check_arange(target, given)
    for name, rule in rules_of(target).items():
        reason = _broken(rule, given.get(name), given)
        if reason:
            raise FormatError(f"{target}: {name} must be {reason}, not {_said(given.get(name))}")
    return row.yields


# Tensors that a number may stand for.
_NUMERALS = {"other", "exponent"}


def _broken(rule: str, value: Value, given: Mapping[str, Value]) -> str:
    """What the argument must be, where it is not; of rules that no shape is needed for."""
    if rule == "statistics":  # batch norm's: what it writes to must be its own, and only training writes
        alone = given.get("running_mean") is None and given.get("running_var") is None
        flag = isinstance(value, fx.Node) and value.op == "get_attr" and value.target == "training"
        return "" if flag or value is False or (value is True and alone) else "false or the module's training flag"
    if rule == "stored":
        read = value if isinstance(value, (list, tuple)) else [value]
        kept = all(one is None or (isinstance(one, fx.Node) and one.op == "get_attr") for one in read)
        return "" if kept else "stored tensors"
    if rule == "none":
        return "" if value is None or value == 0 else "left out"
    if rule == "formula":
        good = isinstance(value, str) and value.count(",") <= 1
        return "" if good else "a formula of at most two tensors"
    if re.fullmatch(r"\d+-\d+", rule):
        least, most = map(int, rule.split("-"))
        return "" if type(value) in (int, float) and least <= value <= most else f"a number from {least} to {most}"
    if "/" in rule:
        return "" if value is None or value in rule.split("/") else f"one of {rule}"
    return ""


def _fits(value: object, kind: str, yields: Mapping[fx.Node, str]) -> bool:
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[9:-1], yields)
    if kind.startswith("List["):
        inner = kind[5:-1]
        if isinstance(value, fx.Node):
            return yields[value] in (TENSORS, LIST, ANY)
        if isinstance(value, (list, tuple)):
            return (inner == "Tensor" or len(value) <= MOST_NUMBERS) and all(
                _fits(item, inner, yields) for item in value
            )
        return inner in ("int", "float") and _fits(value, inner, yields)  # one number for all axes
    if isinstance(value, fx.Node):
        return yields[value] in _FROM_NODE.get(kind, ())
    return kind in _SCALARS and _SCALARS[kind](value)


def _check_sizes(target: Target, name: str, argument: str, value: object, kind: str) -> None:
    items = value if isinstance(value, (list, tuple)) else [value]
    numbers = [item for item in items if type(item) is int]
    if "int" not in kind or not numbers:
        return
    whole = math.prod(max(abs(number), 1) for number in numbers) if argument in _SIZES else max(map(abs, numbers))
    position = name.startswith("slice") and argument in ("start", "end")  # 2**63 - 1 is "to the end"
    most = 2**63 if position else WIDEST if argument in _SPANS else MOST_ELEMENTS
    if whole > most:
        raise FormatError(f"{target}: {argument} = {_said(value)} is too large (at most {most})")


def _check_arange(target: Target, given: Mapping[str, Value]) -> None:
    start, end, step = given.get("start", 0), given.get("end"), given.get("step", 1)
    if not all(type(value) in (int, float) for value in (start, end, step)):
        return  # a size that is only known when the graph runs
    if not step or not abs((end - start) / step) <= MOST_ELEMENTS:  # written so that NaN is refused too
        raise FormatError(f"{target}: from {start} to {end} by {step} is too large (at most {MOST_ELEMENTS} elements)")


def _check_function(
    name: str, args: Sequence[Value], kwargs: Mapping[str, Value], yields: Mapping[fx.Node, str]
) -> str:
    if len(args) != FUNCTIONS[name][1] or kwargs:
        raise FormatError(f"{name} takes {FUNCTIONS[name][1]} arguments, not {len(args) + len(kwargs)}")
    if name == "operator.getitem":
        source, index = args
        if not isinstance(source, fx.Node) or yields[source] not in (TENSORS, LIST, ANY):
            raise FormatError("operator.getitem takes an element of a list of tensors")
        if type(index) is not int or abs(index) > MOST_ELEMENTS:
            raise FormatError(f"operator.getitem takes a whole number as index, not {_said(index)}")
        return TENSOR if yields[source] == TENSORS else ANY
    for value in args:
        if isinstance(value, fx.Node):
            if yields[value] not in (NUMBER, ANY):
                raise FormatError(f"{name} takes numbers, not the {yields[value]} {value.name}")
        elif type(value) not in (int, float, bool) or abs(value) > 2**63:
            raise FormatError(f"{name} takes numbers, not {_said(value)}")
    if name == "operator.pow" and not (type(args[1]) in (int, float) and abs(args[1]) <= 8):
        raise FormatError(f"operator.pow takes a literal exponent up to 8, not {_said(args[1])}")
    return NUMBER


def _said(value: object) -> str:
    return repr(value)[:60]
