"""Batch norm in quantization-aware training: put back behind the layers it was folded into, and folded in at the end.

With one scale an output channel, rounding and batch norm's factor f = g / sqrt(v + e) change places without a rest:

    f · fake_quantize(w, s) = fake_quantize(f w, f s)        f > 0

so conv(x, q(w, s)) -> batch norm is the folded layer, and training may keep live statistics, which let it bear the
rates that training from scratch takes; |g| stands in the graph, as a grid of few bits reaches further down than up, and
a turned sign would cut codes off. The codes that come out are those it saw. A quantised graph holds folded weights, so
the way back chooses f: such that each channel's weight has norm 1 (how far a step turns it is then alike in all
channels, as after training with weight decay), and the statistics are those of the layer's output on a few training
images. In eval mode nothing changes; in training mode the start is where it was up to the images' differences. Late in
the training the statistics are frozen (``Training.freeze``), so that weights settle on what will run.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, fx, nn

from rarefy.distillation.checkpoint import tensors_of
from rarefy.graph import interpreter
from rarefy.graph.nodes import Value, argument, attribute, finish, set_argument, set_attribute
from rarefy.kernels.quantize import fake_quantize

aten = torch.ops.aten
LAYERS = (aten.conv2d.default, aten.linear.default)
NORM = "batch_norm"
EPS, MOMENTUM = 1e-5, 0.1
# Than LSQ's, the rate of a weight's scale: a factor that batch norm takes out again, and whose steps passed through 0
# at 8 bits.
SLOWER = 0.1


def put_back(graph: fx.GraphModule, weights: Collection[str], batches: Iterable[Tensor]) -> fx.GraphModule:
    """``graph``, in the trainable form, with batch norm behind layers. Changed in place.

    weights: names of what these layers multiply by. batches: inputs (N, channels, H, W) for the statistics to start
        with.
    """
    layers = [node for node in graph.graph.nodes if _weight(node) in weights and _reads_parameter(node, "bias")]
    if not layers:
        return graph
    moments = _moments(graph, layers, batches)
    with warnings.catch_warnings(), graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        warnings.simplefilter("ignore")  # it is no tensor
        training = graph.graph.get_attr("training")
    for node in layers:
        bias = argument(node, "bias")
        values = _as_norm(graph, node, *moments[node])
        name = f"{str(_weight(node)).rpartition('.')[0]}.{NORM}".lstrip(".")
        for part, value in values.items():
            set_attribute(graph, f"{name}.{part}", value if part.startswith("running") else nn.Parameter(value))
        with graph.graph.inserting_before(node):
            parts = [graph.graph.get_attr(f"{name}.{part}") for part in values]
            parts[0] = graph.graph.call_function(aten.abs.default, (parts[0],))
        with graph.graph.inserting_after(node):
            norm = graph.graph.call_function(aten.batch_norm.default, (node, *parts, training, MOMENTUM, EPS, True))
        norm.meta |= {"stack": node.meta.get("stack", ""), "bias": str(bias.target)}
        node.replace_all_uses_with(norm, delete_user_cb=lambda user, norm=norm: user is not norm)
        set_argument(node, "bias", None)
        parameter = argument(node, "weight")
        set_argument(parameter, "gradient", SLOWER * argument(parameter, "gradient"))
    return finish(graph)


def folded(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Tensors of ``graph`` by name, batch norms that ``put_back`` made folded into weights, scales and biases."""
    tensors = tensors_of(graph)
    for node in graph.graph.nodes:
        if node.target is not aten.batch_norm.default:
            continue
        layer = argument(node, "input")
        name = _weight(layer)
        if name is None:
            continue
        sources = (
            argument(node, "weight").args[0],
            *(argument(node, part) for part in ("bias", "running_mean", "running_var")),
        )
        gamma, beta, mean, variance = (attribute(graph, source).detach() for source in sources)
        factor = gamma.abs() * torch.rsqrt(variance + argument(node, "eps"))
        scale_node = argument(argument(layer, "weight"), "scale")
        weight, scale = tensors[name].detach(), attribute(graph, scale_node).detach()
        tensors[name] = nn.Parameter(weight * factor.view(-1, *[1] * (weight.dim() - 1)))
        tensors[str(scale_node.target)] = nn.Parameter(scale * factor)
        tensors[node.meta["bias"]] = nn.Parameter(beta - mean * factor)
    return tensors


def _as_norm(graph: fx.GraphModule, node: fx.Node, mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
    """Brings a layer's weight to norm 1 a channel, in place; the tensors of the batch norm that makes up for it.

    mean, variance: (channels,) of what the layer makes as it is.
    """
    parameter = argument(node, "weight")
    weight, scale, bias = (
        attribute(graph, source)
        for source in (argument(parameter, "x"), argument(parameter, "scale"), argument(node, "bias"))
    )
    norms = weight.detach().flatten(1).norm(dim=1).clamp_min(1e-12)
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
    return {part: value.detach().to(weight.dtype) for part, value in values.items()}


def _weight(node: Value) -> str | None:
    """Name of the fake-quantised weight a layer multiplies by, one scale a channel; None for other nodes."""
    if not isinstance(node, fx.Node) or node.target not in LAYERS:
        return None
    parameter = argument(node, "weight")
    fits = parameter.target is fake_quantize and _reads_parameter(parameter, "x") and argument(parameter, "axis") == 0
    return str(argument(parameter, "x").target) if fits else None


def _reads_parameter(node: fx.Node, name: str) -> bool:
    source = argument(node, name)
    return isinstance(source, fx.Node) and source.op == "get_attr"


@torch.no_grad()
def _moments(
    graph: fx.GraphModule, layers: Collection[fx.Node], batches: Iterable[Tensor]
) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """(mean, variance), (channels,) each, of what some layers make."""
    counts = dict.fromkeys(layers, 0)
    sums: dict[fx.Node, Tensor] = {}  # (2, channels): of the values, and of their squares

    def see(node: fx.Node, value: Value) -> None:
        if node in counts:
            flat = value.detach().transpose(0, 1).flatten(1).double()
            both = torch.stack([flat.sum(1), flat.square().sum(1)])
            counts[node] += flat.shape[1]
            sums[node] = sums[node] + both if node in sums else both

    for inputs in batches:
        interpreter.run(graph, (inputs,), see=see)
    means = {node: sums[node] / counts[node] for node in layers}
    return {
        node: (mean.float(), (squares - mean.square()).clamp_min(0).float()) for node, (mean, squares) in means.items()
    }
