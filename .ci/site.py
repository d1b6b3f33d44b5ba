"""Hooks of the documentation site: api.md from the docstrings of rarefy's public names, a page for each notebook, and no
links out of docs/."""

from __future__ import annotations

import inspect
import json
import posixpath
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File

import rarefy

NOTEBOOKS = re.compile(r"\]\(((?:[\w.]+/)*\w+)\.ipynb\)")  # links to notebooks, which are pages here
UPWARDS = re.compile(r"\[([^\]]*)\]\((\.\./[^)]*)\)")  # to another page, or to a file of the repository that is none


def on_files(files: Any, config: Any) -> Any:
    files.append(File.generated(config, "api.md", content=reference()))
    for path in sorted((Path(config.docs_dir) / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = posixpath.dirname(page.file.src_uri)

    def inside(link: re.Match[str]) -> str:
        return link[1] if posixpath.normpath(posixpath.join(here, link[2])).startswith("../") else link[0]

    return NOTEBOOKS.sub(r"](\1.md)", UPWARDS.sub(inside, markdown))


def notebook(path: Path) -> str:
    """A notebook's cells as a page, and the notebook itself to download."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    title, *rest = "\n\n".join(parts).split("\n")
    download = f'<a href="../{path.name}" download>{path.name}</a>'
    return "\n".join([title, "", f"As a notebook: {download}", *rest]) + "\n"


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
