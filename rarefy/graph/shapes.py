from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from rarefy.graph.nodes import attribute, example_inputs

aten = torch.ops.aten


def shapes(graph: fx.GraphModule, batch: int = 2) -> dict[fx.Node, Any]:
    """What every node yields for that batch size, without computing: a tensor of no device (``.shape``, ``.dtype``), or a plain value."""
    with torch.no_grad():
        try:
            return _meta_shapes(graph, batch)
        except Exception:  # an operator that needs real devices or numbers: slower, and knows more of them
            return _fake_shapes(graph, batch)


def output_shapes(graph: fx.GraphModule) -> list[tuple[int, ...]]:
    """Shape of each output, without the batch."""
    values = shapes(graph)
    outputs = [
        node
        for node in pytree.tree_leaves(next(iter(reversed(graph.graph.nodes))).args[0])
        if isinstance(node, fx.Node)
    ]
    return [tuple(values[node].shape[1:]) for node in outputs]


def _meta_shapes(graph: fx.GraphModule, batch: int) -> dict[fx.Node, Any]:
    """Every operator on the meta device, with no bookkeeping around it."""
    inputs = iter(
        [
            torch.empty((batch, *spec["shape"]), dtype=getattr(torch, spec["dtype"]), device="meta")
            for spec in graph.meta["inputs"]
        ]
    )
    found: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            found[node] = next(inputs)
        elif node.op == "get_attr":
            value = attribute(graph, str(node.target))
            found[node] = value.detach().to("meta") if isinstance(value, Tensor) else value
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
            if _keeps_shape(node, args):
                found[node] = args[0]
                continue
            rule: Any = _SHAPES.get(node.target)
            made = rule(*args, **kwargs) if rule is not None else None
            if made is not None:
                found[node] = made
                continue
            args, kwargs = fx.node.map_aggregate((args, kwargs), _nowhere)
            if "device" in kwargs or node.target in _CREATORS:
                kwargs = {**kwargs, "device": _META}
            found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return found


def _keeps_shape(node: fx.Node, args: tuple[Any, ...]) -> bool:
    """Does the node plainly yield a tensor like its first argument? Asking the operator takes a millisecond, and these are most of a network."""
    first = args[0] if args else None
    if not isinstance(first, Tensor) or not first.is_floating_point() or node.kwargs:
        return False
    if node.target in _LIKE_FIRST:
        return True
    return (
        node.target in _LIKE_BOTH
        and len(args) == 2
        and isinstance(args[1], Tensor)
        and (args[1].shape, args[1].dtype) == (first.shape, first.dtype)
    )


_LIKE_FIRST = {
    aten.batch_norm.default,
    aten.relu.default,
    aten.relu6.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.hardtanh.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.gelu.default,
    aten.dropout.default,
    aten.layer_norm.default,
    aten.group_norm.default,
}
_LIKE_BOTH = {aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor}


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    rank = weight.dim() - 2
    if input.dim() != weight.dim():
        return None
    step, around, apart = (
        [value] * rank if isinstance(value, int) else [*value] * (rank // len(value))
        for value in (stride, padding, dilation)
    )
    sizes = zip(input.shape[2:], weight.shape[2:], step, around, apart, strict=True)
    places = [(size + 2 * edge - gap * (kernel - 1) - 1) // jump + 1 for size, kernel, jump, edge, gap in sizes]
    return input.new_empty((input.shape[0], weight.shape[0], *places))


def _projected(input: Tensor, weight: Tensor, bias: Any = None) -> Any:
    return input.new_empty((*input.shape[:-1], weight.shape[0])) if weight.dim() == 2 else None


def _attended(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    if query.dim() != 4 or query.shape[:2] != value.shape[:2]:
        return None
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _joined(tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    if any((one.dtype, one.dim()) != (first.dtype, first.dim()) for one in tensors):
        return None
    dim %= first.dim()
    return first.new_empty((*first.shape[:dim], sum(one.shape[dim] for one in tensors), *first.shape[dim + 1 :]))


def _pooled(input: Tensor, output_size: Any) -> Any:
    if any(size is None for size in output_size):
        return None
    return input.new_empty((*input.shape[: input.dim() - len(output_size)], *output_size))


def _spread(one: Tensor, other: Any) -> Any:
    if not isinstance(other, Tensor) or one.dtype != other.dtype or not one.is_floating_point():
        return None
    rank = max(one.dim(), other.dim())
    sizes = zip(*((1,) * (rank - each.dim()) + tuple(each.shape) for each in (one, other)), strict=True)
    return one.new_empty([size if least == 1 else least for size, least in sizes])


# Shapes known without the operator, which on a tensor without numbers takes a millisecond, and the first time imports a compiler of 150 MB. None: not that plain.
_SHAPES: dict[Any, Callable[..., Any]] = {
    aten.conv1d.default: _convolved,
    aten.conv2d.default: _convolved,
    aten.conv3d.default: _convolved,
    aten.linear.default: _projected,
    aten.scaled_dot_product_attention.default: _attended,
    aten.cat.default: _joined,
    aten.adaptive_avg_pool2d.default: _pooled,
    **dict.fromkeys(_LIKE_BOTH, _spread),
}
_META = torch.device("meta")
_CREATORS = {
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.empty.memory_format,
    aten.linspace.default,
    aten.eye.default,
    aten.eye.m,
    aten.scalar_tensor.default,
}


def _nowhere(value: Any) -> Any:
    return _META if isinstance(value, torch.device) else value


def _fake_shapes(graph: fx.GraphModule, batch: int) -> dict[fx.Node, Any]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [mode.from_tensor(example) for example in example_inputs(graph, batch)]
    found: dict[fx.Node, Any] = {}

    class Recorder(FakeTensorProp):
        def run_node(self, node: fx.Node) -> Any:
            found[node] = fx.Interpreter.run_node(self, node)
            return found[node]

    Recorder(graph, mode).propagate_dont_convert_inputs(*fakes)
    return found
