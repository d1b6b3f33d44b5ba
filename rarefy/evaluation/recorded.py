"""report.json of a saved folder: what whoever made the folder says was measured.

It is believed as far as it is bound: the folder's manifest lists its hash, and it names the hashes of the model's files
that it is about, which must be the folder's. Its size, depth and numbers are bounded before anything is drawn of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rarefy.artifact.snapshot import Snapshot, named
from rarefy.errors import FormatError
from rarefy.system import strict_json
from rarefy.system.files import content
from rarefy.system.strict_json import Json

REPORT = "report.json"
MOST_BYTES, MOST_VALUES, LONGEST, LARGEST = 4 * 2**20, 200_000, 10_000, 1e30  # of the file, a list, a number
_WAY_OUT = "pass --data to measure the folder again"


@named()
def of_folder(held: Snapshot) -> dict[str, Json] | None:
    """The facts of the folder's report, which is about this model; None where there is none. Raises FormatError."""
    if REPORT not in held:
        return None
    path = held.path / REPORT
    facts = _parsed(held.read(REPORT, MOST_BYTES), path)
    provenance = facts.get("provenance")
    hashes = provenance.get("hashes") if isinstance(provenance, Mapping) else None
    files = held.manifest["files"]
    named = {name: one for name, one in hashes.items() if name in files} if isinstance(hashes, Mapping) else {}
    if not named:
        raise FormatError(f"{path}: names no hash of the model that it is about; {_WAY_OUT} [report-unbound]")
    for name, digest in sorted(named.items()):
        if digest != files[name]["sha256"]:
            raise FormatError(f"{path}: is about another model ({name} has another hash); {_WAY_OUT} [report-other]")
    return facts


@named()
def of_file(path: Path) -> dict[str, Json]:
    """The facts of a report that lies alone: bound to nothing. Raises FormatError."""
    return _parsed(content(path, MOST_BYTES), path)


def _parsed(data: bytes, path: Path) -> dict[str, Json]:
    try:
        facts = strict_json.parse(data, path, most_values=MOST_VALUES)
    except FormatError as error:
        raise FormatError(f"{path}: is no report ({str(error).removeprefix(f'{path}: ')}); {_WAY_OUT}") from error
    pending: list[Json] = [facts]
    while pending:
        value = pending.pop()
        if isinstance(value, (dict, list)):
            if len(value) > LONGEST:
                raise FormatError(f"{path}: holds {len(value)} values in one list, {LONGEST} at most [report-size]")
            pending += value.values() if isinstance(value, dict) else value
        elif isinstance(value, (int, float)) and abs(value) > LARGEST:
            raise FormatError(f"{path}: holds the number {str(value)[:40]}, which nothing measures [report-number]")
    return facts
