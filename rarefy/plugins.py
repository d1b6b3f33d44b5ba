"""Choices as objects, and as text: ``"taylor:batches=50"`` is ``Taylor(batches=50)``.

A choice is a frozen dataclass whose fields are its options. Those that come with rarefy live one a file in a folder
(``criteria/ losses/ rounding/ calibration/ runtimes/``), and the file name is the registry: ``criteria/taylor.py``
holds the dataclass ``Taylor``, so adding a file adds a choice. A user's own needs no file of ours: pass the object, or
name it by its import path, ``"mylab.scores:MyScore"`` or ``"mylab.scores:MyScore:power=2"``.

    >>> resolve("criteria", "magnitude:p=1")
    Magnitude(p=1, ...)
    >>> describe(Magnitude(p=1))
    'magnitude:p=1'
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import pkgutil
import types
import typing
from typing import Any

from rarefy.errors import InputError
from rarefy.system.dependencies import own_module
from rarefy.system.options import LARGEST

# kind -> the folder of its choices
KINDS = {
    "criteria": "rarefy.pruning.criteria",
    "losses": "rarefy.distillation.losses",
    "rounding": "rarefy.quantization.rounding",
    "calibration": "rarefy.quantization.calibration",
    "runtimes": "rarefy.runtimes",
    "schedules": "rarefy.compression.schedules",
    "selection": "rarefy.pruning.selection",
    "saliency": "rarefy.pruning.saliency",
    "students": "rarefy.compression.students",
    "detectors": "rarefy.tasks.detectors",
    "loggers": "rarefy.system.loggers",
}
TASKS = "rarefy.tasks"
# file -> the name of its choice in texts, records and saved recipes, where it is another
ALIASES = {"rarefy.quantization.rounding.gptq_narrow": "narrow"}
# kind -> the module whose ``of(text)`` takes words that name none of its choices; its objects are described by their
# ``text``
OTHERS = {"students": "rarefy.compression.students._other", "loggers": "rarefy.system.loggers._folder"}


def available(kind: str) -> list[str]:
    """Names of the choices of ``kind`` that come with rarefy, sorted."""
    return sorted(ALIASES.get(f"{KINDS[kind]}.{name}", name) for name in _files(kind))


def _files(kind: str) -> list[str]:
    package = importlib.import_module(KINDS[kind])
    return [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]


def choice_class(kind: str, name: str) -> Any:
    """The dataclass in the file ``name`` of the kind's folder, or in the one that has that alias."""
    package = KINDS[kind]
    file = next((file for file in _files(kind) if name in (file, ALIASES.get(f"{package}.{file}"))), None)
    if file is None:
        raise InputError(
            f"{kind}: unknown choice {name!r}; have {', '.join(available(kind))}, or give package.module:Class"
        )
    found = _class_of(package, file)
    if found is None:
        raise InputError(f"{package}.{file} must define one dataclass named like the file")
    return found


def _class_of(package: str, name: str) -> Any:
    """The dataclass that is named like its file; None where there is none."""
    module = importlib.import_module(f"{package}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and dataclasses.is_dataclass(value)
        and value.__module__ == module.__name__
        and value.__name__.lower() == name.replace("_", "")
    ]
    return found[0] if len(found) == 1 else None


def tasks() -> list[str]:
    """Names of the tasks that come with rarefy: files of ``rarefy/tasks`` with a dataclass of their name."""
    package = importlib.import_module(TASKS)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg)
    return [name for name in names if _class_of(TASKS, name) is not None]


def task_class(text: str) -> Any:
    """The class of the task of that name, or at ``package.module:Class``. Raises InputError."""
    module, _, name = text.partition(":")
    if "." in module or name:
        return _imported(module, name)
    if text not in tasks():
        raise InputError(f"task: unknown {text!r}; have {', '.join(tasks())}, or give package.module:Class")
    return _class_of(TASKS, text)


def summary(kind: str, name: str) -> str:
    """First paragraph of what the choice's class (or else its file) says of itself, as one line."""
    cls = choice_class(kind, name)
    doc = cls.__doc__ or ""
    if doc.startswith(f"{cls.__name__}("):  # the docstring dataclass makes when there is none
        doc = importlib.import_module(cls.__module__).__doc__ or ""
    return " ".join(doc.strip().partition("\n\n")[0].split())


def resolve(kind: str, choice: Any) -> Any:
    """The object for ``choice``: an object passes through, text is looked up and its options parsed.

    Raises InputError for an unknown name, an unknown option or a value of the wrong type.
    """
    if not isinstance(choice, str):
        return choice
    text = choice.strip()
    head, _, tail = text.partition(":")
    if kind in OTHERS and head.replace("-", "_") not in available(kind):
        other = importlib.import_module(OTHERS[kind]).of(text)
        if other is not None:
            return other
    if "." in head:
        name, _, tail = tail.partition(":")
        cls = _imported(head, name)
    else:
        cls = choice_class(kind, head.replace("-", "_"))
    return build(cls, tail, text)


def several(kind: str, given: Any) -> list[Any]:
    """The objects for none, one or a list of choices."""
    if given is None:
        return []
    each = given if isinstance(given, (list, tuple)) else [given]
    return [resolve(kind, os.fspath(one) if isinstance(one, os.PathLike) else one) for one in each]


def describe(choice: Any) -> str:
    """The text ``resolve`` takes back; only options that differ from their default are written."""
    if isinstance(choice, str):
        return choice
    if type(choice).__module__ in OTHERS.values():
        return str(choice.text)
    name = name_of(choice)
    if not dataclasses.is_dataclass(choice):
        return name
    options = [
        f"{field.name}={_written(getattr(choice, field.name))}"
        for field in dataclasses.fields(choice)
        if getattr(choice, field.name) != field.default
    ]
    return f"{name}:{','.join(options)}" if options else name


def _written(value: object) -> str:
    """``8/16/32`` of a tuple; of a tuple of tuples ``8/16;32``."""
    if not isinstance(value, tuple):
        return str(value)
    nested = any(isinstance(item, tuple) for item in value)
    return (";" if nested else "/").join(map(_written, value))


def name_of(choice: object) -> str:
    """The text of a choice without its options."""
    cls = type(choice)
    if cls.__module__.startswith("rarefy."):
        return ALIASES.get(cls.__module__, cls.__module__.rpartition(".")[2])
    return f"{cls.__module__}:{cls.__name__}"


def _imported(module: str, name: str) -> Any:
    try:
        return getattr(own_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{module}:{name}: can't be imported ({error}); give package.module:Class") from error


def build(cls: Any, options: str, text: str) -> Any:
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    hints = typing.get_type_hints(cls) if fields else {}
    values = {}
    for part in filter(None, (part.strip() for part in options.split(","))):
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in fields:
            raise InputError(f"{text!r}: unknown option {part!r}; have {', '.join(sorted(fields)) or 'none'}")
        values[key] = _parse(value.strip(), hints[key], f"{text!r}: {key}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{text!r}: {error}") from error


def _parse(value: str, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        mark = ";" if typing.get_origin(inner) is tuple else "/"
        return tuple(_parse(part.strip(), inner, where) for part in value.split(mark) if part.strip())
    if typing.get_origin(hint) is typing.Literal and value in typing.get_args(hint):
        return value
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if type(None) in options and value.lower() == "none":
        return None
    if bool in options and value.lower() in ("true", "false", "yes", "no", "1", "0"):
        return value.lower() in ("true", "yes", "1")
    for kind in (int, float):
        if kind in options:
            try:
                number = kind(value)
            except ValueError:
                continue
            if abs(number) <= LARGEST or number == math.inf:  # a choice says whether it takes that
                return number
            raise InputError(f"{where}: {value[:40]!r} is too large, or no number")
    if str in options:
        return value
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise InputError(f"{where}: {value!r} is not {names}")
