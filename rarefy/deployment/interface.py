"""What a model's inputs and outputs are called: the names that its files give them.

An input has the name of forward's argument. An output has its place in what forward returns: the key of a dictionary,
the number in a tuple, joined by ``_`` where one lies in the other (``hidden_states_0``); what has no key is ``output``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from rarefy.graph.nodes import Value


def input_names(graph: fx.GraphModule) -> list[str]:
    """One for each input, in the order of forward's arguments."""
    stated = graph.meta.get("names", {}).get("inputs")
    placeholders = graph.graph.find_nodes(op="placeholder")
    if stated is not None and len(stated) == len(placeholders):
        return [str(name) for name in stated]
    return [str(node.target) for node in placeholders]


def outputs(graph: fx.GraphModule) -> list[tuple[str, fx.Node]]:
    """(name, node) of each value that the graph returns, in the order of pytree's leaves; a value may come twice."""
    (output,) = graph.graph.find_nodes(op="output")
    found = list(_leaves(output.args[0], ""))
    stated = graph.meta.get("names", {}).get("outputs")
    if stated is not None and len(stated) == len(found):
        return [(str(name), node) for name, (_, node) in zip(stated, found, strict=True)]
    return found


def _leaves(value: Value, name: str) -> Iterator[tuple[str, fx.Node]]:
    if isinstance(value, fx.Node):
        yield name or "output", value
        return
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    inside = name or ("" if isinstance(value, dict) else "output")
    for key, part in parts:
        yield from _leaves(part, f"{inside}_{key}" if inside else str(key))
