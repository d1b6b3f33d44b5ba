"""Operators in the form that passes know, while the trace still says what each of them yields.

``x[mask] = number`` is a fill by a mask: each number hangs on its own place alone, and channels may leave. A linear
layer whose weight is one vector is a product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from rarefy.graph.nodes import Value

aten = torch.ops.aten
_FILLS: dict[object, torch._ops.OpOverload] = {
    aten.index_put_.default: aten.masked_fill_.Tensor,
    aten.index_put.default: aten.masked_fill.Tensor,
}


def spell(module: fx.GraphModule) -> None:
    """In place, of a trace."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _FILLS and len(node.args) == 3:
            _fill(node, *node.args)
        elif node.target is aten.linear.default and len(node.args) == 2 and node.args[1].meta["val"].dim() == 1:
            node.target = aten.matmul.default


def _fill(node: fx.Node, changed: fx.Node, places: Sequence[Value], value: fx.Node) -> None:
    """One mask of all places of what is changed, and one number."""
    if len(places) != 1 or places[0] is None:
        return
    mask = places[0].meta["val"]
    if mask.dtype == torch.bool and mask.dim() == changed.meta["val"].dim() and value.meta["val"].dim() == 0:
        node.args = (changed, places[0], value)
        node.target = _FILLS[node.target]
