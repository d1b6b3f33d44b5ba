"""Packages that rarefy can do without, until a step needs them."""

from __future__ import annotations

import importlib
from typing import Any

from rarefy.errors import MissingDependency


def needs(package: str, extra: str = "onnx") -> Any:
    """The package, imported; MissingDependency with the pip line of ``extra`` where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependency(package, extra) from error
