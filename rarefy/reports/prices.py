"""What a model costs to run: machines for a load, electricity and money, by a table that the user can edit.

Nothing here is measured but the throughput. What a core draws and costs, how far it may be loaded and what electricity
costs are assumptions; the report names each beside its figures. A TOML file replaces any of them::

    [prices]
    requests_per_second = 100
    watts_per_core = 8.0            # what a busy core and its share of the machine draw
    euros_per_kwh = 0.20
    euros_per_core_hour = 0.04      # 0 where the machines are yours
    currency = "EUR"
    load = 0.6                      # of a core, so that requests need not queue
    cores_per_server = 16

    [about]
    author = "Vision team"
    license = "Apache-2.0"

::

    cores    = ceil(requests a second / (load * images a second of a core))
    energy   = watts a core * cores at work * time
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

from rarefy.errors import InputError
from rarefy.reports.facts import Facts, Side, is_number
from rarefy.reports.units import short
from rarefy.system import strict_toml

HOURS_A_MONTH = 730.0
TABLES = ("prices", "about")
LONGEST = 200  # characters of an author or a licence


class CostView(TypedDict):
    """rows: label, before, after. remark: what was assumed."""

    rows: list[tuple[str, str, str]]
    remark: str


class Load(NamedTuple):
    """cores, servers: for the requests. kwh, money: a month. kwh_a_million: of that many images."""

    cores: int
    servers: int
    kwh: float
    money: float
    kwh_a_million: float


@dataclass(frozen=True)
class Prices:
    """The assumptions; see above. currency: its name, of both prices."""

    requests_per_second: float = 100.0
    watts_per_core: float = 8.0
    euros_per_kwh: float = 0.20
    euros_per_core_hour: float = 0.04
    currency: str = "EUR"
    load: float = 0.6
    cores_per_server: int = 16

    def millijoules(self, milliseconds: float, threads: int = 1) -> float:
        """Of one run that keeps so many cores busy so long: W x ms."""
        return self.watts_per_core * milliseconds * max(1, threads)

    def for_load(self, per_second: float, threads: int = 1) -> Load:
        """What serves the requests.

        per_second: images that one process with so many threads answers, at its best batch.
        """
        cores = max(1, math.ceil(self.requests_per_second / (self.load * per_second))) * max(1, threads)
        busy = self.requests_per_second / per_second * max(1, threads)  # cores at work, in the mean
        kwh = self.watts_per_core * busy * HOURS_A_MONTH / 1000
        money = kwh * self.euros_per_kwh + cores * HOURS_A_MONTH * self.euros_per_core_hour
        joules = self.watts_per_core * max(1, threads) / per_second
        return Load(cores, math.ceil(cores / self.cores_per_server), kwh, money, joules * 1e6 / 3.6e6)


class About(TypedDict, total=False):
    author: str
    license: str


def read(path: str | Path) -> tuple[Prices, About]:
    """The user's table. Raises InputError, which names the key."""
    file = Path(path)
    if not file.exists():
        raise InputError(f"{file}: no such file; write a TOML file with a table [prices], docs/search.md has one")
    return of(strict_toml.read(file), str(file))


def told(path: str | os.PathLike[str] | None) -> dict[str, object]:
    """What a report is told of the user's file: ``prices`` and ``about``; nothing where there is none."""
    if path is None:
        return {}
    prices, about = read(Path(path))
    return {"prices": dataclasses.asdict(prices), "about": dict(about)}


def of(told: Mapping[str, object], where: str = "prices") -> tuple[Prices, About]:
    """The same of the tables in it."""
    unknown = sorted(told.keys() - set(TABLES))
    if unknown:
        raise InputError(f"{where}: unknown table [{unknown[0]}]; have [prices] and [about]")
    prices, about = (_table(told.get(name), f"{where}: [{name}]") for name in TABLES)
    known = {field.name: field.default for field in dataclasses.fields(Prices)}
    for key, value in prices.items():
        if key not in known:
            raise InputError(f"{where}: [prices] {key}: no such price; have {', '.join(known)}")
        if key == "currency":
            if not isinstance(value, str) or not 0 < len(value) <= 8:
                raise InputError(f"{where}: [prices] currency = {value!r}: write a short name, such as EUR")
        elif not is_number(value) or value < 0 or value > 1e12 or (value == 0 and "per" not in key):
            raise InputError(f"{where}: [prices] {key} = {value!r}: write a number above 0")
    for key, value in about.items():
        if key not in ("author", "license") or not isinstance(value, str) or len(value) > LONGEST:
            raise InputError(
                f"{where}: [about] {key} = {str(value)[:40]!r}: have author and license, each a short text"
            )
    found = Prices(**prices)  # type: ignore[arg-type]  # checked above
    if not 0 < found.load <= 1 or found.requests_per_second <= 0 or found.cores_per_server < 1:
        raise InputError(
            f"{where}: [prices]: load is a share up to 1, requests_per_second and cores_per_server above 0"
        )
    named: About = {**about}  # type: ignore[typeddict-item]  # checked above
    return dataclasses.replace(found, cores_per_server=int(found.cores_per_server)), named


def _table(value: object, where: str) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: is no table; write {where.rpartition(' ')[2]} on a line of its own")
    return value


# ---------------------------------------------------------------------------------------------------------- the report


def view(facts: Facts) -> CostView | None:
    """What it costs to run, before and after; None where no throughput was measured."""
    prices, _ = of({"prices": facts["prices"]} if facts["prices"] else {}, "the report")
    sides = [_served(facts[name], prices) for name in ("before", "after")]  # type: ignore[literal-required]
    if sides[1] is None:
        return None
    labels = (
        "images a second of one process, at its best batch",
        f"cores for {short(prices.requests_per_second)} requests a second",
        f"servers of {prices.cores_per_server} cores",
        "electricity a month",
        f"cores and electricity a month, {prices.currency}",
        "energy of a million images",
    )
    before = sides[0] or [""] * len(labels)
    rows = list(zip(labels, before, sides[1], strict=True))
    remark = (
        f"Throughput was measured on one machine. Assumed, not measured: {short(prices.watts_per_core)} W a busy core, "
        f"{short(prices.euros_per_kwh)} {prices.currency} a kWh, {short(prices.euros_per_core_hour)} "
        f"{prices.currency} a "
        f"core and hour, cores loaded to {100 * prices.load:.0f} %; a table of your own replaces them "
        "(rarefy report FOLDER --prices FILE)."
    )
    return CostView(rows=rows, remark=remark)


def _served(side: Side, prices: Prices) -> list[str] | None:
    measured = side.get("throughput") or {}
    per_second, threads = measured.get("per_second"), measured.get("threads", 1)
    if not per_second:
        return None
    load = prices.for_load(per_second, threads)
    return [
        f"{short(per_second)} (batch {measured.get('batch', 1)})",
        f"{load.cores:,}",
        f"{load.servers:,}",
        f"{short(load.kwh)} kWh",
        short(load.money),
        f"{short(load.kwh_a_million)} kWh",
    ]


def signed_by(facts: Facts) -> str:
    """Author, date and licence, as far as they are told."""
    about, created = facts["about"], facts["provenance"].get("created")
    parts = [
        f"by {about['author']}" if about.get("author") else "",
        str(created)[:10] if created else "",
        f"licence: {about['license']}" if about.get("license") else "",
    ]
    return " · ".join(filter(None, parts))
