"""What a pruning says of itself: before and after, how much could not leave, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from rarefy.system.strict_json import Json

COSTS = {"params": "parameters", "macs": "MACs"}
LITTLE = 0.2  # of what was asked: where half should go, a tenth


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
    """Lines of a table: each cost before and after, what could not leave, and each reason; none of a bare record."""
    if not all(isinstance(facts.get(cost), list) for cost in COSTS):
        return []
    found = [
        (f"{name} before, after", f"{before:,} → {after:,} ({_share(before - after, before)} less)")
        for cost, name in COSTS.items()
        for before, after in [facts[cost]]
        if before
    ]
    stays: Stays | None = facts.get("could_not_leave")
    if stays is None:
        return found
    found.append(("could not leave", _shares(stays["params"], stays["macs"], facts)))
    return [*found, *(("because", _because(held, facts)) for held in stays["reasons"][:MOST])]


MOST = 5  # reasons that are told


def warning(facts: Mapping[str, Json]) -> str:
    """Where much less left than was asked: what is left, why, and the way out; "" elsewhere."""
    if not all(isinstance(facts.get(cost), list) for cost in COSTS):
        return ""
    wanted = _wanted(facts)
    left = {cost: facts[cost][1] / facts[cost][0] for cost in COSTS if facts[cost][0]}
    if not any(1 - share < LITTLE * wanted for share in left.values()):
        return ""
    asked = ", ".join(f"{kind}={value:g}" for kind, value in facts["asked"].items())
    told = " and ".join(f"{share:.1%} of the {COSTS[cost]}" for cost, share in left.items())
    stays: Stays | None = facts.get("could_not_leave")
    held = stays["reasons"] if stays else []
    because = f"; {_shares(stays['params'], stays['macs'], facts)} could not leave" if stays else ""
    most = f", most of it because: {_because(held[0], facts)}" if held else ""
    whole: Sequence[str] = facts.get("kept_whole") or ()
    narrow = f"; {len(whole)} layers are narrower than round_to, such as {whole[0]}" if whole else ""
    return (
        f"{asked} took little: {told} are left{because}{most}{narrow}; "
        "--explain lists what holds each layer: write that operation so that channels may leave, or quantise instead"
    )


def _wanted(facts: Mapping[str, Json]) -> float:
    """The share that was to leave."""
    ((kind, value),) = facts["asked"].items()
    if kind == "speedup":
        return 1 - 1 / float(value)
    return 1 - float(value) if value <= 1 else max(0.0, 1 - value / facts[kind][0])


def _shares(params: int, macs: int, facts: Mapping[str, Json]) -> str:
    parts = [
        f"{_share(number, facts[cost][0])} of the {COSTS[cost]}"
        for cost, number in (("params", params), ("macs", macs))
        if facts[cost][0]
    ]
    return " and ".join(parts)


def _because(held: Held, facts: Mapping[str, Json]) -> str:
    more = held["count"] - len(held["layers"])
    layers = ", ".join(held["layers"]) + (f" and {more} more" if more else "")
    return f"{held['why']}: {layers} ({_shares(held['params'], held['macs'], facts)})"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}".replace("%", " %") if whole else "0 %"
