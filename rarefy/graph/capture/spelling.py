"""Operators and names in the form that passes know.

While the trace still says what each operator yields, ``x[mask] = number`` becomes a fill by a mask: each number hangs
on its own place alone, and channels may leave. A linear layer whose weight is one vector is a product.

A graph is written as a program and as a file, so the name of a tensor is one that both take: ``heads.in.weight``
becomes ``heads.in_.weight``, ``skip 1.weight`` becomes ``skip_1.weight``, and ``graph.weight``, since a graph module
has a ``graph`` of its own, ``graph_.weight``.
"""

from __future__ import annotations

import itertools
import keyword
import logging
import re
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from rarefy.errors import CaptureError
from rarefy.graph.nodes import Value

aten = torch.ops.aten
_FILLS: dict[object, torch._ops.OpOverload] = {
    aten.index_put_.default: aten.masked_fill_.Tensor,
    aten.index_put.default: aten.masked_fill.Tensor,
}
_TAKEN = {*dir(fx.GraphModule), *vars(fx.GraphModule(nn.Module(), fx.Graph()))}


def spell_name(name: str, *, whole: bool = True) -> str:
    """A dotted name of ASCII letters, digits, ``_`` and ``-``, none of whose parts is a word of Python.

    whole: is it the name in a graph, whose own attributes are taken?
    """
    parts = [re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in name.split(".")]
    parts = [re.sub("^__+", "_", part) for part in parts]
    parts = [f"{part}_" if keyword.iskeyword(part) else part for part in parts]
    if whole and parts[0] in _TAKEN:
        parts[0] += "_"
    return ".".join(parts)


def tell_of_names(model: nn.Module) -> None:
    """What a graph calls otherwise than its model does. Raises CaptureError where two would be one."""
    new: dict[str, str] = {}
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, _ in itertools.chain(*named):
        other = new.setdefault(spell_name(name), name)
        if other != name:
            raise CaptureError(f"{other} and {name} would both be {spell_name(name)} in a graph; rename one of them")
    changed = [f"{name} is {spelled}" for spelled, name in new.items() if spelled != name]
    if changed:
        more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
        logging.getLogger("rarefy").warning("in the graph %s%s", ", ".join(changed[:2]), more)


def spell_names(program: ExportedProgram) -> None:
    """In place: the names of its tensors, before a module is made of it."""
    for one in (*program.graph_signature.input_specs, *program.graph_signature.output_specs):
        if one.target is not None:
            one.target = spell_name(one.target, whole=False)
    for held in (program.state_dict, program.constants):
        for name in [name for name in held if spell_name(name, whole=False) != name]:
            held[spell_name(name, whole=False)] = held.pop(name)


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
