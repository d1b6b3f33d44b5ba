"""What was done to a graph: one record a step, oldest first, in ``meta["history"]``, which is saved with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from torch import fx, nn

from rarefy.graph.nodes import Value


class Record(TypedDict):
    """step: the verb. options: what was asked of it. facts: what it reached. JSON values all."""

    step: str
    options: dict[str, Value]
    facts: dict[str, Value]


def records(model: nn.Module) -> list[Record]:
    """All records of a graph, oldest first; none of a model that is no graph."""
    return list(model.meta.get("history", [])) if isinstance(model, fx.GraphModule) else []


def append(graph: fx.GraphModule, step: str, options: Mapping[str, Value], facts: Mapping[str, Value]) -> None:
    """One more record, in a list of the graph's own: another graph that had the same list keeps it as it was."""
    record = Record(step=step, options=dict(options), facts=dict(facts))
    graph.meta["history"] = [*records(graph), record]


def last(model: nn.Module, *steps: str) -> Record | None:
    """The newest record, of one of ``steps`` where any are named; None where there is none."""
    found = (record for record in reversed(records(model)) if not steps or record.get("step") in steps)
    return next(found, None)


def since(graph: nn.Module, before: nn.Module) -> list[Record]:
    """The records that ``graph`` has beyond those of ``before``, which it was made of."""
    return records(graph)[len(records(before)) :]
