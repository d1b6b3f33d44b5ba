"""What of a quantised graph has no integer kernel of ours on CUDA, as modules that torch.compile fuses; and a whole
network in half precision, its values clipped as their codes would be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from rarefy.graph.fold import fold
from rarefy.graph.interpreter import call
from rarefy.graph.lowering import is_decoded, to_numbers
from rarefy.graph.nodes import Value, argument, attribute, finish, set_attribute, share_copy
from rarefy.kernels import OPERATORS, is_quantised, library
from rarefy.kernels import int_linear as layers

aten = torch.ops.aten
RAREFY = torch.ops.rarefy

# Products that tensor cores do in half precision.
HEAVY = frozenset(
    {
        aten.conv2d.default, aten.conv2d.padding, aten.conv1d.default, aten.conv3d.default, aten.linear.default,
        aten.matmul.default, aten.bmm.default, aten.scaled_dot_product_attention.default,
    }
)  # fmt: skip


def stored(codes: Tensor, shift: int) -> Tensor:
    """The codes as kernels keep them, int8 less ``shift``."""
    return (codes.to(torch.int16) - shift).to(torch.int8) if shift else codes.to(torch.int8)


def restored(codes: Tensor, shift: int, dtype: torch.dtype) -> Tensor:
    """The codes as the graph has them."""
    return (codes.to(torch.int16) + shift).to(dtype) if shift else codes.to(dtype)


def island(
    graph: fx.GraphModule,
    nodes: Sequence[fx.Node],
    reads: Sequence[fx.Node],
    yields: Sequence[fx.Node],
    kept: Mapping[fx.Node, tuple[int, torch.dtype]],
    device: torch.device,
) -> Callable[..., Sequence[Value]]:
    """A function of the values of ``reads`` that yields those of ``yields``, which ``nodes`` compute.

    kept: of values that are codes, the shift and type (``stored``, ``restored``).
    """
    inner = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in reads:
        known[node] = inner.placeholder(node.name)
    for node in reads:
        if node in kept:
            known[node] = inner.call_function(restored, (known[node], *kept[node]))
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in known:
                known[source] = inner.node_copy(source)
        copied = inner.node_copy(node, known.__getitem__)
        if node.target in library.FUNCTIONS:  # which a compiler sees through
            copied.target = library.FUNCTIONS[node.target]
        known[node] = copied
    inner.output([inner.call_function(stored, (known[n], kept[n][0])) if n in kept else known[n] for n in yields])
    module = fx.GraphModule(graph, inner)
    if device.type != "cuda":
        return module
    compiled = torch.compile(module, dynamic=False, fullgraph=True)
    exact = any(node.target in layers.OPERATORS for node in nodes)
    half = not exact and any(node.target in HEAVY for node in nodes)

    def run(*values: Tensor) -> Sequence[Value]:
        with torch.autocast("cuda", torch.float16, enabled=half):
            found: Sequence[Value] = compiled(*values)
            return found

    return run


def in_half(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of the network in float16, weights decoded; values that had codes are clipped, not rounded."""
    graph = to_numbers(graph) if is_quantised(graph) else fold(graph)
    graph = share_copy(graph)
    numbers: dict[fx.Node, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if is_decoded(node):
            with graph.graph.inserting_before(node):
                plain = _numbers(graph, node, numbers)
            node.replace_all_uses_with(plain)
    graph = finish(graph).eval()
    stray = [node for node in graph.graph.nodes if node.target in OPERATORS and node.target is not RAREFY.lstm.default]
    if stray:
        raise ValueError(f"{stray[0].name}: {stray[0].target} has no form in floats")
    for name, tensor in [*graph.named_parameters(), *graph.named_buffers()]:
        if tensor.dtype == torch.float32:
            set_attribute(graph, name, tensor.detach().half())
    for node in list(graph.graph.nodes):
        if node.op == "placeholder":
            _halved(graph, node)
    return finish(graph)


def _halved(graph: fx.GraphModule, entry: fx.Node) -> None:
    spec: Mapping[str, object] = dict(
        zip([n for n in graph.graph.nodes if n.op == "placeholder"], graph.meta["inputs"], strict=False)
    ).get(entry, {})
    if not str(spec.get("dtype", "float32")).startswith("float"):
        return
    with graph.graph.inserting_after(entry):
        half = graph.graph.call_function(aten.to.dtype, (entry, torch.float16))
    entry.replace_all_uses_with(half, delete_user_cb=lambda user: user is not half)


def _numbers(graph: fx.GraphModule, node: fx.Node, numbers: dict[fx.Node, fx.Node]) -> fx.Node:
    """What ``node`` decodes, without its codes."""
    codes = argument(node, "q")
    if codes.op == "get_attr":
        name = f"{node.name}_value"
        set_attribute(graph, name, call(node, {one: attribute(graph, one) for one in node.all_input_nodes}))
        return graph.graph.get_attr(name)
    scale, zero = (float(attribute(graph, argument(node, name))) for name in ("scale", "zero_point"))
    moved: list[fx.Node] = []
    while codes.target is not RAREFY.quantize.default:
        moved.append(codes)
        codes = codes.args[0]
    own, start = (float(attribute(graph, argument(codes, name))) for name in ("scale", "zero_point"))
    ends = [own * (argument(codes, name) - start) for name in ("qmin", "qmax")]
    if codes not in numbers:
        with graph.graph.inserting_before(codes):
            numbers[codes] = graph.graph.call_function(aten.clamp.default, (argument(codes, "x"), *ends))
    number = numbers[codes]
    if (own, start) != (scale, zero):
        number = graph.graph.call_function(aten.mul.Tensor, (number, scale / own))
        number = graph.graph.call_function(aten.add.Tensor, (number, scale * (start - zero)))
    for carrier in reversed(moved):
        rest: list[Value] = list(carrier.args[1:])
        if carrier.target is aten.pad.default and len(rest) > 2:
            rest[2] = scale * (rest[2] - zero)
        target: Value = carrier.target
        number = graph.graph.call_function(target, (number, *rest), carrier.kwargs)
    return number
