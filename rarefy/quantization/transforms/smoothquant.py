"""smooth(): outliers of activations go into the weights that multiply them, where a norm can bear it. SmoothQuant
(2211.10438).

After a layer or RMS norm, a few channels are many times as large as the rest, and one scale a tensor leaves the rest
without resolution. In every linear layer that reads the norm, channel j of the input is divided and column j of the
weights multiplied by

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        X_j: over the images; W_j: over the outputs of all these layers

and the division goes into the norm's own weight and bias, so that the float network's answers stay what they were.
alpha 0.5 gives either side the same share of the range; towards 1, the activations get smoother and the weights
rougher.

Done where nothing but linear layers reads the norm, and its weight is its own. Given up: layers after an activation
(NNCF multiplies there at run time).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from rarefy.errors import InputError
from rarefy.graph.fold import put
from rarefy.graph.interpreter import run
from rarefy.graph.layers import weighted
from rarefy.graph.nodes import argument, attribute

aten = torch.ops.aten
_NORMS: dict[object, tuple[str, ...]] = {
    aten.layer_norm.default: ("weight", "bias"),
    aten.rms_norm.default: ("weight",),
}
WIDEST = 1e4  # a factor's bound, either way


def smooth(graph: fx.GraphModule, batches: Iterable[tuple[Tensor, ...]], alpha: float = 0.5) -> int:
    """Smooth ``graph`` (folded, for inference) in place; returns how many norms were.

    batches: inputs that tell how large activations get. Raises InputError for an alpha outside 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"smooth={alpha}: alpha lies in 0 to 1, such as 0.5")
    norms = [node for node in graph.graph.nodes if is_smoothable(graph, node)]
    largest: dict[fx.Node, Tensor] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        if node in norms:
            most = value.detach().abs().flatten(0, -2).amax(0).float()
            largest[node] = torch.maximum(largest[node], most) if node in largest else most

    if norms:
        with torch.no_grad():
            for batch in batches:
                run(graph, batch, see=see)
    for norm in norms:
        _migrate(graph, norm, largest[norm], alpha)
    return len(norms)


def is_smoothable(graph: fx.GraphModule, node: fx.Node) -> bool:
    """A norm over the last axis with a stored weight that nothing else reads, and only linear layers behind it."""
    if node.target not in _NORMS or len(argument(node, "normalized_shape")) != 1 or argument(node, "weight") is None:
        return False
    stored = stored_in(node)
    if any(source.op != "get_attr" for source in stored):
        return False
    read = [source.target for source in stored]
    readers = sum(len(other.users) for other in graph.graph.nodes if other.op == "get_attr" and other.target in read)
    return readers == len(stored) and all(
        user.target is aten.linear.default and weighted(user) and user.all_input_nodes[0] is node and not user.kwargs
        for user in node.users
    )


def stored_in(norm: fx.Node) -> list[fx.Node]:
    """What reads its weight and its bias."""
    sources = (argument(norm, name) for name in _NORMS[norm.target])
    return [source for source in sources if source is not None]


def _migrate(graph: fx.GraphModule, norm: fx.Node, largest: Tensor, alpha: float) -> None:
    layers = list(norm.users)
    weights: list[Tensor] = [attribute(graph, argument(layer, "weight")).detach() for layer in layers]
    columns = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
    factor = (largest.double() ** alpha / columns.double() ** (1 - alpha)).clamp(1 / WIDEST, WIDEST)
    factor = torch.where((largest > 0) & (columns > 0), factor, torch.ones_like(factor))
    for source in stored_in(norm):
        stored = attribute(graph, source)
        with torch.no_grad():
            stored.copy_(stored.double() / factor)
    for layer, weight in zip(layers, weights, strict=True):
        source = argument(layer, "bias")
        bias = weight.new_zeros(weight.shape[0]) if source is None else attribute(graph, source).detach().clone()
        put(graph, layer, (weight.double() * factor).to(weight.dtype), bias)
