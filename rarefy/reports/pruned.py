"""What a pruning says of itself: before and after, how much could not leave, and why.

A record may come out of a file, so what it says is looked at before it is believed: what has another form is not told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from rarefy.system.strict_json import Json

COSTS = {"params": "parameters", "macs": "MACs"}
LITTLE = 0.2  # of what was asked: where half should go, a tenth
MOST = 5  # reasons that are told


class Held(TypedDict):
    """Layers that stay for one reason. params, macs: what of theirs can't leave. layers: the largest. count: of all."""

    why: str
    params: int
    macs: int
    layers: list[str]
    count: int


class Stays(TypedDict):
    """What would be left if all else left. reasons: the largest first."""

    params: int
    macs: int
    reasons: list[Held]


def rows(facts: Mapping[str, Json]) -> list[tuple[str, str]]:
    """Lines of a table: each cost before and after, what could not leave, and each reason."""
    costs, stays = _costs(facts), _stays(facts)
    found = [
        (f"{COSTS[cost]} before, after", f"{before:,} -> {after:,} ({_share(before - after, before)} less)")
        for cost, (before, after) in costs.items()
    ]
    if stays is None or not costs:
        return found
    found.append(("could not leave", _shares(stays["params"], stays["macs"], costs)))
    return [*found, *(("because", _because(held, costs)) for held in stays["reasons"][:MOST])]


def warning(facts: Mapping[str, Json]) -> str:
    """Where much less left than was asked: what is left, why, and the way out; "" elsewhere."""
    costs, stays = _costs(facts), _stays(facts)
    wanted = _wanted(facts, costs)
    if not any(1 - after / before < LITTLE * wanted for before, after in costs.values()):
        return ""
    asked = ", ".join(f"{kind}={value:g}" for kind, value in facts["asked"].items())
    left = " and ".join(f"{_share(after, before)} of the {COSTS[cost]}" for cost, (before, after) in costs.items())
    because = most = ""
    if stays is not None:
        because = f"; {_shares(stays['params'], stays['macs'], costs)} could not leave"
        most = f", most of it because: {_because(stays['reasons'][0], costs)}" if stays["reasons"] else ""
    whole = facts.get("kept_whole")
    narrow = ""
    if isinstance(whole, list) and whole:
        narrow = f"; {len(whole)} layers are narrower than round_to, such as {whole[0]}"
    return (
        f"{asked} took little: {left} are left{because}{most}{narrow}; "
        "--explain lists what holds each layer: write that operation so that channels may leave, or quantise instead"
    )


def _costs(facts: Mapping[str, Json]) -> dict[str, tuple[int, int]]:
    """Cost -> (before, after), of those that there were any of."""
    found = {}
    for cost in COSTS:
        pair = facts.get(cost)
        if isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(one) is int for one in pair) and pair[0] > 0:
            found[cost] = (pair[0], pair[1])
    return found


def _stays(facts: Mapping[str, Json]) -> Stays | None:
    found = facts.get("could_not_leave")
    if not isinstance(found, Mapping) or not _counts(found, COSTS) or not isinstance(found.get("reasons"), list):
        return None
    reasons: list[Held] = found["reasons"]
    fits = all(
        isinstance(held, Mapping) and _counts(held, (*COSTS, "count")) and isinstance(held.get("layers"), list)
        for held in reasons
    )
    return Stays(params=found["params"], macs=found["macs"], reasons=reasons) if fits else None


def _counts(table: Mapping[str, Json], keys: Mapping[str, str] | tuple[str, ...]) -> bool:
    return all(type(table.get(key)) is int for key in keys)


def _wanted(facts: Mapping[str, Json], costs: Mapping[str, tuple[int, int]]) -> float:
    """The share that was to leave."""
    asked = facts.get("asked")
    if not isinstance(asked, Mapping) or len(asked) != 1:
        return 0.0
    ((kind, value),) = asked.items()
    if type(value) not in (int, float) or value <= 0:
        return 0.0
    if kind == "speedup":
        return float(1 - 1 / value)
    return 1 - value if value <= 1 else max(0.0, 1 - value / costs[kind][0]) if kind in costs else 0.0


def _shares(params: int, macs: int, costs: Mapping[str, tuple[int, int]]) -> str:
    parts = [
        f"{_share(number, costs[cost][0])} of the {COSTS[cost]}"
        for cost, number in (("params", params), ("macs", macs))
        if cost in costs
    ]
    return " and ".join(parts)


def _because(held: Held, costs: Mapping[str, tuple[int, int]]) -> str:
    more = held["count"] - len(held["layers"])
    layers = ", ".join(map(str, held["layers"])) + (f" and {more} more" if more > 0 else "")
    return f"{held['why']}: {layers} ({_shares(held['params'], held['macs'], costs)})"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"
