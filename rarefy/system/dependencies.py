"""Packages that rarefy can do without until a step needs them, and modules of the user's own.

A module is code: importing it runs it. Who names one on the command line or in Python means it to run; a recipe may be
a stranger's, and the module that it names lie beside it (``asking``).
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import importlib.machinery
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from rarefy.errors import InputError, MissingDependency


def needs(package: str, extra: str = "onnx") -> Any:
    """The package, imported; MissingDependency with the pip line of ``extra`` where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependency(package, extra) from error


_asking: contextvars.ContextVar[Path | None] = contextvars.ContextVar("_asking", default=None)


@contextlib.contextmanager
def asking(recipe: Path) -> Iterator[None]:
    """Meanwhile no module is imported that lies beside the recipe or in the working folder: InputError says which.

    Nor can one there take an installed package's place: the working folder is searched no more.
    """
    token, before = _asking.set(recipe), list(sys.path)
    sys.path[:] = [place for place in before if place and not _is_below(Path(place).resolve(), _folders(recipe))]
    try:
        yield
    finally:
        _asking.reset(token)
        sys.path[:] = before


def own_module(name: str) -> ModuleType:
    """The module of the user's own, imported from the working folder too. Raises InputError under ``asking``."""
    recipe, here = _asking.get(), os.getcwd()
    if recipe is not None:
        root = name.partition(".")[0]
        for place in dict.fromkeys(map(str, _folders(recipe))) if root not in sys.modules else ():
            spec = importlib.machinery.PathFinder.find_spec(root, [place])
            if spec is not None and importlib.machinery.PathFinder.find_spec(root) is None:
                found = spec.origin or next(iter(spec.submodule_search_locations or ()), place)
                raise InputError(
                    f"{recipe}: names the module {name}, which is {found}, and its code would run; "
                    "read it, and pass --trust-modules if it may"
                )
    elif "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _folders(recipe: Path) -> tuple[Path, ...]:
    return Path.cwd(), recipe.resolve().parent


def _is_below(place: Path, folders: tuple[Path, ...]) -> bool:
    """Does it lie in one of the folders, and is not where packages are installed?"""
    installed = [Path(path).resolve() for path in sysconfig.get_paths().values()]
    return any(place.is_relative_to(folder) for folder in folders) and not any(
        place.is_relative_to(path) for path in installed if path.name.endswith("-packages") or "lib" in path.parts
    )
