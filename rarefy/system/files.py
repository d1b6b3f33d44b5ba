from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside ``path`` that takes its place when all went well."""
    target = Path(path)
    partial = target.with_name(f".{target.stem}.part{target.suffix}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------- cache


def cache_folder() -> Path:
    """``$RAREFY_CACHE``, else rarefy's place in the user's cache folder."""
    named, home = os.environ.get("RAREFY_CACHE"), Path.home()
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "rarefy"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "rarefy" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "rarefy"
