"""Where channels are read: what the criteria that look at data have in common.

A channel matters through the operators that sum over it: convolutions, linear layers, products, means over channels. Each such place is a
**read**, (reader, source, layer): the node, the activation it takes, and the labels that end in it. An operator that passes its channels on
(depthwise convolution, batch norm, addition, pooling over the plane) is none.

A mask m of ones, one number a sample and position, multiplied into every read, has the gradient dL/dm: how the loss of that sample changes as
the channel leaves, exactly the sum of W * dL/dW over the weights that read it, without a weight's gradient for each sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.errors import DataError, InputError
from rarefy.graph.macs import MACS
from rarefy.graph.nodes import device_of, operator_name
from rarefy.pruning.groups.groups import Coupling
from rarefy.pruning.groups.labels import Value, axes_of

_SUMS = {*MACS, "mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "logsumexp", "var_mean", "std_mean"}


@dataclass(frozen=True, eq=False)
class Read:
    """reader takes source; axis: of the source; classes: (size,) the class of each position, 0 where it does not leave."""

    reader: fx.Node
    source: fx.Node
    axis: int
    classes: Tensor

    def along(self, value: Tensor, rank: int) -> Tensor:
        """(N, size) -> shaped to multiply the source of that rank."""
        return value.reshape([len(value), *(-1 if axis == self.axis else 1 for axis in range(1, rank))])


def reads(coupling: Coupling) -> list[Read]:
    """Every place where an operator sums over channels that could leave, in execution order."""
    found = []
    for node in coupling.graph.graph.nodes:
        if operator_name(node) not in _SUMS:
            continue
        passed = _classes_of(coupling, node)
        for source in node.all_input_nodes:
            value = coupling.values[source]
            if source.op == "get_attr" or not isinstance(value, Value):
                continue
            for layer in value.layers:
                axes = axes_of(layer)
                classes = layer.reshape(-1)
                ends = (classes > 0) & ~torch.isin(classes, passed)
                if len(axes) == 1 and axes[0] > 0 and bool(ends.any()):
                    found.append(Read(node, source, axes[0], torch.where(ends, classes, 0)))
    return found


def _classes_of(coupling: Coupling, node: fx.Node) -> Tensor:
    values = coupling.values[node]
    layers = [
        layer
        for value in (values if isinstance(values, list) else [values])
        if isinstance(value, Value)
        for layer in value.layers
    ]
    return torch.cat([torch.zeros(1, dtype=torch.int64), *(layer.reshape(-1) for layer in layers)]).unique()


class Reading(fx.Interpreter):
    """Runs a graph; what each read takes goes through ``see(read, activation)``, whose result the reader gets instead."""

    def __init__(self, graph: fx.GraphModule, places: list[Read], see: Callable[[Read, Tensor], Tensor]):
        super().__init__(graph)
        self.places: dict[fx.Node, list[Read]] = {}
        for place in places:
            self.places.setdefault(place.reader, []).append(place)
        self.see = see

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        own = self.places.get(n)
        if own is None:
            return super().fetch_args_kwargs_from_env(n)
        taken = {source: self.env[source] for source in n.all_input_nodes}
        for place in own:
            taken[place.source] = self.see(place, taken[place.source])
        return fx.map_arg((n.args, n.kwargs), lambda source: taken[source])  # type: ignore[no-any-return]


def batches_of(
    task: Any, graph: fx.GraphModule, name: str, batches: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Any]]:
    """(inputs, targets) of the training split, shuffled by the seed. Raises InputError without a task, DataError without data."""
    if task is None:
        raise InputError(f"criterion {name!r} needs data: pass task= (--data), or use criterion='magnitude'")
    seen = 0
    for inputs, targets in itertools.islice(
        task.batches("train", batch_size, shuffle_seed=seed, device=device_of(graph)), batches
    ):
        yield inputs, targets
        seen += 1
    if not seen:
        raise DataError(f"criterion {name!r}: the training split of the task is empty")


def sensitivities(
    graph: fx.GraphModule, places: list[Read], count: int, inputs: Tensor, loss: Callable[[Any], Tensor]
) -> Tensor:
    """(N, count) float64: for each sample and class, d loss / d mask, summed over all reads of the class (arXiv 2108.00708, eq. 4 to 6).

    loss: from the network's output to a scalar, the *sum* over samples, so that a sample's gradient is its own.
    """
    masks: list[Tensor] = []
    order: list[Read] = []

    def see(place: Read, activation: Tensor) -> Tensor:
        mask = activation.new_ones(len(activation), activation.shape[place.axis], requires_grad=True)
        masks.append(mask)
        order.append(place)
        return activation * place.along(mask, activation.dim())

    frozen = {name: value.requires_grad for name, value in graph.named_parameters()}
    try:
        graph.requires_grad_(False)
        with torch.enable_grad():
            value = loss(Reading(graph, places, see).run(inputs))
        gradients = torch.autograd.grad(value, masks, allow_unused=True, materialize_grads=True)
    finally:
        for name, parameter in graph.named_parameters():
            parameter.requires_grad_(frozen[name])
    total = torch.zeros(len(inputs), count, dtype=torch.float64)
    for place, gradient in zip(order, gradients, strict=True):
        total.index_add_(1, place.classes, gradient.double().cpu())
    return total


def check_reads(places: list[Read], coupling: Coupling, name: str) -> list[Read]:
    """``places``, if they cover every class. Raises InputError, naming a layer that no operator reads."""
    seen = torch.zeros(coupling.count, dtype=torch.bool)
    seen[0] = True
    for place in places:
        seen[place.classes] = True
    missing = next((row.names[0] for row in coupling.rows if not bool(seen[row.classes].all())), None)
    if missing is not None:
        raise InputError(
            f"criterion {name!r}: no layer reads the channels of {missing}; list it in ignore, or use criterion='magnitude'"
        )
    return places
