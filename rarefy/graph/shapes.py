"""What every node of a graph yields, without computing: shapes and types.

Operators run on the meta device, which has no numbers. Asking one takes a millisecond, and the first time imports a
compiler of 150 MB, so that the few operators most of a network is made of have their rule here (``_SHAPES``). Where an
operator needs real devices or numbers, torch's fake tensors know more of them, and take longer.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from rarefy.graph.interpreter import Rule, check_lstm, steps, values
from rarefy.graph.nodes import Value, attribute, example_inputs
from rarefy.kernels.lstm import LSTM
from rarefy.system.quiet import quiet

aten = torch.ops.aten


def shapes(graph: fx.GraphModule, batch: int = 2) -> dict[fx.Node, Value]:
    """What each node yields for that batch size: a tensor of no device (``.shape``, ``.dtype``), or a plain value."""
    with torch.no_grad():
        try:
            return _meta_shapes(graph, batch)
        except Exception:  # an operator that needs real devices or numbers: slower, and knows more of them
            return _fake_shapes(graph, batch)


def output_shapes(graph: fx.GraphModule) -> list[tuple[int, ...]]:
    """Shape of each output, without the batch."""
    found = shapes(graph)
    (output,) = graph.graph.find_nodes(op="output")
    return [tuple(found[node].shape[1:]) for node in pytree.tree_leaves(output.args[0]) if isinstance(node, fx.Node)]


def activation_bytes(graph: fx.GraphModule) -> tuple[int, int]:
    """Of one sample: the most that is held at once without gradients, and all of it, which a backward pass needs."""
    found = {node: _bytes(value) / 2 for node, value in shapes(graph, 2).items() if node.op != "get_attr"}
    place = {node: index for index, node in enumerate(graph.graph.nodes)}
    ends: dict[int, list[fx.Node]] = {}
    for node in found:
        ends.setdefault(max((place[user] for user in node.users), default=place[node]), []).append(node)
    held = most = 0.0
    for node in graph.graph.nodes:
        held += found.get(node, 0)
        most = max(most, held)
        held -= sum(found[gone] for gone in ends.get(place[node], ()))
    return math.ceil(most), math.ceil(sum(found.values()))


def _bytes(value: Value) -> int:
    return sum(one.numel() * one.element_size() for one in pytree.tree_leaves(value) if isinstance(one, Tensor))


def _meta_shapes(graph: fx.GraphModule, batch: int) -> dict[fx.Node, Value]:
    """Every operator on the meta device, with no bookkeeping around it."""
    inputs = [
        torch.empty((batch, *spec["shape"]), dtype=getattr(torch, spec["dtype"]), device="meta")
        for spec in graph.meta["inputs"]
    ]
    return dict(walk(graph, inputs))


def walk(
    graph: fx.GraphModule, inputs: Sequence[Tensor], compute: Rule | None = None
) -> Iterator[tuple[fx.Node, Value]]:
    """Each node before the output and its shape, on inputs and stored tensors without numbers.

    compute: in place of ``shape_of``.
    """
    given = iter(inputs)
    live: dict[fx.Node, Value] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            live[node] = next(given).to("meta")
        elif node.op == "get_attr":
            value = attribute(graph, node)
            live[node] = value.detach().to("meta") if isinstance(value, Tensor) else value
    return steps(graph, list(graph.graph.nodes)[:-1], live, compute or remembered(shape_of))


def remembered(ask: Rule) -> Rule:
    """``ask``, once for each operator with arguments of the same shapes and types: most of a network is repeated."""
    known: dict[object, Value] = {}

    def rule(node: fx.Node, live: Mapping[fx.Node, Value]) -> Value:
        if not isinstance(node.target, torch._ops.OpOverload):  # arithmetic, an item of a list: sooner done than known
            return ask(node, live)
        try:
            named = [(name, _likeness(value, live)) for name, value in node.kwargs.items()]
            key = node.target, _likeness(node.args, live), *named
            if key in known:
                return known[key]
        except TypeError:  # a computed size, which stands for many
            return ask(node, live)
        value = known[key] = ask(node, live)
        return value

    return rule


def _likeness(value: Value, live: Mapping[fx.Node, Value]) -> object:
    """All that a shape can depend on. Raises TypeError for what can't be compared."""
    if isinstance(value, fx.Node):
        value = live[value]
    kind = type(value)
    if isinstance(value, Tensor):
        held = not value.is_meta and (not isinstance(value, FakeTensor) or value.constant is not None)
        return kind, value.shape, value.dtype, value.stride(), id(value) if held else None
    if isinstance(value, (list, tuple)):
        return kind, *[_likeness(one, live) for one in value]
    if isinstance(value, (dict, slice, torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise TypeError(kind)
    return kind, value


def check_lstms(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Raises InputError where an LSTM has weights or states of other sizes than inputs of these shapes ask for."""
    if not graph.graph.find_nodes(op="call_function", target=LSTM):
        return
    seen, shape = _SEEN.setdefault(graph, set()), tuple((one.shape, one.dtype) for one in inputs)
    if shape not in seen:
        with torch.no_grad():
            deque(walk(graph, inputs), 0)
        seen.add(shape)


_SEEN: weakref.WeakKeyDictionary[fx.GraphModule, set[object]] = weakref.WeakKeyDictionary()


def shape_of(node: fx.Node, live: Mapping[fx.Node, Value]) -> Value:
    """What a ``call_function`` node yields, where its sources yield tensors without numbers."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), live.__getitem__)
    value = _known(node, live, args, kwargs)
    if value is not None:
        return value
    args, kwargs = fx.node.map_aggregate((args, kwargs), _nowhere)
    if _creates(node.target):
        kwargs = {**kwargs, "device": _META}
    return node.target(*args, **kwargs)  # type: ignore[operator]


def fake_of(node: fx.Node, live: Mapping[fx.Node, Value]) -> Value:
    """``shape_of`` among fake tensors, which have a device."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), live.__getitem__)
    value = _known(node, live, args, kwargs)
    return node.target(*args, **kwargs) if value is None else value  # type: ignore[operator]


def _known(node: fx.Node, live: Mapping[fx.Node, Value], args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
    """What the node yields, where the operator need not be asked; else None."""
    if node.target is LSTM:
        check_lstm(node, live)
    if _keeps_shape(node, args):
        return args[0]
    if node.target is operator.getitem:  # of thousands, perhaps
        return args[0][args[1]]
    rule = _SHAPES.get(node.target)
    return None if rule is None else rule(*args, **kwargs)


def _keeps_shape(node: fx.Node, args: Sequence[Value]) -> bool:
    """Does the node plainly yield a tensor like its first argument?"""
    first = args[0] if args else None
    if not isinstance(first, Tensor) or not first.is_floating_point() or node.kwargs:
        return False
    if node.target in _LIKE_FIRST:
        return _fits(node.target, args)
    return (
        node.target in _LIKE_BOTH
        and len(args) == 2
        and isinstance(args[1], Tensor)
        and (args[1].shape, args[1].dtype) == (first.shape, first.dtype)
    )


def _fits(target: object, args: Sequence[Value]) -> bool:
    """Have the tensors of a normalization the lengths it needs? Where not, the operator itself says what is wrong."""
    first, *others = args
    given = [one.shape for one in others if isinstance(one, Tensor)]
    if target is aten.layer_norm.default:
        size = tuple(args[1])
        return 0 < len(size) <= first.dim() and size == first.shape[-len(size) :] and all(one == size for one in given)
    return not given or (first.dim() > 1 and all(one == first.shape[1:2] for one in given))


_LIKE_FIRST = {
    getattr(aten, name).default
    for name in (
        *("batch_norm", "relu", "relu6", "hardswish", "hardsigmoid", "hardtanh", "silu", "sigmoid", "gelu", "dropout"),
        *("layer_norm", "group_norm"),
    )
}
_LIKE_BOTH = {aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor}


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    rank = weight.dim() - 2
    if input.dim() != weight.dim() or input.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    step, around, apart = (
        [value] * rank if isinstance(value, int) else [*value] * (rank // len(value))
        for value in (stride, padding, dilation)
    )
    sizes = zip(input.shape[2:], weight.shape[2:], step, around, apart, strict=True)
    places = [(size + 2 * edge - gap * (kernel - 1) - 1) // jump + 1 for size, kernel, jump, edge, gap in sizes]
    return input.new_empty((input.shape[0], weight.shape[0], *places))


def _projected(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    fits = weight.dim() == 2 and input.dim() > 0 and input.shape[-1] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    return input.new_empty((*input.shape[:-1], weight.shape[0])) if fits else None


def _attended(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor | None:
    if query.dim() != 4 or query.shape[:2] != value.shape[:2] or key.shape[:-1] != value.shape[:-1]:
        return None
    if query.shape[-1] != key.shape[-1]:
        return None
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if any((one.dtype, one.dim()) != (first.dtype, first.dim()) for one in tensors):
        return None
    dim %= max(1, first.dim())
    around = {(*one.shape[:dim], *one.shape[dim + 1 :]) for one in tensors}
    if len(around) > 1 or not first.dim():
        return None
    return first.new_empty((*first.shape[:dim], sum(one.shape[dim] for one in tensors), *first.shape[dim + 1 :]))


def _pooled(input: Tensor, output_size: Sequence[int | None]) -> Tensor | None:
    sizes = [size for size in output_size if size is not None]
    return input.new_empty((*input.shape[: -len(sizes)], *sizes)) if len(sizes) == len(output_size) else None


def _spread(one: Tensor, other: object, *, alpha: float = 1) -> Tensor | None:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return None
    if one.dtype != other.dtype or not one.is_floating_point():
        return None
    rank = max(one.dim(), other.dim())
    sizes = zip(*((1,) * (rank - each.dim()) + tuple(each.shape) for each in (one, other)), strict=True)
    pairs = list(sizes)
    if any(size != least and 1 not in (size, least) for size, least in pairs):
        return None
    return one.new_empty([size if least == 1 else least for size, least in pairs])


def _remembered(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Of an LSTM whose sizes were compared."""
    return input.new_empty((*input.shape[:2], hx[0].shape[2] * (2 if bidirectional else 1))), *hx


def _stepped(operator: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Value]:
    """Of another recurrent layer: asked about one step, since torch goes through them all."""

    def rule(input: Tensor, hx: Tensor, *others: Value) -> tuple[Tensor, Tensor] | None:
        axis = 1 if others and others[-1] is True else 0
        if not isinstance(input, Tensor) or input.dim() != 3 or input.shape[axis] < 2 or len(others) != 7:
            return None
        first, state = operator(input.narrow(axis, 0, 1), hx, *others)
        shape = list(first.shape)
        shape[axis] = input.shape[axis]
        return first.new_empty(shape), state

    return rule


def _resized(input: Tensor, output_size: Sequence[int] | None, *others: Value) -> Tensor | None:
    """Of a picture that is put on another grid: torch's own rule writes all of its samples out."""
    factors = others[-1] if others and isinstance(others[-1], (list, tuple)) else []
    if not isinstance(input, Tensor) or not input.is_floating_point() or (factors and output_size is not None):
        return None
    if output_size is None and len(factors) == input.dim() - 2:
        output_size = [math.floor(size * factor) for size, factor in zip(input.shape[2:], factors)]
    if output_size is None or len(output_size) != input.dim() - 2 or min(*input.shape[1:], *output_size) < 1:
        return None
    return input.new_empty((*input.shape[:2], *output_size))


# Shapes known without asking the operator; None: not that plain.
_SHAPES: dict[object, Callable[..., Value]] = {
    aten.lstm.input: _remembered,
    aten.conv1d.default: _convolved,
    aten.conv2d.default: _convolved,
    aten.conv3d.default: _convolved,
    aten.linear.default: _projected,
    aten.scaled_dot_product_attention.default: _attended,
    aten.cat.default: _joined,
    aten.adaptive_avg_pool2d.default: _pooled,
    **dict.fromkeys(_LIKE_BOTH, _spread),
    **{one: _stepped(one) for one in (aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)},
    **{
        getattr(getattr(aten, f"upsample_{mode}"), form): _resized
        for mode in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
        for form in ("default", "vec")
    },
}
_META = torch.device("meta")


def _creates(target: object) -> bool:
    """Is a device among the operator's keywords?"""
    schema = target._schema if isinstance(target, torch._ops.OpOverload) else None
    return schema is not None and any(one.name == "device" and one.kwarg_only for one in schema.arguments)


def _nowhere(value: Value) -> Value:
    return _META if isinstance(value, torch.device) else value


def _fake_shapes(graph: fx.GraphModule, batch: int) -> dict[fx.Node, Value]:
    with quiet("torch._subclasses.fake_tensor"), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return dict(values(graph, [mode.from_tensor(example) for example in example_inputs(graph, batch)]))
