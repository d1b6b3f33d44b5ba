"""Batch norm in quantization-aware training: put back behind the layers it was folded into, and folded in again at the end.

With one scale an output channel, rounding and batch norm's factor f = g / sqrt(v + e) change places without a rest:

    f · fake_quantize(w, s) = fake_quantize(f w, f s)        f > 0

so conv(x, q(w, s)) -> batch norm is the folded layer, and training may keep live statistics, which let it bear the rates that training from scratch takes; |g| stands
in the graph, as a grid of few bits reaches further down than up, and a turned sign would cut codes off. The codes that come
out are those it saw. A quantised graph holds folded weights, so the way back chooses f: such that each channel's weight has norm 1 (how far a step turns it is then alike in all channels,
as after training with weight decay), and the statistics are those of the layer's output on a few training images. In eval mode nothing changes; in training mode the start is where it
was up to the images' differences. Late in the training the statistics are frozen (``Training.freeze``), so that weights settle on what will run.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.graph.nodes import attribute, finish, set_attribute
from rarefy.kernels.quantize import fake_quantize

aten = torch.ops.aten
LAYERS = (aten.conv2d.default, aten.linear.default)
NORM = "batch_norm"
EPS, MOMENTUM = 1e-5, 0.1
# Than LSQ's, the rate of a weight's scale: a factor that batch norm takes out again, and whose steps passed through 0 at 8 bits.
SLOWER = 0.1


def put_back(graph: fx.GraphModule, weights: Collection[str], batches: Iterable[Tensor]) -> fx.GraphModule:
    """``graph``, in the trainable form, with batch norm behind the layers that read these weights. batches: inputs; changed in place."""
    places: list[Any] = [
        node
        for node in graph.graph.nodes
        if _weight(node) in weights and len(node.args) > 2 and _is_parameter(node.args[2])
    ]
    if not places:
        return graph
    found = _Moments(graph, places)
    with torch.no_grad():
        for inputs in batches:
            found.run(inputs)
    with warnings.catch_warnings(), graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        warnings.simplefilter("ignore")  # it is no tensor
        training = graph.graph.get_attr("training")
    for node in places:
        mean, variance = found.of(node)
        weight, scale, bias = (attribute(graph, source) for source in (*node.args[1].args[:2], node.args[2]))
        norms = weight.detach().flatten(1).norm(dim=1).clamp_min(1e-12)
        name = f"{_weight(node).rpartition('.')[0]}.{NORM}".lstrip(".")
        with torch.no_grad():
            weight.div_(norms.view(-1, *[1] * (weight.dim() - 1)))
            scale.div_(norms)
            variance = variance / norms.square()
            values = {
                "weight": norms * torch.sqrt(variance + EPS),
                "bias": mean.clone(),
                "running_mean": (mean - bias) / norms,
                "running_var": variance,
            }
        for part, value in values.items():
            value = value.detach().to(weight.dtype)
            set_attribute(graph, f"{name}.{part}", value if part.startswith("running") else torch.nn.Parameter(value))
        with graph.graph.inserting_before(node):
            parts = [graph.graph.get_attr(f"{name}.{part}") for part in values]
            parts[0] = graph.graph.call_function(aten.abs.default, (parts[0],))
        with graph.graph.inserting_after(node):
            norm = graph.graph.call_function(aten.batch_norm.default, (node, *parts, training, MOMENTUM, EPS, True))
        norm.meta |= {"stack": node.meta.get("stack", ""), "bias": str(node.args[2].target)}
        node.replace_all_uses_with(norm, delete_user_cb=lambda user, norm=norm: user is not norm)
        node.args = (*node.args[:2], None, *node.args[3:])
        parameter = node.args[1]
        parameter.args = (*parameter.args[:6], SLOWER * parameter.args[6], *parameter.args[7:])
    return finish(graph)


def folded(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Parameters and buffers of ``graph`` by name, batch norms that ``put_back`` made folded into weights, scales and biases."""
    found: dict[str, Tensor] = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    nodes: Iterable[Any] = graph.graph.nodes
    for node in nodes:
        if node.target is not aten.batch_norm.default or (name := _weight(node.args[0])) is None:
            continue
        gamma, beta, mean, variance = (
            attribute(graph, source).detach() for source in (node.args[1].args[0], *node.args[2:5])
        )
        factor = gamma.abs() * torch.rsqrt(variance + node.args[7])
        weight, scale = (attribute(graph, source).detach() for source in node.args[0].args[1].args[:2])
        found[name] = torch.nn.Parameter(weight * factor.view(-1, *[1] * (weight.dim() - 1)))
        found[str(node.args[0].args[1].args[1].target)] = torch.nn.Parameter(scale * factor)
        found[node.meta["bias"]] = torch.nn.Parameter(beta - mean * factor)
    return found


def _weight(node: Any) -> Any:
    """Name of the fake-quantised weight a layer multiplies by, one scale a channel; None for other nodes."""
    if not isinstance(node, fx.Node) or node.target not in LAYERS:
        return None
    source: Any = node.args[1]
    fits = source.target is fake_quantize and source.args[0].op == "get_attr" and source.args[3] == 0
    return str(source.args[0].target) if fits else None


def _is_parameter(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


class _Moments(fx.Interpreter):
    """Mean and variance, a channel, of what some layers make; values nobody reads any more are let go."""

    def __init__(self, graph: fx.GraphModule, places: Iterable[fx.Node]):
        super().__init__(graph)
        self.sums: Mapping[fx.Node, list[Any]] = {node: [0, 0.0, 0.0] for node in places}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.sums:
            flat = value.detach().transpose(0, 1).flatten(1).double()
            entry = self.sums[n]
            entry[0] += flat.shape[1]
            entry[1] = entry[1] + flat.sum(1)
            entry[2] = entry[2] + flat.square().sum(1)
        return value

    def of(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        count, total, squares = self.sums[node]
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp_min(0).float()
