"""What graph.json's meta says in words: the submodule that was captured, and the family of a detector.

A family is text that the registry makes an object of (``rarefy/plugins.py``). From a file it may name one that comes
with rarefy, with options that its class accepts, and nothing is imported by a name of the file's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.system.strict_json import Json, expect, said

LONGEST = 2000  # letters of a family
_FAMILY = re.compile(r"[a-z0-9_]{1,100}(:[ -~]*)?")


def check(meta: Mapping[str, Json], where: str) -> None:
    """Raises FormatError."""
    core, family = meta.get("core"), meta.get("detector")
    expect(core is None or isinstance(core, str), where, f"meta.core is {said(core)}")
    expect(family is None or _is_family(family), where, f"meta.detector is {said(family)}, no family of rarefy's")


def _is_family(text: object) -> bool:
    if not isinstance(text, str) or len(text) > LONGEST or _FAMILY.fullmatch(text) is None:
        return False
    if text.partition(":")[0] not in plugins.available("detectors"):
        return False
    try:
        plugins.resolve("detectors", text)
    except InputError:
        return False
    return True
