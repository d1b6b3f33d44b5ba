"""Hooks of the documentation site: api.md from the docstrings of rarefy's public names, and no links out of docs/."""

from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File

import rarefy

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./[^)]*\)")  # links to files of the repository that are no pages


def on_files(files: Any, config: Any) -> Any:
    files.append(File.generated(config, "api.md", content=reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(r"\1", markdown)


def reference() -> str:
    """Each public name: how it is called, and its docstring."""
    parts = ["# API", "", "What `import rarefy` gives. Tasks are in `rarefy.tasks`."]
    for name in sorted(rarefy.__all__, key=str.lower):
        value = getattr(rarefy, name)
        if isinstance(value, (str, ModuleType)):
            continue
        parts += ["", f"## rarefy.{name}", "", "```text", f"{name}{_signature(value)}", "```", ""]
        parts += ["```text", inspect.getdoc(value) or "", "```"]
    return "\n".join(parts) + "\n"


def _signature(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    return f"({', '.join(str(one) for one in signature.parameters.values())})"
