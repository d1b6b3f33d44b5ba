"""Results of a bench kept one file a cell, below ``out/BENCH/``, so that a long bench can be cut off, go on, and be run
in parts.

A cell belongs to its options: one that was made with others counts as not made. ``--resume`` takes the cells that are
there, ``--for SECONDS`` begins no new one after that time and leaves the rest to the next call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1] / "out"


class Cells:
    """``folder``: where the cells of these ``options`` lie."""

    def __init__(self, bench: str, options: Mapping[str, Any], given: argparse.Namespace):
        mark = hashlib.sha256(json.dumps(dict(options), sort_keys=True, default=str).encode()).hexdigest()[:8]
        self.folder = ROOT / bench / mark
        self.resume, self.until = given.resume, time.monotonic() + given.seconds_in_all
        self.left, self.made = 0, set[str]()

    def found(self, key: str) -> Any:
        """What the cell holds, or None; without ``--resume``, for those that were not made in this run."""
        return self._read(key) if self.resume or key in self.made else None

    def _read(self, key: str) -> Any:
        path = self._path(key)
        return json.loads(path.read_text())["facts"] if path.exists() else None

    def missing(self, keys: Iterable[str]) -> Iterator[str]:
        """Those that are to be made, one by one until the time is over; the others are counted in ``left``."""
        for key in keys:
            if self.found(key) is None:
                late = time.monotonic() > self.until
                self.left += late
                if not late:
                    yield key

    def keep(self, key: str, facts: Any) -> Any:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(key)
        path.with_suffix(".new").write_text(json.dumps({"key": key, "facts": facts}))
        path.with_suffix(".new").replace(path)
        self.made.add(key)
        return facts

    def forget(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)
        self.made.discard(key)

    def _path(self, key: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '_', key)}.json"


def in_processes(attempt: Callable[[Any], dict[str, Any]], cells: Sequence[Any], jobs: int) -> Iterator[dict[str, Any]]:
    """What ``attempt`` says of each of ``cells`` (named tuples), as they come: so many at once, each in a process; one
    at once: in this one."""
    if jobs == 1:
        yield from map(attempt, cells)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(attempt, cell): cell for cell in cells}
        for one in as_completed(waiting):
            try:
                yield one.result()
            except BrokenProcessPool:
                died = "its process died; run this again for what is missing, perhaps with fewer --jobs"
                yield {**waiting[one]._asdict(), "failed": died}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", action="store_true", help="take the results that are there (below out/) and make the others"
    )
    parser.add_argument(
        "--for",
        dest="seconds_in_all",
        metavar="SECONDS",
        type=float,
        default=float("inf"),
        help="begin nothing after that",
    )
