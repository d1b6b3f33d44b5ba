"""What graph.json's meta says in words: names, how the folder is stored, the submodule that was captured, and the
family of a detector.

A family is text that the registry makes an object of (``rarefy/plugins.py``). From a file it may name one that comes
with rarefy, with options that its class accepts, and nothing is imported by a name of the file's.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.system.strict_json import Json, expect, said

LONGEST = 2000  # letters of a family
STORES = ("readable", "smallest", "fastest")  # rarefy/artifact/weights.py
MOST_NODES = 20_000
_IDENTIFIER = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]{0,200}")
_FAMILY = re.compile(r"[a-z0-9_]{1,100}(:[ -~]*)?")


def check(meta: Mapping[str, Json], where: str) -> None:
    """Raises FormatError."""
    core, family = meta.get("core"), meta.get("detector")
    expect(core is None or isinstance(core, str), where, f"meta.core is {said(core)}")
    expect(family is None or _is_family(family), where, f"meta.detector is {said(family)}, no family of rarefy's")


def store_of(meta: Json, where: str) -> str:
    """How the folder says that it is stored. Raises FormatError."""
    store = meta.get("store", STORES[0]) if isinstance(meta, dict) else STORES[0]
    expect(isinstance(store, str) and store in STORES, where, f"meta.store is {said(store)}")
    return str(store)


def check_names(meta: Mapping[str, Json], where: str) -> None:
    """meta.names, and meta.sizes. Raises FormatError."""
    names, inputs = meta.get("names", {"inputs": [], "outputs": []}), meta["inputs"]
    good = isinstance(names, dict) and names.keys() == {"inputs", "outputs"}
    good = good and all(isinstance(part, list) and all(map(is_identifier, part)) for part in names.values())
    good = good and all(len(set(part)) == len(part) <= MOST_NODES for part in names.values())
    expect(good and len(names["inputs"]) in (0, len(inputs)), where, f"meta.names is {said(names)}")
    ranks = [len(entry["shape"]) for entry in inputs]
    sizes = meta.get("sizes", [[None] * rank for rank in ranks])
    good = isinstance(sizes, list) and all(isinstance(one, list) for one in sizes) and list(map(len, sizes)) == ranks
    good = good and all(one is None or (type(one) is int and 1 <= one <= 2**16) for part in sizes for one in part)
    expect(good, where, f"meta.sizes is {said(sizes)}")


def is_identifier(name: object) -> bool:
    return isinstance(name, str) and _IDENTIFIER.fullmatch(name) is not None and not keyword.iskeyword(name)


def is_range(value: Json) -> bool:
    """Least and most of whole numbers."""
    good = isinstance(value, list) and len(value) == 2 and all(type(end) is int and abs(end) < 2**62 for end in value)
    return good and bool(value[0] <= value[1])


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
