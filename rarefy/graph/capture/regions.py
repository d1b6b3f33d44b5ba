"""``with torch.no_grad():`` and ``with torch.autocast(...):`` around a part of a model: the part itself.

The trace keeps such a part as an operator on a submodule. What comes out of ``no_grad`` is detached, so that gradients
stop there as in the model. Autocast chooses the type in which an operator computes; the trace knows the type of each
result, so that what the operator reads is brought to that type before it, in so many words.
"""

from __future__ import annotations

import torch
from torch import fx

from rarefy.graph.nodes import Value, attribute, is_tensor

aten = torch.ops.aten
_GRADIENTS, _AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default}

# Take an input of few bits with statistics and weights in float32, which autocast leaves alone.
_OF_TWO_TYPES = {aten.batch_norm.default, aten.instance_norm.default}


def inline(module: fx.GraphModule) -> None:
    """Every such region of a trace becomes nodes of its own. In place."""
    graph = module.graph
    for node in list(graph.nodes):
        held = [part for part in node.args if isinstance(part, fx.Node) and part.op == "get_attr"]
        regions = [part for part in held if isinstance(attribute(module, part), fx.GraphModule)]
        if node.op != "call_function" or len(regions) != 1 or str(node.target) not in (_GRADIENTS, _AUTOCAST):
            continue
        place = node.args.index(regions[0])
        settings, operands = node.args[:place], node.args[place + 1 :]
        region = attribute(module, regions[0])
        inline(region)
        if str(node.target) == _AUTOCAST and settings[2]:
            _cast(region)
        copied = dict(zip((inner for inner in region.graph.nodes if inner.op == "placeholder"), operands, strict=True))
        with graph.inserting_before(node):
            outputs = graph.graph_copy(region.graph, copied)
            assert isinstance(outputs, (list, tuple))
            if str(node.target) == _GRADIENTS and not settings[0]:
                outputs = [
                    graph.call_function(aten.detach.default, (one,)) if isinstance(one, fx.Node) else one
                    for one in outputs
                ]
        for user in list(node.users):  # the region returns a tuple, of which only getitem reads
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not regions[0].users:
            graph.erase_node(regions[0])


def _cast(region: fx.GraphModule) -> None:
    """What an operator reads in the type of what it yields, where both are floats. In place."""
    for node in list(region.graph.nodes):
        wanted = _float_type(node)
        if node.op != "call_function" or wanted is None or node.target in _CASTS | _OF_TWO_TYPES:
            continue
        for source in node.all_input_nodes:
            if _float_type(source) not in (None, wanted):
                with region.graph.inserting_before(node):
                    cast = region.graph.call_function(aten.to.dtype, (source, wanted))
                cast.meta = {**source.meta, "val": source.meta["val"].to(wanted)}
                node.replace_input_with(source, cast)


def _float_type(node: fx.Node) -> torch.dtype | None:
    value: Value = node.meta.get("val")
    return value.dtype if is_tensor(value) and value.is_floating_point() else None
