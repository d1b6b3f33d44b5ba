"""What an operator takes and yields, by its schema, which torch is asked for once: that is slow."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

# What a node yields, as far as an argument must know it.
TENSOR, TENSORS, LIST, NUMBER, ANY = "tensor", "tensors", "list", "number", "any"


class Parameter(NamedTuple):
    name: str
    kind: str
    positional: bool
    optional: bool


class Row(NamedTuple):
    """An operator's schema, asked of torch once."""

    name: str
    parameters: Sequence[Parameter]
    names: frozenset[str]
    places: Sequence[str]  # names of positional parameters
    yields: str


@functools.cache
def row_of(target: torch._ops.OpOverload) -> Row:
    schema = target._schema
    parameters = [
        Parameter(one.name, str(one.real_type), not one.kwarg_only, one.has_default_value()) for one in schema.arguments
    ]
    return Row(
        schema.name.removeprefix("aten::"),
        parameters,
        frozenset(one.name for one in parameters),
        [one.name for one in parameters if one.positional],
        _yielded([str(result.type) for result in schema.returns]),
    )


def _yielded(returns: Sequence[str]) -> str:
    if len(returns) != 1:
        return TENSORS if all(kind == "Tensor" for kind in returns) else LIST
    known = {"Tensor": TENSOR, "List[Tensor]": TENSORS}
    return known.get(returns[0], LIST if returns[0].startswith("List[") else NUMBER)
